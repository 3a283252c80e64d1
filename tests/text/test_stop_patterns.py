"""Regular expressions that end an answer: against a search that looks at everything, and within their bounds."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.errors import InvalidRequest
from streamserve.text.stop_patterns import MAX_MATCH, StopPatterns, StopRun
from streamserve.text.stops import stops_in

_ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\d", "c", "B", "[^A-Z]", r"[\W\d-]", "[]a]", r"\u00e9", "()", "}"])
_PATTERNS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,2}", "{2,}", "*?", "{0}", "{0,3}"])).map(
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
        for start in range(max(0, end - MAX_MATCH), end):
            if re.fullmatch(pattern, text[start:end], re.DOTALL):
                return text[:start]
    return text


@given(st.tuples(st.sampled_from(["", "", "(?i)"]), _PATTERNS).map("".join), st.text("abcAB1\n-]}éÉ", max_size=14), st.data())
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


def test_match_that_is_too_long_hides_none_that_began_later() -> None:
    text = "a" + "x" * 200 + "a" + "x" * 100 + "b."
    run = StopRun(StopPatterns(["a.*b"]))
    assert run.push(text)[0] + run.flush() == slowly("a.*b", text) == text[:201]


@pytest.mark.parametrize(("include_stop", "shown"), [(False, "a"), (True, "aEND")])
def test_stop_string_that_is_shown_holds_no_pattern(include_stop: bool, shown: str) -> None:
    stops = stops_in(["END"], StopPatterns(["N"]), include_stop=include_stop)
    assert stops is not None and stops.push("aENDx") == (shown, "END")


def test_of_two_patterns_that_end_together_the_longer_counts_then_the_first() -> None:
    assert StopRun(StopPatterns(["b", "ab", "[a]b"])).push("xab") == ("x", "ab")


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
        ("(|a){9999}b", "over 1000 edges"),
        ("a{2}{3}", r"the \{ at character 4 repeats what is repeated"),
        (r"\UFFFFFFFF", "is no character"),
        (r"[\d-z]", "a range that is none"),
        ("[+-[b]]", "has another one inside"),
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


def test_patterns_have_a_length_in_all_and_counts_that_are_bounded_cost_an_edge_or_two_each() -> None:
    with pytest.raises(InvalidRequest, match="2001 characters in all; at most 2000"):
        StopPatterns(["a" * 1000, "b" * 1001])
    assert StopRun(StopPatterns(["\n.{0,200}:"])).push("a\n" + "b" * 200 + ":c") == ("a", "\n.{0,200}:")


def test_what_takes_a_long_time_in_other_readers_is_compiled_at_once() -> None:
    for pattern in ("(" + "()" * 900 + "a){499}", "[" + "".join(f"{chr(256 + n)}-\uffff" for n in range(600)) + "]{400}"):
        StopPatterns([pattern, "(?i)b"])  # minutes, if each copy were read again


def test_a_pattern_made_to_backtrack_costs_no_more_than_another() -> None:
    run = StopRun(StopPatterns(["(a+)+b|(a|a)*c"]))
    assert run.push("a" * 20_000)[0].count("a") >= 20_000 - MAX_MATCH  # a backtracking search would take years
