"""Decoders as networks for vectors (Qwen3-Embedding and the like): the same layers as for generating, without KV memory and head.

Owns how a folder of such a model names its weights, and attention over packed batches in the place of paged attention. The
families are those that generate: one file each, found by name.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.kernels.ops import NetworkParts, NetworkShape, Packed, apply_rope, rms_norm, silu_mul
from streamserve.models import find
from streamserve.models.packing import Group, PackedBatch, Read, attend
from streamserve.models.spec import read_spec

MAX_LEN = 8192  # tokens of a text, as OpenAI's models take them: one text of 32,768 would hold up everybody else's for minutes


class CausalFamily:
    """A folder of a decoder. Implements packing.Family. The last token has seen all others, so that its state is the vector."""

    default_pooling = "lasttoken"
    gpu_dtype = torch.bfloat16
    first_position = 0

    def __init__(self, config: Mapping[str, Any], names: Collection[str]) -> None:
        self._model = find(str(config.get("model_type")))
        spec = read_spec(config, self._model.traits(config))
        self._spec = replace(spec, tie_embeddings=True)  # the head is not wanted: so it costs nothing
        self._is_causal = bool(config.get("is_causal", True)) and not config.get("use_bidirectional_attention", False)
        # Within the window it is as if there were none.
        self.max_len = min(spec.max_position_embeddings, spec.sliding_window or MAX_LEN, MAX_LEN)
        self.vocab_size, self.hidden_size = spec.vocab_size, spec.hidden_size
        # Saved without a head, names lack their first word.
        self._cut = "model." if "embed_tokens.weight" in names else ""
        self.weights: Mapping[str, tuple[int, ...]] = {
            name.removeprefix(self._cut): shape for name, shape in self._model.weights(self._spec).items()
        }
        self.unused: tuple[str, ...] = ("lm_head.",)

    def load(self, read: Read, device: torch.device, dtype: torch.dtype) -> Callable[[PackedBatch], Tensor]:
        """See Family."""
        is_causal = self._is_causal

        def attention(shape: NetworkShape) -> _Attention:
            return _Attention(is_causal)

        ops = {"norm.rms": rms_norm, "rope.apply": apply_rope, "mlp.silu_mul": silu_mul, "attention.paged": attention}
        weights = _Weights(read, self._cut)
        network = self._model(NetworkParts(shape=self._spec, weights=weights, dtype=dtype, device=device, ops=ops))
        return lambda batch: network.states(batch.token_ids_T, batch.positions_T, batch.groups)

    def load_head(self, read: Read) -> Callable[[Tensor], Tensor] | None:
        """See Family."""
        return None


@dataclass(frozen=True, slots=True)
class _Weights:
    """kernels.ops.Weights of a folder that may name them without their first word."""

    read: Read
    cut: str

    def tensor(self, name: str) -> Tensor:
        return self.read(name.removeprefix(self.cut))

    def load(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensor(name))

    def packed(self, name: str) -> Packed | None:
        return None


@dataclass(frozen=True, slots=True)
class _Attention:
    """In the place of PagedAttention: what is prepared are the batch's groups, and nothing is kept."""

    is_causal: bool

    def prepare(self, batch: Any) -> Any:
        raise CheckpointError("this network was loaded for vectors; it has no KV memory to generate with")

    def attend(self, prepared: tuple[Group, ...], layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        return attend(q_THD, k_TKD, v_TKD, prepared, is_causal=self.is_causal)
