"""Figures against the bounds they are to meet: one table per model and card, from the JSON files of the other benches.

    python bench/report.py RESULT.json [RESULT.json ...]

Several files of one model and card become one table: rounds of the same workload are put together. Owns the bounds and the
form of a result. A figure is the median of its rounds; `SHORT` marks one that misses its bound.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.load import Figures
from bench.machine import shown


@dataclass(slots=True)
class Result:
    """What a bench found: rounds of figures by workload. `notes` are free words and numbers that belong to them."""

    model: str
    machine: dict[str, Any]
    rounds: dict[str, list[Figures]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def add(self, workload: str, figures: Figures) -> None:
        """One more round."""
        self.rounds.setdefault(workload, []).append(figures)

    def save(self, path: str | None) -> None:
        """As JSON; None saves nothing."""
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(
                json.dumps({"model": self.model, "machine": self.machine, "rounds": self.rounds, "notes": self.notes}, indent=1)
            )


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of the table: where it is found, how it is called, and its bounds by model. Times are upper bounds."""

    workload: str
    figure: str
    title: str
    bounds: dict[str, float] = field(default_factory=dict)

    @property
    def is_at_most(self) -> bool:
        """Whether less is better."""
        return self.figure.endswith(("_ms", "_s")) and not self.figure.endswith(("tok_s", "req_s"))


def _line(workload: str, figure: str, title: str, llama8b: float | None = None, qwen06b: float | None = None) -> Line:
    bounds = {"llama8b": llama8b, "qwen06b": qwen06b}
    return Line(workload, figure, title, {name: bound for name, bound in bounds.items() if bound is not None})


# Bounds hold on one H200.
LINES = (
    _line("a", "out_tok_s", "single stream, output tok/s", 232, 1100),
    _line("a", "ttft_p50_ms", "  TTFT of 128 tokens, ms", 9, 6),
    _line("a", "itl_p50_ms", "  ITL p50, ms"),
    _line("a", "itl_p99_ms", "  ITL p99, ms"),
    _line("b", "out_tok_s", "offline, output tok/s (mean of two seeds)", 10_300, 27_000),
    _line("c64", "out_tok_s", "64 at once, output tok/s", 6850, 22_000),
    _line("c64", "ttft_p50_ms", "  TTFT p50, ms", 380, 57),
    _line("c64", "ttft_p99_ms", "  TTFT p99, ms"),
    _line("c64", "itl_p50_ms", "  ITL p50, ms"),
    _line("c64", "itl_p99_ms", "  ITL p99, ms", 12, 5),
    _line("c64", "itl_max_ms", "  ITL longest, ms"),
    _line("c256", "out_tok_s", "256 at once, output tok/s", 10_000, 28_000),
    _line("c256", "ttft_p50_ms", "  TTFT p50, ms"),
    _line("c256", "ttft_p99_ms", "  TTFT p99, ms"),
    _line("c256", "itl_p50_ms", "  ITL p50, ms"),
    _line("c256", "itl_p99_ms", "  ITL p99, ms", 60, 30),
    _line("c256", "itl_max_ms", "  ITL longest, ms"),
    _line("d", "req_s", "shared prefix, requests/s", 66, 170),
    _line("d", "cached_rate", "  cached-token rate", 0.881, 0.881),
    _line("d", "ttft_p50_ms", "  TTFT p50, ms"),
    _line("doff", "req_s", "  requests/s, cache off"),
    _line("doff", "ttft_p50_ms", "  TTFT p50, cache off, ms"),
    _line("on/off", "ratio", "  on / off", 3.7, 1.7),
    _line("f", "ttft_p50_ms", "32,768-token prompt, TTFT, ms", 1150, 255),
    _line("start", "warm_s", "start to first token, warm caches, s", 12, 10),
    _line("start", "cold_s", "  first start ever, s", 45, 40),
    _line("start", "warm_ready_s", "  ready, warm caches, s"),
    _line("start", "cold_ready_s", "  ready, first start ever, s"),
    _line("idle", "cpu_percent", "idle, per cent of a core"),
    _line("trace", "req_s", "trace, requests/s"),
    _line("trace", "out_tok_s", "  output tok/s"),
    _line("trace", "cached_rate", "  cached-token rate"),
    _line("trace", "ttft_p50_ms", "  TTFT p50, ms"),
    _line("trace", "ttft_p99_ms", "  TTFT p99, ms"),
    _line("trace", "itl_p99_ms", "  ITL p99, ms"),
)


def values(result: Result, line: Line) -> list[float]:
    """The figure in each round."""
    if line.workload == "on/off":
        on, off = (result.rounds.get(name, []) for name in ("d", "doff"))
        return [statistics.median(r["req_s"] for r in on) / statistics.median(r["req_s"] for r in off)] if on and off else []
    return [figures[line.figure] for figures in result.rounds.get(line.workload, []) if line.figure in figures]


def verdict(line: Line, model: str, value: float) -> str:
    """The bound and whether it is met; empty where there is none."""
    bound = line.bounds.get(model)
    if bound is None:
        return ""
    is_met = value <= bound if line.is_at_most else value >= bound
    return f"{'<=' if line.is_at_most else '>='} {bound:<10,g}{'ok' if is_met else 'SHORT'}"


def table(result: Result) -> str:
    """All lines for which there are figures."""
    rows = [f"{result.model:<42}{'median':>10}  {'lowest to highest':<22}{'bound':<13}rounds"]
    for line in LINES:
        found = sorted(values(result, line))
        if not found:
            continue
        middle = statistics.median(found)
        spread = f"{_number(found[0])} to {_number(found[-1])}" if len(found) > 1 else ""
        rows.append(f"{line.title:<42}{_number(middle):>10}  {spread:<22}{verdict(line, result.model, middle):<19}{len(found)}")
    return "\n".join(rows)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def merged(results: Iterable[Result]) -> list[Result]:
    """One result per model and card, rounds in the order given."""
    whole: dict[tuple[str, Any], Result] = {}
    for result in results:
        into = whole.setdefault((result.model, result.machine.get("card")), Result(result.model, result.machine))
        for workload, rounds in result.rounds.items():
            for figures in rounds:
                into.add(workload, figures)
    return list(whole.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="RESULT.json")
    paths = parser.parse_args().results
    for result in merged(Result(**json.loads(Path(path).read_text())) for path in paths):
        print(shown(result.machine), table(result), sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
