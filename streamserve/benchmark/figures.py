"""What answers amount to: rates, latencies, and how many kept their promises. Numbers only; report.py shows them.

The names are those of vLLM's and SGLang's results. A request's latency goes from its sending to its last token; TPOT is the time
per token behind the first; ITL is the time between two events of a stream, which may bring several tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev
from typing import Any

from streamserve.benchmark.answers import Answer

PERCENTILES = (90, 95, 99)
LATENCIES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token",
    "itl": "Inter-Token Latency",
    "e2e_latency": "End to End",
}


def percentile(values: Iterable[float], percent: float) -> float:
    """The value that `percent` of the others do not exceed: between two ranks a line is drawn, as numpy and the peers do."""
    ordered = sorted(values)
    rank = percent / 100 * (len(ordered) - 1)
    below = int(rank)
    return ordered[below] + (rank - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])


@dataclass(frozen=True, slots=True)
class Timing:
    """One whole answer's latencies, in ms."""

    ttft: float
    tpot: float | None  # of an answer of one token there is none
    itl: tuple[float, ...]
    e2e_latency: float


def timing(answer: Answer) -> Timing:
    """See Timing."""
    first, last = answer.events_s[0], answer.events_s[-1]
    return Timing(
        (first - answer.sent_s) * 1e3,
        (last - first) / (answer.num_output - 1) * 1e3 if answer.num_output > 1 else None,
        tuple((later - before) * 1e3 for before, later in zip(answer.events_s, answer.events_s[1:], strict=False)),
        (last - answer.sent_s) * 1e3,
    )


def figures(answers: Sequence[Answer], guessed_prompts: Sequence[int], goodput: Mapping[str, float]) -> dict[str, Any]:
    """Everything about a run. `guessed_prompts`: tokens of each prompt, for servers that do not count. `goodput`: the most ms
    that a good answer may take, by latency."""
    whole = [answer for answer in answers if answer.error is None]
    timings = [timing(answer) for answer in whole]
    num_prompt = sum(
        answer.num_prompt if answer.has_usage else guessed
        for answer, guessed in zip(answers, guessed_prompts, strict=True)
        if answer.error is None
    )
    num_output = sum(answer.num_output for answer in whole)
    found: dict[str, Any] = {
        "completed": len(whole),
        "failed": len(answers) - len(whole),
        "total_input_tokens": num_prompt,
        "total_output_tokens": num_output,
        "tokens_counted_by": "usage" if all(answer.has_usage for answer in whole) else "events",
    }
    if not whole:
        return found
    seconds = max(answer.events_s[-1] for answer in whole) - min(answer.sent_s for answer in whole)
    found |= {
        "duration": seconds,
        "request_throughput": len(whole) / seconds,
        "input_throughput": num_prompt / seconds,
        "output_throughput": num_output / seconds,
        "total_throughput": (num_prompt + num_output) / seconds,
        "concurrency": sum(one.e2e_latency for one in timings) / 1e3 / seconds,
        "max_concurrency_seen": _most_at_once(whole),
        "tokens_per_event": num_output / sum(len(answer.events_s) for answer in whole),
    }
    if any(answer.num_cached is not None for answer in whole):
        cached = sum(answer.num_cached or 0 for answer in whole)
        found |= {"total_cached_tokens": cached, "cached_share": cached / num_prompt if num_prompt else 0.0}
    if num_drafted := sum(answer.num_drafted for answer in whole):
        found["accepted_share"] = sum(answer.num_accepted for answer in whole) / num_drafted
    for name in LATENCIES:
        found |= _spread(name, _values(name, timings))
    if goodput:
        num_good = sum(is_good(one, goodput) for one in timings)
        found |= {"goodput": num_good / seconds, "good_requests": num_good}
    return found


def _values(name: str, timings: Sequence[Timing]) -> list[float]:
    if name == "itl":
        return [value for one in timings for value in one.itl]
    return [value for one in timings if (value := getattr(one, name)) is not None]


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        f"mean_{name}_ms": fmean(values),
        f"median_{name}_ms": median(values),
        f"std_{name}_ms": pstdev(values),
        **{f"p{percent}_{name}_ms": percentile(values, percent) for percent in PERCENTILES},
        f"max_{name}_ms": max(values),
    }


def is_good(one: Timing, goodput: Mapping[str, float]) -> bool:
    """Whether every latency that was promised was kept. An answer of one token has no TPOT to keep."""
    return all((getattr(one, name) or 0.0) <= most for name, most in goodput.items())


def _most_at_once(answers: Sequence[Answer]) -> int:
    """The most requests that were under way at one moment."""
    changes = sorted(change for answer in answers for change in ((answer.sent_s, 1), (answer.events_s[-1], -1)))
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
