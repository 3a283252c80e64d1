"""`streamserve bench serve`: asks what a server takes, sends a workload, and shows what came back.

Owns the order of these. The server may be anybody's: nothing but OpenAI's routes is needed.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from streamserve.benchmark import workloads
from streamserve.benchmark.answers import STOPPED, Answer
from streamserve.benchmark.client import PROCESSES, Ask, drive
from streamserve.benchmark.figures import figures, timing
from streamserve.benchmark.probe import OPTIONAL, Dialect, find_dialect, find_ids, find_maker, find_model
from streamserve.benchmark.report import table
from streamserve.benchmark.target import Target, target_at
from streamserve.benchmark.texts import find_tokenizer
from streamserve.benchmark.workloads import Request
from streamserve.errors import ConfigError
from streamserve.keys import key_to_send

SHOWN_ERRORS = 3
INTERRUPTED = 130


def run(options: argparse.Namespace) -> int:
    """Measure; 1 when a request failed, 130 when Ctrl+C ended it early."""
    if options.output_file is not None:
        _append(options.output_file, "")  # not to find out behind an hour's measurement that it cannot be written
    target = _target(options)
    model = find_model(target, options.model)
    is_chat = options.backend.endswith("-chat")
    path = "/" + (options.endpoint or ("v1/chat/completions" if is_chat else "v1/completions")).removeprefix("/")
    tokenizer = find_tokenizer(options.tokenizer, model)
    ids = None if is_chat else find_ids(target, model, tokenizer)
    dialect, _ = find_dialect(target, Dialect(model, path, is_chat, options.extra_request_body), ids)
    maker = find_maker(target, dialect, ids, tokenizer)
    requests = workloads.make(maker, options)
    _warm_up(target, dialect, requests, options)
    answers = _drive(target, _asks(target, dialect, requests, options), options, "requests answered")
    ended = [number for number, answer in enumerate(answers) if answer.error != STOPPED]
    num_stopped = len(answers) - len(ended)
    requests, answers = [requests[number] for number in ended], [answers[number] for number in ended]
    promises = {name: most for one in options.goodput for name, most in one.items()}
    found = figures(answers, [one.num_prompt for one in requests], promises)
    about = _about(target, dialect, options)
    stopped = [f"stopped: {num_stopped:,} requests were not answered by then and are left out"] if num_stopped else []
    made = "the file's" if options.dataset_name in workloads.AS_THEY_STAND else maker.says
    print(table(about, found, [*stopped, f"prompts are {made}", *_notes(dialect, requests, answers)]))
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    for error, count in errors.most_common(SHOWN_ERRORS):
        print(f"streamserve: {'a request' if count == 1 else f'{count:,} requests'} failed: {error}", file=sys.stderr)
    if options.output_file is not None:
        _save(options, about, found, requests, answers)
    return INTERRUPTED if num_stopped else int(found["failed"] > 0)


def _target(options: argparse.Namespace) -> Target:
    key = key_to_send(os.environ)
    headers = (("Authorization", f"Bearer {key}"),) if key is not None else ()
    try:
        return target_at(options.base_url or f"http://{options.host}:{options.port}", headers)
    except ValueError as error:
        raise ConfigError(f"--base-url: {error}") from None


def _asks(target: Target, dialect: Dialect, requests: Sequence[Request], options: argparse.Namespace) -> list[Ask]:
    asks = []
    for one in requests:
        body = dialect.body(one.parts, one.num_output, ignores_eos=not options.disable_ignore_eos, messages=one.messages)
        asks.append(Ask(target.post(dialect.path, {**body, **(one.more or {})}), one.at_s))
    return asks


def _warm_up(target: Target, dialect: Dialect, requests: Sequence[Request], options: argparse.Namespace) -> None:
    """Requests of the same lengths that share nothing with those that count: one word before the prompt makes it another."""
    if options.warmup_requests > 0:
        some = requests[: options.warmup_requests]
        others = []
        for number, one in enumerate(some):
            parts = tuple(f"{number} {part}" if isinstance(part, str) else [*part[1:], *part[:1]] for part in one.parts)
            others.append(Request(parts, one.num_prompt, one.num_output, more=one.more))
        answers = _drive(target, _asks(target, dialect, others, options), options, "requests of the warm-up answered")
        if any(answer.error == STOPPED for answer in answers):
            raise KeyboardInterrupt
    if options.flush_cache:
        status, _ = target.ask("POST", "/flush_cache")
        if status != 200:
            raise ConfigError(f"--flush-cache: {target.url}/flush_cache answered with status {status}; leave it out")


def _drive(target: Target, asks: Sequence[Ask], options: argparse.Namespace, words: str) -> list[Answer]:
    at_once = min(options.max_concurrency or len(asks), len(asks))
    is_shown = sys.stderr.isatty()

    def progress(count: int) -> None:
        print(f"\r{count} of {len(asks)} {words}", end="" if count < len(asks) else "\n", file=sys.stderr, flush=True)

    processes = min(PROCESSES, os.cpu_count() or 1)
    limit_s = options.request_timeout_s
    return drive(target, asks, at_once=at_once, processes=processes, limit_s=limit_s, progress=progress if is_shown else None)


def _about(target: Target, dialect: Dialect, options: argparse.Namespace) -> list[tuple[str, str]]:
    if options.dataset_name == "mooncake":
        rate = "at the trace's times"
    else:
        rate = "no rate limit" if options.request_rate == float("inf") else f"{options.request_rate:g} requests a second"
    at_once = "any number at once" if options.max_concurrency is None else f"at most {options.max_concurrency} at once"
    return [
        ("Server", target.url + dialect.path),
        ("Model", dialect.model),
        ("Dataset", options.dataset_name),
        ("Load", f"{rate}, {at_once}"),
    ]


def _notes(dialect: Dialect, requests: Sequence[Request], answers: Sequence[Answer]) -> list[str]:
    """How far the numbers can be trusted."""
    notes = [f"the server refuses {OPTIONAL[name]}" for name in sorted(dialect.without) if name != "ids"]
    whole = [(one, answer) for one, answer in zip(requests, answers, strict=True) if answer.error is None]
    if any(not answer.has_usage for _, answer in whole):
        notes.append("the server counts no tokens: output tokens are the events of its streams, input tokens are as thought")
    short = sum(one.num_output is not None and answer.num_output < one.num_output for one, answer in whole)
    if short:
        notes.append(f"{short:,} of {len(whole):,} answers ended before the length that was asked for")
    return notes


def _save(
    options: argparse.Namespace,
    about: Sequence[tuple[str, str]],
    found: dict[str, Any],
    requests: Sequence[Request],
    answers: Sequence[Answer],
) -> None:
    line: dict[str, Any] = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **{name.lower(): value for name, value in about}}
    settings = {name: value for name, value in vars(options).items() if name != "bench"}
    line |= {"settings": {name: str(value) if value == float("inf") else value for name, value in settings.items()}, **found}
    if options.save_detailed:
        line["requests"] = [
            {
                "at_s": one.at_s,
                "input_tokens": answer.num_prompt if answer.has_usage else one.num_prompt,
                "output_tokens": answer.num_output,
                "cached_tokens": answer.num_cached,
                "error": answer.error,
                "text": answer.text,
                **({f"{name}_ms": value for name, value in asdict(timing(answer)).items()} if answer.error is None else {}),
            }
            for one, answer in zip(requests, answers, strict=True)
        ]
    _append(options.output_file, json.dumps(line) + "\n")


def _append(path: str, text: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--output-file: cannot write {path}: {error.strerror}") from None
