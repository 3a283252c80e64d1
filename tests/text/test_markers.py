"""Markers in text that arrives in pieces."""

from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve.text.markers import find_first, first_letters, may_hold, open_at, pieces_of

MARKERS = st.lists(st.text("ab<◁", min_size=1, max_size=3), max_size=3)


@settings(deadline=None, max_examples=300)
@given(MARKERS, st.text("ab<◁xy", max_size=8), st.integers(0, 8))
def test_a_text_that_may_hold_no_marker_holds_none_and_begins_none(markers: list[str], text: str, start: int) -> None:
    start = min(start, len(text))
    is_any_found = find_first(text, markers, start)[1] is not None or open_at(text, markers, start) < len(text)
    if is_any_found:
        assert may_hold(text, first_letters(markers), start)
    assert may_hold(text, first_letters(markers), start) == any(marker[0] in text[start:] for marker in markers)


def test_pieces_are_the_text_however_long_it_is() -> None:
    for length in (0, 1, 4095, 4096, 4097, 9000):
        text = "".join(chr(65 + place % 26) for place in range(length))
        pieces = list(pieces_of(text))
        assert "".join(pieces) == text and all(0 < len(piece) <= 4096 for piece in pieces)
