"""Small random networks with quantised weights, and a driver that feeds scattered pages to a network, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from streamserve.cache.pool import KVPool
from streamserve.kernels.ops import Batch, Network, NetworkParts, Packed, ReferenceAttention, apply_rope, rms_norm, silu_mul
from streamserve.models.decoder import Decoder, decoder_weights
from streamserve.models.spec import ModelSpec, Traits, read_spec

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 203,  # not a whole number of blocks
    "max_position_embeddings": 4096,
}


def small_spec(traits: Traits | None = None, **more: Any) -> ModelSpec:
    return read_spec({**CONFIG, **more}, traits or Traits())


class RandomWeights:
    """Matrices quantised to `kind` (the embedding and the head to Q8_0), the rest float. Implements ops.Weights."""

    def __init__(self, spec: ModelSpec, kind: str) -> None:
        rng = np.random.default_rng(7)
        self._tensors: dict[str, Tensor] = {}
        self._packed: dict[str, Packed] = {}
        for name, shape in decoder_weights(spec).items():
            if len(shape) == 1:
                self._tensors[name] = torch.from_numpy(rng.uniform(0.5, 1.5, shape).astype(np.float32))
                continue
            weight = rng.standard_normal(shape).astype(np.float32) * shape[1] ** -0.5
            held = "Q8_0" if "embed" in name or "lm_head" in name else kind
            rows = quantize(weight, GGMLQuantizationType[held])
            self._packed[name] = Packed(held, rows, (shape[0], shape[1]))
            self._tensors[name] = torch.from_numpy(dequantize(rows, GGMLQuantizationType[held]))

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def packed(self, name: str) -> Packed | None:
        return self._packed.get(name)


def new_reference(spec: ModelSpec, weights: Any) -> "Driver":
    """The plain float32 network over the dequantised weights, with a pool of its own."""
    pool = KVPool(spec, num_pages=96)
    ops = {
        "norm.rms": rms_norm,
        "rope.apply": apply_rope,
        "mlp.silu_mul": silu_mul,
        "attention.paged": ReferenceAttention,
    }
    return Driver(Decoder(NetworkParts(spec, weights, torch.float32, torch.device("cpu"), ops)), pool)


@dataclass
class Request:
    """Pages of one request, and how many tokens it has in them."""

    pages: list[int]
    len: int = 0


@dataclass
class Driver:
    """A network and its pool."""

    network: Network
    pool: KVPool
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = torch.randperm(self.pool.num_pages, generator=torch.Generator().manual_seed(3)).tolist()
        # Rubbish, as pages have it that were used before.
        self.pool.k.fill_(1e4)
        self.pool.v.fill_(-1e4)

    def request(self, max_len: int) -> Request:
        count = -(-max_len // self.pool.page_size)
        pages, self.free = self.free[:count], self.free[count:]
        return Request(pages)

    def step(self, *rows: tuple[Request, Sequence[int]], logit_rows: Sequence[int] | None = None) -> Tensor:
        """Feed each request its next tokens, all in one step; logits of every token, or of those in `logit_rows`."""
        return self.network.forward(self.batch(*rows, logit_rows=logit_rows))

    def batch(self, *rows: tuple[Request, Sequence[int]], logit_rows: Sequence[int] | None = None) -> Batch:
        """That step, for the network; its tokens count as fed."""
        starts: list[int] = [0]
        positions: list[int] = []
        for request, tokens in rows:
            positions += range(request.len, request.len + len(tokens))
            request.len += len(tokens)
            starts.append(starts[-1] + len(tokens))
        width = max(len(request.pages) for request, _ in rows)
        table = [request.pages + [0] * (width - len(request.pages)) for request, _ in rows]
        return Batch(
            token_ids_T=torch.tensor([token for _, tokens in rows for token in tokens]),
            positions_T=torch.tensor(positions),
            row_start=starts,
            kv_len=[request.len for request, _ in rows],
            page_table_BP=torch.tensor(table, dtype=torch.int32),
            logit_rows_R=torch.arange(starts[-1]) if logit_rows is None else torch.tensor(logit_rows, dtype=torch.int64),
            pool=self.pool,
        )


def new_driver(network: Network, spec: ModelSpec, *, num_pages: int = 96, page_size: int = 16, dtype: Any = None) -> Driver:
    return Driver(network, KVPool(spec, num_pages=num_pages, page_size=page_size, dtype=dtype or torch.float32))


def random_tokens(spec: ModelSpec, count: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, spec.vocab_size, count).tolist()
    return tokens
