"""Networks that guess, against their definition in plain torch (tiny_heads.py); and MiMo as a family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamserve.cache.pool import KVPool
from streamserve.errors import CheckpointError
from streamserve.kernels.ops import Batch, NetworkParts, ReferenceAttention, apply_rope, rms_norm, silu_mul
from streamserve.models import llama
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.decoder import Decoder
from streamserve.models.eagle import EagleFile, EagleHead
from streamserve.models.heads import Head
from streamserve.models.mtp import MTPHead
from streamserve.models.spec import ModelSpec, read_spec
from tests.models.test_families import check, prompt
from tests.models.tiny import Driver, build_reference, reference_logits
from tests.models.tiny_heads import EAGLE_CONFIG, eagle_states, mtp_states, norm, save_eagle, save_mimo, streams

OPS = {"norm.rms": rms_norm, "rope.apply": apply_rope, "mlp.silu_mul": silu_mul, "attention.paged": ReferenceAttention}


def parts_of(shape: Any, weights: Any) -> NetworkParts:
    return NetworkParts(shape=shape, weights=weights, dtype=torch.float32, device=torch.device("cpu"), ops=OPS)


def batch_of(tokens: list[int], start: int, pool: KVPool) -> Batch:
    """One row on pages in falling order."""
    return Batch(
        token_ids_T=torch.tensor(tokens),
        positions_T=torch.arange(start, start + len(tokens)),
        row_start=[0, len(tokens)],
        kv_len=[start + len(tokens)],
        page_table_BP=torch.arange(pool.num_pages - 1, -1, -1, dtype=torch.int32).unsqueeze(0),
        logit_rows_R=torch.tensor([], dtype=torch.int64),
        pool=pool,
    )


def states_in_pieces(head: Head, features_TE: torch.Tensor, tokens: list[int], shape: Any) -> torch.Tensor:
    """As a drafter makes them: a long piece, a short one, then single pairs."""
    pool = KVPool(shape, num_pages=8, page_size=4)
    pieces, at = [], 0
    for length in (11, 3, *[1] * (len(tokens) - 14)):
        batch = batch_of(tokens[at : at + length], at, pool)
        with torch.inference_mode():
            pieces.append(head.forward(features_TE[at : at + length], batch.token_ids_T, batch.positions_T, head.prepare(batch)))
        at += length
    return torch.cat(pieces)


@pytest.mark.parametrize("is_normed_first", [False, True])
@pytest.mark.parametrize("own_embedding", [False, True])
def test_an_eagle_head_computes_what_its_layout_says(
    is_normed_first: bool, own_embedding: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = {**EAGLE_CONFIG, "norm_before_residual": is_normed_first, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    weights = save_eagle(tmp_path, own_embedding=own_embedding, config=config)
    target = Driver.load(folders["llama"])
    assert isinstance(target.network, Decoder)
    spec = open_checkpoint(folders["llama"]).spec
    file = EagleFile(tmp_path, spec)
    head = EagleHead(parts_of(file.spec, file), file, target.network)
    tokens = prompt(21, 30)
    states = streams(build_reference("llama"), tokens)
    shown = torch.cat([states[layer] for layer in file.layers], -1)
    features = shown @ weights["fc.weight"].T
    check(head.features(shown), features)
    embedding = weights.get("embed_tokens.weight", target.network.embedding_VE)
    wanted = eagle_states(features[:-1], tokens[1:], weights, embedding, is_normed_first=is_normed_first)
    got = states_in_pieces(head, features[:-1], tokens[1:], file.spec)
    check(got, wanted)
    check(head.logits(got), norm(wanted, weights["norm.weight"]) @ weights["lm_head.weight"].T)
    assert head.token_ids_V is not None and head.token_ids_V.tolist() == list(range(0, 80, 2))


def test_a_network_shows_its_stream_before_the_layers_that_are_asked_for(folders: dict[str, Path]) -> None:
    tokens = prompt(17, 31)
    driver = Driver.load(folders["qwen3"])
    assert isinstance(driver.network, Decoder)
    batch = batch_of(tokens, 0, driver.pool)
    batch.logit_rows_R = torch.tensor([16])
    model = build_reference("qwen3")
    with torch.inference_mode():
        logits, shown = driver.network.forward_with_features(batch, (1, 2))
    check(logits, reference_logits(model, tokens)[-1:])
    check(shown, torch.cat(streams(model, tokens)[1:3], -1))
    with torch.inference_mode():
        _, last = driver.network.forward_with_features(batch, (3,))
    check(driver.network.last_norm(last), streams(model, tokens)[3])


def test_a_layer_that_predicts_further_ahead_computes_what_its_layout_says(tmp_path: Path) -> None:
    model, weights = save_mimo(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.spec.num_mtp_layers == 1 and checkpoint.has_optional_weights
    target = Driver.load(tmp_path)
    assert isinstance(target.network, Decoder)
    head = MTPHead(parts_of(checkpoint.spec, checkpoint), target.network)
    assert head.layers == (3,)
    tokens = prompt(21, 32)
    hidden = streams(model, tokens)[-1]
    got = states_in_pieces(head, hidden[:-1], tokens[1:], checkpoint.spec)
    wanted = mtp_states(hidden[:-1], tokens[1:], weights, target.network.embedding_VE)
    check(got, wanted)
    check(head.logits(got), wanted @ target.network.head_VE.T)


@pytest.mark.parametrize("has_mtp", [True, False])
def test_mimo_answers_as_the_qwen2_that_it_is(has_mtp: bool, tmp_path: Path) -> None:
    model, _ = save_mimo(tmp_path, has_mtp=has_mtp)
    tokens = prompt(30, 33)
    driver = Driver.load(tmp_path)
    [logits] = driver.step((driver.request(30), tokens))
    check(logits, reference_logits(model, tokens))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.has_optional_weights is has_mtp
    assert not any("mtp" in name for name in checkpoint.names)


def test_half_a_layer_that_predicts_further_ahead_is_refused(tmp_path: Path) -> None:
    save_mimo(tmp_path)
    held = load_file(tmp_path / "mtp.safetensors")
    del held["model.mtp_layers.0.input_proj.weight"]
    save_file(held, tmp_path / "mtp.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.mtp_layers\.0\.input_proj\.weight missing"):
        open_checkpoint(tmp_path)


def test_the_layers_that_an_eagle_head_reads_come_from_either_place_in_its_config(tmp_path: Path) -> None:
    spec = spec_of(12)
    for config, layers in (
        ({}, (2, 6, 9)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 5, 11]}, (1, 5, 11)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 5, 10]}}, (2, 6, 11)),
    ):
        save_eagle(tmp_path, config={**EAGLE_CONFIG, **config})
        assert EagleFile(tmp_path, spec).layers == layers


def spec_of(num_layers: int) -> ModelSpec:
    """Numbers of a target."""
    config = {**EAGLE_CONFIG, "num_hidden_layers": num_layers}
    return read_spec(config, llama.Model.traits(config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "is no EAGLE-3 head.*LlamaForCausalLMEagle3"),
        ({"num_hidden_layers": 2}, "has 2 layers"),
        ({"norm_before_fc": True}, "norm_before_fc is True"),
        ({"vocab_size": 98}, "98 tokens and hidden size 48; the model served has 97 and 48"),
        ({"target_hidden_size": 64}, "hidden size 64"),
        ({"draft_vocab_size": 41}, r"has shape \(40, 48\); config asks for \(41, 48\)"),
        ({"attention_bias": True}, r"midlayer\.self_attn\.k_proj\.bias.* missing"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 5, 13]}, "before layers 1, 5, 13; the model served has 12"),
    ],
)
def test_an_eagle_head_that_does_not_fit_is_refused_with_the_reason(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_eagle(tmp_path, config={**EAGLE_CONFIG, **changes})
    with pytest.raises(CheckpointError, match=words):
        EagleFile(tmp_path, spec_of(12))


def test_whole_numbers_are_weights_of_no_model(tmp_path: Path) -> None:
    save_eagle(tmp_path, config={**EAGLE_CONFIG})
    (tmp_path / "config.json").write_text(json.dumps({**EAGLE_CONFIG, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(CheckpointError, match=r"(d2t|t2d) in .* is held as"):
        open_checkpoint(tmp_path)
