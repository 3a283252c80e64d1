"""The table that a measurement ends with."""

from collections.abc import Mapping, Sequence
from typing import Any

from streamserve.benchmark.figures import LATENCIES, PERCENTILES

WIDTH = 96
_COUNTS = (
    ("Successful requests", "completed", ",d"),
    ("Failed requests", "failed", ",d"),
    ("Benchmark duration (s)", "duration", ",.2f"),
    ("Total input tokens", "total_input_tokens", ",d"),
    ("Total output tokens", "total_output_tokens", ",d"),
    ("Cached input tokens (%)", "cached_share", "%"),
    ("Guesses accepted (%)", "accepted_share", "%"),
    ("Request throughput (req/s)", "request_throughput", ",.2f"),
    ("Request goodput (req/s)", "goodput", ",.2f"),
    ("Input token throughput (tok/s)", "input_throughput", ",.2f"),
    ("Output token throughput (tok/s)", "output_throughput", ",.2f"),
    ("Total token throughput (tok/s)", "total_throughput", ",.2f"),
    ("Tokens per event", "tokens_per_event", ",.2f"),
    ("Concurrency", "concurrency", ",.2f"),
    ("Peak concurrent requests", "max_concurrency_seen", ",d"),
)
_COLUMNS = ("mean", "median", *(f"p{percent}" for percent in PERCENTILES), "max")


def table(about: Sequence[tuple[str, str]], found: Mapping[str, Any], notes: Sequence[str]) -> str:
    """`about`: what was measured, in words; `notes`: what a reader must know of the numbers."""
    lines = [" Serving Benchmark Result ".center(WIDTH, "=")]
    lines += [f"{name + ':':<36}{value}" for name, value in about]
    lines.append("-" * WIDTH)
    for name, key, form in _COUNTS:
        if key in found:
            value = f"{found[key] * 100:.1f}" if form == "%" else format(found[key], form)
            lines.append(f"{name + ':':<36}{value}")
    if any(f"mean_{name}_ms" in found for name in LATENCIES):
        lines.append("-" * WIDTH)
        lines.append(f"{'ms':<30}" + "".join(f"{column:>11}" for column in _COLUMNS))
        for name, words in LATENCIES.items():
            if f"mean_{name}_ms" in found:
                values = (found[f"{column}_{name}_ms"] for column in _COLUMNS)
                lines.append(f"{_short(name) + words:<30}" + "".join(f"{value:>11,.2f}" for value in values))
    lines += ["-" * WIDTH, *(f"- {note}" for note in notes)] if notes else []
    return "\n".join([*lines, "=" * WIDTH])


def _short(name: str) -> str:
    return {"ttft": "TTFT  ", "tpot": "TPOT  ", "itl": "ITL   ", "e2e_latency": "E2E   "}[name]
