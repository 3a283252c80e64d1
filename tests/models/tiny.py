"""Tiny random models of every family, made with transformers, and a driver that feeds rows to a network."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from streamserve.cache.pool import KVPool
from streamserve.kernels.ops import Batch, Network
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.network import build_network

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}

# name -> (model_type, what its config says beside SHAPE)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_wide_heads": ("llama", {"head_dim": 16}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama_llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama_dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "qwen2": ("qwen2", {}),
    "qwen2_yarn": (
        "qwen2",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", {"sliding_window": 9}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "gemma3_tied": ("gemma3_text", {"head_dim": 8, "sliding_window": 9, "tie_word_embeddings": True}),
}


def from_config(config: Any) -> Any:
    """transformers' model of a config, float32 and in its plainest arithmetic."""
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def build_reference(variant: str) -> Any:
    """A random float32 model; norms and biases are random too, so that a forgotten one shows."""
    model_type, more = VARIANTS[variant]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **{"tie_word_embeddings": False, **SHAPE, **more})
    model = from_config(config)
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


def reference_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """Logits at every position."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits


@dataclass
class Driver:
    """A network with its pool; hands scattered pages to rows and runs steps."""

    network: Network
    pool: KVPool
    free: list[int] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, *, page_size: int = 4, num_pages: int = 64, load_format: str = "auto", **options: Any) -> "Driver":
        checkpoint = open_checkpoint(path, load_format=load_format)
        pool = KVPool(checkpoint.spec, num_pages=num_pages, page_size=page_size)
        # Rubbish, as pages have it that were used before.
        pool.k.normal_(std=3.0)
        pool.v.normal_(std=3.0)
        free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(2)).tolist()
        return cls(build_network(checkpoint, pool=pool, **options), pool, free)

    def request(self, max_len: int) -> "Rows":
        count = -(-max_len // self.pool.page_size)
        pages, self.free = self.free[:count], self.free[count:]
        return Rows(pages)

    def step(self, *rows: "tuple[Rows, Sequence[int]]") -> list[Tensor]:
        """Feed each request its next tokens, all in one step; logits of every token, per request."""
        starts, batch_rows = [0], [request for request, _ in rows]
        positions: list[int] = []
        for request, tokens in rows:
            positions += range(request.len, request.len + len(tokens))
            request.len += len(tokens)
            starts.append(starts[-1] + len(tokens))
        width = max(len(request.pages) for request in batch_rows)
        table = [request.pages + [0] * (width - len(request.pages)) for request in batch_rows]
        logits = self.network.forward(
            Batch(
                token_ids_T=torch.tensor([token for _, tokens in rows for token in tokens]),
                positions_T=torch.tensor(positions),
                row_start=starts,
                kv_len=[request.len for request in batch_rows],
                page_table_BP=torch.tensor(table, dtype=torch.int32),
                logit_rows_R=torch.arange(starts[-1]),
                pool=self.pool,
            )
        )
        return [logits[start:end] for start, end in pairwise(starts)]


@dataclass
class Rows:
    """One request's pages and how many tokens it has in them."""

    pages: list[int]
    len: int = 0
