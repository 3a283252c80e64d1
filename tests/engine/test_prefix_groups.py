"""Groups of rows that share pages, against all groupings there are; and the lines that a device reads."""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve.engine import prefix_groups
from streamserve.engine.prefix_groups import MIN_SHARED, PrefixGroup, fill_parts, find_groups

PAGE, TILE = 16, 64


def grown(parents: Sequence[int], lengths: Sequence[int], kept: Sequence[int]) -> list[list[int]]:
    """Page lists as the tree hands them out: row i takes its first kept[i] pages from row parents[i] < i, the rest is its own."""
    fresh = count(1000)
    rows: list[list[int]] = []
    for i, (parent, length, keep) in enumerate(zip(parents, lengths, kept, strict=True)):
        head = rows[parent % i][: min(keep, length)] if i else []
        rows.append(head + [next(fresh) for _ in range(length - len(head))])
    return rows


def shared_pages(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def shared_len(pages_of: list[list[int]], positions: Sequence[int], rows: Sequence[int], tile: int, page: int) -> int:
    """What may be read once for these rows, the slow way."""
    tokens = min(positions[row] for row in rows)
    for row in rows[1:]:
        tokens = min(tokens, shared_pages(pages_of[rows[0]], pages_of[row]) * page)
    tokens -= tokens % max(tile, page)
    return tokens if tokens >= MIN_SHARED else 0


def partitions(rows: list[int], most: int) -> Iterator[list[list[int]]]:
    if not rows:
        yield []
        return
    for rest in partitions(rows[1:], most):
        yield [[rows[0]], *rest]
        for i, group in enumerate(rest):
            if len(group) < most:
                yield [*rest[:i], [rows[0], *group], *rest[i + 1 :]]


def best_saving(pages_of: list[list[int]], positions: Sequence[int], most: int, tile: int, page: int) -> int:
    return max(
        sum((len(g) - 1) * shared_len(pages_of, positions, g, tile, page) for g in groups)
        for groups in partitions(list(range(len(pages_of))), most)
    )


@st.composite
def steps(draw: st.DrawFn, max_rows: int) -> tuple[list[list[int]], list[int]]:
    num = draw(st.integers(1, max_rows))
    lengths = draw(st.lists(st.integers(1, 60) | st.integers(30, 60), min_size=num, max_size=num))
    parents = draw(st.lists(st.integers(0, num), min_size=num, max_size=num))
    kept = draw(st.lists(st.integers(0, 60) | st.integers(16, 40), min_size=num, max_size=num))
    unused = draw(st.lists(st.integers(0, 3 * PAGE), min_size=num, max_size=num))
    return grown(parents, lengths, kept), [max(n * PAGE - u, 0) for n, u in zip(lengths, unused, strict=True)]


@settings(max_examples=150, deadline=None)
@given(step=steps(7), most=st.integers(2, 8), tile=st.sampled_from([8, 16, 64]))
def test_groups_are_right_and_save_at_least_half_of_what_is_possible(
    step: tuple[list[list[int]], list[int]], most: int, tile: int
) -> None:
    pages_of, positions = step
    groups = find_groups(pages_of, positions, page_size=PAGE, tile_len=tile, max_rows=most)
    members = [row for group in groups for row in group.rows]
    assert len(members) == len(set(members))
    for group in groups:
        assert 2 <= len(group.rows) <= most
        assert MIN_SHARED <= group.shared_len <= shared_len(pages_of, positions, group.rows, tile, PAGE)
        assert group.shared_len % tile == 0
    best = best_saving(pages_of, positions, most, tile, PAGE)
    assert 2 * sum(group.saved_len for group in groups) >= best


@settings(max_examples=50, deadline=None)
@given(step=steps(40), most=st.integers(2, 8))
def test_never_less_than_any_one_depth_saves(step: tuple[list[list[int]], list[int]], most: int) -> None:
    pages_of, positions = step
    groups = find_groups(pages_of, positions, page_size=PAGE, tile_len=TILE, max_rows=most)
    for tokens in range(MIN_SHARED, 60 * PAGE + 1, TILE):
        heads: dict[int, int] = {}
        for pages, position in zip(pages_of, positions, strict=True):
            if position >= tokens:
                heads[pages[tokens // PAGE - 1]] = heads.get(pages[tokens // PAGE - 1], 0) + 1
        flat = sum((n - -(-n // most)) * tokens for n in heads.values())
        assert sum(group.saved_len for group in groups) >= flat


def find(pages_of: list[list[int]], positions: list[int], most: int) -> list[tuple[list[int], int]]:
    groups = find_groups(pages_of, positions, page_size=PAGE, tile_len=TILE, max_rows=most)
    return sorted((sorted(group.rows), group.shared_len) for group in groups)


def nested(pair_len: int, own: int = 5) -> list[list[int]]:
    """Eight rows: all share 256 tokens, pairs share `pair_len`."""
    rows = []
    for i in range(8):
        pair = i // 2
        rows.append(
            [
                *range(16),
                *(1000 * (pair + 1) + k for k in range(16, pair_len // PAGE)),
                *(10**6 + 100 * i + k for k in range(own)),
            ]
        )
    return rows


def test_pairs_that_share_much_stay_pairs() -> None:
    pages_of = nested(2048)
    assert find(pages_of, [2048 + 70] * 8, 8) == [([2 * i, 2 * i + 1], 2048) for i in range(4)]


def test_pairs_that_share_little_more_than_all_do_are_given_up() -> None:
    pages_of = nested(320)
    assert find(pages_of, [320 + 70] * 8, 8) == [(list(range(8)), 256)]


def test_more_rows_than_fit_a_group_make_several() -> None:
    pages_of = [[*range(64), 1000 + i] for i in range(19)]
    found = find(pages_of, [1030] * 19, 8)
    assert sorted(len(rows) for rows, _ in found) == [3, 8, 8] and {length for _, length in found} == {1024}


def test_a_prefix_ends_before_every_member_and_within_whole_tiles() -> None:
    pages_of = [list(range(40)), list(range(40))]
    assert find(pages_of, [40 * PAGE, 321], 8) == [([0, 1], 320)]
    assert find(pages_of, [40 * PAGE, 319], 8) == [([0, 1], 256)]
    assert find(pages_of, [40 * PAGE, 255], 8) == []


@pytest.mark.parametrize("head", [1, 4, 12, 30])
def test_pages_computed_twice_and_shared_after_never_stretch_a_prefix(head: int) -> None:
    """The first pages of two rows differ, the ones behind are the same, then each row has its own."""
    tail = list(range(1000, 1020))
    found = find([[k + 100 * i for k in range(head)] + tail + [500 + i] * 9 for i in range(2)], [(head + 29) * PAGE] * 2, 8)
    for rows, length in found:
        assert rows == [0, 1] and head * PAGE < length <= (head + 20) * PAGE


def test_pages_longer_than_a_tile() -> None:
    groups = find_groups([[1, 2, 3], [1, 2, 4]], [400, 390], page_size=128, tile_len=64, max_rows=8)
    assert groups == [PrefixGroup((0, 1), 256)]


@pytest.mark.parametrize("most", [1, 8])
def test_rows_that_share_nothing_make_no_groups(most: int) -> None:
    assert find([[100 * i + k for k in range(50)] for i in range(5)], [800] * 5, most) == []


@settings(max_examples=100, deadline=None)
@given(step=steps(20), most=st.integers(2, 8), programs=st.integers(1, 300))
def test_lines_hold_every_row_once_in_parts_that_follow_one_another(
    step: tuple[list[list[int]], list[int]], most: int, programs: int
) -> None:
    pages_of, positions = step
    groups = find_groups(pages_of, positions, page_size=PAGE, tile_len=TILE, max_rows=most)
    parts = np.full((len(positions) + programs, most + 3), 77, dtype=np.int32)
    fill_parts(groups, positions, parts, tile_len=TILE, programs=programs)
    wanted = {group.rows: group.shared_len for group in groups}
    seen: list[int] = []
    lines = iter(parts.tolist())
    for line in lines:
        *members, shared, split, splits = line
        if members[0] < 0:
            assert line == [-1] * (most + 3) and all(set(rest) == {-1} for rest in lines)  # nothing behind the first surplus
            break
        rows = tuple(row for row in members if row >= 0)
        assert shared == wanted.get(rows, 0) and (rows in wanted or len(rows) == 1)
        assert split == 0 and 1 <= splits <= prefix_groups._MAX_SPLITS
        assert [next(lines)[-2] for _ in range(splits - 1)] == list(range(1, splits))
        seen += rows
    assert sorted(seen) == list(range(len(positions)))


def test_work_is_cut_by_tiles() -> None:
    parts = np.empty((3 + 30, 8 + 3), dtype=np.int32)
    fill_parts([PrefixGroup((2, 0), 1024)], [1024 + 128, 640, 1024 + 128], parts, tile_len=TILE, programs=30)
    assert parts[0].tolist() == [2, 0, -1, -1, -1, -1, -1, -1, 1024, 0, 20]  # 16 + 2 + 2 tiles of 30
    assert parts[20].tolist() == [1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 10]
    assert (parts[30:] == -1).all()
