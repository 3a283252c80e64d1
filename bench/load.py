"""Load on a server of this machine, for benches: requests as they are mostly made, and the figures of what came back.

The client itself is the one of `streamserve bench` (streamserve/benchmark/client.py). Knows no workload and no server process.
"""

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

from streamserve.benchmark import client
from streamserve.benchmark.answers import Answer
from streamserve.benchmark.client import PROCESSES, Ask
from streamserve.benchmark.figures import percentile as percentile
from streamserve.benchmark.target import Target

Figures = dict[str, float]
MARK = b"data: "  # begins an event


def local(port: int) -> Target:
    """A server on this machine."""
    return Target("127.0.0.1", port)


def ask(body: dict[str, Any], *, at_s: float = 0.0, leaves_after: int | None = None, path: str = "/v1/completions") -> Ask:
    """A streamed request that ends with its usage."""
    whole = {**body, "stream": True, "stream_options": {"include_usage": True}}
    return Ask(local(0).post(path, whole), at_s, leaves_after)


def random_tokens(rng: Random, count: int, tokens: range) -> list[int]:
    """`count` token ids."""
    return [rng.randrange(tokens.start, tokens.stop) for _ in range(count)]


def completion(model: str, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    """The body of a greedy completion of exactly `max_tokens` tokens."""
    return {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}


def drive(port: int, asks: Sequence[Ask], *, at_once: int, processes: int = PROCESSES, limit_s: float = 300.0) -> list[Answer]:
    """Send everything, at most `at_once` at a time, each process its share; the answers in the order of the requests."""
    return client.drive(local(port), asks, at_once=at_once, processes=processes, limit_s=limit_s)


class Streams(client.Streams):
    """Answers that are streamed beside whatever else is measured, until they are told to stop."""

    def __init__(self, port: int, asks: Sequence[Ask]) -> None:
        super().__init__(local(port), asks)


# ---- figures --------------------------------------------------------------------------------------------------------


def failures(answers: Iterable[Answer]) -> list[str]:
    """What went wrong, one entry per failed request."""
    return [answer.error for answer in answers if answer.error is not None]


def figures(answers: Sequence[Answer]) -> Figures:
    """Rates over the time from the first request to the last event; times to the first token, and between events, in ms.

    Only whole answers count. Raises SystemExit when any request failed: its figures would not be worth reading."""
    if failed := failures(answers):
        raise SystemExit(f"{len(failed)} of {len(answers)} requests failed; the first: {failed[0]}")
    whole = [answer for answer in answers if not answer.has_left and answer.has_usage]
    if not whole:
        raise SystemExit("no request was answered to its end, with its usage")
    seconds = max(answer.events_s[-1] for answer in whole) - min(answer.sent_s for answer in whole)
    num_output, num_prompt = sum(answer.num_output for answer in whole), sum(answer.num_prompt for answer in whole)
    first_ms = [(answer.events_s[0] - answer.sent_s) * 1e3 for answer in whole]
    gaps_ms = [
        (later - before) * 1e3 for answer in whole for before, later in zip(answer.events_s, answer.events_s[1:], strict=False)
    ]
    per_token_ms = [
        (answer.events_s[-1] - answer.events_s[0]) / (answer.num_output - 1) * 1e3 for answer in whole if answer.num_output > 1
    ]
    found = {
        "requests": float(len(whole)),
        "seconds": seconds,
        "out_tok_s": num_output / seconds,
        "in_tok_s": num_prompt / seconds,
        "req_s": len(whole) / seconds,
        "ttft_p50_ms": percentile(first_ms, 50),
        "ttft_p99_ms": percentile(first_ms, 99),
        "cached_rate": sum(answer.num_cached or 0 for answer in whole) / num_prompt,
        "events_per_token": sum(len(answer.events_s) for answer in whole) / num_output,
    }
    if gaps_ms:
        found |= {f"itl_p{percent}_ms": percentile(gaps_ms, percent) for percent in (50, 99)}
        found |= {"itl_max_ms": max(gaps_ms), "itl_mean_ms": sum(gaps_ms) / len(gaps_ms)}
    if per_token_ms:
        found["tpot_p50_ms"] = percentile(per_token_ms, 50)
    return found
