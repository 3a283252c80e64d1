"""Guesses under grammars and thoughts: which may be sampled at once, the masks behind them, and that answers are the same as one
token at a time, whatever was guessed."""

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamserve.engine.grammar import GrammarLimits, Grammars
from streamserve.engine.guide import Guide
from streamserve.engine.plan import Masks
from streamserve.messages import Guidance, ThoughtLimits
from tests.engine.test_guide import A, B, limits
from tests.engine.test_guide import guide as guide_of
from tests.engine.test_jump import CHOICES, CONST, LETTERS, PERSON
from tests.engine.words import END, END_THINK, ENDS, STOP, THINK, TOKENS, Words

EXAMPLES = 2 * int(os.environ.get("STREAMSERVE_EXAMPLES", "40"))
WORDS = Words()
ADDRESS = json.dumps(
    {
        "grammars": [
            {
                "json_schema": {
                    "type": "array",
                    "minItems": 4,
                    "items": {
                        "type": "object",
                        "properties": {"name": {"type": "string", "maxLength": 9}, "n": {"type": "integer"}},
                        "required": ["name"],
                    },
                }
            }
        ]
    }
)
CALL = "start: /[a-z ]*/ <think> /[a-d]+/ </think> /(red|green)*/"  # control tokens inside
NO_WAY_BACK = 'start: a " is " /[a-f]*/\na[stop="x"]: /[a-fx]*/'  # llguidance cannot roll back here
GRAMMARS = (None, PERSON, CONST, LETTERS, CHOICES, ADDRESS, CALL, NO_WAY_BACK)


@pytest.fixture(scope="module")
def bench() -> Iterator["Bench"]:
    with asyncio.Runner() as runner:
        bench = Bench(runner, Grammars(WORDS, vocab_size=len(TOKENS), eos_token_ids=ENDS, num_lanes=2))
        yield bench
        bench.grammars.close()


@dataclass(frozen=True)
class Asked:
    """What one answer is asked for."""

    grammar: str | None
    thought: ThoughtLimits | None = None
    jumps: bool = True
    min_new_tokens: int = 0
    seed: int = 0
    max_len: int = 60


class Answer:
    """An answer in the making: what a scheduler and a sampler do with a guide. The model's choice depends on the place alone."""

    def __init__(self, asked: Asked, guide: Guide) -> None:
        self.asked, self.guide = asked, guide
        self.tokens = guide.begin()
        self.sampled: list[int] = []
        self.steps = 0
        self.has_stopped = False

    @property
    def is_done(self) -> bool:
        return self.has_stopped or self.guide.is_over or self.guide.error is not None or len(self.tokens) >= self.asked.max_len

    def choose(self, words_W: Masks | None, place: int) -> int:
        rng = Random(f"{self.asked.seed} {place}")
        wanted = rng.choice((END_THINK, THINK, END, B, rng.randrange(END), rng.randrange(END), TOKENS.index(b'"')))
        if words_W is None:
            return wanted
        allowed = np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little"))
        return int(allowed[np.searchsorted(allowed, wanted) % len(allowed)])

    def step(self, guesses: Sequence[int], masks: Masks | None) -> None:
        """Sample behind the newest token and behind every guess that is right."""
        self.steps += 1
        first, new = len(self.tokens), list[int]()
        for j in range(1 + len(guesses)):
            new.append(self.choose(None if masks is None else masks[j], first + j))
            if j < len(guesses) and new[j] != guesses[j]:
                break
        for j, token_id in enumerate(new):
            self.tokens.append(token_id)
            self.sampled.append(token_id)
            self.has_stopped = token_id in ENDS
            if self.is_done and len(self.tokens) < self.asked.max_len:
                return
            self.tokens += self.guide.took(token_id, is_last=j == len(new) - 1)
            if self.is_done:
                return


Guessing = Callable[[Answer], Sequence[int]]


class Bench:
    """Follows answers through grammars."""

    def __init__(self, runner: asyncio.Runner, grammars: Grammars) -> None:
        self.runner, self.grammars = runner, grammars

    def guide(self, asked: Asked) -> Guide:
        async def make() -> Guide:
            matcher, lane = (await self.grammars.matcher(asked.grammar, "regex")) if asked.grammar is not None else (None, 0)
            return Guide(
                Guidance(asked.grammar, thought=asked.thought),
                matcher=matcher,
                lane=lane,
                token_bytes=WORDS.token_bytes,
                begin_ids=[THINK] if asked.thought is not None and not asked.thought.is_open else [],
                end_ids=ENDS,
                min_new_tokens=asked.min_new_tokens,
                jumps=asked.jumps,
            )

        return self.runner.run(make())

    def masks(self, guide: Guide, guesses: Sequence[int] = (), others: Sequence[Guide] = ()) -> Masks | None:
        """Those of the guide, in a step with others."""
        if not guide.needs_mask:
            return None
        asked = [(guide, guesses), *((other, ()) for other in others)]
        return self.runner.run(self.grammars.fill(asked))[: 1 + len(guesses)].copy()

    def answer(self, asked: Asked, guess: Guessing = lambda answer: ()) -> Answer:
        answer = Answer(asked, self.guide(asked))
        while not answer.is_done:
            guesses = guess(answer)
            guesses = guesses[: answer.guide.admit(guesses)]
            masks = self.masks(answer.guide, guesses)
            answer.guide.check_mask()
            if not answer.is_done:
                answer.step(guesses, masks)
        return answer

    def may_stand(self, answer: Answer, guesses: Sequence[int]) -> int:
        """What `admit` should say, found by telling the guesses to another guide."""
        twin = self.guide(answer.asked)
        twin.begin()
        for token_id in answer.sampled:
            twin.took(token_id)
        for n, token_id in enumerate(guesses):
            masks, phase = self.masks(twin), twin._phase
            if twin._forced or token_id in ENDS or not (masks is None or _has(masks[0], token_id)):
                return n
            follows = twin.took(token_id)
            if follows or twin._forced or twin.is_over or twin.error is not None:
                return n
            if twin.needs_mask and twin._phase is not phase:
                return n
        return len(guesses)


def _has(words_W: Masks, token_id: int) -> bool:
    return bool(words_W.view(np.uint32)[token_id // 32] >> np.uint32(token_id % 32) & 1)


def how_it_ended(answer: Answer) -> tuple[object, ...]:
    return answer.has_stopped, answer.guide.is_over, answer.guide.error, answer.guide.num_thought


def state_of(guide: Guide) -> dict[str, object]:
    """All that `admit` must leave as it was."""
    own = {"_scout", "_scout_lacks", "_can_scout", "_guesses_s", "_matcher"}
    state = {name: getattr(guide, name) for name in Guide.__slots__ if name not in own}
    state |= {"_forced": list(guide._forced), "_tail_lens": list(guide._tail_lens)}
    if guide._matcher is not None:
        ahead = guide._matcher.deep_copy()
        state["mask"] = ahead.compute_bitmask()  # type: ignore[attr-defined]
    return state


ASKED = st.builds(
    Asked,
    grammar=st.sampled_from(GRAMMARS),
    thought=st.sampled_from([None, *(limits(is_open=o, max_tokens=n) for o in (True, False) for n in (None, 0, 3, 12))]),
    jumps=st.booleans(),
    min_new_tokens=st.sampled_from([0, 0, 5, 40]),
    seed=st.integers(0, 2**32),
).filter(lambda asked: asked.grammar is not None or asked.thought is not None)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(asked=ASKED, most=st.integers(1, 9), is_right=st.sampled_from([1.0, 0.8, 0.3]), is_threaded=st.booleans())
def test_an_answer_is_the_same_whatever_was_guessed(
    bench: Bench, asked: Asked, most: int, is_right: float, is_threaded: bool
) -> None:
    plain = bench.answer(asked)
    rng = Random(asked.seed)

    def guess(answer: Answer) -> Sequence[int]:
        bench.grammars._last_fill_s = float(is_threaded)
        if is_threaded and rng.random() < 0.3:
            bench.grammars._num_fills = 15  # the next one is timed
        length = len(answer.tokens)
        guesses = [t if rng.random() < is_right else rng.randrange(len(TOKENS)) for t in plain.tokens[length : length + most]]
        before = state_of(answer.guide)
        num_admitted = answer.guide.admit(guesses)
        assert state_of(answer.guide) == before
        if asked.grammar is NO_WAY_BACK:
            assert num_admitted == 0 or answer.guide.masking is None
        elif asked.jumps and rng.random() < 0.3:
            assert num_admitted == bench.may_stand(answer, guesses)
        return guesses

    drafted = bench.answer(asked, guess)
    assert drafted.tokens[: asked.max_len] == plain.tokens[: asked.max_len]
    if len(plain.tokens) < asked.max_len:
        assert how_it_ended(drafted) == how_it_ended(plain)
    assert drafted.steps <= plain.steps


@pytest.mark.parametrize("grammar", [LETTERS, ADDRESS, CALL])
@pytest.mark.parametrize("jumps", [True, False])
def test_right_guesses_save_steps(bench: Bench, grammar: str, jumps: bool) -> None:
    asked = Asked(grammar, jumps=jumps, min_new_tokens=40, seed=1)
    plain = bench.answer(asked)
    drafted = bench.answer(asked, lambda answer: plain.tokens[len(answer.tokens) : len(answer.tokens) + 4])
    assert drafted.tokens == plain.tokens and len(plain.tokens) > 40
    assert drafted.steps < (0.6 if jumps else 0.3) * plain.steps


def test_guesses_stand_as_far_as_the_grammar_leaves_a_choice(bench: Bench) -> None:
    r, e, d, red, green, x = (TOKENS.index(token) for token in (b"r", b"e", b"d", b"red", b"green", b"x"))
    guide = bench.guide(Asked('start: ("red" | "green" | "re" /[a-z]/ /[a-z]/)* "x"'))
    assert guide.begin() == []
    assert guide.admit([red, green, red]) == 3 and guide.admit([x]) == 0  # that would end it
    assert guide.admit([red, x, red]) == 1 and guide.admit([red, THINK]) == 1 and guide.admit([]) == 0
    assert guide.admit([green, r, r]) == 1  # behind "r" an "e" must follow
    assert guide.admit([END]) == guide.admit([STOP]) == 0
    assert guide.took(red, is_last=False) == [] and guide.took(r) == [e]
    assert guide.admit([d, red, green]) == 3
    masks = bench.masks(guide, [d, red])
    assert masks is not None and [_has(line, green) for line in masks] == [False, True, True]


def test_a_grammar_that_a_guess_would_fulfil_goes_on_as_if_nothing_had_been_guessed(bench: Bench) -> None:
    red, green = TOKENS.index(b"red"), TOKENS.index(b"green")
    for token_id in (red, green):
        guide = bench.guide(Asked('start: "red" | "green"'))
        guide.begin()
        assert guide.admit([red]) == guide.admit([green, red]) == 0
        assert guide.took(token_id) == [] and guide.is_over and guide.error is None
        assert guide.admit([red]) == 0


def test_guesses_of_a_thought_stand_up_to_its_end() -> None:
    thinking = guide_of(limits(max_tokens=3))
    thinking.begin()
    assert thinking.admit([A] * 5) == thinking.admit([A] * 2) == 2  # behind the third its end must follow
    assert thinking.admit([A, END_THINK, A, A, A]) == 5  # it ends by itself, and no grammar waits behind it
    assert [thinking.took(A, is_last=False), thinking.took(A, is_last=False), thinking.took(A)] == [[], [], [END_THINK]]
    assert thinking.num_thought == 3 and thinking.admit([A, END, A]) == 1
    closed = guide_of(limits(is_open=False, max_tokens=2))
    closed.begin()
    assert closed.admit([THINK, A, A, A]) == 2 and closed.admit([A, A, A]) == 3
    careful = guide_of(limits(max_tokens=1), jumps=False)
    careful.begin()
    assert careful.took(A) == [] and careful.admit([END_THINK, A]) == 0  # a mask demands it


def test_a_thought_whose_end_is_asked_for_among_guesses_ends_behind_the_last(bench: Bench) -> None:
    for grammar in (None, LETTERS):
        thinking = bench.guide(Asked(grammar, limits()))
        thinking.begin()
        assert thinking.admit([A, A, A]) == 3
        assert thinking.end_thought() and thinking.admit([A]) == 0
        assert thinking.took(A, is_last=False) == [] and thinking.took(A, is_last=False) == []
        assert thinking.took(A) == [END_THINK] and thinking.num_thought == 3


def test_masks_stop_no_answer_before_its_least_length(bench: Bench) -> None:
    guide = bench.guide(Asked(LETTERS, min_new_tokens=2))
    guide.begin()
    masks = bench.masks(guide, [A, B, A], others=[bench.guide(Asked(PERSON))])
    assert masks is not None
    assert [_has(line, END) for line in masks] == [False, False, True, True]
    thinking = bench.guide(Asked(LETTERS, limits()))
    thinking.begin()
    masks = bench.masks(thinking, [A, B])
    assert masks is not None and not any(_has(line, END) for line in masks) and all(_has(line, END_THINK) for line in masks)


AMBIGUOUS = 'start: s /[b-f]*/\ns: s s s | s s | "a"'  # the more "a", the more ways to read them; a "b" ends that


@pytest.fixture
def tight(bench: Bench) -> Iterator[Bench]:
    """Grammars that may not be very ambiguous."""
    limits = replace(GrammarLimits(), max_items_per_token=50)
    grammars = Grammars(WORDS, vocab_size=len(TOKENS), eos_token_ids=ENDS, limits=limits, num_lanes=1)
    yield Bench(bench.runner, grammars)
    grammars.close()


def test_a_wrong_guess_that_spends_the_grammars_limits_spends_nothing_of_the_answer(tight: Bench) -> None:
    guide = tight.guide(Asked(AMBIGUOUS))
    assert guide.begin() == guide.took(A) == []
    assert guide.admit([A] * 40) == 0 and guide.error is None
    assert guide.admit([B]) == 0  # such a grammar is followed without guesses
    assert [guide.took(B) for _ in range(40)] == [[]] * 40
    assert tight.masks(guide) is not None
    guide.check_mask()
    assert guide.error is None


@pytest.mark.parametrize("is_threaded", [False, True])
def test_a_mask_that_spends_the_limits_fails_the_answer_only_if_it_gets_there(tight: Bench, is_threaded: bool) -> None:
    plain = tight.guide(Asked(AMBIGUOUS))
    plain.begin()
    num_fine = 0
    while True:
        tight.masks(plain)
        plain.check_mask()
        if plain.error is not None:
            break
        plain.took(A)
        num_fine += 1
    for num_right in (2, num_fine):
        guide = tight.guide(Asked(AMBIGUOUS))
        guide.begin()
        guesses = [A] * num_fine
        assert guide.admit(guesses) == num_fine > 4
        tight.grammars._last_fill_s, tight.grammars._num_fills = float(is_threaded), 15
        masks = tight.masks(guide, guesses)
        guide.check_mask()
        assert guide.error is None and masks is not None
        assert [_has(line, B) for line in masks] == [False] + [True] * num_fine
        assert [_has(line, END) for line in masks] == [False] + [True] * (num_fine - 1) + [False]
        assert [guide.took(A, is_last=False) for _ in range(num_right)] == [[]] * num_right
        assert guide.took(B) == []
        if num_right < num_fine:
            assert [guide.took(B) for _ in range(30)] == [[]] * 30
            assert guide.error is None and tight.masks(guide) is not None
        else:
            assert guide.error == plain.error


def test_guesses_whose_masks_take_long_are_not_made(bench: Bench) -> None:
    guide = bench.guide(Asked(LETTERS))
    guide.begin()
    guide.spend_on_guesses(0.2)
    assert guide.admit([A, B]) == 0 and guide.error is None
    for _ in range(100):
        guide.took(A)
    assert guide.admit([A, B]) == 2  # little, by now, for each token
    timed = bench.guide(Asked(LETTERS))
    timed.begin()
    bench.grammars._last_fill_s, bench.grammars._num_fills = 1.0, 15
    bench.masks(timed, [A, B, A])
    assert timed._guesses_s > 0 < timed._spent_s
