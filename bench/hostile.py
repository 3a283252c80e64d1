"""What grammars made to hurt cost a server: each answered in time, and how much slower others' tokens come meanwhile.

    python bench/hostile.py [--model MODEL] [--rounds 3] [--tokens 256] [--senders 2] [--json OUT] [-- FLAGS]

A server in a process of its own, with the defaults a user gets. In each round four chats stream `--tokens` tokens one after
another: first alone, then while `--senders` clients send the hostile set over and over, at least once and no grammar twice.
Printed are p50, p99 and the longest of the times between two events of a chat, alone and beside, and their ratios; then of every
hostile request its longest time and what it was answered. Without --model the default model.

Exit code 1 if a hostile request is not answered within LIMIT_S or is answered as if the server were at fault; or if a chat fails.
"""

import argparse
import http.client
import json
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count, cycle
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.load import ask, completion, drive, figures, random_tokens
from bench.machine import machine, shown
from bench.report import Result
from bench.server import Server, random_range, split_arguments
from streamserve.benchmark.answers import Answer

CHATS = 4
LIMIT_S = 25.0  # a grammar compiles for at most 20 s (engine/grammar.py)
SALT = "s4lt00000000"  # in every body; another one each time, so that no grammar is there already
DEEP = "nested deeper than json can write"  # in its place stand brackets
SHOWN = ("itl_p50_ms", "itl_p99_ms", "itl_max_ms")
NAMES = ("answer", "status", "reason", "amount", "colour")


def _chained(length: int) -> dict[str, Any]:
    """Definitions that refer to each other, all of them to all that follow."""
    found = {
        f"d{n}": {"type": "object", "properties": {f"p{m}": {"$ref": f"#/$defs/d{m}"} for m in range(n + 1, min(n + 6, length))}}
        for n in range(length)
    }
    return {"$ref": "#/$defs/d0", "$defs": found}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for n in range(depth):
        schema = {"type": "object", "properties": {f"a{n}": schema, "b": {"type": "string", "maxLength": 50}}, "required": ["b"]}
    return schema


def _joined(depth: int) -> dict[str, Any]:
    """Alternatives that are all joined with each other."""
    names = [{"properties": {f"{side}{n}": {"type": "string"}}} for n in range(4) for side in "ab"]
    return {"allOf": [{"anyOf": names} for _ in range(depth)]}


_TREE = {"type": "object", "properties": {"left": {"$ref": "#/$defs/t"}, "right": {"$ref": "#/$defs/t"}, "v": {"type": "number"}}}
_LEAF = {"type": "object", "properties": {name: {"type": "string", "maxLength": 64} for name in NAMES}}


def _branch(n: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"const": f"k{n}"}, f"value{n}": {"type": "number"}}, "required": ["kind"]}


def _tool(n: int) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {f"x{n}": _LEAF, "n": {"type": "integer"}}, "required": ["n"]}
    return {"type": "function", "function": {"name": f"tool_{n}", "description": SALT, "parameters": parameters}}


def hostile_set() -> dict[str, dict[str, Any]]:
    """Bodies of chats by what hurts about them."""
    schemas: dict[str, Any] = {
        "10,000 branches": {"anyOf": [_branch(n) for n in range(10_000)]},
        "10,000 branches, one of": {"oneOf": [_branch(n) for n in range(10_000)]},
        "2,500 branches": {"anyOf": [_branch(n) for n in range(2_500)]},
        "10,000 constants": {"enum": [f"{n * 7919 % 10_007:x}" * 3 for n in range(10_000)]},
        "a tree without an end": {"$ref": "#/$defs/t", "$defs": {"t": _TREE}},
        "nested 45 deep": _nested(45),
        "nested 100,000 deep": {"items": DEEP},
        "150 definitions, chained": _chained(150),
        "8 to the 6th joined": _joined(6),
        "100,000 items": {"type": "array", "items": _LEAF, "minItems": 99_999, "maxItems": 100_000},
        "100,000 characters": {"type": "string", "minLength": 50_000, "maxLength": 100_000},
        "a range of primes": {"type": "number", "multipleOf": 0.000013, "minimum": 1.0000001, "maximum": 987654321.1234567},
        "a 5 MB constant": {"const": "x" * 5_000_000},
        "5 MB of properties": {"properties": {f"property_{n:06}": {"type": "string", "title": "t"} for n in range(90_000)}},
        "5 MB of titles": {"type": "string", "title": "t" * 5_000_000},
        "5 MB of numbers": {"enum": list(range(720_000))},
        "5 MB of references": {"anyOf": [{"$ref": "#/$defs/a"}] * 270_000, "$defs": {"a": {"type": "null"}}},
    }
    patterns = {
        "nested repeats": "^(a+)+$",
        "nested counts": "^(((a{0,99}){0,99}){0,99}){0,99}$",
        "a far look back": "^[ab]*a[ab]{24}$",
        "alternatives of alternatives": "^((a|aa|aaa)(b|bb|bbb)){1,200}$",
        "words counted": r"^(?:\S+\s+){0,199}\S+$",
        "many anywhere": "".join(f".*{letter}{letter}" for letter in "abcdefghij"),
    }
    forms: dict[str, dict[str, Any]] = {
        name: {"type": "json_schema", "json_schema": {"name": "x", "schema": one}} for name, one in schemas.items()
    }
    for name, pattern in patterns.items():
        schema = {"type": "string", "pattern": pattern}
        forms[f"pattern: {name}"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tags = [{"begin": f"<t{n}>", "schema": {**_LEAF, "title": SALT}, "end": f"</t{n}>"} for n in range(1000)]
    forms["1,000 tags"] = {"type": "structural_tag", "structures": tags, "triggers": ["<t"]}
    chats: dict[str, dict[str, Any]] = {name: {"response_format": _salted(form)} for name, form in forms.items()}
    chats |= {f"regex: {name}": {"regex": f"({pattern.strip('^$')})|{SALT}"} for name, pattern in patterns.items()}
    tools = [_tool(n) for n in range(1000)]
    chats["1,000 tools, one required"] = {"tools": tools, "tool_choice": "required"}
    chats["1,000 tools, free"] = {"tools": tools}
    chats["1,000 strict tools"] = {"tools": [{**one, "function": {**one["function"], "strict": True}} for one in tools]}
    hello = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    return {name: {**hello, **fields} for name, fields in chats.items()}


def _salted(form: dict[str, Any]) -> dict[str, Any]:
    """The same form, in which the salt makes another grammar: a property or an alternative more."""
    if form["type"] != "json_schema":
        return form
    schema = {"anyOf": [{"const": SALT}, form["json_schema"]["schema"]]}
    definitions = schema["anyOf"][1].get("$defs")
    found = {**schema, "$defs": definitions} if definitions else schema
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": found}}


# ---- sending it ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Fate:
    """What became of one kind of hostile request."""

    num_sent: int = 0
    longest_s: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)
    text: str = ""  # of the last answer that was no 200


def bytes_of(body: dict[str, Any]) -> bytes:
    """A body as it is sent, but for its salt."""
    return json.dumps(body).encode().replace(json.dumps(DEEP).encode(), b'{"items":' * 100_000 + b"{}" + b"}" * 100_000)


def send_over_and_over(
    port: int, bodies: dict[str, bytes], senders: int, first: int, through: Event, stop: Event, out: Connection
) -> None:
    """The hostile clients, a process of their own. `through`: everything was sent once."""
    fates = {name: Fate() for name in bodies}
    salts = count(first)

    def sender(number: int) -> None:
        for name in cycle(list(bodies)[number::senders]):
            if stop.is_set():
                return
            body = bodies[name].replace(SALT.encode(), b"s%011d" % next(salts))
            started = time.perf_counter()
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4 * LIMIT_S)
                connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
                reply = connection.getresponse()
                status, text = str(reply.status), reply.read()
                connection.close()
            except OSError as error:
                status, text = type(error).__name__, str(error).encode()
            fate = fates[name]
            fate.num_sent += 1
            fate.longest_s = max(fate.longest_s, time.perf_counter() - started)
            fate.answers[status] += 1
            if status != "200":
                fate.text = text.decode("utf-8", "replace")
            if all(one.num_sent for one in fates.values()):
                through.set()

    threads = [Thread(target=sender, args=(number,)) for number in range(senders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out.send(fates)


class Hostility:
    """The hostile clients while they run."""

    def __init__(self, port: int, bodies: dict[str, bytes], senders: int, first: int) -> None:
        context = multiprocessing.get_context("fork")
        self._through, self._stop = context.Event(), context.Event()
        self._here, there = context.Pipe(duplex=False)
        arguments = (port, bodies, senders, first, self._through, self._stop, there)
        self._process = context.Process(target=send_over_and_over, args=arguments, daemon=True)
        self._process.start()
        there.close()

    @property
    def is_through(self) -> bool:
        """Whether everything was sent once."""
        return self._through.is_set()

    def end(self) -> dict[str, Fate]:
        """What became of all that was sent."""
        self._stop.set()
        fates: dict[str, Fate] = self._here.recv()
        self._process.join()
        return fates


class Chats:
    """Four chats at a time, two after each other."""

    def __init__(self, server: Server, model: str | None) -> None:
        self._server = server
        self._tokens = random_range(model)
        self._rng = Random(7)

    def drive(self, num_tokens: int) -> list[Answer]:
        """Have them answered."""
        bodies = [
            completion(self._server.model, random_tokens(self._rng, 64, self._tokens), num_tokens) for _ in range(2 * CHATS)
        ]
        return drive(self._server.port, [ask(body) for body in bodies], at_once=CHATS, processes=1, limit_s=600)


def report(fates: dict[str, Fate]) -> bool:
    """Print what became of them; whether all were answered in time and none failed for want of something of the server's."""
    is_right = True
    for name, fate in fates.items():
        message = _message_in(fate.text)
        faults = [f"later than {LIMIT_S:g} s"] if fate.longest_s > LIMIT_S else []
        if any(not status.startswith(("2", "4")) for status in fate.answers):
            faults.append("failed")
        is_right = is_right and not faults
        answers = ", ".join(f"{status} x{number}" for status, number in fate.answers.items())
        print(f"  {name:38} {fate.longest_s:6.2f} s  {answers:16} {' '.join((*faults, *message.split()))[:110]}")
    return is_right


def _message_in(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="GGUF file or folder; else the default model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--senders", type=int, default=2)
    parser.add_argument("--json", help="where to write all figures")
    own, flags = split_arguments(sys.argv[1:])
    args = parser.parse_args(own)
    found = machine()
    print(shown(found))
    result = Result(Path(args.model or "default").name, found, notes={"flags": flags, "command": sys.argv})
    bodies = {name: bytes_of(body) for name, body in hostile_set().items()}
    server = Server(args.model, flags)
    fates = {name: Fate() for name in bodies}
    try:
        chats = Chats(server, args.model)
        chats.drive(16)  # warm
        for number in range(args.rounds):
            alone = chats.drive(args.tokens)
            hostility = Hostility(server.port, bodies, args.senders, number * 1_000_000)
            beside = chats.drive(args.tokens)
            while not hostility.is_through:
                beside += chats.drive(args.tokens)
            _add(fates, hostility.end())
            for name, answers in (("alone", alone), ("beside", beside)):
                one = figures(answers)
                result.add(name, one)
                print(f"  {name:8} " + "  ".join(f"{key} {one[key]:.4g}" for key in SHOWN), flush=True)
        result.notes["problems"] = server.problems()
        for problem in server.problems():
            print(f"  {problem[:300]}")
    finally:
        server.close()
        result.save(args.json)
    print(_ratios(result))
    raise SystemExit(0 if report(fates) else 1)


def _add(total: dict[str, Fate], more: dict[str, Fate]) -> None:
    for name, fate in more.items():
        kept = total[name]
        kept.num_sent += fate.num_sent
        kept.longest_s = max(kept.longest_s, fate.longest_s)
        kept.answers += fate.answers
        kept.text = fate.text or kept.text


def _ratios(result: Result) -> str:
    parts = []
    for key in SHOWN:
        beside, alone = (statistics.median(one[key] for one in result.rounds[name]) for name in ("beside", "alone"))
        parts.append(f"{key} x{beside / alone:.2f}")
    return "beside hostile requests / alone: " + "  ".join(parts)


if __name__ == "__main__":
    main()
