"""Speculation on a GPU where chance says which guesses are right: what a step of 1 + k tokens is worth at a given acceptance.

    python bench/speculative.py synthetic --model FOLDER [--load-format dummy] [--output 768] [--rounds 2] [-- FLAGS]

Made-up weights guess nothing right, so here a drafter always offers k random tokens, and a sampler takes each of them with chance
p, given those before it. Nothing else differs from a server: one engine in this process, the same steps, graphs, scheduler and
loop. How many guesses of a row are right is drawn evenly (steps of the golden ratio through the distribution), so that a few
hundred steps show its mean.

First, one stream, every guess verified: for each p and k the speed-up over plain decoding, which is measured beside it in every
round, and its share of the (1 - p^(k+1)) / (1 - p) tokens that a step brings on average (Leviathan et al., arXiv
2211.17192): of the speed-up if a step with guesses took no longer than one without. Then batches, where the engine decides how
many guesses to verify: whole answers, prompts included, over the same without a drafter. Before rounds that count there is one in
which the engine learns what steps cost.

A line of JSON for each figure; the last says how long all took, the start included. Exit code 1 if an answer is shorter than was
asked for.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from bench.load import random_tokens
from bench.server import config_of, random_range
from streamserve import log, process
from streamserve.build import Built, build
from streamserve.engine.client import Mailbox
from streamserve.engine.device_sampler import DraftedRows
from streamserve.engine.device_state import Loaded
from streamserve.engine.drafters.chance import Chance
from streamserve.engine.drafters.drafter import Guess
from streamserve.engine.plan import Plan
from streamserve.engine.step_costs import StepCosts
from streamserve.messages import Delta, GenerateRequest, SamplingParams

CHANCES, DEPTHS, BATCHES = (0.3, 0.6, 0.8, 0.9), (2, 4, 6), (1, 4, 16, 64)
AUTO_CHANCES, AUTO_DEPTH = (0.3, 0.8), 4
PROMPT_LEN, BATCH_OUTPUT = 128, 192
SURE = 1e4  # a logit that no other reaches
GOLDEN = 0.6180339887498949
MAX_KEPT_ROWS = 8


def tokens_per_step(p: float, k: int) -> float:
    """How many a row of k guesses brings on average, if each is right with chance p, given those before it."""
    return k + 1.0 if p == 1.0 else (1 - p ** (k + 1)) / (1 - p)


# ---- who guesses, and who accepts ------------------------------------------------------------------------------------------


class Odds:
    """How many of a row's guesses are right. `was_asked`: it has decided something."""

    def __init__(self, p: float = 0.0) -> None:
        self.p = p
        self.was_asked = False
        self._at = 0.5

    def draw(self, num_drafts: int) -> int:
        """Of so many. At least n are with chance p^n."""
        self.was_asked = True
        self._at = (self._at + GOLDEN) % 1.0
        num_right = 0
        while num_right < num_drafts and self._at < self.p ** (num_right + 1):
            num_right += 1
        return num_right


class RandomDrafts:
    """Drafts: always as many guesses as are asked for. Learns how many are right."""

    def __init__(self, drafter: "RandomDrafter") -> None:
        self._drafter = drafter
        self._chance = Chance(drafter.belief)

    def grew(self, token_ids: Sequence[int]) -> None:
        """See Drafts."""

    def offered(self, token_ids: Sequence[int]) -> None:
        """See Drafts."""

    def guess(self, most: int) -> Guess:
        """See Drafts. Tokens are drawn from a supply, so that drawing costs no more than a lookup."""
        return Guess(self._drafter.some(most), self._chance.value)

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """See Drafts."""
        for _ in range(num_accepted):
            self._chance.saw(True)
        if num_accepted < num_drafted:
            self._chance.saw(False)

    def close(self) -> None:
        """See Drafts."""


class RandomDrafter:
    """Drafter. `max_drafts` may be changed while nothing runs."""

    def __init__(self, tokens: range, max_drafts: int) -> None:
        self.max_drafts = max_drafts
        self.num_wanted = 0
        self.belief = Chance(0.6, weight=16.0, memory=512.0)
        self._supply = random_tokens(Random(3), 4096, tokens)
        self._at = 0

    def open(self, request: GenerateRequest, token_ids: Sequence[int]) -> RandomDrafts:
        """See Drafter."""
        return RandomDrafts(self)

    def some(self, count: int) -> list[int]:
        """So many tokens."""
        self._at = (self._at + 1) % (len(self._supply) - count)
        return self._supply[self._at : self._at + count]


class Judge:
    """Edits logits of steps with guesses, so that as many of these are found right as `odds` says. Everything else is chosen as
    ever."""

    def __init__(self, odds: Odds) -> None:
        self._odds = odds
        self._kept: dict[tuple[tuple[int, ...], tuple[float, ...]], tuple[Tensor, Tensor, Tensor]] = {}

    def watch(self, runner: Any) -> None:
        """Of every step of a DeviceRunner, right before its tokens are chosen."""
        choose = runner._choose

        @torch.inference_mode()
        def judged(plan: Plan, loaded: Loaded, *rest: Any) -> Any:
            if loaded.drafted is not None:
                self.decide(runner._logits_RV, loaded.drafted)
            return choose(plan, loaded, *rest)

        runner._choose = judged

    def decide(self, logits_RV: Tensor, drafted: DraftedRows) -> None:
        """The logit of each guess, one row before the guess is fed: above all others where it is right, else out of reach."""
        rows, values = decisions(drafted.offsets, self._odds)
        if rows:
            rows_N, next_N, values_N = self._decision(tuple(rows), tuple(values), logits_RV.device)
            logits_RV.index_put_((rows_N, drafted.on_device.fed_R.index_select(0, next_N).long()), values_N)

    def _decision(self, rows: tuple[int, ...], values: tuple[float, ...], where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """On the device: the rows, those behind them, and the values. Of one answer there are few, and they stay there: what
        a measurement adds to a step should not be seen in it."""
        if (rows, values) in self._kept:
            return self._kept[rows, values]
        rows_N = torch.tensor(rows).to(where, non_blocking=True)
        made = rows_N, rows_N + 1, torch.tensor(values, dtype=torch.float32).to(where, non_blocking=True)
        if len(rows) <= MAX_KEPT_ROWS:
            self._kept[rows, values] = made
        return made


def decisions(offsets: Sequence[int], odds: Odds) -> tuple[list[int], list[float]]:
    """For every guess: the row of logits that it is compared with, and what its logit is to be."""
    rows: list[int] = []
    values: list[float] = []
    start = 0
    while start < len(offsets):
        end = start + 1
        while end < len(offsets) and offsets[end] > 0:
            end += 1
        num_drafts = end - start - 1
        if num_drafts:
            num_right = odds.draw(num_drafts)
            rows += range(start, end - 1)
            values += [SURE] * num_right + [float("-inf")] * (num_drafts - num_right)
        start = end
    return rows, values


# ---- runs ------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Timed:
    """One request: when its deltas came, and the last of them."""

    times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    last: Delta = field(default_factory=Delta)

    async def read(self, mailbox: Mailbox) -> None:
        """To the end."""
        while self.last.finish_reason is None:
            self.last = await mailbox.get()
            if self.last.token_ids:
                self.times_s.append(time.perf_counter())
                self.num_tokens += len(self.last.token_ids)


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one run: tokens a second behind the first token, and prompts included; tokens of a row; guesses verified."""

    decode_tok_s: float
    whole_tok_s: float
    tokens_per_row: float
    num_drafted: int


class Bench:
    """One engine, and runs on it."""

    def __init__(self, built: Built, drafter: RandomDrafter, odds: Odds, tokens: range) -> None:
        self._built, self._drafter, self.odds, self._tokens = built, drafter, odds, tokens
        # A server has no switch for what is switched here between runs.
        self._scheduler = built.engine._scheduler
        speculation = self._scheduler._speculation
        assert speculation is not None, "it was built with a drafter"
        self._speculation, self._learnt = speculation, speculation.costs
        self._rng = Random(11)
        self._num_requests = 0

    def plain(self) -> None:
        """From here on nobody guesses."""
        self._scheduler._speculation = None

    def fixed(self, p: float, k: int) -> None:
        """From here on every row has k guesses."""
        self._speculate(p, k, StepCosts.free())

    def auto(self, p: float, k: int) -> None:
        """From here on the engine decides."""
        self._speculate(p, k, self._learnt)
        self._drafter.belief = Chance(0.6, weight=16.0, memory=512.0)

    def _speculate(self, p: float, k: int, costs: StepCosts) -> None:
        self.odds.p, self._drafter.max_drafts = p, k
        # To the policy the guesses are like those of a network: there whatever the newest token is. The runner makes none.
        self._drafter.num_wanted = k
        self._speculation.costs = costs
        self._scheduler._speculation = self._speculation

    async def run(self, batch: int, num_output: int) -> Rates:
        """So many requests at once, with prompts that no other has."""
        params = SamplingParams(temperature=0.0, max_new_tokens=num_output, ignore_eos=True)
        self._built.cache.flush()
        requests = []
        for _ in range(batch):
            self._num_requests += 1
            prompt = tuple(random_tokens(self._rng, PROMPT_LEN, self._tokens))
            requests.append(GenerateRequest(str(self._num_requests), prompt, params))
        timed = [Timed() for _ in requests]
        started_s = time.perf_counter()
        mailboxes = [await self._built.engine.submit(request) for request in requests]
        await asyncio.gather(*(one.read(mailbox) for one, mailbox in zip(timed, mailboxes, strict=True)))
        for one in timed:
            if one.num_tokens != num_output:
                raise SystemExit(f"an answer has {one.num_tokens} tokens, not {num_output}: {one.last.error}")
        decode = sum((one.num_tokens - 1) / (one.times_s[-1] - one.times_s[0]) for one in timed)
        num_accepted = sum(one.last.num_accepted for one in timed)
        num_tokens = sum(one.num_tokens for one in timed)
        return Rates(
            decode,
            num_tokens / (max(one.times_s[-1] for one in timed) - started_s),
            (num_tokens - batch) / max(1, num_tokens - batch - num_accepted),
            sum(one.last.num_drafted for one in timed),
        )


def tell(**figures: Any) -> None:
    """A line of JSON."""
    print(
        json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}), flush=True
    )


async def one_stream(bench: Bench, chances: Sequence[float], depths: Sequence[int], num_output: int, rounds: int) -> None:
    """Every p with every k, beside plain runs."""
    plain: dict[float, list[Rates]] = {p: [] for p in chances}
    found: dict[tuple[float, int], list[Rates]] = {(p, k): [] for p in chances for k in depths}
    for _ in range(rounds):
        for p in chances:
            bench.plain()
            plain[p].append(await bench.run(1, num_output))
            for k in depths:
                bench.fixed(p, k)
                found[p, k].append(await bench.run(1, num_output))
    for (p, k), runs in found.items():
        pairs = list(zip(plain[p], runs, strict=True))
        speedup, formula = (
            statistics.median(run.decode_tok_s / beside.decode_tok_s for beside, run in pairs),
            tokens_per_step(p, k),
        )
        tell(
            mode="fixed",
            batch=1,
            p=p,
            k=k,
            plain_tok_s=statistics.median(beside.decode_tok_s for beside, _ in pairs),
            tok_s=statistics.median(run.decode_tok_s for run in runs),
            speedup=speedup,
            formula=formula,
            share=speedup / formula,
            tokens_per_row=statistics.fmean(run.tokens_per_row for run in runs),
            **({"bound": 0.85, "holds": speedup / formula >= 0.85} if (p, k) == (0.8, 4) else {}),
        )


async def batches(bench: Bench, sizes: Sequence[int], chances: Sequence[float], num_output: int, rounds: int) -> None:
    """Batches, the engine's policy beside plain runs. The first round does not count."""
    for size in sizes:
        ratios: dict[float, list[float]] = {p: [] for p in chances}
        last: dict[float, tuple[Rates, Rates]] = {}
        for number in range(rounds + 1):
            bench.plain()
            beside = await bench.run(size, num_output)
            for p in chances:
                bench.auto(p, AUTO_DEPTH)
                run = await bench.run(size, num_output)
                last[p] = beside, run
                if number:
                    ratios[p].append(run.whole_tok_s / beside.whole_tok_s)
        for p in chances:
            beside, run = last[p]
            ratio = statistics.median(ratios[p])
            tell(
                mode="auto",
                batch=size,
                p=p,
                most_drafts=AUTO_DEPTH,
                plain_tok_s=beside.whole_tok_s,
                tok_s=run.whole_tok_s,
                ratio=ratio,
                lowest=min(ratios[p]),
                drafts_per_token=run.num_drafted / (size * num_output),
                tokens_per_row=run.tokens_per_row,
                bound=0.98,
                holds=ratio >= 0.98,
            )


async def measure(bench: Bench, built: Built, args: argparse.Namespace) -> None:
    """Both parts."""
    engine = asyncio.create_task(built.engine.run())
    try:
        for p, k in ((0.0, 0), *((0.5, k) for k in args.depths)):  # whatever is compiled or captured late is by now
            bench.fixed(p, k) if k else bench.plain()
            await bench.run(1, 32)
        if not bench.odds.was_asked:
            raise SystemExit("no guess was decided by chance: that takes a GPU's sampler")
        await one_stream(bench, args.chances, args.depths, args.output, args.rounds)
        await batches(bench, args.batches, AUTO_CHANCES, args.batch_output, args.rounds)
    finally:
        engine.cancel()
        with suppress(asyncio.CancelledError):
            await engine


def main(arguments: list[str], flags: list[str]) -> int:
    """Build, measure."""
    parser = argparse.ArgumentParser("speculative.py synthetic", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, help="folder; a config.json is enough for made-up weights")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="dummy")
    parser.add_argument("--chances", type=_floats, default=CHANCES)
    parser.add_argument("--depths", type=_ints, default=DEPTHS)
    parser.add_argument("--batches", type=_ints, default=BATCHES)
    parser.add_argument("--output", type=int, default=768, help="tokens of an answer of one stream")
    parser.add_argument("--batch-output", type=int, default=BATCH_OUTPUT, help="and of those in batches")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args(arguments)
    log.configure("warning", "console")
    most = max(*args.depths, AUTO_DEPTH)
    flags = ["--load-format", args.load_format, "--speculative", f"ngram,{most}", *flags]
    odds, tokens = Odds(), random_range(args.model)
    drafter = RandomDrafter(tokens, most)
    started_s = time.perf_counter()
    built = build(config_of(args.model, flags), drafter=drafter)
    Judge(odds).watch(built.engine._runner)
    process.settle()
    print(f"ready after {time.perf_counter() - started_s:.1f} s", file=sys.stderr, flush=True)
    try:
        asyncio.run(measure(Bench(built, drafter, odds, tokens), built, args))
    finally:
        built.close()
    tell(mode="end", seconds=time.perf_counter() - started_s)
    return 0


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)
