"""Which decode rows share their first pages, and how attention's work on them is cut: StepInputs.parts_PR as plain integers.

Knows page numbers and positions; neither requests nor the tree, and no torch. It relies on one property of the tree: two rows
have the same page at an index only if their tokens up to its end are the same, so that either may read the other's pages up to
there. Nearly always those are the same pages, so that how far they reach is found by bisection. (Two requests that computed the
same prompt at the same time keep a page of their own for it; bisection may then find less than there is, never more.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from operator import itemgetter
from typing import Any

MIN_SHARED = 256  # tokens: what a shorter prefix saves is less than what its group costs
_MAX_SPLITS = 64  # parts of a group that attention can merge


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Decode rows, by their place in the step, that may read `shared_len` tokens from the pages of the first of them."""

    rows: tuple[int, ...]
    shared_len: int

    @property
    def saved_len(self) -> int:
        """Tokens that need not be read again."""
        return (len(self.rows) - 1) * self.shared_len


def find_groups(
    pages_of: Sequence[Sequence[int]], positions: Sequence[int], *, page_size: int, tile_len: int, max_rows: int
) -> list[PrefixGroup]:
    """Groups of 2 to `max_rows` rows that share at least MIN_SHARED tokens, a multiple of `tile_len`, in pages that all of them
    have filled (`positions`: tokens of each row in KV). Rows that are in no group share nothing worth while. Groups stay valid
    while rows keep their places, as positions grow.

    They save at least half of what the best grouping would, and no less than the best that makes groups of the rows below some
    nodes of the tree of prefixes without mixing nodes."""
    assert page_size % tile_len == 0 or tile_len % page_size == 0
    if max_rows < 2:
        return []
    unit = max(page_size, tile_len)
    lowest = -(-MIN_SHARED // unit)
    finder = _Finder(pages_of, [position // unit for position in positions], unit // page_size, max_rows)
    found: list[PrefixGroup] = []
    for rows in finder.alike([i for i, units in enumerate(finder.units) if units >= lowest], lowest):
        if len(rows) > 1:
            groups, _ = finder.solve(rows, lowest)
            found += [PrefixGroup(tuple(members), units * unit) for members, units in groups]
    return found


_Group = tuple[list[int], int]  # rows, units shared


class _Finder:
    """Walks the tree of prefixes, in units: the least number of tokens that is whole pages and whole tiles."""

    def __init__(self, pages_of: Sequence[Sequence[int]], units: list[int], step: int, max_rows: int) -> None:
        self._pages_of = pages_of
        self.units = units  # of each row, complete
        self._step = step  # pages of a unit
        self._max_rows = max_rows

    def alike(self, rows: list[int], depth: int) -> list[list[int]]:
        """Rows by their first `depth` units, of which each has so many."""
        at, pages_of = depth * self._step - 1, self._pages_of
        buckets: dict[int, list[int]] = {}
        for row in rows:
            buckets.setdefault(pages_of[row][at], []).append(row)
        return list(buckets.values())

    def solve(self, rows: list[int], depth: int) -> tuple[list[_Group], list[int]]:
        """Groups among rows that share `depth` units, and the rows left over. From the end of one row's path to its beginning:
        what branches off there is solved by itself, then joined with what came from below."""
        if len(rows) == 1:
            return [], rows
        units = self.units
        path = rows[len(rows) // 2]  # any will do; the first of many that branch off one after another would be the slowest
        branches: dict[int, list[int]] = {}
        for row in rows:
            if row != path:
                branches.setdefault(self._shared(path, row, depth), []).append(row)
        if len(rows) == 2:
            return [(rows, next(iter(branches)))], []
        groups: list[_Group] = []
        single = [path]
        for at in sorted(branches, reverse=True):
            branch = branches[at]
            single += [row for row in branch if units[row] == at]
            for alike in self.alike([row for row in branch if units[row] > at], at + 1):
                more, alone = self.solve(alike, at + 1)
                groups += more
                single += alone
            groups, single = self._join(groups, single, at)
        return groups, single

    def _shared(self, a: int, b: int, low: int) -> int:
        """Units that two rows share, of which `low` are known."""
        high, step = min(self.units[a], self.units[b]), self._step
        pages_a, pages_b = self._pages_of[a], self._pages_of[b]
        while low < high:
            middle = (low + high + 1) // 2
            if pages_a[middle * step - 1] == pages_b[middle * step - 1]:
                low = middle
            else:
                high = middle - 1
        return low

    def _join(self, groups: list[_Group], single: list[int], depth: int) -> tuple[list[_Group], list[int]]:
        """Groups of `depth` units out of single rows, and out of deeper groups where giving those up saves more."""
        most = self._max_rows
        by_loss = sorted((g for g in groups if len(g[0]) < most), key=lambda g: (len(g[0]) - 1) * g[1] / len(g[0]))
        count, lost, best, given_up = len(single), 0, self._saved(len(single), depth), 0
        for i, (members, units) in enumerate(by_loss):
            count += len(members)
            lost += (len(members) - 1) * units
            if (saved := self._saved(count, depth) - lost) > best:
                best, given_up = saved, i + 1
        if best == 0:
            return groups, single
        pool = [row for members, _ in by_loss[:given_up] for row in members] + single
        kept = by_loss[given_up:] + [group for group in groups if len(group[0]) == most]
        cut = [pool[at : at + most] for at in range(0, len(pool), most)]
        alone = cut.pop() if len(cut[-1]) == 1 else []
        return kept + [(members, depth) for members in cut], alone

    def _saved(self, count: int, depth: int) -> int:
        return (count - ceil(count / self._max_rows)) * depth


def fill_parts(groups: Sequence[PrefixGroup], positions: Sequence[int], parts_PR: Any, *, tile_len: int, programs: int) -> None:
    """Write StepInputs.parts_PR (an int32 array of at least len(positions) + `programs` lines) for these groups, and a group of
    its own for every other row. About `programs` parts go to the groups by their numbers of tiles; they stay right as positions
    grow, but are balanced for those given."""
    max_rows = parts_PR.shape[1] - 3
    assert len(parts_PR) >= len(positions) + programs
    grouped = {row for group in groups for row in group.rows}
    todo = [(group.rows, group.shared_len) for group in groups]
    todo += [((row,), 0) for row in range(len(positions)) if row not in grouped]
    tiles = [shared // tile_len + sum(-((shared - positions[row]) // tile_len) for row in rows) for rows, shared in todo]
    all_tiles = max(sum(tiles), 1)
    lines: list[tuple[int, ...]] = []
    # The largest first: what is begun last should be short.
    for count, (rows, shared) in sorted(zip(tiles, todo, strict=True), key=itemgetter(0), reverse=True):
        # Rounded, for half a part more is cheaper than a second wave; not cut to the tiles there are, for rows grow.
        splits = min(max((2 * programs * count + all_tiles) // (2 * all_tiles), 1), _MAX_SPLITS)
        line = (*rows, *(-1,) * (max_rows - len(rows)), shared)
        lines += [(*line, split, splits) for split in range(splits)]
    parts_PR[: len(lines)] = lines
    parts_PR[len(lines) :] = -1
