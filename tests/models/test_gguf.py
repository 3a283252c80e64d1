"""GGUF files of every supported quantisation, written with the gguf package and compared with transformers."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import dequantize, quantize

from streamserve.errors import CheckpointError
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.gguf_file import SUPPORTED_KINDS
from tests.models.tiny import Driver, from_config, reference_logits

KIND = {kind.name: kind for kind in gguf.GGMLQuantizationType}
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GEMMA = {
    "num_hidden_layers": 7,  # the sixth has no window
    "sliding_window": 5,
    "query_pre_attn_scalar": 64,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def random_rows(kind: str, values: np.ndarray) -> np.ndarray:
    """Packed rows: quantised where the gguf package can, random bits with a small scale for the K kinds."""
    if kind not in ("Q4_K", "Q5_K", "Q6_K"):
        return quantize(values, KIND[kind])
    group_bytes = gguf.GGML_QUANT_SIZES[KIND[kind]][1]
    generator = np.random.default_rng(values.shape[0])
    groups = generator.integers(0, 256, (values.size // 256, group_bytes), dtype=np.uint8)
    scale = np.full((len(groups), 1), 2e-5 if kind == "Q6_K" else 1e-4, np.float16).view(np.uint8)
    if kind == "Q6_K":
        groups[:, -2:] = scale
    else:
        groups[:, 0:2], groups[:, 2:4] = scale, scale
    return groups.reshape(values.shape[0], -1)


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: row i of the first half of a head, row i of the second, and so on."""
    dim = rows.shape[0] // num_heads
    order = [head * dim + half * dim // 2 + i for head in range(num_heads) for i in range(dim // 2) for half in (0, 1)]
    return np.ascontiguousarray(rows[order])


def write(path: Path, model_type: str, kind: str, *, drop: str | None = None, **more: Any) -> Any:
    """A random model in a GGUF file; returns the transformers model with the same, dequantised weights."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(model_type, **{"tie_word_embeddings": False, **SHAPE, **more})
    model = from_config(config)
    is_gemma = model_type == "gemma3_text"
    writer = gguf.GGUFWriter(path, "gemma3" if is_gemma else model_type)
    if is_gemma:
        writer.add_sliding_window(config.sliding_window)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(64)
    writer.add_rope_dimension_count(64)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"token {i}" for i in range(61)])
    writer.add_token_scores([0.0] * 61)
    writer.add_eos_token_id(7)
    for name, parameter in model.state_dict().items():
        values = parameter.numpy()
        if name == drop or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        rows, row_kind = (values, "F32") if values.ndim == 1 else (random_rows(kind, values), kind)
        if values.ndim == 2:
            parameter.copy_(torch.from_numpy(dequantize(rows, KIND[kind]).astype(np.float32)))
        elif not name.endswith("bias"):
            values[:] = rows = np.random.default_rng(len(name)).uniform(0.5, 1.5, values.shape).astype(np.float32)
        else:
            values[:] = rows = np.random.default_rng(len(name)).normal(size=values.shape).astype(np.float32)
        if model_type == "llama" and ".q_proj" in name:
            rows = interleave(rows, 4)
        if model_type == "llama" and ".k_proj" in name:
            rows = interleave(rows, 2)
        if is_gemma and name.endswith("norm.weight"):
            rows = rows + np.float32(1)
        writer.add_tensor(gguf_name(name, GEMMA_NAMES if is_gemma else NAMES), rows, raw_dtype=KIND[row_kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def gguf_name(name: str, parts: dict[str, str]) -> str:
    if name in TOP:
        return TOP[name]
    _, _, index, rest = name.split(".", 3)
    part, ending = rest.rsplit(".", 1)
    return f"blk.{index}.{parts[part]}.{ending}"


def compare(path: Path, model: Any) -> None:
    tokens = torch.randint(0, 61, (19,), generator=torch.Generator().manual_seed(4)).tolist()
    driver = Driver.load(path, dtype="float32", choices=None)
    request = driver.request(19)
    pieces = driver.step((request, tokens[:18])) + driver.step((request, tokens[18:]))
    torch.testing.assert_close(torch.cat(pieces), reference_logits(model, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", SUPPORTED_KINDS)
def test_llama_of_every_kind_gives_transformers_logits(kind: str, tmp_path: Path) -> None:
    compare(tmp_path / "m.gguf", write(tmp_path / "m.gguf", "llama", kind))


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma3_text", {**GEMMA, "tie_word_embeddings": True}),
    ],
)
def test_every_architecture_gives_transformers_logits(model_type: str, more: dict[str, Any], tmp_path: Path) -> None:
    compare(tmp_path / "m.gguf", write(tmp_path / "m.gguf", model_type, "Q8_0", **more))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q6_K"])
def test_packed_rows_are_the_dequantised_rows(kind: str, tmp_path: Path) -> None:
    model = write(tmp_path / "m.gguf", "llama", kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.weight_kinds == {kind}
    for name, parameter in model.state_dict().items():
        packed = checkpoint.packed(name)
        if parameter.ndim == 1:
            assert packed is None
            continue
        assert packed is not None
        assert packed.kind == kind
        assert packed.shape == tuple(parameter.shape)
        np.testing.assert_array_equal(dequantize(packed.rows, KIND[kind]), parameter.numpy())


def test_metadata_becomes_the_spec(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "qwen3", "F16")
    spec = open_checkpoint(tmp_path / "m.gguf").spec
    assert (spec.model_type, spec.num_layers, spec.num_kv_heads, spec.vocab_size) == ("qwen3", 2, 2, 61)
    assert spec.qk_norm and not spec.tie_embeddings
    assert spec.rope.theta == 5000.0
    assert spec.eos_token_ids == {7}


def test_llama3_frequency_factors_are_read_from_their_tensor(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = write(tmp_path / "plain.gguf", "llama", "F32", rope_parameters=rope)
    freq = model.model.rotary_emb.inv_freq.numpy()
    plain = 5000.0 ** -(np.arange(0, 64, 2) / 64)
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, item in reader.fields.items():
        if key.startswith("llama.") and not key.endswith("architecture"):
            writer.add_key_value(key, item.contents(), item.types[0])
    writer.add_tensor("rope_freqs.weight", (plain / freq).astype(np.float32))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    compare(tmp_path / "m.gguf", model)


def test_a_split_file_is_one_model(tmp_path: Path) -> None:
    model = write(tmp_path / "whole.gguf", "llama", "Q8_0")
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    for number, part in enumerate((reader.tensors[:9], reader.tensors[9:]), start=1):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number:05d}-of-00002.gguf", "llama")
        if number == 1:
            for key, item in reader.fields.items():
                if key.startswith("llama."):
                    writer.add_key_value(key, item.contents(), item.types[0])
        for tensor in part:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    compare(tmp_path / "m-00001-of-00002.gguf", model)
    (tmp_path / "whole.gguf").unlink()
    assert open_checkpoint(tmp_path).path.name == "m-00001-of-00002.gguf"
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"split over 2 files, and m-00002-of-00002\.gguf is missing"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", "Q8_0", drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight missing"):
        open_checkpoint(tmp_path / "m.gguf")


def test_an_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'mamba'; supported in GGUF are llama, qwen2, qwen3"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_damaged_header_is_refused_or_harmless(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", "Q8_0")
    whole = (tmp_path / "m.gguf").read_bytes()
    generator = np.random.default_rng(5)
    num_refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.integers(0, 4000)] = generator.integers(0, 256)
        (tmp_path / "m.gguf").write_bytes(damaged)
        try:
            open_checkpoint(tmp_path / "m.gguf")
        except CheckpointError:
            num_refused += 1
    assert num_refused > 20


def test_numbers_that_differ_by_layer_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_embedding_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"head_count_kv differs from layer to layer"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("keep", [0, 3, 10, 200, 3000, -100])
def test_a_cut_off_file_is_refused(keep: int, tmp_path: Path) -> None:
    write(tmp_path / "whole.gguf", "llama", "Q8_0")
    (tmp_path / "m.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a complete GGUF file"):
        open_checkpoint(tmp_path / "m.gguf")
