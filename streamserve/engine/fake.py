"""A runner without a model: deterministic tokens, steps of a fixed length on a clock that tests can hold. Torch-free.

Serves `serve --fake`, the playground's development and every test of the API and the scheduler. It checks what a real
device would only corrupt silently: that each row continues exactly where its slot stands, on pages it was given.
"""

from asyncio import Event, get_running_loop, sleep
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import Protocol

import numpy as np

from streamserve.engine.plan import NO_EDITS, Edits, Masks, Plan, Row, RowResult, StepResult
from streamserve.messages import SamplingParams, TokenLogprobs

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
    pages: list[int] = field(default_factory=list)
    computed: int = -1  # unknown until the first row says where the cached prefix ends


class FakeStep:
    """A step that ends at a fixed time."""

    def __init__(self, clock: Clock, ends_s: float, sample: Callable[[Edits], StepResult]) -> None:
        self._clock = clock
        self._ends_s = ends_s
        self._sample = sample
        self._result: StepResult | None = None

    def sample(self, edits: Edits = NO_EDITS) -> None:
        assert self._result is None, "a step is sampled once"
        self._result = self._sample(edits)

    def is_done(self) -> bool:
        return self._result is not None and self._clock.now() >= self._ends_s

    async def done(self) -> StepResult:
        assert self._result is not None, "a step is sampled before it is awaited"
        await self._clock.sleep_until(self._ends_s)
        return self._result


class FakeRunner:
    """Runner whose every step lasts `step_s`.

    The token at a position depends on the prompt and the position only; if a mask forbids it, the next one allowed is taken.
    With a `script`, an answer walks through it from a place that depends on the prompt, and ends with `eos_token_id` after
    `answer_len` tokens when both are given.
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
    ) -> None:
        self.plans: list[Plan] | None = None  # set to [] to record
        self._vocab_size = vocab_size
        self._page_size = page_size
        self._step_s = step_s
        self._clock = clock or LoopClock()
        self._script = script
        self._eos = eos_token_id
        self._answer_len = answer_len
        self._slots: dict[int, _Slot] = {}
        self._free_at_s = 0.0

    def forward(self, plan: Plan) -> FakeStep:
        if self.plans is not None:
            self.plans.append(plan)
        for admission in plan.admissions:
            self._slots[admission.slot] = _Slot(admission.sampling, list(admission.history), admission.num_prompt)
        for append in plan.appends:
            slot = self._slots[append.slot]
            slot.tokens += append.token_ids
            assert len(slot.tokens) - slot.num_prompt == append.num_generated, "a token was sampled and appended over"
        prompt_logprobs = [self._row(row) for row in plan.rows]
        self._free_at_s = max(self._free_at_s, self._clock.now()) + self._step_s
        return FakeStep(self._clock, self._free_at_s, partial(self._sample, plan, prompt_logprobs))

    def _sample(self, plan: Plan, prompt_logprobs: Sequence[tuple[TokenLogprobs, ...]], edits: Edits) -> StepResult:
        masks = {at.row: words_W for at, words_W in zip(edits.masked, edits.masks, strict=True)}
        results = []
        for i, (row, logprobs) in enumerate(zip(plan.rows, prompt_logprobs, strict=True)):
            is_wanted = row.samples and i not in edits.unwanted
            results.append(self._choose(row, masks.get(i), logprobs) if is_wanted else RowResult((), (), logprobs))
        return StepResult(results)

    def _row(self, row: Row) -> tuple[TokenLogprobs, ...]:
        """The row's prompt_logprobs."""
        slot = self._slots[row.slot]
        slot.pages.extend(row.new_pages)
        end = row.start + row.num_tokens
        assert slot.computed in (-1, row.start), f"row starts at {row.start}, slot stands at {slot.computed}"
        assert len(slot.pages) * self._page_size >= end, f"{len(slot.pages)} pages do not hold {end} tokens"
        if row.token_ids is None:
            assert row.num_tokens == 1 and row.start < len(slot.tokens)
        else:
            assert list(row.token_ids) == slot.tokens[row.start : end]
        slot.computed = end
        if not row.wants_all_logits:
            return ()
        return tuple(self._logprob(token) for token in slot.tokens[row.start + 1 : end + 1])

    def _choose(self, row: Row, words_W: Masks | None, prompt_logprobs: tuple[TokenLogprobs, ...]) -> RowResult:
        slot = self._slots[row.slot]
        assert row.start + row.num_tokens == len(slot.tokens)
        token = self._token(slot)
        if words_W is not None:
            allowed = np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little")[: self._vocab_size])
            token = int(allowed[np.searchsorted(allowed, token) % len(allowed)])
        slot.tokens.append(token)
        logprobs = (self._logprob(token, slot.sampling.logprob_token_ids),) if slot.sampling.logprobs is not None else ()
        return RowResult((token,), logprobs, prompt_logprobs)

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
