"""What is known of one answer before it is sampled: thoughts and their ends, forced tokens, masks."""

import numpy as np
import pytest

from streamserve.engine.guide import Guide
from streamserve.messages import Guidance, ThoughtLimits
from tests.engine.words import END, END_THINK, ENDS, STOP, THINK, TOKENS, Words

WORDS = Words()
A, B = WORDS.encode("ab"[0])[0], WORDS.encode("b")[0]


class Script:
    """A grammar that takes one sequence of tokens, and forces those that `forces` says."""

    def __init__(self, *tokens: int, forces: int = 0, fails_at: int | None = None) -> None:
        self.left, self.forces, self.fails_at, self.taken = list(tokens), forces, fails_at, 0

    def consume_token(self, sampled_token: int, /) -> bool:
        is_right = bool(self.left) and sampled_token == self.left[0] and self.taken != self.fails_at
        self.taken += 1
        self.left = self.left[1:] if is_right else [-1]
        return is_right

    def compute_ff_tokens(self) -> list[int]:
        return self.left[: self.forces]

    def is_stopped(self) -> bool:
        return self.left in ([], [-1])

    def is_error(self) -> bool:
        return self.left == [-1]

    def get_error(self) -> str:
        return "no such token\n<state>" if self.is_error() else ""


def guide(thought: ThoughtLimits | None = None, matcher: Script | None = None, **more: object) -> Guide:
    return Guide(Guidance(thought=thought), matcher=matcher, token_bytes=TOKENS.__getitem__, end_ids=ENDS, **more)  # type: ignore[arg-type]


def limits(*, is_open: bool = True, max_tokens: int | None = None, end: bytes = b"</think>") -> ThoughtLimits:
    return ThoughtLimits(b"<think>", end, tuple(WORDS.encode(end.decode())), is_open, max_tokens)


def allowed(guide: Guide, filled: int = -1) -> set[int]:
    """Tokens of the mask, over what a matcher would have filled."""
    words_W = np.full(-(-len(TOKENS) // 32), filled, np.int32)
    guide.edit_mask(words_W)
    bits = np.unpackbits(words_W.view(np.uint8), bitorder="little")[: len(TOKENS)]
    return set(np.flatnonzero(bits).tolist())


def test_a_thought_ends_when_its_tokens_are_spent() -> None:
    thinking = guide(limits(max_tokens=3))
    assert thinking.begin() == []
    assert [thinking.took(A) for _ in range(3)] == [[], [], [END_THINK]]
    assert thinking.num_thought == 3 and not thinking.needs_mask
    assert thinking.took(A) == [] and thinking.num_thought == 3


def test_no_tokens_of_thought_end_it_before_it_begins() -> None:
    assert guide(limits(max_tokens=0)).begin() == [END_THINK]
    closed = guide(limits(is_open=False, max_tokens=0))
    assert closed.begin() == []
    assert closed.took(THINK) == [END_THINK]


def test_a_thought_that_ends_by_itself_is_not_ended_again() -> None:
    thinking = guide(limits(max_tokens=3))
    thinking.begin()
    assert [thinking.took(token) for token in (A, A, END_THINK, A, A, A)] == [[]] * 6
    assert thinking.num_thought == 2


@pytest.mark.parametrize("end", [b"</think>", b"is over"])
def test_markers_of_many_tokens_count_for_nothing(end: bytes) -> None:
    thinking = guide(ThoughtLimits(b"<think>", end, (A,), True))
    thinking.begin()
    for token in [*WORDS.encode("some <thought"), *(TOKENS.index(bytes((byte,))) for byte in end)]:
        thinking.took(token)
    assert thinking.num_thought == len(WORDS.encode("some <thought"))


def test_an_answer_that_begins_otherwise_has_no_thought() -> None:
    plain = guide(limits(is_open=False, max_tokens=0))
    plain.begin()
    assert [plain.took(token) for token in (*WORDS.encode(" \n"), A, THINK, A)] == [[]] * 5
    assert plain.num_thought == 0 and not plain.end_thought()
    late = guide(limits(is_open=False, max_tokens=1))
    late.begin()
    assert [late.took(token) for token in (*WORDS.encode(" \n"), THINK, A)] == [[], [], [], [END_THINK]]


def test_a_thought_ends_on_request_after_the_next_token() -> None:
    thinking = guide(limits())
    thinking.begin()
    thinking.took(A)
    assert thinking.end_thought() and not thinking.end_thought()
    assert thinking.took(A) == [END_THINK]
    assert not thinking.end_thought()


def test_a_request_to_end_a_thought_that_ends_just_then_changes_nothing() -> None:
    thinking = guide(limits())
    thinking.begin()
    assert thinking.end_thought()
    assert thinking.took(END_THINK) == [] and thinking.took(A) == []


def test_a_grammar_sleeps_until_the_thought_is_over() -> None:
    answering = guide(limits(max_tokens=2), Script(A, B, STOP, forces=2))
    assert answering.begin() == []
    assert answering.masking is None and allowed(answering) == set(range(len(TOKENS))) - ENDS
    assert not answering.may_append
    assert answering.took(STOP) == []
    assert answering.took(B) == [END_THINK, A, B, STOP]
    assert answering.is_over and answering.error is None


def test_a_thought_before_a_grammar_is_begun_by_force() -> None:
    answering = guide(limits(is_open=False), Script(A), begin_ids=[THINK])
    assert answering.begin() == [THINK]
    assert answering.num_thought == 0 and answering.masking is None
    answering.took(B)
    assert answering.took(END_THINK) == [] and answering.num_thought == 1
    assert answering.masking is not None


def test_what_the_model_writes_behind_a_thought_in_the_same_token_is_not_hidden_from_the_grammar() -> None:
    tokens = [b"x", b"</t>\n", b"</t>{"]
    for token, is_fine in ((1, True), (2, False)):
        answering = Guide(
            Guidance(thought=ThoughtLimits(b"<t>", b"</t>", (1,), True)), matcher=Script(0), token_bytes=tokens.__getitem__
        )
        answering.begin()
        answering.took(token)
        assert (answering.error is None) is is_fine


def test_without_jumps_forced_tokens_are_demanded_by_masks() -> None:
    careful = guide(limits(is_open=False, max_tokens=1), Script(A, B, forces=1), begin_ids=[THINK], jumps=False)
    assert careful.begin() == []
    seen = []
    for token in (THINK, A, END_THINK):
        seen.append(allowed(careful))
        assert careful.masking is None and careful.took(token) == []
    assert seen == [{THINK}, set(range(len(TOKENS))) - ENDS, {END_THINK}]
    assert careful.masking is not None and not careful.may_append
    assert [careful.took(token) for token in (A, B)] == [[], []] and careful.is_over


def test_a_demand_that_was_not_met_is_an_error_of_the_request() -> None:
    careful = guide(limits(max_tokens=0), jumps=False)
    careful.begin()
    assert careful.needs_mask and allowed(careful) == {END_THINK}
    assert careful.took(A) == [] and careful.error is not None


def test_too_early_an_end_is_forbidden_where_the_grammar_has_another_choice() -> None:
    answering = guide(matcher=Script(A, B, A), min_new_tokens=2)
    answering.begin()
    assert allowed(answering) == set(range(len(TOKENS))) - ENDS
    words_W = np.zeros(-(-len(TOKENS) // 32), np.int32)
    words_W.view(np.uint32)[END // 32] = 1 << END % 32  # all that the grammar allows
    answering.edit_mask(words_W)
    assert words_W.any()
    answering.took(A)
    answering.took(B)
    assert allowed(answering) == set(range(len(TOKENS)))


def test_a_matcher_that_fails_says_why_in_one_line() -> None:
    answering = guide(matcher=Script(A, B, forces=1))
    assert answering.begin() == [A, B] and answering.is_over
    wrong = guide(matcher=Script(A, B))
    wrong.begin()
    assert wrong.took(B) == [] and wrong.error == "the grammar cannot go on: no such token"
    spent = guide(matcher=Script(A, B, A, forces=3, fails_at=1))
    spent.begin()
    assert spent.error is not None
