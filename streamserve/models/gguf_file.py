"""GGUF files as a source of weights: header, name translation, packed rows, dequantisation through the gguf package.

Owns the mapping between llama.cpp's names and metadata and Hugging Face's. Knows no network.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.kernels.ops import Packed

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

SUPPORTED_KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")

# llama.cpp stores q and k of this architecture for interleaved RoPE: inside each head the rows of the two halves alternate.
_PERMUTED = ("llama",)
# That of this one holds 1 + weight of every norm, where Hugging Face's files hold the weight.
_GEMMA = "gemma3"
_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", _GEMMA: "gemma3_text"}
_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_PARTS = {
    **_LAYER_PARTS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TOP_PARTS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies. `shape` is rows first, as torch has it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    data: Bytes


class GGUFHeader:
    """One pass over a file's header: scalar metadata and the tensor table.

    The gguf package's reader makes numpy objects of every token of the vocabulary: 3.2 s for 49,152 of them, this pass
    0.1 s. Arrays are skipped, only their lengths are kept (`array_lens`): the tokenizer is read elsewhere.
    """

    _SCALARS: Mapping[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    _STRING, _ARRAY = 8, 9

    def __init__(self, path: Path) -> None:
        self._at = 0
        self.scalars: dict[str, Any] = {}
        self.array_lens: dict[str, int] = {}
        try:
            self._file: Bytes = np.memmap(path, dtype=np.uint8, mode="r")
            self._view = memoryview(self._file)  # type: ignore[arg-type]
            self.tensors = self._read()
        except (struct.error, OSError, ValueError, IndexError, OverflowError) as error:
            raise CheckpointError(f"{path} is not a complete GGUF file: {error}") from error

    def _read(self) -> list[GGUFTensor]:
        if bytes(self._view[:4]) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._take("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; versions 2 and 3 in little-endian order are read")
        num_tensors, num_fields = self._take("Q"), self._take("Q")
        for _ in range(num_fields):
            key = self._string()
            self._field(key, self._take("I"))
        table = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = self.scalars.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        return [self._tensor(start, *entry) for entry in table]

    def _take(self, letter: str) -> Any:
        (value,) = struct.unpack_from("<" + letter, self._view, self._at)
        self._at += struct.calcsize("<" + letter)
        return value

    def _string(self) -> str:
        length = self._take("Q")
        raw = bytes(self._view[self._at : self._at + length])
        self._at += length
        return str(raw, "utf-8", "replace")

    def _field(self, key: str, kind: int) -> None:
        if kind == self._STRING:
            self.scalars[key] = self._string()
        elif kind == self._ARRAY:
            element, length = self._take("I"), self._take("Q")
            self.array_lens[key] = length
            self._skip(element, length)
        else:
            self.scalars[key] = self._take(self._letter(kind))

    def _letter(self, kind: int) -> str:
        if kind not in self._SCALARS:
            raise ValueError(f"metadata of unknown type {kind}")
        return self._SCALARS[kind]

    def _skip(self, element: int, length: int) -> None:
        if element == self._ARRAY:
            for _ in range(length):
                self._skip(self._take("I"), self._take("Q"))
            return
        if element != self._STRING:
            self._at += length * struct.calcsize("<" + self._letter(element))
            return
        unpack, view, at = struct.Struct("<Q").unpack_from, self._view, self._at
        for _ in range(length):
            at += 8 + unpack(view, at)[0]
        self._at = at

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dims = tuple(self._take("Q") for _ in range(self._take("I")))
        return name, dims[::-1], self._take("I"), self._take("Q")

    def _tensor(self, start: int, name: str, shape: tuple[int, ...], number: int, offset: int) -> GGUFTensor:
        kind = GGMLQuantizationType(number)
        group, group_bytes = GGML_QUANT_SIZES[kind]
        row_bytes = shape[-1] // group * group_bytes
        num_bytes = int(np.prod(shape[:-1], dtype=np.int64)) * row_bytes
        data = self._file[start + offset : start + offset + num_bytes]
        if len(data) != num_bytes:
            raise ValueError(f"the data of {name} is cut off")
        return GGUFTensor(name, kind.name, shape, data.reshape(*shape[:-1], row_bytes))


class GGUFSource:
    """Weights of one GGUF file, or of one split over several (`-00001-of-00003.gguf`). Implements checkpoint.Source."""

    def __init__(self, path: Path) -> None:
        self.path = path
        headers = [GGUFHeader(part) for part in _parts(path)]
        scalars = headers[0].scalars
        architecture = scalars.get("general.architecture")
        if architecture not in _MODEL_TYPES:
            raise CheckpointError(
                f"{path} holds a network of architecture {architecture!r}; supported in GGUF are {', '.join(_MODEL_TYPES)}"
            )
        parts = _GEMMA_PARTS if architecture == _GEMMA else _LAYER_PARTS
        self._has_raised_norms = architecture == _GEMMA
        self._tensors: dict[str, GGUFTensor] = {}
        self._rope_factors: GGUFTensor | None = None
        for header in headers:
            for tensor in header.tensors:
                if tensor.name == "rope_freqs.weight":
                    self._rope_factors = tensor
                else:
                    self._tensors[hf_name(tensor.name, parts)] = tensor
        self.config = self._read_config(architecture, headers[0])
        self.generation_config: dict[str, Any] = {}
        self._rows_per_head = {"q": self.config["num_attention_heads"], "k": self.config["num_key_value_heads"]}
        self._is_permuted = architecture in _PERMUTED

    @property
    def sizes(self) -> Mapping[str, int]:
        """Every tensor by Hugging Face name, with its bytes in the file."""
        return {name: tensor.data.nbytes for name, tensor in self._tensors.items()}

    @property
    def kinds(self) -> frozenset[str]:
        """ggml types of the matrices."""
        return frozenset(tensor.kind for tensor in self._tensors.values() if len(tensor.shape) == 2)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if tensor.kind not in SUPPORTED_KINDS:
            raise CheckpointError(
                f"{tensor.name} in {self.path} is held as {tensor.kind}; supported are {', '.join(SUPPORTED_KINDS)}"
            )
        kind = GGMLQuantizationType[tensor.kind]
        values = dequantize(self._unpermuted(name, tensor.data), kind).reshape(tensor.shape)
        if self._has_raised_norms and name.endswith("norm.weight"):
            values = values - 1
        return torch.from_numpy(np.array(values, dtype=np.float32, order="C", copy=None if values.flags.writeable else True))

    def load(self, name: str, out: Tensor) -> None:
        out.copy_(self.read(name))

    def finish(self) -> None: ...

    def packed(self, name: str) -> Packed | None:
        tensor = self._tensors[name]
        if len(tensor.shape) != 2:
            return None
        rows, columns = tensor.shape
        return Packed(tensor.kind, self._unpermuted(name, tensor.data), (rows, columns))

    def _unpermuted(self, name: str, rows: Bytes) -> Bytes:
        """Rows in Hugging Face's order. Rows are quantised independently, so whole packed rows can move."""
        match = re.search(r"self_attn\.([qk])_proj\.", name)
        if match is None or not self._is_permuted:
            return rows
        if rows.ndim == 1:  # a bias: one float32 per row
            return np.ascontiguousarray(self._unpermuted(name, rows.reshape(-1, 4)).reshape(-1))
        num_heads = self._rows_per_head[match[1]]
        return rows.reshape(num_heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)

    def _read_config(self, architecture: str, header: GGUFHeader) -> dict[str, Any]:
        """The metadata under config.json's keys."""

        def get(key: str, default: Any = None) -> Any:
            if f"{architecture}.{key}" in header.array_lens:
                raise CheckpointError(f"{self.path}: {architecture}.{key} differs from layer to layer, which is not supported")
            return header.scalars.get(f"{architecture}.{key}", default)

        heads, hidden = get("attention.head_count"), get("embedding_length")
        if not heads or not hidden:
            raise CheckpointError(f"{self.path}: metadata lacks {architecture}.attention.head_count or .embedding_length")
        head_dim = get("attention.key_length") or hidden // heads
        if get("rope.dimension_count", head_dim) != head_dim:
            raise CheckpointError(f"{self.path}: RoPE over a part of each head is not supported")
        embedding = self._tensors.get("model.embed_tokens.weight")
        window = get("attention.sliding_window")
        if window and architecture not in ("llama", _GEMMA):
            raise CheckpointError(f"{self.path}: a sliding window is not supported for architecture {architecture}")
        q_bias = "model.layers.0.self_attn.q_proj.bias" in self._tensors
        return {
            # Mistral is stored as a llama; only a window tells them apart.
            "model_type": "mistral" if window and architecture == "llama" else _MODEL_TYPES[architecture],
            "num_hidden_layers": get("block_count"),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv") or heads,
            "head_dim": head_dim,
            "intermediate_size": get("feed_forward_length"),
            "vocab_size": embedding.shape[0] if embedding else get("vocab_size"),
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-6),
            "rope_parameters": self._read_rope(get, head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": q_bias,
            "mlp_bias": "model.layers.0.mlp.down_proj.bias" in self._tensors,
            "sliding_window": window,
            **(_gemma_config(get, head_dim) if architecture == _GEMMA else {}),
            "eos_token_id": [
                header.scalars[key]
                for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
                if key in header.scalars
            ],
        }

    def _read_rope(self, get: Any, head_dim: int) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_theta": get("rope.freq_base", 10000.0)}
        kind = get("rope.scaling.type", "none")
        if self._rope_factors is not None:
            factors = self._rope_factors.data.reshape(-1).view(np.float32)
            return rope | {"rope_type": "factors", "factors": factors.tolist()}
        if kind == "none":
            return rope
        return rope | {
            "rope_type": kind,
            "factor": get("rope.scaling.factor", 1.0),
            "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        }


def _gemma_config(get: Any, head_dim: int) -> dict[str, Any]:
    """What llama.cpp knows of Gemma 3 without a file saying so: scores are scaled by the head size, but in the 27B model, whose
    layers are 62, by the stream's share of a head."""
    is_27b = get("block_count") == 62
    return {
        "query_pre_attn_scalar": get("embedding_length") // get("attention.head_count") if is_27b else head_dim,
        "rope_local_base_freq": get("rope.freq_base_swa", 10_000.0),
        "sliding_window_pattern": 6,
    }


def hf_name(name: str, parts: Mapping[str, str]) -> str:
    """Hugging Face's name of a llama.cpp tensor, `parts` of a layer being called so; a name without counterpart is returned
    unchanged."""
    if name in _TOP_PARTS:
        return _TOP_PARTS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in parts:
        return name
    return f"model.layers.{match[1]}.{parts[match[2]]}.{match[3]}"


def _parts(path: Path) -> Iterator[Path]:
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None:
        yield path
        return
    for number in range(1, int(match[3]) + 1):
        part = path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf")
        if not part.is_file():
            raise CheckpointError(f"{path} is split over {int(match[3])} files, and {part.name} is missing beside it")
        yield part
