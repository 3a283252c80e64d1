"""What answers amount to."""

from streamserve.benchmark.answers import Answer
from streamserve.benchmark.figures import figures, timing
from streamserve.benchmark.report import WIDTH, table

ANSWERS = [
    Answer(10.0, (11.0, 12.0, 14.0), num_prompt=10, num_output=3, num_cached=5),
    Answer(10.5, (12.5, 15.0), num_prompt=30, num_output=2),
    Answer(9.0, error="429"),
    Answer(14.5, (15.0,), num_output=1, has_usage=False),
]


def test_rates_are_those_of_answered_requests() -> None:
    found = figures(ANSWERS, [1, 1, 1, 10], {})
    assert (found["completed"], found["failed"], found["duration"]) == (3, 1, 5.0)
    assert (found["total_input_tokens"], found["total_output_tokens"], found["tokens_counted_by"]) == (50, 6, "events")
    assert (found["request_throughput"], found["output_throughput"], found["total_throughput"]) == (0.6, 1.2, 11.2)
    assert found["cached_share"] == 0.1 and found["tokens_per_event"] == 1.0
    assert found["concurrency"] == (4 + 4.5 + 0.5) / 5 and found["max_concurrency_seen"] == 2


def test_latencies_are_those_of_tokens_and_events() -> None:
    assert timing(ANSWERS[0]).tpot == 1500.0
    found = figures(ANSWERS, [0] * 4, {})
    assert (found["mean_ttft_ms"], found["median_ttft_ms"], found["p99_ttft_ms"]) == (3500 / 3, 1000.0, 1980.0)
    assert (found["mean_tpot_ms"], found["max_itl_ms"], found["median_e2e_latency_ms"]) == (2000.0, 2500.0, 4000.0)


def test_good_answers_keep_every_promise() -> None:
    found = figures(ANSWERS, [0] * 4, {"ttft": 1000.0, "tpot": 1600.0})
    assert (found["good_requests"], found["goodput"]) == (2, 0.4)
    assert figures(ANSWERS, [0] * 4, {"e2e_latency": 3999.0})["good_requests"] == 1


def test_a_table_is_made_even_when_nothing_was_answered() -> None:
    found = figures([ANSWERS[2]], [3], {"ttft": 1.0})
    shown = table([("Model", "m")], found, ["a note"])
    assert "Failed requests:                    1" in shown and "TTFT" not in shown and "- a note" in shown


def test_a_table_shows_what_there_is() -> None:
    shown = table([], figures(ANSWERS, [0] * 4, {}), [])
    (line,) = (line for line in shown.splitlines() if line.startswith("TTFT"))
    assert line.split()[-6:] == ["1,166.67", "1,000.00", "1,800.00", "1,900.00", "1,980.00", "2,000.00"]
    assert "Cached input tokens (%):" in shown and "Guesses" not in shown
    assert len(max(shown.splitlines(), key=len)) == WIDTH
