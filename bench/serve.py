"""Speed over HTTP: `streamserve serve` with the defaults a user gets, under the workloads that its peers were measured with.

    python bench/serve.py MODEL [--load-format dummy] [--workloads a,c64,c256,d,f] [--rounds 3] [--json OUT] [-- FLAGS]

a      one request at a time, 128 tokens in, 512 out
c64    256 requests, 512 in, 256 out, 64 at once; c256 all at once
d      shared prefixes: 32 groups of 16 requests, 2,048 common and 128 own tokens in, 64 out, 64 at once; doff the same on
       a second server without the prefix cache
f      one prompt of 32,768 tokens
start  from exec to the first streamed token: with every cache on disk empty, then again with what that start left there
idle   processor time of the server over ten quiet seconds
trace  replay of a trace of requests (--trace) for --minutes, one client in ten hanging up at some time; afterwards no request
       may have failed, the tree and free pages must be all pages, and memory must be flat, or the exit code is 1

Prompts are random tokens, new ones in every round, so that nothing is in the prefix cache but what a workload puts there.
Rounds take turns over the workloads. MODEL `fake` runs the server's made-up tokens: for work on the bench itself. FLAGS
after `--` go to the server and are printed with the figures; the table of record has none.
"""

import argparse
import itertools
import json
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.load import Figures, ask, completion, drive, failures, figures, random_tokens
from bench.machine import machine, shown, used_mib
from bench.report import Result, table
from bench.server import Server, random_range, split_arguments
from bench.steps import Steps
from streamserve.benchmark.client import Ask
from streamserve.benchmark.texts import Ids, Words
from streamserve.benchmark.workloads import mooncake_requests

LONG_PROMPT = 32_768


@dataclass(frozen=True, slots=True)
class Load:
    """A closed-loop workload: `count` requests, `at_once` at a time. `groups` prefixes of `common` tokens are shared."""

    count: int
    at_once: int
    prompt: int
    output: int
    groups: int = 0
    common: int = 0

    def asks(self, model: str, tokens: range, seed: int) -> list[Ask]:
        """Its requests, in an order in which groups are mixed."""
        rng = Random(seed)
        prefixes = [random_tokens(rng, self.common, tokens) for _ in range(self.groups)] or [[]]
        asks = [
            ask(completion(model, prefixes[i % len(prefixes)] + random_tokens(rng, self.prompt, tokens), self.output))
            for i in range(self.count)
        ]
        rng.shuffle(asks)
        return asks


SHARED = Load(512, 64, 128, 64, groups=32, common=2048)
LOADS = {
    "a": Load(4, 1, 128, 512),
    "c64": Load(256, 64, 512, 256),
    "c256": Load(256, 256, 512, 256),
    "d": SHARED,
    "doff": SHARED,
    "f": Load(3, 1, LONG_PROMPT, 4),
}
WARM_UP = Load(8, 8, 64, 16)
NO_REUSE = "--disable-radix-cache"


class Bench:
    """One model's servers and what they have shown."""

    def __init__(self, model: str, flags: Sequence[str], result: Result, *, tells_steps: bool = False) -> None:
        self.model, self.flags, self.result, self.tells_steps = model, flags, result, tells_steps
        self.tokens = random_range(model)
        self._seed = 1000

    def next_seed(self) -> int:
        """One that no round had."""
        self._seed += 1
        return self._seed

    def server(self, *more: str) -> Server:
        """A server that has answered a few requests."""
        server = Server(self.model, [*self.flags, *more])
        print(f"ready after {server.ready_s:.1f} s: {shlex.join(server.command[1:])}", flush=True)
        figures(drive(server.port, WARM_UP.asks(server.model, self.tokens, self.next_seed()), at_once=WARM_UP.at_once))
        return server

    def run(self, workload: str, server: Server) -> None:
        """One round of a closed-loop workload."""
        load = LOADS[workload]
        asks = load.asks(server.model, self.tokens, self.next_seed())
        steps = Steps(server) if self.tells_steps else None
        begin_s = time.perf_counter()
        found = figures(drive(server.port, asks, at_once=load.at_once))
        self.add(workload, found)
        if steps is not None:
            steps.close()
            print("", *steps.told(begin_s, time.perf_counter()), sep="\n    ", flush=True)

    def add(self, workload: str, found: Figures) -> None:
        """Keep a round's figures and show them."""
        self.result.add(workload, found)
        print(f"  {workload:5} " + "  ".join(f"{name} {value:.5g}" for name, value in found.items()), flush=True)

    def take_turns(self, workloads: Sequence[str], rounds: int, *more: str) -> None:
        """Every workload on one server, in turn, `rounds` times."""
        if not workloads:
            return
        server = self.server(*more)
        try:
            longest = server.context_len()
            for name in [name for name in workloads if LOADS[name].common + LOADS[name].prompt + LOADS[name].output > longest]:
                print(f"  {name}: left out, the server's context holds {longest} tokens")
                workloads = [other for other in workloads if other != name]
            for _ in range(rounds):
                for workload in workloads:
                    self.run(workload, server)
            self.result.notes["problems"] = [*self.result.notes.get("problems", []), *server.problems()]
        finally:
            server.close()

    # ---- starts ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """A first start ever, and the one after it."""
        with tempfile.TemporaryDirectory() as empty:
            caches = {"TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda", "XDG_CACHE_HOME": "cache"}
            environment = {name: os.path.join(empty, place) for name, place in caches.items()}
            found: Figures = {}
            for kind in ("cold", "warm"):
                server = Server(self.model, self.flags, environment=environment)
                try:
                    one = ask(completion(server.model, random_tokens(Random(self.next_seed()), 16, self.tokens), 4))
                    (answer,) = drive(server.port, [one], at_once=1)
                    if answer.error is not None:
                        raise SystemExit(answer.error)
                    # drive() takes a moment of its own to start a client: count what the server took, not that
                    found[f"{kind}_s"] = server.ready_s + answer.events_s[0] - answer.sent_s
                    found[f"{kind}_ready_s"] = server.ready_s
                    self._show_phases(kind, server)
                finally:
                    server.close()
        self.add("start", found)

    def _show_phases(self, kind: str, server: Server) -> None:
        phases = [event for event in server.events if "seconds" in event]
        self.result.notes.setdefault("phases", []).append({kind: phases})
        for event in phases:
            rest = " ".join(
                f"{name} {value}" for name, value in event.items() if name not in ("event", "seconds", "after_s", "url")
            )
            print(f"    {kind} {event['event']:<22} {event['seconds']:8.2f} s  (at {event['after_s']:.2f} s) {rest}"[:400])

    def idle(self) -> None:
        """What a server burns that nobody asks anything."""
        server = self.server()
        try:
            time.sleep(1)
            before_s = server.cpu_s()
            time.sleep(10)
            self.add("idle", {"cpu_percent": (server.cpu_s() - before_s) * 10})
        finally:
            server.close()

    # ---- a trace ---------------------------------------------------------------------------------------------------

    def trace(self, path: Path, minutes: float, lengths: float, speed: float) -> bool:
        """Replay, then look for what stayed behind. False when something did."""
        server = self.server()
        try:
            asks = trace_asks(
                [json.loads(line) for line in path.read_text().splitlines()],
                server.model,
                self.tokens,
                context_len=server.context_len(),
                seconds=minutes * 60,
                lengths=lengths,
                speed=speed,
                rng=Random(self.next_seed()),
            )
            leaving = sum(one.leaves_after is not None for one in asks)
            print(f"  trace: {len(asks)} requests in {minutes:g} minutes, {leaving} clients may hang up", flush=True)
            memory = Memory(server)
            with memory:
                answers = drive(server.port, asks, at_once=1000, processes=4, limit_s=600)
            is_idle = server.wait_idle()
            memory.look()
            self.result.notes["memory"] = memory.seen
            tree = server.get("/cache")
            failed, problems = failures(answers), [line for line in server.problems() if '"level": "warning"' not in line]
            checks = {
                f"no request failed ({len(failed)} did: {failed[:1]})": not failed,
                f"no error was logged ({len(problems)}: {problems[:1]})": not problems,
                "idle within a minute of the last request": is_idle,
                f"tree {tree['evictable_tokens']} + free {tree['free_tokens']} = total {tree['total_tokens']} tokens": (
                    tree["evictable_tokens"] + tree["free_tokens"] == tree["total_tokens"]
                ),
                memory.shown(): memory.is_flat(),
            }
            for words, holds in checks.items():
                print(f"  {'ok  ' if holds else 'FAIL'} {words}", flush=True)
            self.result.notes["checks"] = checks
            if not failed:
                found = figures(answers)
                self.add("trace", {**found, "left": float(sum(answer.has_left for answer in answers))})
            return all(checks.values())
        finally:
            server.close()


def trace_asks(
    lines: Sequence[dict[str, Any]],
    model: str,
    tokens: range,
    *,
    context_len: int,
    seconds: float,
    lengths: float,
    speed: float,
    rng: Random,
    leaving: float = 0.1,
) -> list[Ask]:
    """Requests of a trace in Mooncake's form (streamserve/benchmark/workloads.py). `speed` is seconds of the trace per second. A
    prompt that does not fit the context loses its end. One client in ten, or as `leaving` says, hangs up somewhere in its answer.
    """
    due = itertools.takewhile(lambda line: float(line["timestamp"]) / 1e3 / speed < seconds, lines)
    short = ({**line, "output_length": min(int(line["output_length"]), context_len // 2)} for line in due)
    asks = []
    for one in mooncake_requests(
        short, Ids(tokens, Words()), rng, lengths=lengths, fits=lambda prompt, output: min(prompt, context_len - output)
    ):
        (prompt,), num_output = one.parts, one.num_output
        assert isinstance(prompt, list) and num_output is not None
        leaves_after = rng.randrange(num_output) if rng.random() < leaving else None
        asks.append(ask(completion(model, prompt, num_output), at_s=one.at_s / speed, leaves_after=leaves_after))
    return asks


class Memory:
    """The server's resident memory and the card's, looked at every few seconds while used as a context."""

    EVERY_S = 5.0

    def __init__(self, server: Server) -> None:
        self.seen: list[tuple[float, float | None]] = []
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def look(self) -> None:
        """Once."""
        self.seen.append((self._server.resident_mib(), used_mib()))

    def _watch(self) -> None:
        self.look()
        while not self._stop.wait(self.EVERY_S):
            self.look()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _spans(self) -> list[tuple[float, float]]:
        """Host and card: the most in the first quarter, which fills caches that are meant to fill, and at the end."""
        early = self.seen[: max(1, len(self.seen) // 4)]
        spans = [(max(host for host, _ in early), self.seen[-1][0])]
        if self.seen[-1][1] is not None:
            spans.append((max(card or 0.0 for _, card in early), self.seen[-1][1]))
        return spans

    def is_flat(self) -> bool:
        """Grown by no more than 5 % and 64 MiB since the first quarter."""
        return all(late <= early * 1.05 + 64 for early, late in self._spans())

    def shown(self) -> str:
        """In words."""
        names = ("resident", "card")
        return "memory is flat: " + ", ".join(
            f"{name} {early:,.0f} then {late:,.0f} MiB" for name, (early, late) in zip(names, self._spans(), strict=False)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file or folder; fake: the server's made-up tokens")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--workloads", default="a,c64,c256,d,f")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", action="store_true", help="after each round, what steps there were and how long they took")
    parser.add_argument("--json", help="where to write all figures")
    parser.add_argument("--trace", type=Path, default=Path(__file__).parents[2] / "shared/data/mooncake_synthetic_trace.jsonl")
    parser.add_argument("--minutes", type=float, default=8.0, help="length of the replay")
    parser.add_argument("--trace-lengths", type=float, default=0.5, help="prompt lengths, as a share of the trace's")
    parser.add_argument("--trace-speed", type=float, default=1.0, help="seconds of the trace per second")
    own, flags = split_arguments(sys.argv[1:])
    args = parser.parse_args(own)
    names = [name for name in args.workloads.split(",") if name]
    if unknown := set(names) - {*LOADS, "start", "idle", "trace"}:
        parser.error(f"unknown workload {', '.join(sorted(unknown))}")

    found = machine()
    print(shown(found))
    flags += ["--load-format", args.load_format] if args.load_format != "auto" else []
    result = Result(Path(args.model).name, found, notes={"flags": flags, "command": sys.argv})
    bench = Bench(args.model, flags, result, tells_steps=args.steps)
    is_clean = True
    try:
        if "start" in names:
            for _ in range(args.rounds):
                bench.start()
        if "idle" in names:
            bench.idle()
        bench.take_turns([name for name in names if name in LOADS and name != "doff"], args.rounds)
        bench.take_turns([name for name in names if name == "doff"], args.rounds, NO_REUSE)
        if "trace" in names:
            is_clean = bench.trace(args.trace, args.minutes, args.trace_lengths, args.trace_speed)
    finally:
        result.save(args.json)
    print(f"\n{table(result)}")
    raise SystemExit(0 if is_clean else 1)


if __name__ == "__main__":
    main()
