"""A runner without a model: deterministic tokens, steps of a fixed length on a clock that tests can hold. Torch-free.

Serves `serve --fake`, the playground's development and every test of the API and the scheduler. It checks what a real
device would only corrupt silently: that each row continues exactly where its slot stands, on pages it was given, that pictures
are encoded before their places are computed, and that nothing is planned over guesses that are being verified.
"""

from asyncio import Event, get_running_loop, sleep
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import Protocol

import numpy as np

from streamserve.engine.plan import NO_EDITS, Edits, Masks, Place, Plan, Row, RowResult, StepResult
from streamserve.messages import Media, SamplingParams, TokenLogprobs

_MASK = (1 << 64) - 1


class Clock(Protocol):
    """Where a step's time comes from."""

    def now(self) -> float: ...

    async def sleep_until(self, time_s: float) -> None: ...


class LoopClock:
    """The event loop's own time."""

    def now(self) -> float:
        return get_running_loop().time()

    async def sleep_until(self, time_s: float) -> None:
        await sleep(max(0.0, time_s - self.now()))


class VirtualClock:
    """Time that moves only when a test says so."""

    def __init__(self) -> None:
        self._now = 0.0
        self._sleepers: list[tuple[float, int, Event]] = []

    def now(self) -> float:
        return self._now

    async def sleep_until(self, time_s: float) -> None:
        if time_s > self._now:
            event = Event()
            heappush(self._sleepers, (time_s, id(event), event))
            await event.wait()

    def advance(self, seconds: float) -> None:
        """Let time pass; everybody whose time has come wakes up."""
        self._now += seconds
        while self._sleepers and self._sleepers[0][0] <= self._now:
            heappop(self._sleepers)[2].set()


def _mix(value: int) -> int:
    """splitmix64's finaliser: a well-spread 64-bit hash of a 64-bit number (Steele, Lea, Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@dataclass(slots=True)
class _Slot:
    sampling: SamplingParams
    tokens: list[int]
    num_prompt: int
    media: tuple[Media, ...] = ()
    pages: list[int] = field(default_factory=list)
    computed: int = -1  # unknown until the first row says where the cached prefix ends
    verified_by: "FakeStep | None" = None  # the newest step that had guesses for it


class FakeStep:
    """A step that ends at a fixed time."""

    def __init__(self, clock: Clock, ends_s: float, sample: Callable[[Edits], StepResult]) -> None:
        self._clock = clock
        self._ends_s = ends_s
        self._sample = sample
        self._result: StepResult | None = None
        self.is_known = False  # the host has what came out of it

    def sample(self, edits: Edits = NO_EDITS) -> None:
        assert self._result is None, "a step is sampled once"
        self._result = self._sample(edits)

    def is_done(self) -> bool:
        return self._result is not None and self._clock.now() >= self._ends_s

    async def done(self) -> StepResult:
        assert self._result is not None, "a step is sampled before it is awaited"
        await self._clock.sleep_until(self._ends_s)
        self.is_known = True
        return self._result


class FakeRunner:
    """Runner whose every step lasts `step_s`.

    The token at a position depends on the prompt and the position only; if a mask forbids it, the next one allowed is taken.
    With a `script`, an answer walks through it from a place that depends on the prompt, and ends with `eos_token_id` after
    `answer_len` tokens when both are given. With a `draft_accuracy` it has a drafter, whose every guess is right with that
    chance, by a hash of prompt and position.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        page_size: int = 16,
        step_s: float = 0.002,
        clock: Clock | None = None,
        script: Sequence[int] = (),
        eos_token_id: int | None = None,
        answer_len: int | None = None,
        draft_accuracy: float | None = None,
    ) -> None:
        self.plans: list[Plan] | None = None  # set to [] to record
        self._vocab_size = vocab_size
        self._page_size = page_size
        self._step_s = step_s
        self._clock = clock or LoopClock()
        self._script = script
        self._eos = eos_token_id
        self._answer_len = answer_len
        self._draft_accuracy = draft_accuracy
        self._slots: dict[int, _Slot] = {}
        self._encoded: set[bytes] = set()  # keys of media
        self._free_at_s = 0.0

    def forward(self, plan: Plan) -> FakeStep:
        if self.plans is not None:
            self.plans.append(plan)
        for admission in plan.admissions:
            history = list(admission.history)
            self._slots[admission.slot] = _Slot(admission.sampling, history, admission.num_prompt, admission.media)
        self._encoded -= set(plan.forgets)
        self._encoded |= {encode.key for encode in plan.encodes}
        for append in plan.appends:
            slot = self._slots[append.slot]
            assert slot.verified_by is None or slot.verified_by.is_known, "appended over guesses that are being verified"
            slot.tokens += append.token_ids
            assert len(slot.tokens) - slot.num_prompt == append.num_generated, "a token was sampled and appended over"
        prompt_logprobs = [self._row(row) for row in plan.rows]
        self._free_at_s = max(self._free_at_s, self._clock.now()) + self._step_s
        step = FakeStep(self._clock, self._free_at_s, partial(self._sample, plan, prompt_logprobs))
        for row in plan.rows:
            if row.num_drafts:
                self._slots[row.slot].verified_by = step
        return step

    def _sample(self, plan: Plan, prompt_logprobs: Sequence[tuple[TokenLogprobs, ...]], edits: Edits) -> StepResult:
        masks = dict(zip(edits.masked, edits.masks, strict=True))
        results = []
        for i, (row, logprobs) in enumerate(zip(plan.rows, prompt_logprobs, strict=True)):
            is_wanted = row.samples and i not in edits.unwanted
            results.append(self._choose(i, row, masks, logprobs) if is_wanted else RowResult((), (), logprobs))
        return StepResult(results)

    def _row(self, row: Row) -> tuple[TokenLogprobs, ...]:
        """The row's prompt_logprobs."""
        slot = self._slots[row.slot]
        slot.pages.extend(row.new_pages)
        end = row.start + row.num_tokens
        assert slot.verified_by is None or slot.verified_by.is_known, "planned over guesses that are being verified"
        assert slot.computed in (-1, row.start), f"row starts at {row.start}, slot stands at {slot.computed}"
        assert len(slot.pages) * self._page_size >= end, f"{len(slot.pages)} pages do not hold {end} tokens"
        for media in slot.media:
            is_needed = any(span.start < end and row.start < span.end for span in media.spans)
            assert not is_needed or media.key in self._encoded, "places of a picture that is not encoded"
        known = end - row.num_drafts
        if row.token_ids is None:
            assert row.num_tokens == 1 and row.start < len(slot.tokens)
        else:
            assert list(row.token_ids[: known - row.start]) == slot.tokens[row.start : known]
        if row.num_drafts:
            assert row.samples and row.token_ids is not None and len(row.token_ids) == row.num_tokens == 1 + row.num_drafts
            assert known == len(slot.tokens), "guesses stand behind a slot's newest token"
        slot.computed = known  # and what of the guesses turns out to be right
        if not row.wants_all_logits:
            return ()
        return tuple(self._logprob(token) for token in slot.tokens[row.start + 1 : known + 1])

    def _choose(
        self, index: int, row: Row, masks: Mapping[Place, Masks], prompt_logprobs: tuple[TokenLogprobs, ...]
    ) -> RowResult:
        slot = self._slots[row.slot]
        first = len(slot.tokens)
        assert row.start + row.num_tokens == first + row.num_drafts
        guesses = row.token_ids[1:] if row.token_ids is not None and row.num_drafts else ()
        for place, guess in enumerate((*guesses, None)):
            slot.tokens.append(self._allowed(self._token(slot), masks.get(Place(index, place)) if masks else None))
            if slot.tokens[-1] != guess:
                break
        tokens, asked = tuple(slot.tokens[first:]), slot.sampling.logprob_token_ids
        slot.computed = len(slot.tokens) - 1
        logprobs = tuple(self._logprob(token, asked) for token in tokens) if slot.sampling.logprobs is not None else ()
        return RowResult(tokens, logprobs, prompt_logprobs, self._drafts(slot, row.num_wanted))

    def _allowed(self, token: int, words_W: Masks | None) -> int:
        if words_W is None:
            return token
        allowed = np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little")[: self._vocab_size])
        return int(allowed[np.searchsorted(allowed, token) % len(allowed)])

    def _drafts(self, slot: _Slot, count: int) -> tuple[int, ...]:
        """What the runner's drafter guesses: what would come without masks, or something else."""
        if self._draft_accuracy is None or count == 0:
            return ()
        known, start = len(slot.tokens), hash(tuple(slot.tokens[: slot.num_prompt]))
        for _ in range(count):
            slot.tokens.append(self._token(slot))
        right, slot.tokens[known:] = slot.tokens[known:], []
        is_right = (_mix((start + place) & _MASK) < self._draft_accuracy * 2**64 for place in range(known, known + count))
        return tuple(token if good else (token + 1) % self._vocab_size for token, good in zip(right, is_right, strict=True))

    def _token(self, slot: _Slot) -> int:
        index = len(slot.tokens) - slot.num_prompt
        start = _mix(hash(tuple(slot.tokens[: slot.num_prompt])) & _MASK)
        may_end = index >= slot.sampling.min_new_tokens and not slot.sampling.ignore_eos
        if self._eos is not None and self._answer_len is not None and index >= self._answer_len and may_end:
            return self._eos
        if self._script:
            return self._script[(start + index) % len(self._script)]
        token = _mix(start + index) % self._vocab_size
        return (token + 1) % self._vocab_size if token == self._eos else token

    def _logprob(self, token: int, asked: Sequence[int] = ()) -> TokenLogprobs:
        (top, *others) = ((one, -1.0 - (_mix(one) % 1000) / 500) for one in (token, *asked))
        return TokenLogprobs(token, top[1], (top,), tuple(others))
