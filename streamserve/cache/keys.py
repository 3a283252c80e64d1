"""What the prefix tree compares: tokens within a namespace, packed so that thousands compare in microseconds.

Owns the packed form of tokens and how two runs of them are compared. Knows nothing of pages or nodes.
"""

from array import array
from collections.abc import Hashable, Sequence
from struct import pack as pack_struct
from typing import TypeAlias

Packed: TypeAlias = "array[int]"

_FIRST_CHUNK = 64
_CHUNK_GROWTH = 4


def pack(token_ids: Sequence[int]) -> Packed:
    """Tokens as 32-bit numbers in a row. An array of that kind is returned as it is: do not change it."""
    if isinstance(token_ids, array) and token_ids.typecode == "i":
        return token_ids
    # struct packs 8,000 tokens of a list in 75 us where array's own constructor takes 170 us.
    return array("i", pack_struct(f"{len(token_ids)}i", *token_ids))


def edge(namespace: str, position: int, token: int) -> Hashable:
    """Under what a node whose first token stands at `position` is filed in its parent.

    The namespace is part of the first edge of every path, so paths of two namespaces have no node in common.
    """
    return (namespace, token) if position == 0 else token


def common_len(packed: Packed, token_ids: Sequence[int], start: int, end: int) -> int:
    """How many tokens `packed` and `token_ids[start:end]` share from their beginnings.

    Compares in growing chunks: an early difference costs little, a long agreement one memory compare per chunk.
    """
    length = min(len(packed), end - start)
    done, size = 0, _FIRST_CHUNK
    while done < length:
        size = min(size, length - done)
        ours, theirs = packed[done : done + size], pack(token_ids[start + done : start + done + size])
        if ours != theirs:
            return done + _first_difference(ours, theirs)
        done += size
        size *= _CHUNK_GROWTH
    return length


def _first_difference(a: Packed, b: Packed) -> int:
    """Index of the first difference of two arrays of one length that are not equal, by bisection."""
    low, high = 0, len(a)  # a[:low] == b[:low] and a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
