"""Speculation: what guessing tokens ahead brings and costs.

    python bench/speculative.py edit [--model MODEL] [--count 50] [--rounds 3] [--json OUT] [-- FLAGS]
    python bench/speculative.py chat [--model MODEL] [--count 80] [--rounds 1] [--json OUT] [-- FLAGS]
    python bench/speculative.py batch [--model MODEL] [--at-once 1,4,16] [--rounds 2] [--json OUT] [-- FLAGS]
    python bench/speculative.py json [--model MODEL] [--count 16] [--json OUT] [-- FLAGS]
    python bench/speculative.py counters [--count 1000] [--seed 0]            see bench/counters.py
    python bench/speculative.py synthetic --model FOLDER                      see bench/synthetic.py

edit      repeat a given text with a change (bench/edits.py), one stream: --speculative none against ngram
chat      first turns of mt_bench, at most 256 tokens, one stream: none against auto, or against --way, as ngram or eagle=HEAD
batch     the edits at 1, 4 and 16 streams: none against auto
json      documents of a nested schema, one at a time, with jump-forward, greedy and at temperature 0.8: forwards of the network
          per token of the answers, from the server's count of steps
counters  random requests on the server's made-up tokens, some of them cancelled: what usages say against what /metrics says
synthetic on a GPU, with weights made up, chance says which guesses are right: speed-up over what would be ideal

Two servers with the defaults a user gets, but for the size of their KV memory, run side by side and answer the same prompts in
turns of ten, now one first and now the other; prefixes are forgotten before every turn, and every round has a salt of its own, so
that nothing is guessed from answers of another round. Rates are tokens of answers over the time from a request to its last event,
prompts included. Both have answered two of the prompts before, so that kernels are compiled and the cost of steps is known a
little. Prompt i has seed i, for a --temperature above 0. Without --model it is the default model.

Exit code 1 if two answers to a prompt differ. On a GPU, where a drafted step may add up in another order than a plain one, they
are told and no failure.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.edits import copied_share, edits
from bench.load import Figures, ask, drive, failures
from bench.machine import machine, shown
from bench.report import Result
from bench.server import ROOT, Server, split_arguments
from bench.structured import NESTED
from streamserve.benchmark.answers import Answer
from streamserve.benchmark.client import Ask
from streamserve.default_model import find_default_model
from streamserve.text.model import TextModel, load_text_model

QUESTIONS = ROOT.parent / "shared" / "data" / "mt_bench_questions.jsonl"
MAX_TOKENS, MAX_DOCUMENT = 256, 1024
PER_TURN = 10  # prompts of a turn, where one stream at a time is served
KV_TOKENS = "16k"  # of each server, for they share a machine
MOST = 0.5  # of a text's words: an answer that holds so many is a copy of it
STEPS = "streamserve_step_seconds_count"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as token ids. `text`: what is to be repeated, if anything is."""

    kind: str
    token_ids: list[int]
    text: str = ""


@dataclass(slots=True)
class Sums:
    """What answers add up to. `seconds`: of the turns they came in; `later_s`: from the first event of each to its last."""

    tokens: int = 0
    num_answers: int = 0
    seconds: float = 0.0
    later_s: float = 0.0
    drafted: int = 0
    accepted: int = 0
    jumped: int = 0

    def add(self, answers: Sequence[Answer], seconds: float) -> None:
        """The answers of one turn."""
        self.tokens += sum(answer.num_output for answer in answers)
        self.drafted += sum(answer.num_drafted for answer in answers)
        self.accepted += sum(answer.num_accepted for answer in answers)
        self.jumped += sum(answer.num_jumped for answer in answers)
        self.seconds += seconds
        self.num_answers += len(answers)
        self.later_s += sum(answer.events_s[-1] - answer.events_s[0] for answer in answers)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def later_rate(self) -> float:
        """Tokens a second behind the first one of an answer, per stream."""
        return (self.tokens - self.num_answers) / self.later_s if self.later_s else 0.0

    def figures(self) -> Figures:
        """For a result's file."""
        return {
            "out_tok_s": self.rate,
            "later_tok_s": self.later_rate,
            "tokens": float(self.tokens),
            "drafted": float(self.drafted),
            "accepted": float(self.accepted),
            "tokens_per_row": self.tokens / max(1, self.tokens - self.accepted - self.jumped),
        }


@dataclass(slots=True)
class Comparison:
    """Answers of two servers to the same prompts. `ways` are their settings, the one without guesses first; `texts` what each
    said to each prompt, in every round."""

    ways: tuple[str, str]
    sums: dict[str, Sums] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)  # of each turn
    texts: dict[int, set[str]] = field(default_factory=dict)
    alone: dict[tuple[str, int], Sums] = field(default_factory=dict)  # by way and prompt, where one stream is served at a time

    def add(self, first: int, turn: Mapping[str, Sequence[Answer]], *, at_once: int) -> None:
        """One turn of both, which began with prompt `first`."""
        rates = []
        for way in self.ways:
            answers = turn[way]
            if failed := failures(answers):
                raise SystemExit(f"{len(failed)} of {len(answers)} requests failed; the first: {failed[0]}")
            times = [answer.events_s[-1] - answer.sent_s for answer in answers]
            whole = max(answer.events_s[-1] for answer in answers) - min(answer.sent_s for answer in answers)
            seconds = sum(times) if at_once == 1 else whole
            self.sums.setdefault(way, Sums()).add(answers, seconds)
            rates.append(sum(answer.num_output for answer in answers) / seconds)
            for number, (answer, time) in enumerate(zip(answers, times, strict=True), first):
                self.texts.setdefault(number, set()).add(answer.text)
                if at_once == 1:
                    self.alone.setdefault((way, number), Sums()).add([answer], time)
        self.ratios.append(rates[1] / rates[0])

    @property
    def ratio(self) -> float:
        """How many times as fast as plain."""
        plain, other = (self.sums[way].rate for way in self.ways)
        return other / plain

    def ratio_of(self, numbers: Sequence[int]) -> float:
        """The same for some of the prompts; one stream at a time only."""
        rates = []
        for way in self.ways:
            chosen = [self.alone[way, number] for number in numbers]
            rates.append(sum(one.tokens for one in chosen) / sum(one.seconds for one in chosen))
        return rates[1] / rates[0]

    @property
    def num_equal(self) -> int:
        """Prompts to which every answer was the same."""
        return sum(len(texts) == 1 for texts in self.texts.values())


def questions(text: TextModel, mode: str, count: int) -> list[Prompt]:
    """The prompts of a mode, as a chat's template makes them."""

    def encoded(question: str) -> list[int]:
        return list(text.encode_chat([{"role": "user", "content": question}]))

    if mode == "chat":
        if not QUESTIONS.is_file():
            raise SystemExit(f"{QUESTIONS} is missing: it holds the questions of mt_bench, a line of JSON each")
        lines = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
        return [Prompt(line["category"], encoded(line["turns"][0])) for line in lines][:count]
    if mode == "json":
        return [Prompt("json", encoded(f"Make up an order of {who}, as JSON.")) for who in _CUSTOMERS][:count]
    return [Prompt(edit.kind, encoded(edit.question), edit.text) for edit in edits()][:count]


_CUSTOMERS = (
    *(
        "a bakery in Berlin",
        "a school in Leeds",
        "a hotel in Nice",
        "a dentist in Boston",
        "a garage in Hamburg",
        "a farm in Wales",
    ),
    *(
        "a museum in Paris",
        "a shop for toys in Bonn",
        "a gym in Denver",
        "a library in York",
        "a theatre in Lyon",
        "a zoo in Bremen",
    ),
    *("a painter in Toulouse", "a café in Dresden", "a bookshop in Oxford", "an architect in Austin"),
)


def asks(server: Server, prompts: Sequence[Prompt], first: int, temperature: float, more: Mapping[str, Any]) -> list[Ask]:
    """Their requests; the first has the number `first`."""
    common = {"model": server.model, "max_tokens": MAX_TOKENS, "temperature": temperature, **more}
    return [ask({**common, "prompt": prompt.token_ids, "seed": number}) for number, prompt in enumerate(prompts, first)]


def compare(
    servers: Mapping[str, Server], prompts: Sequence[Prompt], *, at_once: int, rounds: int, temperature: float
) -> Comparison:
    """Both servers, turn by turn."""
    plain, other = servers
    found = Comparison((plain, other))
    size = PER_TURN if at_once == 1 else len(prompts)
    num_turns = 0
    for number in range(rounds):
        salt = {"cache_salt": f"{at_once} at once, round {number}"}
        for first in range(0, len(prompts), size):
            turn = {}
            for way in (plain, other) if num_turns % 2 == 0 else (other, plain):
                server = servers[way]
                server.flush_cache()
                batch = asks(server, prompts[first : first + size], first, temperature, salt)
                turn[way] = drive(server.port, batch, at_once=at_once, processes=1)
            found.add(first, turn, at_once=at_once)
            num_turns += 1
    return found


def started(stack: ExitStack, model: str | None, way: str, flags: Sequence[str], prompts: Sequence[Prompt]) -> Server:
    """A server with --speculative `way` that has answered two prompts."""
    server = Server(model, ["--max-total-tokens", KV_TOKENS, "--speculative", way, *flags])
    stack.callback(server.close)
    drive(server.port, asks(server, prompts[:2], 0, 0.0, {"cache_salt": "before"}), at_once=1)
    return server


def verdict(value: float, bound: float, *, is_at_most: bool = False) -> str:
    """A bound and whether it is met."""
    is_met = value <= bound if is_at_most else value >= bound
    return f"{'<=' if is_at_most else '>='} {bound:g} {'ok' if is_met else 'SHORT'}"


def tell(found: Comparison, prompts: Sequence[Prompt], title: str, bound: float | None) -> str:
    """A comparison in a few lines."""
    plain, other = found.ways
    mine = found.sums[other]
    spread = f"turns {min(found.ratios):.2f} to {max(found.ratios):.2f}, median {statistics.median(found.ratios):.2f}"
    drafted = f"{mine.drafted} tokens drafted, {mine.accepted} accepted"
    lines = [
        f"{title}: {plain} {found.sums[plain].rate:.1f} tok/s, {other} {mine.rate:.1f}: {found.ratio:.3f}x"
        + (f" {verdict(found.ratio, bound)}" if bound is not None else "")
        + f" ({spread})",
        f"  behind the first token: {found.sums[plain].later_rate:.1f} tok/s of a stream, {mine.later_rate:.1f}: "
        f"{mine.later_rate / max(1e-9, found.sums[plain].later_rate):.3f}x",
        f"  {drafted}{f' ({mine.accepted / mine.drafted:.0%})' if mine.drafted else ''}; {mine.tokens} tokens in all, "
        f"{mine.figures()['tokens_per_row']:.2f} for each that the network computed a row for",
        f"  same text from both: {found.num_equal} of {len(found.texts)}",
    ]
    by_kind: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_kind.setdefault(prompt.kind, []).append(number)
    if found.alone:
        kinds = ", ".join(f"{kind} {found.ratio_of(numbers):.2f}x" for kind, numbers in by_kind.items())
        lines.append(f"  by kind: {kinds}")
    copies = [
        number
        for number, prompt in enumerate(prompts)
        if prompt.text and all(copied_share(prompt.text, answer) >= MOST for answer in found.texts[number])
    ]
    if any(prompt.text for prompt in prompts):
        alone = f"; of these alone {found.ratio_of(copies):.2f}x" if found.alone and copies else ""
        lines.append(f"  answers that hold most of their text: {len(copies)} of {len(prompts)}{alone}")
    return "\n".join(lines)


def comparing(args: argparse.Namespace, flags: Sequence[str], text: TextModel, result: Result) -> bool:
    """Modes edit, chat and batch. Whether all answers were the same from both servers."""
    prompts = questions(text, args.mode, args.count)
    way, bound = {"edit": ("ngram", 1.8), "chat": ("auto", 0.98), "batch": ("auto", None)}[args.mode]
    way = args.way or way
    is_equal = True
    with ExitStack() as stack:
        servers = {name: started(stack, args.model, name, flags, prompts) for name in ("none", way)}
        for at_once in [int(number) for number in args.at_once.split(",")]:
            found = compare(servers, prompts, at_once=at_once, rounds=args.rounds, temperature=args.temperature)
            for name, sums in found.sums.items():
                result.add(f"{args.mode}{at_once}.{name}", sums.figures())
            result.add(f"{args.mode}{at_once}", {"ratio": found.ratio, "equal": found.num_equal / len(found.texts)})
            print(tell(found, prompts, f"{args.mode}, {at_once} at once", bound if at_once == 1 else None), flush=True)
            is_equal &= found.num_equal == len(found.texts)
        result.notes["problems"] = [problem for server in servers.values() for problem in server.problems()]
    return is_equal


def documents(args: argparse.Namespace, flags: Sequence[str], text: TextModel, result: Result) -> bool:
    """Mode json. Whether guesses changed no document."""
    prompts = questions(text, "json", args.count)
    texts: dict[tuple[float, int], set[str]] = {}
    for way in ("none", args.way or "ngram"):
        with ExitStack() as stack:
            server = started(stack, args.model, way, flags, prompts)
            for temperature in (0.0, 0.8):
                server.flush_cache()
                more = {"json_schema": NESTED, "max_tokens": MAX_DOCUMENT, "cache_salt": f"at {temperature}"}
                batch = asks(server, prompts, 0, temperature, more)
                before = server.metrics()[STEPS]
                answers = drive(server.port, batch, at_once=1, processes=1)
                steps = server.metrics()[STEPS] - before
                if failed := failures(answers):
                    raise SystemExit(f"{len(failed)} of {len(answers)} requests failed; the first: {failed[0]}")
                sums = Sums()
                sums.add(answers, sum(answer.events_s[-1] - answer.sent_s for answer in answers))
                for number, answer in enumerate(answers):
                    texts.setdefault((temperature, number), set()).add(answer.text)
                forwards = steps / sums.tokens
                result.add(f"json.{way}.t{temperature:g}", {**sums.figures(), "forwards_per_token": forwards})
                bound = verdict(forwards, 0.6, is_at_most=True) if way != "none" else ""
                print(
                    f"{way}, temperature {temperature:g}: {forwards:.3f} forwards per token {bound} ({steps:.0f} steps, prompts' "
                    f"included; {sums.tokens} tokens, {sums.jumped} forced, {sums.accepted} of {sums.drafted} guesses accepted; "
                    f"{sums.rate:.1f} tok/s)",
                    flush=True,
                )
    num_equal = sum(len(answers) == 1 for answers in texts.values())
    print(f"same document with guesses and without: {num_equal} of {len(texts)}")
    return num_equal == len(texts)


MODES = {"edit": comparing, "chat": comparing, "batch": comparing, "json": documents}


def main() -> None:
    own, flags = split_arguments(sys.argv[1:])
    if own[:1] == ["synthetic"]:
        from bench.synthetic import main as synthetic

        raise SystemExit(synthetic(own[1:], flags))
    if own[:1] == ["counters"]:
        from bench.counters import main as counters

        raise SystemExit(counters(own[1:], flags))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    defaults = (("edit", 50, 3, "1"), ("chat", 80, 1, "1"), ("batch", 50, 2, "1,4,16"), ("json", 16, 1, "1"))
    for mode, count, rounds, at_once in defaults:
        one = modes.add_parser(mode)
        one.add_argument("--model", help="GGUF file or folder; else the default model")
        one.add_argument("--count", type=int, default=count, help="prompts")
        one.add_argument("--way", help="--speculative of the server that guesses")
        if mode != "json":
            one.add_argument("--rounds", type=int, default=rounds)
            one.add_argument("--at-once", default=at_once)
            one.add_argument("--temperature", type=float, default=0.0)
        one.add_argument("--json", help="where to write all figures")
    args = parser.parse_args(own)
    found = machine()
    print(shown(found))
    result = Result(Path(args.model or "default").name, found, notes={"flags": flags, "command": sys.argv})
    text = load_text_model(Path(args.model) if args.model else find_default_model())
    try:
        is_equal = MODES[args.mode](args, flags, text, result)
    finally:
        result.save(args.json)
    raise SystemExit(0 if is_equal or found.get("card") else 1)


if __name__ == "__main__":
    main()
