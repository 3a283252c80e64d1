"""Figures and the bounds they are to meet."""

import pytest

from bench.report import LINES, Result, merged, table, verdict


def result(**rounds: list[float]) -> Result:
    return Result("llama8b", {"card": "A"}, {name: [{"out_tok_s": value} for value in values] for name, values in rounds.items()})


@pytest.mark.parametrize(
    ("figure", "value", "word"),
    [
        ("out_tok_s", 232.0, "ok"),
        ("out_tok_s", 231.9, "SHORT"),
        ("ttft_p50_ms", 9.0, "ok"),
        ("ttft_p50_ms", 9.1, "SHORT"),
    ],
)
def test_times_are_bounded_above_and_rates_below(figure: str, value: float, word: str) -> None:
    line = next(line for line in LINES if (line.workload, line.figure) == ("a", figure))
    assert verdict(line, "llama8b", value).split()[-1] == word
    assert verdict(line, "unknown", value) == ""


def test_starts_and_shares_are_bounded_the_right_way() -> None:
    at_most = {line.figure: line.is_at_most for line in LINES if line.bounds}
    assert at_most["warm_s"] and at_most["cold_s"] and at_most["itl_p99_ms"]
    assert not (at_most["cached_rate"] or at_most["ratio"] or at_most["req_s"])


def test_rounds_of_one_card_are_put_together_and_the_median_counts() -> None:
    other = Result("llama8b", {"card": "B"}, {"a": [{"out_tok_s": 1.0}]})
    first, second = merged([result(a=[231.0, 240.0]), other, result(a=[233.0])])
    assert second.machine == {"card": "B"}
    line = next(row for row in table(first).splitlines() if row.startswith("single stream"))
    assert line.split()[4:] == ["233", "231", "to", "240", ">=", "232", "ok", "3"]


def test_the_cache_is_compared_with_itself() -> None:
    both = Result("llama8b", {}, {"d": [{"req_s": 60.0}, {"req_s": 66.0}], "doff": [{"req_s": 21.0}]})
    assert next(row for row in table(both).splitlines() if "on / off" in row).split()[3:] == ["3", ">=", "3.7", "SHORT", "1"]
