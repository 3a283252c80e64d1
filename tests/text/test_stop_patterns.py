"""Regular expressions that end an answer: against a search that looks at everything, and within their bounds."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.errors import InvalidRequest
from streamserve.text.stop_patterns import MAX_MATCH, StopPatterns, StopRun
from streamserve.text.stops import stops_in

_ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\\d", "c"])
_PATTERNS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,2}", "{2,}", "*?"])).map(
            lambda it: f"(?:{it[0]}){it[1]}"
        ),
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda it: f"({it[0]}|{it[1]})"),
    ),
    max_leaves=6,
)


def slowly(pattern: str, text: str) -> str:
    """The text before the first match, by trying all of them."""
    for end in range(1, len(text) + 1):
        for start in range(end):
            if re.fullmatch(pattern, text[start:end], re.DOTALL):
                return text[:start]
    return text


@given(_PATTERNS, st.text("abc1\n", max_size=14), st.data())
def test_answer_ends_where_a_search_after_each_character_first_finds_something(
    pattern: str, text: str, data: st.DataObject
) -> None:
    if re.fullmatch(pattern, ""):
        with pytest.raises(InvalidRequest, match="matches the empty text"):
            StopPatterns([pattern])
        return
    run = StopRun(StopPatterns([pattern]))
    shown, rest = "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        shown, rest = shown + run.push(rest[:size])[0], rest[size:]
    assert shown + run.flush() == slowly(pattern, text)


@pytest.mark.parametrize(
    ("patterns", "strings", "text", "shown", "matched"),
    [
        ([r"\n\n+"], [], "one\n\ntwo", "one", r"\n\n+"),
        ([r"(?i)the end"], [], "and so The End.", "and so ", "(?i)the end"),
        ([r"\d{4}", r"[.!?]"], [], "In 1984. So", "In ", r"\d{4}"),
        ([r"[.!?] [A-Z]"], ["stop"], "a. b stop C", "a. b ", "stop"),
        ([r"[.!?] [A-Z]"], ["stop"], "a. B stop", "a", r"[.!?] [A-Z]"),
        ([r"x[0-9]+y"], ["stop"], "x12 x3", "x12 x3", None),
        ([r"<[^>]*>"], [], "a < b " + "c" * 300 + " > d", "a < b " + "c" * 300 + " > d", None),  # too long for a match
    ],
)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_patterns_and_strings_end_a_text(
    patterns: list[str], strings: list[str], text: str, shown: str, matched: str | None, size: int
) -> None:
    stops = stops_in(strings, StopPatterns(patterns))
    assert stops is not None
    found = "".join([stops.push(text[at : at + size])[0] for at in range(0, len(text), size)]) + stops.flush()
    assert (found, stops.matched) == (shown, matched)
    assert stops.push("more") == ("", matched) if matched else True


def test_no_more_is_held_back_than_the_longest_match() -> None:
    run = StopRun(StopPatterns(["<.*>"]))
    assert run.push("<" + "x" * (MAX_MATCH - 1)) == ("", None)
    assert run.push("x") == ("<" + "x" * MAX_MATCH, None) and run.push("> <>") == ("> ", "<.*>")
    kept = StopRun(StopPatterns(["b+"]), include_stop=True)
    assert kept.push("aab")[0] == "aab" and kept.matched == "b+"


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("(a|b)*", "matches the empty text"),
        ("a{500}b{600}", "over 1000 edges"),
        ("((a{30}){30}){30}", "over 1000 edges"),
        ("(((){9999}){9999}){9999}", "matches the empty text"),
        ("^a", r"the \^ at character 0 has no place"),
        ("a$", "has no place in a text"),
        (r"(a)\1", "back-reference"),
        ("(?=a)b", "look-around"),
        (r"\pL", "not supported"),
        ("[[:alpha:]]", "has another one inside"),
        ("[a-z&&b]", "operation on sets"),
        ("a(?i)b", "group"),
        ("(a", "not closed"),
        ("(?i:a)", "flags"),
    ],
)
def test_what_cannot_be_a_stop_pattern_is_refused(pattern: str, what: str) -> None:
    with pytest.raises(InvalidRequest, match=what) as refused:
        StopPatterns(["x", pattern], "sampling_params.stop_regex")
    assert refused.value.param == "sampling_params.stop_regex[1]"


def test_a_pattern_made_to_backtrack_costs_no_more_than_another() -> None:
    run = StopRun(StopPatterns(["(a+)+b|(a|a)*c"]))
    assert run.push("a" * 20_000)[0].count("a") >= 20_000 - MAX_MATCH  # a backtracking search would take years
