"""Comparing runs of tokens."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.cache.keys import common_len, edge, pack


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 5), st.sampled_from((list, tuple, pack)))
def test_the_common_length_is_found_wherever_two_runs_part(
    differs_at: int, num_ours: int, num_theirs: int, start: int, kind: type[list[int]]
) -> None:
    ours = pack(range(num_ours))
    theirs = [token if token != differs_at else 9999 for token in range(num_theirs)]
    expected = min(num_ours, num_theirs, differs_at)
    assert common_len(ours, kind([7] * start + theirs), start, start + num_theirs) == expected


def test_the_common_length_ends_at_the_limit() -> None:
    tokens = list(range(500))
    assert common_len(pack(tokens), tokens, 0, 130) == 130
    assert common_len(pack(tokens), tokens, 0, 0) == 0


def test_packing_keeps_every_32_bit_token_of_any_kind_of_run() -> None:
    tokens = [0, 1, 49151, 2**31 - 1]
    assert pack(tokens) == pack(tuple(tokens)) == pack(array("i", tokens)) == array("i", tokens)
    assert pack(array("q", tokens)) == array("i", tokens)


@pytest.mark.parametrize("namespace", ["", "x"])
def test_only_the_first_edge_of_a_path_knows_the_namespace(namespace: str) -> None:
    assert edge(namespace, 0, 5) == (namespace, 5)
    assert edge(namespace, 1, 5) == 5
