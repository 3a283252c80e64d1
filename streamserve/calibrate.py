"""A short race at the first start: one layer of the model's size, in each way it could run here; the fastest is taken.

Processors differ too much to be asked by name: torch's bf16 kernels are the fastest path on one with bf16 instructions
and several times slower than float32 on another (vLLM and transformers pick bf16 on both). Quantised weights do not run in bf16:
rounding what they are multiplied with turns answers that the quantisation has left close (the capital of France, of the default
model). Owns the race; results are kept by calibration.py, so later starts read them.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from streamserve.cache.pool import KVPool
from streamserve.calibration import Calibration
from streamserve.kernels.devices.cpu import CPU
from streamserve.kernels.ops import Batch, Network, NetworkParts, Packed
from streamserve.kernels.registry import Choice
from streamserve.models import find
from streamserve.models.checkpoint import Checkpoint
from streamserve.resolve import FLOATS

PACKED = "packed"
PROMPT = 64  # tokens of the prompt that is timed; one decode row is timed behind it
_REPEATS = 3
_VOCAB = 512


class Sample:
    """Random weights of one layer, at the model's size and in its quantised format. Implements kernels.ops.Weights."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], kind: str | None) -> None:
        self._shapes = shapes
        self._kind = kind

    def tensor(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) * 0.02

    def load(self, name: str, out: torch.Tensor) -> None:
        out.copy_(self.tensor(name))

    def packed(self, name: str) -> Packed | None:
        if self._kind is None or len(self._shapes[name]) != 2:
            return None
        rows = quants.quantize(self.tensor(name).numpy(), GGMLQuantizationType[self._kind])
        out_features, in_features = self._shapes[name]
        return Packed(self._kind, rows.view(np.uint8).reshape(out_features, -1), (out_features, in_features))


@dataclass(frozen=True, slots=True)
class Race:
    """Milliseconds per layer of each way, for a prompt and for one decode row."""

    prompt_ms: Mapping[str, float]
    decode_ms: Mapping[str, float]

    @property
    def fastest(self) -> str:
        """Prompt and decode count alike: the smallest product of the two times."""
        return min(self.prompt_ms, key=lambda way: self.prompt_ms[way] * self.decode_ms[way])

    @property
    def why(self) -> str:
        """The times, for the list of decisions."""
        times = ", ".join(f"{way} {self.prompt_ms[way]:.2g} and {self.decode_ms[way]:.2g}" for way in self.prompt_ms)
        return f"fastest here, ms per layer for {PROMPT} tokens and for one: {times}"


def race(checkpoint: Checkpoint, choices: Mapping[str, Choice], cpu: CPU, threads: int) -> Race:
    """The measured times, from the cache file if this processor has run the race before. Blocks for about a second then."""
    kind = _kind(checkpoint) if choices["network"].name == PACKED else None
    spec = replace(checkpoint.spec, num_layers=1, vocab_size=_VOCAB)
    facts = {"cpu": cpu.model, "features": sorted(cpu.features), "threads": threads, "torch": torch.__version__, "kind": kind}
    dtypes = ("float32", "bfloat16") if checkpoint.weight_kinds <= FLOATS else ("float32",)
    numbers = {name: value for name, value in _numbers(spec).items()}
    file = Calibration({**facts, "dtypes": dtypes, "layer": numbers, "race": 2})
    if (known := file.load()) is not None:
        return Race(known["prompt_ms"], known["decode_ms"])
    ops = {op: choice.run for op, choice in choices.items()}
    shapes = find(spec.model_type).weights(spec)
    pool = KVPool(spec, num_pages=-(-(PROMPT + 1) // 16), page_size=16)

    def parts(dtype: torch.dtype, kind: str | None) -> NetworkParts:
        return NetworkParts(spec, Sample(shapes, kind), dtype, torch.device("cpu"), ops, threads)

    ways: dict[str, Callable[[], Network]] = {
        name: lambda name=name: find(spec.model_type)(parts(getattr(torch, name), None))  # type: ignore[misc]
        for name in dtypes
    }
    if kind is not None:
        ways[PACKED] = lambda: choices["network"].run(parts(torch.float32, kind))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times = {way: _times(make(), pool) for way, make in ways.items()}
    finally:
        torch.set_num_threads(before)
    result = Race({way: t[0] for way, t in times.items()}, {way: t[1] for way, t in times.items()})
    file.store(
        {"prompt_ms": result.prompt_ms, "decode_ms": result.decode_ms, "load": os.getloadavg()[0], "fastest": result.fastest}
    )
    return result


def _kind(checkpoint: Checkpoint) -> str:
    """Of the formats that gguf can make: the one nearest to the checkpoint's."""
    return "Q4_1" if any(kind.startswith(("Q4", "Q5")) for kind in checkpoint.weight_kinds) else "Q8_0"


def _numbers(spec: Any) -> dict[str, Any]:
    names = ("model_type", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    return {name: getattr(spec, name) for name in names}


def _times(network: Network, pool: KVPool) -> tuple[float, float]:
    """Milliseconds of a prompt and of one token behind it: the best of a few, the first not counted."""
    return _best_ms(network, _batch(0, PROMPT, pool)), _best_ms(network, _batch(PROMPT, 1, pool))


def _best_ms(network: Network, batch: Batch) -> float:
    best = float("inf")
    with torch.inference_mode():
        network.forward(batch)
        for _ in range(_REPEATS):
            started = perf_counter()
            network.forward(batch)
            best = min(best, perf_counter() - started)
    return best * 1e3


def _batch(start: int, count: int, pool: KVPool) -> Batch:
    positions = torch.arange(start, start + count)
    return Batch(
        token_ids_T=positions % _VOCAB,
        positions_T=positions,
        row_start=[0, count],
        kv_len=[start + count],
        page_table_BP=torch.arange(pool.num_pages, dtype=torch.int32).unsqueeze(0),
        logit_rows_R=torch.tensor([count - 1]),
        pool=pool,
    )
