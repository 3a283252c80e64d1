"""Guesses of the n-gram drafter: against a slow one that looks at all places, and in the cases it was made for."""

from collections.abc import Sequence
from itertools import islice

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamserve.engine.drafters import ngram
from streamserve.engine.drafters.chance import Chance
from streamserve.engine.drafters.drafter import NO_GUESS, Drafts
from streamserve.engine.drafters.ngram import MAX_MATCH, REJOIN_WITHIN, NgramDrafter
from streamserve.engine.drafters.places import MAX_CANDIDATES
from streamserve.engine.drafters.recent import BEGIN, LEAST_TOKENS, MAX_SALTS, MAX_TOKENS, Recent
from streamserve.messages import GenerateRequest


def _open(prompt: Sequence[int], prediction: Sequence[int] = (), drafter: NgramDrafter | None = None, salt: str = "") -> Drafts:
    request = GenerateRequest("a", tuple(prompt), prediction=tuple(prediction), salt=salt)
    return (drafter or NgramDrafter(8)).open(request, prompt)


class _Slow:
    """The same by its definition: texts are lists of their own, and every place of each is looked at."""

    def __init__(self, prompt: Sequence[int], prediction: Sequence[int], answers: Sequence[list[int]] = ()) -> None:
        self.answers = answers
        self.own, self.prediction, self.num_prompt = list(prompt), list(prediction), len(prompt)
        self.taken = len(prompt)
        self.source: tuple[list[int], int] | None = (self.prediction, 0) if prediction else None
        self.left: tuple[list[int], int] | None = None

    def guess(self, most: int) -> list[int]:
        while self.taken < len(self.own):
            if self.source is not None:
                text, place = self.source
                if text[place] == self.own[self.taken]:
                    self.source = (text, place + 1) if text is self.own or place + 1 < len(text) else None
                else:
                    self.left, self.source = self.source, None
            self.taken += 1
        if self.source is None:
            self.source = self.search()
            if self.source is not None:
                self.left = None
        guessed: list[int] = []
        while self.source is not None and len(guessed) < most:
            text, place = self.source
            follows = [*text, *guessed] if text is self.own else text
            if place + len(guessed) == len(follows):
                break
            guessed.append(follows[place + len(guessed)])
        return guessed

    def search(self) -> tuple[list[int], int] | None:
        rejoining = [(self.left[0], self.left[1] + i) for i in range(1, REJOIN_WITHIN + 1)] if self.left is not None else []
        rejoining = [(text, place) for text, place in rejoining if place < len(text)]
        own = [(self.own, place) for place in reversed(range(2, len(self.own))) if self.matches(self.own, place) >= 2]
        predicted = [
            (self.prediction, i) for i in reversed(range(2, len(self.prediction))) if self.matches(self.prediction, i) >= 2
        ]
        answered = [(text, place) for text, place in own if place >= self.num_prompt]
        prompted = [(text, place) for text, place in own if place < self.num_prompt]
        others = [(text, place) for text in reversed(self.answers) for place in reversed(range(2, len(text)))]
        others = [(text, place) for text, place in others if self.matches(text, place) >= 2]
        parts = [list(islice(part, MAX_CANDIDATES)) for part in (answered, predicted, prompted, others)]
        nearest_first = [*rejoining, *(candidate for part in parts for candidate in part)]
        longest = max((self.matches(*candidate) for candidate in nearest_first), default=0)
        if longest >= 2:
            return next(c for c in nearest_first if self.matches(*c) == longest)
        return next((c for c in rejoining if self.matches(*c) == 1), None)

    def matches(self, text: list[int], place: int) -> int:
        """How many tokens before a place are those at the end of the answer."""
        num = 0
        while num < min(place, len(self.own), MAX_MATCH) and text[place - 1 - num] == self.own[-1 - num]:
            num += 1
        return num


TOKENS = st.integers(0, 3)


@given(
    prompt=st.lists(TOKENS, min_size=1, max_size=60),
    prediction=st.lists(TOKENS, max_size=30),
    num_copied=st.integers(0, 40),
    answer=st.lists(st.tuples(st.lists(TOKENS, min_size=1, max_size=5), st.integers(0, 8)), max_size=40),
    others=st.lists(st.tuples(st.lists(TOKENS, min_size=1, max_size=40), st.lists(TOKENS, max_size=20)), max_size=3),
)
@example(prompt=[0], prediction=[1], num_copied=0, answer=[([0, 0, 1, 0, 0], 1)], others=[])  # left at a prediction's end
def test_a_guess_follows_the_longest_match_or_the_nearest_of_equal_ones(
    prompt: list[int],
    prediction: list[int],
    num_copied: int,
    answer: list[tuple[list[int], int]],
    others: list[tuple[list[int], list[int]]],
) -> None:
    drafter, kept = NgramDrafter(8, is_shared=True), []
    for its_prompt, its_answer in others:
        other = _open(its_prompt, drafter=drafter)
        other.grew(its_answer)
        other.close()
        kept += [text for text in [its_prompt[-MAX_MATCH:] + its_answer] if len(text) >= LEAST_TOKENS]
    drafts, slow = _open(prompt, prediction, drafter), _Slow(prompt, prediction, kept)
    copied = [([token_id], 3) for token_id in (prediction or prompt)[:num_copied]]
    for token_ids, most in [*copied, *answer]:
        drafts.grew(token_ids)
        slow.own += token_ids
        if most:  # else it is not asked now
            assert list(drafts.guess(most).token_ids) == slow.guess(most)


def _say(drafts: Drafts, token_ids: Sequence[int], most: int = 8) -> list[list[int]]:
    """The answer grows token by token; what was guessed after each."""
    guesses = []
    for token_id in token_ids:
        drafts.grew([token_id])
        guesses.append(list(drafts.guess(most).token_ids))
    return guesses


def test_a_copy_is_guessed_from_its_second_token_on() -> None:
    drafts = _open(range(100, 120))
    assert _say(drafts, [103, 104, 105], most=3) == [[], [105, 106, 107], [106, 107, 108]]


def test_an_answer_is_guessed_to_begin_as_its_prediction_does_and_no_further_than_that_goes() -> None:
    drafts = _open([1, 2, 3], prediction=[7, 8, 9])
    assert drafts.guess(8).token_ids == [7, 8, 9]
    assert _say(drafts, [7, 8, 9, 1]) == [[8, 9], [9], [], []]


def test_a_prediction_goes_before_the_prompt_where_both_match() -> None:
    drafts = _open([5, 6, 1, 0, 0], prediction=[4, 5, 6, 2, 3])
    assert _say(drafts, [9, 9, 5, 6])[-1] == [2, 3]


def test_an_edited_text_is_joined_again_by_one_token_near_the_edit() -> None:
    text = list(range(100, 140))
    replaced = _open([1], prediction=text)
    assert _say(replaced, [100, 101, 7, 103], most=3)[1:] == [[102, 103, 104], [], [104, 105, 106]]
    inserted = _open([1], prediction=text)
    assert _say(inserted, [100, 101, 7, 102], most=3)[1:] == [[102, 103, 104], [], [103, 104, 105]]
    left_out = _open([1], prediction=text)
    assert _say(left_out, [100, 103], most=3) == [[101, 102, 103], [104, 105, 106]]
    far = _open([1], prediction=text)
    assert _say(far, [100, 101 + REJOIN_WITHIN + 1], most=3) == [[101, 102, 103], []]


def test_a_text_that_is_over_is_not_joined_again_by_one_token() -> None:
    drafts = _open([0], prediction=[10, 11, 12, 13, 14])
    assert _say(drafts, [10, 99, 12, 13, 14, 12], most=3) == [[11, 12, 13], [], [13, 14], [14], [], []]


def test_near_an_edit_the_text_goes_on_where_it_was_left() -> None:
    text = [1, 2, 30, 1, 2, 31, 1, 2, 32, 1, 2, 33]
    drafts = _open([0], prediction=text)
    assert _say(drafts, [1, 2, 30, 9, 1, 2], most=1)[-1] == [31]  # and not 33, behind the last of these pairs


def test_what_repeats_itself_is_guessed_to_go_on() -> None:
    drafts = _open([0])
    assert _say(drafts, [5, 6, 7, 5, 6], most=7)[-1] == [7, 5, 6, 7, 5, 6, 7]


def test_a_long_text_is_sorted_in_parts_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "PART", 4)
    text = list(range(100, 137))
    for place in range(2, 37):
        drafts = _open(text, prediction=range(200, 211))
        drafts.grew([0, 0, *text[place - 2 : place]])
        assert not drafts.guess(1).token_ids, "each time one part more, those of the prediction first"
        for _ in range(12):
            guess = drafts.guess(1)
        assert guess.token_ids == [*text, 0][place : place + 1]
    for place in range(2 + REJOIN_WITHIN, 41):
        drafts = _open(text, prediction=range(200, 240))
        drafts.grew([0, 0, 198 + place, 199 + place])
        for _ in range(24):
            guess = drafts.guess(1)
        assert list(guess.token_ids) == ([200 + place] if place < 40 else [])
    assert _say(_open([1, 2, 3], prediction=[0] * 30 + [6]), [7, 6, 0, 0], 2)[-1] == [0, 0]


def test_a_prediction_is_found_from_its_third_token_on() -> None:
    drafts = _open([1, 2, 3], prediction=[5, 6, 7, *range(100, 140)])
    assert _say(drafts, [*range(100, 140), 0, 5, 6], most=2)[-1] == [7, 100]


def test_of_a_frequent_pair_only_the_last_places_are_looked_at() -> None:
    for num, found in ((MAX_CANDIDATES - 1, 70), (MAX_CANDIDATES, 71)):
        prompt = [9, 1, 2, 70, *[token for _ in range(num) for token in (8, 1, 2, 71)]]
        for drafts, answer in ((_open(prompt), [9, 1, 2]), (_open([0, 0]), [*prompt, 9, 1, 2])):
            drafts.grew(answer)
            assert list(drafts.guess(1).token_ids) == [found]


def test_an_answer_that_was_not_asked_about_for_long_is_taken_in_by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "SLICE", 4)
    answer = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    late, prompt = _open([0]), _open([0])
    late.grew(answer)
    assert [late.guess(3) for _ in range(2)] == [NO_GUESS, NO_GUESS]
    _say(prompt, answer)
    assert late.guess(3) == prompt.guess(3)
    assert late.guess(3).token_ids == [3, 4, 5]


def test_a_match_ends_where_its_text_begins() -> None:
    def chance(prompt: Sequence[int], prediction: Sequence[int]) -> float:
        drafts = _open(prompt, prediction)
        drafts.grew([2])
        assert drafts.guess(1).token_ids == [3]
        return drafts.guess(1).chance

    assert chance([1], [1, 2, 3]) == chance([8, 1], [1, 2, 3]) == chance([8, 1], [7, 1, 2, 3])


def test_asking_changes_nothing() -> None:
    drafts = _open([1, 2, 3, 4, 5, 1, 2])
    drafts.grew([3])
    assert drafts.guess(2) == drafts.guess(2)
    assert drafts.guess(4).token_ids[:2] == drafts.guess(2).token_ids


def test_the_largest_token_ids_are_found() -> None:
    large = (1 << 20) - 1
    drafts = _open([large, large, 5, large - 1, large, 6])
    assert _say(drafts, [large, large])[-1] == [5, large - 1, large, 6, large, large, 5, large - 1]


def test_guesses_that_came_true_make_the_next_ones_likelier_and_wrong_ones_less_so() -> None:
    def chance(answer: Sequence[int], drafter: NgramDrafter) -> float:
        drafts = _open(range(100, 160), drafter=drafter)
        _say(drafts, [100, 101])
        _say(drafts, answer)
        drafts.grew([100, 101])
        return drafts.guess(1).chance

    believed = chance([], NgramDrafter(8))
    right = chance([x for n in range(105, 150, 4) for x in (n, n + 1, n + 2)], NgramDrafter(8))
    wrong = chance([x for n in range(105, 150, 4) for x in (n, n + 1, 0)], NgramDrafter(8))
    assert wrong < believed < right
    shared = NgramDrafter(8)
    chance([x for n in range(105, 150, 4) for x in (n, n + 1, 0)], shared)
    assert wrong < chance([], shared) < believed  # another answer has heard of it


def test_a_long_match_is_not_blamed_for_short_ones() -> None:
    drafts = _open(range(100, 200))
    for n in range(105, 150, 4):
        _say(drafts, [n, n + 1, 0])
    short = drafts.guess(1).chance
    _say(drafts, range(150, 170))
    assert drafts.guess(1).chance > 0.8 > short


def test_what_is_seen_of_guesses_fades() -> None:
    chance = Chance(0.5, weight=4.0, memory=8.0)
    for _ in range(100):
        chance.saw(True)
    assert chance.value > 0.8
    for _ in range(16):
        chance.saw(False)
    assert chance.value < 0.3


def _answered(drafter: NgramDrafter, prompt: Sequence[int], answer: Sequence[int], salt: str = "") -> None:
    drafts = _open(prompt, drafter=drafter, salt=salt)
    drafts.grew(answer)
    drafts.close()


def test_a_question_asked_again_is_guessed_to_be_answered_again() -> None:
    drafter = NgramDrafter(8, is_shared=True)
    _answered(drafter, [1, 2, 3, 4], [10, 11, 12, 13])
    _answered(drafter, [1, 2, 5, 4], [20, 21, 22, 23])
    assert _open([1, 2, 3, 4], drafter=drafter).guess(9).token_ids == [10, 11, 12, 13], "and no further than that went"
    assert _say(_open([7], drafter=drafter), [20, 21])[-1] == [22, 23]


def test_answers_to_others_are_not_looked_up_unless_asked_for_and_never_across_salts() -> None:
    for drafter, salt in ((NgramDrafter(8), "a"), (NgramDrafter(8, is_shared=True), "b"), (NgramDrafter(8, is_shared=True), "")):
        _answered(drafter, [1, 2, 3, 4], [10, 11, 12, 13], salt="a")
        drafts = _open([1, 2, 3, 4], drafter=drafter, salt=salt)
        assert not drafts.guess(9).token_ids
        assert not any(_say(drafts, [10, 11, 12]))


def test_recent_answers_are_bounded_and_the_oldest_go_first() -> None:
    recent = Recent()
    for nth in range(10):
        recent.add("a", [nth] * (MAX_TOKENS // 4 - 1))
    text = recent.of("a").text
    assert len(text) == MAX_TOKENS + 1
    assert sorted({token_id for token_id in text if token_id >= 0}) == [6, 7, 8, 9]
    recent.add("a", range(2 * MAX_TOKENS))
    assert len(recent.of("a").text) == MAX_TOKENS + 1 and recent.of("a").text[1:4] == [0, 1, 2]
    recent.add("b", [1] * (LEAST_TOKENS - 1))
    assert recent.of("b").text == [BEGIN], "nothing can be learnt from that"
    for nth in range(MAX_SALTS):
        recent.of("a")
        recent.add(f"s{nth}", [1, 2, 3, 4])
    assert len(recent.of("a").text) > 1 and len(recent.of("s0").text) == 1, "the salt used least recently is forgotten"
    assert all(len(recent.of(f"s{nth}").text) > 1 for nth in range(1, MAX_SALTS))
