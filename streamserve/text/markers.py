"""Finding markers in a text that arrives in pieces, such that where it was cut changes nothing.

Owns no state. Knows nothing of what the markers mean.
"""

from collections.abc import Iterable, Sequence

# Readers that look ahead for several markers take time by the length of what they hold, so they take long texts in pieces.
_PIECE_CHARS = 4_096


def find_first(text: str, markers: Sequence[str], start: int = 0) -> tuple[int, str | None]:
    """Where the earliest marker begins at or after `start`, and which; (len(text), None) without one. Of two that begin at the
    same place, the longer one.

    A marker that another one may still grow into (one begins with the other) is the caller's to avoid.
    """
    at, found = len(text), None
    for marker in markers:
        place = text.find(marker, start, at + len(marker))
        if place >= 0 and (place < at or (place == at and found is not None and len(marker) > len(found))):
            at, found = place, marker
    return at, found


def open_at(text: str, markers: Sequence[str], start: int = 0) -> int:
    """Where the earliest marker may have begun that the end of the text cuts off; len(text) if none may."""
    earliest = len(text)
    for marker in markers:
        at = max(start, len(text) - len(marker) + 1)
        while (at := text.find(marker[0], at, earliest)) >= 0:
            if marker.startswith(text[at:]):
                earliest = at
                break
            at += 1
    return earliest


def first_letters(markers: Iterable[str]) -> str:
    """The letters with which markers begin, each once."""
    return "".join({marker[0]: None for marker in markers})


def may_hold(text: str, letters: str, start: int = 0) -> bool:
    """Whether a marker that begins with one of these letters may stand, or have begun, at or after `start`. Nearly always none
    may, and this takes a fraction of the time of looking for each."""
    for letter in letters:  # noqa: SIM110 - a generator takes twice as long
        if text.find(letter, start) >= 0:
            return True
    return False


def pieces_of(text: str) -> Iterable[str]:
    """The text in pieces short enough to search again and again."""
    if 0 < len(text) <= _PIECE_CHARS:
        return (text,)
    return (text[start : start + _PIECE_CHARS] for start in range(0, len(text), _PIECE_CHARS))
