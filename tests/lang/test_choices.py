"""Choosing by log-probabilities: cases computed by hand, and what holds of every method whatever the numbers are."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.errors import InvalidRequest
from streamserve.lang.choices import (
    ChoicesSamplingMethod,
    greedy_token_selection,
    healed,
    mean_of,
    token_length_normalized,
    unconditional_likelihood_normalized,
)

METHODS = [token_length_normalized, greedy_token_selection, unconditional_likelihood_normalized]
# Paris: one likely token and a very unlikely one. antidisestablishmentarianism: many even ones.
ROWS = {"Paris": [-1.0, -9.0], "London": [-2.0, -2.0], "antidis": [-3.0, -0.1, -0.1, -0.1]}
ALONE = {"Paris": [None, -9.5], "London": [None, -1.0], "antidis": [None, -0.1, -0.1, -0.2]}


def entries(values: list[Any]) -> list[list[Any]]:
    return [[value, 7, "x"] for value in values]


def choose(method: ChoicesSamplingMethod, rows: dict[str, list[Any]], alone: dict[str, list[Any]]) -> Any:
    inputs = [entries(values) for values in rows.values()]
    return method(
        choices=list(rows),
        normalized_prompt_logprobs=[mean_of(one) for one in inputs],
        input_token_logprobs=inputs,
        output_token_logprobs=[[] for _ in rows],
        unconditional_token_logprobs=[entries(values) for values in alone.values()]
        if method.requires_unconditional_logprobs
        else None,
    )


def test_mean_over_tokens_takes_the_long_even_choice() -> None:
    chosen = choose(token_length_normalized, ROWS, ALONE)
    assert chosen.decision == "antidis"  # -0.825 against -5 and -2
    assert chosen.meta["normalized_prompt_logprobs"] == pytest.approx([-5.0, -2.0, -0.825])


def test_greedy_takes_the_likeliest_first_token() -> None:
    assert choose(greedy_token_selection, ROWS, ALONE).decision == "Paris"


def test_gain_over_the_unconditional_likelihood_decides() -> None:
    # Paris: (-1 + 0.5) / 2; London: (-2 - 1) / 2; antidis: (-3 + 0 + 0 + 0.1) / 4
    chosen = choose(unconditional_likelihood_normalized, ROWS, ALONE)
    assert chosen.decision == "Paris"
    assert chosen.meta["normalized_unconditional_prompt_logprobs"] == pytest.approx([-0.25, -1.5, -0.725])


def test_greedy_goes_on_with_the_mean_of_a_choice_that_another_begins_with() -> None:
    rows: dict[str, list[Any]] = {"no": [-1.0], "no, never": [-1.0, -0.5]}
    assert choose(greedy_token_selection, rows, rows).decision == "no, never"
    rows["no, never"][1] = -1.5
    assert choose(greedy_token_selection, rows, rows).decision == "no"


def test_method_that_needs_unconditional_likelihoods_says_so() -> None:
    with pytest.raises(InvalidRequest, match="unconditional_likelihood_normalized needs"):
        unconditional_likelihood_normalized(
            choices=["a"], normalized_prompt_logprobs=[0.0], input_token_logprobs=[entries([-1.0])], output_token_logprobs=[[]]
        )


@pytest.mark.parametrize(
    ("whole", "prompt", "start", "own"),
    [
        ([1, 2, 3, 4], [1, 2, 3], 1, [4]),  # nothing healed
        ([1, 2, 9], [1, 2, 3], 1, [9]),  # the last token grew into the choice
        ([1, 8, 4], [1, 2, 3], 1, [8, 4]),  # two did
        ([5, 6], [], 0, [5, 6]),  # no prompt
        ([1, 4, 5], [1], 0, [4, 5]),  # a prompt of one token
    ],
)
def test_token_of_the_prompt_counts_only_where_it_changed(
    whole: list[int], prompt: list[int], start: int, own: list[int]
) -> None:
    assert [entry[1] for entry in healed([[-1.0, id, ""] for id in whole[start:]], prompt, start)] == own


@given(st.data(), st.lists(st.lists(st.floats(-20, 0), min_size=1, max_size=4), min_size=1, max_size=5))
def test_order_of_the_choices_changes_nothing(data: st.DataObject, rows: list[list[float]]) -> None:
    named: dict[str, list[Any]] = {str(place): row for place, row in enumerate(rows)}
    alone: dict[str, list[Any]] = {name: [value / 2 for value in row] for name, row in named.items()}
    order = data.draw(st.permutations(list(named)))
    for method in METHODS:
        one = choose(method, named, alone)
        other = choose(method, {name: named[name] for name in order}, {name: alone[name] for name in order}).decision
        # Of equals the first is taken: then they have the same score, not the same name.
        matrix = one.meta.get("greedy_logprob_matrix")
        scores = {name: matrix[int(name)] if matrix else sum(row) / len(row) for name, row in named.items()}
        assert one.decision == other or scores[one.decision] == pytest.approx(scores[other])
        assert len(named) > 1 or one.decision == "0"
