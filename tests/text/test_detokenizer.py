"""Text of an answer while its tokens arrive."""

import random
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve.text.byte_tokenizer import END_OF_TURN, ByteTokenizer
from streamserve.text.detokenizer import Detokenizer
from streamserve.text.model import TextModel
from streamserve.text.tokenizer import Tokenizer, load_tokenizer
from tests.text.toys import sentencepiece_gguf

BYTES = ByteTokenizer()
# Runs of bytes that are near UTF-8: whole characters, cut ones, stray and forbidden bytes.
NEAR_TEXT = st.lists(
    st.one_of(
        st.text(max_size=3).map(str.encode),
        st.text(min_size=1, max_size=2).map(lambda text: text.encode()[:-1]),
        st.sampled_from([b"\x80", b"\xbf", b"\xc0\x80", b"\xe0\x80", b"\xed\xa0\x80", b"\xf0\x90", b"\xf4\x90\x80", b"\xff"]),
    ),
    max_size=8,
).map(b"".join)


def pieces(tokenizer: Tokenizer, groups: list[list[int]], prompt_ids: tuple[int, ...] = (), *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, prompt_ids=prompt_ids)
    return [*(detokenizer.push(group) for group in groups), detokenizer.finish()]


def is_begun(tail: bytes) -> bool:
    """Whether some bytes more would make these exactly one character."""
    for count in (1, 2, 3):
        for more in product((0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF), repeat=count):
            try:
                if len((tail + bytes(more)).decode()) == 1:
                    return True
            except UnicodeDecodeError:
                pass
    return False


def whole_text(text: bytes) -> str:
    """The text decoded at once, less a character that is only begun at its end."""
    cut = next((cut for cut in (3, 2, 1) if len(text) >= cut and is_begun(text[-cut:])), 0)
    return text[: len(text) - cut].decode("utf-8", "replace")


@settings(deadline=None)
@given(NEAR_TEXT, st.lists(st.integers(0, 30), max_size=10))
def test_text_is_that_of_one_whole_decode_however_tokens_are_grouped(text: bytes, cuts: list[int]) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    groups = [list(text[start:end]) for start, end in pairwise(borders)]
    assert "".join(pieces(BYTES, groups)) == whole_text(text)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from([*b"a !\x80\xff", *"🦙é世".encode(), *range(256, 263)]), max_size=24),
    st.lists(st.integers(0, 24), max_size=10),
    st.booleans(),
    st.frozensets(st.sampled_from([END_OF_TURN, 256]), max_size=2),
)
def test_control_tokens_between_parts_of_characters_change_nothing(
    ids: list[int], cuts: list[int], skip: bool, shows: frozenset[int]
) -> None:
    visible = [id for id in ids if not (skip and BYTES.is_special(id)) or id in shows]
    borders = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    detokenizer = Detokenizer(BYTES, skip_special_tokens=skip, shows=shows)
    shown = [detokenizer.push(ids[start:end]) for start, end in pairwise(borders)]
    assert "".join(shown) + detokenizer.finish() == whole_text(b"".join(map(BYTES.token_bytes, visible)))


def test_character_is_shown_once_and_only_when_whole(smollm: TextModel) -> None:
    text = "žluťoučký 🦙 世界 👩‍👩‍👧"
    ids = smollm.tokenizer.encode(text)
    shown = pieces(smollm.tokenizer, [[id] for id in ids])
    assert any("\ufffd" in smollm.tokenizer.id_to_text(id) for id in ids)  # some tokens are parts of characters
    assert "\ufffd" not in "".join(shown) and "".join(shown) == text


def test_answer_cut_off_anywhere_is_a_beginning_of_the_text(smollm: TextModel) -> None:
    text = "🦙世界 👩‍👩‍👧 ok"
    ids = smollm.tokenizer.encode(text)
    for end in range(len(ids) + 1):
        assert text.startswith("".join(pieces(smollm.tokenizer, [ids[:end]])))


def test_bytes_that_can_no_longer_become_a_character_are_shown_at_once() -> None:
    assert pieces(BYTES, [[0xF0, 0x9F], [0x41]]) == ["", "\ufffdA", ""]
    assert pieces(BYTES, [[0xFF]]) == ["\ufffd", ""]


def test_control_tokens_are_hidden_or_shown_as_text() -> None:
    ids = [*b"hi", END_OF_TURN, *b"!"]
    assert "".join(pieces(BYTES, [ids])) == "hi!"
    assert "".join(pieces(BYTES, [ids], skip=False)) == "hi<|im_end|>!"


def test_character_that_the_prompt_begins_is_finished_by_the_answer() -> None:
    llama = list("🦙".encode())
    assert pieces(BYTES, [llama[3:], list(b"!")], prompt_ids=(*b"hi ", *llama[:3])) == ["🦙", "!", ""]


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(sentencepiece_gguf(tmp_path / "toy.gguf"))


@pytest.mark.parametrize(("prompt", "answer"), [("the cat", " sat"), ("the", "ing"), ("", "the cat"), ("the ", "  s")])
def test_sentencepiece_answer_is_what_its_text_adds_to_the_prompt(sentencepiece: Tokenizer, prompt: str, answer: str) -> None:
    prompt_ids = sentencepiece.encode(prompt)  # "<s>" first: hidden, so an answer to it alone begins the text
    starts_text = sentencepiece.encode(answer, add_special_tokens=False)
    ids = sentencepiece.encode(answer, continues=True) if prompt else starts_text
    whole = sentencepiece.decode([*prompt_ids, *ids])
    assert whole == prompt + answer
    assert "".join(pieces(sentencepiece, [[id] for id in ids], tuple(prompt_ids))) == whole[len(prompt) :]


def test_sentencepiece_answer_does_not_depend_on_how_tokens_are_grouped(sentencepiece: Tokenizer) -> None:
    rng = random.Random(3)
    for _ in range(300):
        ids = rng.choices(range(sentencepiece.vocab_size), k=rng.randrange(1, 12))
        start = tuple(rng.choice([[], [1], sentencepiece.encode("the")]))
        cut = rng.randrange(len(ids) + 1)
        one_by_one = "".join(pieces(sentencepiece, [[id] for id in ids], start))
        assert "".join(pieces(sentencepiece, [ids[:cut], ids[cut:]], start)) == one_by_one
