"""Where the event loop's time goes, per step: `streamserve serve` with a stopwatch on its engine, streams over HTTP.

    python bench/loop.py [MODEL] [--load-format dummy] [--rows 1,64,256] [--json OUT] [-- FLAGS]

Without MODEL it is the default model on a GPU, and the server's made-up tokens elsewhere. Only steps in which every stream
decodes are looked at; medians, in microseconds:

    plan     the scheduler draws the next step
    launch   the runner hands it to the device
    wait     the rest of the step, until the one before has come back; streams are served meanwhile
    commit   tokens to mailboxes, finished requests out
    streams  all other processor time of the loop's thread: text, events, HTTP, sockets
    step     from one commit to the next

The law: plan + launch + commit (the engine's Python) + streams at a send for every token < step. Where it does not hold, tokens
merge (sends per token below 1), or the device waits for the loop. The engine's Python is to stay below 2 ms at 256 rows.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.load import Figures, ask, completion, drive, figures, percentile, random_tokens
from bench.machine import machine, shown
from bench.report import Result
from bench.server import FAKE, Server, random_range, split_arguments

PROMPT, OUTPUT = 64, 1024  # so many that the last stream begins before the first one ends
ENGINE_LIMIT_US = 2000.0  # at 256 rows
PHASES = ("plan", "launch", "wait", "commit")
STEPS_FILE = "STREAMSERVE_BENCH_STEPS"  # environment: where the server under the stopwatch writes its steps


class Stopwatch:
    """Times of every step of one engine. Wraps what the engine calls; the engine itself is as it was."""

    def __init__(self, engine: Any) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._ended = (time.perf_counter(), time.thread_time())
        self._turns, self._served = engine._turns, 0
        scheduler, runner = engine._scheduler, engine._runner
        scheduler.next_plan = self._timed("plan", scheduler.next_plan)
        runner.forward = self._timed("launch", runner.forward)
        commit = self._timed("commit", scheduler.commit)

        def commit_and_note(flight: Any, result: Any) -> None:
            commit(flight, result)
            self._note(flight.plan)

        scheduler.commit = commit_and_note

    def _timed(self, phase: str, call: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self._now[phase] += (time.perf_counter() - started) * 1e6

        return timed

    def _note(self, plan: Any) -> None:
        ended = (time.perf_counter(), time.thread_time())
        wall, busy = ((after - before) * 1e6 for after, before in zip(ended, self._ended, strict=True))
        self._now["wait"] = wall - sum(self._now.values())
        decodes = all(row.token_ids is None for row in plan.rows)
        sends, self._served = self._turns.num_served - self._served, self._turns.num_served
        self.steps.append({**self._now, "step": wall, "busy": busy, "rows": len(plan.rows) if decodes else 0, "sends": sends})
        self._now, self._ended = dict.fromkeys(PHASES, 0.0), ended


def serve(arguments: list[str]) -> int:
    """`streamserve serve` under the stopwatch; its steps are written when it ends."""
    from streamserve import cli
    from streamserve import serve as module

    server: Any = module  # whose `build` is replaced
    watches: list[Stopwatch] = []
    build = server.build

    def watched(*given: Any, **named: Any) -> Any:
        built = build(*given, **named)
        watches.append(Stopwatch(built.engine))
        return built

    server.build = watched
    try:
        return cli.main(["serve", *arguments])
    finally:
        Path(os.environ[STEPS_FILE]).write_text(json.dumps([step for watch in watches for step in watch.steps]))


def by_rows(steps: list[dict[str, float]], rows: int) -> Figures:
    """Figures of the steps in which `rows` rows decode, as did the step before."""
    chosen = [step for before, step in pairwise(steps) if before["rows"] == step["rows"] == rows]
    if not chosen:
        raise SystemExit(f"no step had {rows} decoding rows and nothing else")
    for step in chosen:
        step["engine"] = step["plan"] + step["launch"] + step["commit"]
        step["streams"] = max(0.0, step["busy"] - step["engine"])
    names = (*PHASES, "streams", "engine", "busy", "step")
    found = {f"{name}_us": statistics.median(step[name] for step in chosen) for name in names}
    found["engine_p99_us"] = percentile((step["engine"] for step in chosen), 99)
    found["sends_per_token"] = statistics.fmean(step["sends"] for step in chosen) / rows
    return {"rows": float(rows), "steps": float(len(chosen)), **found, "stream_us": found["streams_us"] / rows}


def measured(model: str | None, flags: list[str], rows: list[int]) -> tuple[list[Figures], dict[int, Figures]]:
    """Figures by number of rows, and what the clients saw."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.json"
        server = Server(model, flags, program=(__file__, "--serve"), environment={STEPS_FILE: str(path)})
        seen = {}
        try:
            for count in rows:
                rng, tokens = Random(count), random_range(model)
                asks = [ask(completion(server.model, random_tokens(rng, PROMPT, tokens), OUTPUT)) for _ in range(count)]
                seen[count] = figures(drive(server.port, asks, at_once=count))
        finally:
            server.close()
        steps = json.loads(path.read_text())
    return [by_rows(steps, count) for count in rows], seen


def table(found: list[Figures], seen: dict[int, Figures]) -> str:
    """One line per number of rows, then what is to hold."""
    names = (*PHASES, "streams", "step")
    lines = [
        f"{'rows':>5}{'steps':>7}" + "".join(f"{name:>10}" for name in names) + f"{'engine':>10}{'p99':>8}{'busy':>7}  per stream"
    ]
    for one in found:
        cells = "".join(f"{one[f'{name}_us']:>10,.0f}" for name in names)
        busy = f"{one['busy_us'] / one['step_us']:.0%}"
        lines.append(
            f"{one['rows']:>5.0f}{one['steps']:>7.0f}{cells}{one['engine_us']:>10,.0f}{one['engine_p99_us']:>8,.0f}{busy:>7}"
            f"  {one['stream_us']:.1f} us a step, {one['sends_per_token']:.2f} sends a token;"
            f" clients saw {seen[int(one['rows'])]['out_tok_s']:,.0f} tok/s"
        )
    for one in found:
        needed_ms = (one["engine_us"] + one["streams_us"] / max(one["sends_per_token"], 1e-9)) / 1e3
        step_ms = one["step_us"] / 1e3
        word = "holds" if needed_ms < step_ms else "is BROKEN: tokens merge, or the device waits for the loop"
        lines.append(f"law at {one['rows']:.0f} rows: {needed_ms:.2f} ms of loop < {step_ms:.2f} ms of step {word}")
        if one["rows"] == 256:
            word = "ok" if one["engine_us"] < ENGINE_LIMIT_US else "SHORT"
            lines.append(f"host work at 256 rows: {one['engine_us'] / 1e3:.2f} ms, bound 2 ms: {word}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--rows", default="1,64,256")
    parser.add_argument("--json", help="where to write all figures")
    own, flags = split_arguments(sys.argv[1:])
    args = parser.parse_args(own)
    flags += ["--load-format", args.load_format] if args.load_format != "auto" else []

    machine_found = machine()
    print(shown(machine_found))
    model = args.model or (None if machine_found["card"] else FAKE)
    found, seen = measured(model, flags, [int(rows) for rows in args.rows.split(",")])
    print(f"{model or 'default model'} {' '.join(flags)}\n{table(found, seen)}")
    result = Result(Path(model or "default").name, machine_found, notes={"flags": flags, "command": sys.argv})
    for one in found:
        result.add(f"loop{one['rows']:.0f}", one)
    result.save(args.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve(sys.argv[2:]))
    main()
