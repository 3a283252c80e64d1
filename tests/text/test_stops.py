"""Stop strings in a text that arrives in pieces."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve.errors import InvalidRequest
from streamserve.text.stops import StopStrings

LETTERS = "ab界"


def run(stops: list[str], chunks: list[str], *, include_stop: bool = False) -> tuple[list[str], str | None]:
    """What is shown after each piece, and what stopped the text."""
    search = StopStrings(stops, include_stop=include_stop)
    shown = [search.push(chunk)[0] for chunk in chunks]
    return [*shown, search.flush()], search.matched


def brute_force(stops: list[str], text: str) -> tuple[str, str | None]:
    for start in range(len(text)):
        for stop in sorted(stops, key=len):
            if text[start : start + len(stop)] == stop:
                return text[:start], stop
    return text, None


def cut(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(min(at, len(text)) for at in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(borders)]


@settings(deadline=None)
@given(
    st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=4),
    st.text(LETTERS, max_size=20),
    st.lists(st.integers(0, 20), max_size=8),
    st.booleans(),
)
def test_result_is_that_of_a_search_in_the_whole_text(stops: list[str], text: str, cuts: list[int], include: bool) -> None:
    before, stop = brute_force(stops, text)
    shown, matched = run(stops, cut(text, cuts), include_stop=include)
    assert ("".join(shown), matched) == (before + stop if include and stop else before, stop)


def test_beginning_of_a_stop_string_is_held_back_until_it_fails() -> None:
    assert run(["\n\nUser:"], ["Hi", "\n", "\nUs", "a", "ge"]) == (["Hi", "", "", "\n\nUsa", "ge", ""], None)


def test_nothing_of_the_stop_string_is_shown() -> None:
    assert run(["END"], ["one E", "N", "D two"]) == (["one ", "", "", ""], "END")


def test_held_text_is_given_back_at_the_end() -> None:
    assert run(["END"], ["one EN"]) == (["one ", "EN"], None)


def test_inner_stop_string_counts_once_the_outer_one_has_failed() -> None:
    assert run(["abcd", "bc"], ["abc", "d"]) == (["", "", ""], "abcd")
    assert run(["abcd", "bc"], ["abc", "x"]) == (["", "a", ""], "bc")
    assert run(["abcd", "bc"], ["abc"]) == (["", "a"], "bc")


def test_text_after_the_match_is_ignored() -> None:
    search = StopStrings(["."])
    assert search.push("a.b") == ("a", ".")
    assert search.push("c.d") == ("", ".")
    assert search.flush() == ""


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty") as caught:
        StopStrings(["x", ""])
    assert caught.value.param == "stop"
