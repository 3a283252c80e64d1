"""Structured output: which schemas compile and how fast, whether answers match them, and what grammars cost a server.

    python bench/structured.py schemas FILE [--model MODEL]
    python bench/structured.py answers FILE [--model MODEL] [--count 40] [--at-once 16] [--max-tokens 512] [-- FLAGS]
    python bench/structured.py serve MODEL [--load-format dummy] [--at-once 64] [--rounds 3] [--json OUT] [-- FLAGS]

FILE has a line of JSON per schema: `name`, `schema`, and `tests`, a list of {`data`, `valid`}: JSONSchemaBench with instances.

schemas  every schema is compiled or refused with a reason; compile times; the share of valid instances that the grammar accepts,
         and of others that it rejects. Needs a tokenizer and no weights.
answers  answers at temperature 0.8 under --count of the schemas that compile: every one that came to its end is parsed and
         validated by `jsonschema`. Exit code 1 if one does not match. Without --model the default model.
serve    a server in a process of its own, with the defaults a user gets:
           e      256 requests, 512 random tokens in, 256 out, --at-once at a time: free, under the schema of an ordinary record
                  without jumps and with; bounded, once: under a schema whose strings have a greatest length
           new    time to the first token, one request at a time: free, and each under a schema that nobody has used before
           nested one document of a nested schema at a time, without jumps and with: time to its end, steps per token
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.load import Figures, ask, completion, drive, figures, percentile, random_tokens
from bench.machine import machine, shown
from bench.report import Result
from bench.server import Server, config_of, random_range, split_arguments
from streamserve import process
from streamserve.build import Built, build
from streamserve.default_model import find_default_model
from streamserve.engine.client import collect
from streamserve.engine.grammar import Grammars
from streamserve.errors import InvalidRequest
from streamserve.messages import Delta, FinishReason, GenerateRequest, Guidance, SamplingParams
from streamserve.text.model import load_text_model
from streamserve.text.structure import json_schema, text_of

REQUESTS, PROMPT_LEN, OUTPUT_LEN = 256, 512, 256
NEW_SCHEMAS = 32
DOCUMENTS = 16

_ADDRESS = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "maxLength": 24},
        "postcode": {"type": "string", "pattern": "^[0-9]{5}$"},
        "country_code": {"enum": ["DE", "FR", "GB", "US"]},
    },
    "required": ["street", "postcode", "country_code"],
    "additionalProperties": False,
}
NESTED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "order_number": {"type": "integer", "minimum": 1, "maximum": 99999},
        "customer_name": {"type": "string", "maxLength": 24},
        "billing_address": _ADDRESS,
        "shipping_address": _ADDRESS,
        "ordered_items": {
            "type": "array",
            "minItems": 3,
            "maxItems": 5,
            "items": {
                "type": "object",
                "properties": {
                    "article_number": {"type": "integer", "minimum": 100, "maximum": 999},
                    "description": {"type": "string", "maxLength": 16},
                    "payment_status": {"enum": ["paid", "outstanding", "refunded"]},
                    "is_gift_wrapped": {"type": "boolean"},
                },
                "required": ["article_number", "description", "payment_status", "is_gift_wrapped"],
                "additionalProperties": False,
            },
        },
        "preferred_contact": {"anyOf": [{"const": "by electronic mail"}, {"type": "null"}]},
    },
    "required": ["order_number", "customer_name", "billing_address", "shipping_address", "ordered_items", "preferred_contact"],
    "additionalProperties": False,
}
_RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "role": {"enum": ["admin", "member", "guest"]},
        "is_active": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
    },
    "required": ["name", "age", "email", "role", "is_active", "tags"],
    "additionalProperties": False,
}
# No answer under these ends by itself. Strings of bounded length are the dearest thing that a schema can ask of llguidance: the
# places in them are as many different states, and the mask of each has to be worked out.
RECORDS: dict[str, Any] = {"type": "array", "items": _RECORD, "minItems": 1000}
ORDERS: dict[str, Any] = {"type": "array", "items": NESTED, "minItems": 1000}


@dataclass(frozen=True, slots=True)
class Case:
    """A schema of the file: its grammar, or why there is none."""

    name: str
    schema: Any
    tests: Sequence[dict[str, Any]]
    grammar: str = ""
    refusal: str | None = None


def read_cases(path: Path, *, closes_objects: bool = False) -> list[Case]:
    """The file, as far as text alone can judge it. `closes_objects`: as the API takes schemas, which keeps answers to the
    properties that are named."""
    cases = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        try:
            grammar, refusal = text_of(json_schema(entry["schema"], "schema", closes_objects=closes_objects)), None
        except InvalidRequest as error:
            grammar, refusal = "", str(error)
        cases.append(Case(entry["name"], entry["schema"], entry.get("tests", ()), grammar, refusal))
    return cases


# ---- schemas ---------------------------------------------------------------------------------------------------------------


async def compile_all(cases: Sequence[Case], model: str | None) -> None:
    """Compile times, refusals, and instances."""
    text = load_text_model(Path(model) if model else find_default_model())
    size = text.tokenizer.vocab_size
    grammars = Grammars(text.tokenizer, vocab_size=size, eos_token_ids=text.tokenizer.eos_token_ids)
    await grammars.matcher("start: /a/", "warm-up")
    times_ms: list[float] = []
    refusals = [(case.name, case.refusal) for case in cases if case.refusal is not None]
    accepted, num_tests, wrong = Counter[bool](), Counter[bool](), []
    for case in cases:
        if case.refusal is not None:
            continue
        started = time.perf_counter()
        try:
            matcher, _ = await grammars.matcher(case.grammar, "schema")
        except InvalidRequest as error:
            refusals.append((case.name, str(error)))
            continue
        finally:
            times_ms.append((time.perf_counter() - started) * 1e3)
        for test in case.tests:
            instance = json.dumps(test["data"], ensure_ascii=False, separators=(",", ":"))
            ids = text.tokenizer.encode(instance, add_special_tokens=False)
            copy = matcher.deep_copy()
            is_accepted = copy.consume_tokens(ids) and copy.is_accepting()
            num_tests[test["valid"]] += 1
            accepted[test["valid"]] += is_accepted
            if is_accepted is not test["valid"]:
                wrong.append(case.name)
    grammars.close()
    num_compiled = len(cases) - len(refusals)
    print(f"{len(cases)} schemas: {num_compiled} compiled, {len(refusals)} refused ({len(refusals) / len(cases):.1%})")
    print(
        f"compiling: p50 {percentile(times_ms, 50):.2f} ms, p99 {percentile(times_ms, 99):.2f} ms, longest {max(times_ms):.1f} ms"
    )
    for is_valid, words in ((True, "valid instances accepted"), (False, "other instances rejected")):
        right = accepted[True] if is_valid else num_tests[False] - accepted[False]
        share = f"{right / num_tests[is_valid]:.2%}" if num_tests[is_valid] else "none"
        print(f"{words}: {right} of {num_tests[is_valid]} ({share})")
    if wrong:
        print(f"  wrong under {', '.join(sorted(set(wrong))[:8])}")
    for reason, count in Counter(_without_names(refusal) for _, refusal in refusals).most_common():
        print(f"  {count:4} {reason}")


def _without_names(refusal: str) -> str:
    return " ".join(refusal.split())[:110]


# ---- answers ---------------------------------------------------------------------------------------------------------------


async def answer_all(cases: Sequence[Case], built: Built, at_once: int, max_tokens: int) -> bool:
    """Whether every answer that came to its end matches its schema."""
    from jsonschema.validators import Draft202012Validator, validator_for

    engine = asyncio.create_task(built.engine.run())
    turns = asyncio.Semaphore(at_once)
    outcomes = Counter[str]()

    async def answer(number: int, case: Case) -> tuple[Case, str, Delta | None]:
        question = f"Give an example of JSON that matches this schema:\n{json.dumps(case.schema)[:2000]}"
        ids = built.text.encode_chat([{"role": "user", "content": question}])
        params = SamplingParams(temperature=0.8, max_new_tokens=max_tokens, seed=number)
        async with turns:
            try:
                guidance = Guidance(case.grammar, "schema")
                mailbox = await built.engine.submit(GenerateRequest(f"{number}", tuple(ids), params, guidance=guidance))
            except InvalidRequest:
                return case, "refused", None
            delta = await collect(mailbox)
        if delta.finish_reason is not FinishReason.STOP:
            return case, f"ended: {delta.error}" if delta.error else "cut", delta
        try:
            instance = json.loads(built.text.tokenizer.decode(delta.token_ids))
        except ValueError as error:
            return case, f"no JSON: {error}", delta
        kind = validator_for(case.schema, default=Draft202012Validator)
        mistake = next(iter(kind(case.schema, format_checker=kind.FORMAT_CHECKER).iter_errors(instance)), None)
        return case, "matches" if mistake is None else f"does not match: {mistake.message[:200]}", delta

    async def noted(number: int, case: Case) -> tuple[Case, str, Delta | None]:
        found = await answer(number, case)
        word = found[1].partition(":")[0]
        outcomes[word if word in ("matches", "cut", "refused", "ended") else "wrong"] += 1
        if outcomes.total() % 20 == 0 or found[1] not in ("matches", "cut"):
            shown = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
            print(f"{time.perf_counter() - started:6.0f} s: {case.name} {found[1]}; {shown}", file=sys.stderr, flush=True)
        return found

    started = time.perf_counter()
    done = await asyncio.gather(*(noted(number, case) for number, case in enumerate(cases)))
    seconds = time.perf_counter() - started
    engine.cancel()
    await asyncio.gather(engine, return_exceptions=True)
    deltas = [delta for _, _, delta in done if delta is not None]
    num_tokens, num_jumped = sum(len(delta.token_ids) for delta in deltas), sum(delta.num_jumped for delta in deltas)
    num_finished = outcomes["matches"] + outcomes["wrong"]
    print(f"{len(deltas)} answers in {seconds:.1f} s: {num_tokens} tokens, {num_jumped / max(1, num_tokens):.1%} of them jumped")
    print(f"came to their end: {num_finished} ({num_finished / max(1, len(deltas)):.1%}); of those {outcomes['matches']} match")
    print(f"cut by the limit: {outcomes['cut']}; ended by an error: {outcomes['ended']}; refused: {outcomes['refused']}")
    for case, outcome, _ in done:
        if outcome not in ("matches", "cut", "refused"):
            print(f"  {case.name}: {outcome}")
    return not outcomes["wrong"]


# ---- serve -----------------------------------------------------------------------------------------------------------------


class Serving:
    """One server, and rounds of the three workloads on it."""

    def __init__(self, server: Server, tokens: range, result: Result) -> None:
        self.server, self.tokens, self.result = server, tokens, result
        self._rng = Random(7)
        self._num_schemas = 0

    def prompt(self, length: int) -> list[int]:
        """One that no other request has."""
        return random_tokens(self._rng, length, self.tokens)

    def add(self, workload: str, found: Figures) -> None:
        """Keep a round's figures and show them."""
        self.result.add(workload, found)
        print(f"  {workload:12} " + "  ".join(f"{name} {value:.5g}" for name, value in found.items()), flush=True)

    def throughput(self, at_once: int, *, with_bounded: bool) -> None:
        """Workload e. Constrained answers are as long as free ones: their schema has no end."""
        ways: dict[str, dict[str, Any]] = {
            "e.free": {},
            "e.masked": {"json_schema": RECORDS, "jump_forward": False},
            "e.jumping": {"json_schema": RECORDS},
            **({"e.bounded": {"json_schema": ORDERS, "jump_forward": False}} if with_bounded else {}),
        }
        for name, more in ways.items():
            bodies = [completion(self.server.model, self.prompt(PROMPT_LEN), OUTPUT_LEN) for _ in range(REQUESTS)]
            asks = [ask({**body, "temperature": 0.8, **more}) for body in bodies]
            self.add(name, figures(drive(self.server.port, asks, at_once=at_once)))

    def first_tokens(self) -> None:
        """Workload new. A schema is new by the name of a key."""
        for name in ("new.free", "new.schema"):
            asks = []
            for _ in range(NEW_SCHEMAS):
                body = completion(self.server.model, self.prompt(64), 4)
                if name == "new.schema":
                    self._num_schemas += 1
                    schema = {**NESTED, "properties": {f"key_{self._num_schemas}": {"type": "string"}, **NESTED["properties"]}}
                    body |= {"json_schema": schema, "jump_forward": False}
                asks.append(ask(body))
            found = figures(drive(self.server.port, asks, at_once=1))
            self.add(name, {key: found[key] for key in ("ttft_p50_ms", "ttft_p99_ms")})

    def documents(self) -> None:
        """Workload nested."""
        prompts = [self.prompt(64) for _ in range(DOCUMENTS)]
        for name, may_jump in (("nested.walk", False), ("nested.jump", True)):
            seconds, steps, num_tokens = [], 0, 0
            for seed, prompt in enumerate(prompts):
                body = {
                    "model": self.server.model,
                    "prompt": prompt,
                    "max_tokens": 1024,
                    "temperature": 0.8,
                    "seed": seed,
                    "json_schema": NESTED,
                    "jump_forward": may_jump,
                }
                started = time.perf_counter()
                usage = self._post(body)["usage"]
                seconds.append(time.perf_counter() - started)
                num_tokens += usage["completion_tokens"]
                steps += usage["completion_tokens"] - usage["completion_tokens_details"]["jumped_tokens"]
            median = statistics.median(seconds)
            self.add(name, {"document_s": median, "tokens": num_tokens / DOCUMENTS, "steps_per_token": steps / num_tokens})

    def _post(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.server.port}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)


def summary(result: Result) -> str:
    """The ratios that the figures are for, from the medians of the rounds."""

    def median(workload: str, figure: str) -> float:
        return statistics.median(found[figure] for found in result.rounds[workload])

    free = median("e.free", "out_tok_s")
    later_ms = median("new.schema", "ttft_p50_ms") - median("new.free", "ttft_p50_ms")
    gain = median("nested.walk", "document_s") / median("nested.jump", "document_s")
    return "\n".join(
        (
            f"constrained / free, without jumps {median('e.masked', 'out_tok_s') / free:.3f}, with jumps "
            f"{median('e.jumping', 'out_tok_s') / free:.3f}, with bounded strings {median('e.bounded', 'out_tok_s') / free:.3f} "
            f"(free: {free:,.0f} tok/s)",
            f"first token under a new schema: {later_ms:+.1f} ms",
            f"nested document: {gain:.2f}x faster with jumps, {median('nested.jump', 'steps_per_token'):.3f} steps per token",
        )
    )


def serve(args: argparse.Namespace, flags: list[str]) -> None:
    """The third mode."""
    found = machine()
    print(shown(found))
    flags += ["--load-format", args.load_format] if args.load_format != "auto" else []
    result = Result(Path(args.model).name, found, notes={"flags": flags, "command": sys.argv})
    server = Server(args.model, flags)
    try:
        serving = Serving(server, random_range(args.model), result)
        warm = [completion(server.model, serving.prompt(64), 16) for _ in range(8)]
        drive(server.port, [ask({**body, "json_schema": NESTED}) for body in warm], at_once=8)
        for round in range(args.rounds):
            serving.throughput(args.at_once, with_bounded=round == 0)
            serving.first_tokens()
            serving.documents()
        result.notes["problems"] = server.problems()
    finally:
        server.close()
        result.save(args.json)
    print(summary(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    for mode in ("schemas", "answers"):
        one = modes.add_parser(mode)
        one.add_argument("file", type=Path)
        one.add_argument("--model", help="GGUF file or folder; else the default model")
        if mode == "answers":
            one.add_argument("--count", type=int, default=40, help="schemas, drawn from those that compile; 0: all")
            one.add_argument("--at-once", type=int, default=16)
            one.add_argument("--max-tokens", type=int, default=512)
    one = modes.add_parser("serve")
    one.add_argument("model", help="GGUF file or folder; fake: the server's made-up tokens")
    one.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    one.add_argument("--at-once", type=int, default=64)
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--json", help="where to write all figures")
    own, flags = split_arguments(sys.argv[1:])
    args = parser.parse_args(own)
    if args.mode == "serve":
        serve(args, flags)
        return
    cases = read_cases(args.file, closes_objects=args.mode == "answers")
    if args.mode == "schemas":
        asyncio.run(compile_all(cases, args.model))
        return
    cases = [case for case in cases if case.refusal is None]
    if args.count:
        cases = random.Random(0).sample(cases, min(args.count, len(cases)))
    built = build(config_of(args.model, flags))
    process.settle()
    try:
        is_right = asyncio.run(answer_all(cases, built, args.at_once, args.max_tokens))
    finally:
        built.close()
    raise SystemExit(0 if is_right else 1)


if __name__ == "__main__":
    main()
