"""Demanded calls: whether the arguments of every call match the schema of its tool's parameters.

    python bench/tools.py [--model MODEL] [--requests 100] [--at-once 8] [--max-tokens 1500] [-- FLAGS]

Chats with tools at temperature 0.9, to a server in a process of its own with the defaults a user gets: a call required or one
named, one call or several allowed, each asked twice, streamed and not. Calls are read as a client reads them; `jsonschema` judges
the arguments. Both of a pair must hold the same calls, for they have the same seed. Without --model the default model: it is
small and untrained in calls, so what is right about them is the grammar's doing.

Exit code 1 if an answer has no call, one that does not match, one of a tool that was not asked for, or differs from its twin.
"""

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.load import MARK
from bench.server import Server, split_arguments

LIMIT_S = 600
_TEXT = {"type": "string", "maxLength": 40}  # as long as it likes, a small model goes on to the end of its context
_PLACE = {
    "type": "object",
    "properties": {"city": _TEXT, "country_code": {"type": "string", "pattern": "^[A-Z]{2}$"}},
    "required": ["city", "country_code"],
}
_LINE = {
    "type": "object",
    "properties": {
        "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2}$"},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 9},
        "gift": {"type": "boolean"},
    },
    "required": ["sku", "quantity"],
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {"place": _PLACE, "unit": {"enum": ["celsius", "fahrenheit"]}, "days": {"type": "integer", "maximum": 14}},
        "required": ["place", "unit"],
    },
    "add": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]},
    "now": {"type": "object", "properties": {}},
    "place_order": {
        "type": "object",
        "properties": {
            "lines": {"type": "array", "items": _LINE, "minItems": 1, "maxItems": 3},
            "ship_to": {"$ref": "#/$defs/place"},
            "note": {"anyOf": [{"type": "null"}, _TEXT]},
            "due": {"type": "string", "format": "date"},
        },
        "required": ["lines", "ship_to", "note"],
        "$defs": {"place": _PLACE},
    },
    "search": {
        "type": "object",
        "properties": {
            "query": _TEXT,
            "filter": {
                "oneOf": [
                    {"type": "object", "properties": {"kind": {"const": "tag"}, "tag": _TEXT}, "required": ["kind", "tag"]},
                    {
                        "type": "object",
                        "properties": {"kind": {"const": "range"}, "low": {"type": "integer"}, "high": {"type": "integer"}},
                        "required": ["kind", "low", "high"],
                    },
                ]
            },
            "limit": {"type": ["integer", "null"], "minimum": 1, "maximum": 100},
        },
        "required": ["query", "filter"],
    },
}
SETS = (("get_weather",), ("add", "now"), ("get_weather", "add", "place_order"), ("search", "place_order"), tuple(PARAMETERS))


@dataclass(frozen=True, slots=True)
class Found:
    """One answer: its calls (name, arguments), and why it ended."""

    calls: tuple[tuple[str, str], ...]
    finish_reason: str


def body_of(number: int, model: str, max_tokens: int) -> dict[str, Any]:
    """The request of this number. Tools, choice and parallel calls take turns."""
    names = SETS[number % len(SETS)]
    is_named, parallel = number // len(SETS) % 2 == 1, (None, True, False)[number // 2 % 3]
    chosen = {"type": "function", "function": {"name": names[number // 7 % len(names)]}}
    question = f"Task {number}: what is the weather in Rome, what is {number} and 3, and please order two lamps."
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "tools": [{"type": "function", "function": {"name": name, "parameters": PARAMETERS[name]}} for name in names],
        "tool_choice": chosen if is_named else "required",
        "temperature": 0.9,
        "seed": number,
        "max_tokens": max_tokens,
        **({} if parallel is None else {"parallel_tool_calls": parallel}),
    }


def answer(port: int, body: Mapping[str, Any]) -> Found:
    """What came of a request, streamed or not."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as reply:
            if body.get("stream"):
                return _streamed(reply.readlines())
            choice = json.load(reply)["choices"][0]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{error.code}: {error.read()[:500]!r}") from None
    calls = [call["function"] for call in choice["message"]["tool_calls"] or ()]
    return Found(tuple((call["name"], call["arguments"]) for call in calls), choice["finish_reason"])


def _streamed(lines: list[bytes]) -> Found:
    calls: list[list[str]] = []
    reason = ""
    for line in lines:
        if not line.startswith(MARK) or line.startswith(MARK + b"[DONE]"):
            continue
        for choice in json.loads(line[len(MARK) :])["choices"]:
            for piece in choice["delta"].get("tool_calls") or ():
                if piece["index"] == len(calls):
                    calls.append(["", ""])
                call, function = calls[piece["index"]], piece["function"]
                call[0] += function.get("name") or ""
                call[1] += function.get("arguments") or ""
            reason = choice["finish_reason"] or reason
    return Found(tuple((name, arguments) for name, arguments in calls), reason)


def fault_of(body: Mapping[str, Any], found: Found) -> str | None:
    """What is wrong with an answer that came to its end."""
    from jsonschema import Draft202012Validator

    if found.finish_reason != "tool_calls" or not found.calls:
        return f"{len(found.calls)} calls, finish_reason {found.finish_reason}"
    is_named = body["tool_choice"] != "required"
    if (is_named or body.get("parallel_tool_calls") is False) and len(found.calls) > 1:
        return f"{len(found.calls)} calls where one was asked for"
    allowed = [tool["function"]["name"] for tool in body["tools"]]
    if is_named:
        allowed = [body["tool_choice"]["function"]["name"]]
    for name, arguments in found.calls:
        if name not in allowed:
            return f"a call of {name}"
        try:
            value = json.loads(arguments)
        except ValueError as error:
            return f"{name}: {error}: {arguments[:200]}"
        validator = Draft202012Validator(PARAMETERS[name], format_checker=Draft202012Validator.FORMAT_CHECKER)
        for mistake in validator.iter_errors(value):
            return f"{name}: {mistake.message[:200]}"
    return None


def check(server: Server, num_requests: int, at_once: int, max_tokens: int) -> bool:
    """Send everything, print what came of it; whether all of it is right."""
    bodies = [body_of(number, server.model, max_tokens) for number in range(num_requests // 2)]
    both = [{**body, "stream": is_streamed} for body in bodies for is_streamed in (False, True)]
    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        found = list(threads.map(lambda body: answer(server.port, body), both))
    seconds = time.perf_counter() - started
    counts: dict[str, Counter[str]] = {}
    is_right = True
    for number, (body, one) in enumerate(zip(both, found, strict=True)):
        choice = "required" if body["tool_choice"] == "required" else "named"
        ways = {None: "", True: ", parallel", False: ", not parallel"}[body.get("parallel_tool_calls")]
        count = counts.setdefault(f"{choice}{ways}, {'streamed' if body['stream'] else 'whole'}", Counter())
        fault = None if one.finish_reason == "length" else fault_of(body, one)
        if fault is None and body["stream"] and one != found[number - 1]:
            fault = f"differs from its twin: {one} and {found[number - 1]}"
        outcome = "cut" if one.finish_reason == "length" else "right" if fault is None else "wrong"
        count[outcome] += 1
        count["calls"] += len(one.calls)
        count["most"] = max(count["most"], len(one.calls))
        if fault is not None:
            is_right = False
            print(f"  request {number}: {fault}")
    total = sum(counts.values(), Counter[str]())
    print(f"{len(both)} requests in {seconds:.1f} s, {total['calls']} calls: {_shown(total)}")
    for way, count in sorted(counts.items()):
        print(f"  {way:34} {_shown(count)}; {count['calls']} calls, at most {count['most']}")
    return is_right


def _shown(count: Counter[str]) -> str:
    return f"{count['right']} answers right, {count['wrong']} wrong, {count['cut']} cut by max_tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="GGUF file or folder; else the default model")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=1500)
    own, flags = split_arguments(sys.argv[1:])
    args = parser.parse_args(own)
    server = Server(args.model, flags)
    try:
        is_right = check(server, args.requests, args.at_once, args.max_tokens)
        for problem in server.problems():
            print(problem)
    finally:
        server.close()
    raise SystemExit(0 if is_right else 1)


if __name__ == "__main__":
    main()
