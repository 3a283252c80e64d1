"""Turns: streams are served in order, a few at a time; the device goes first, and nobody is left out or loses a token."""

import asyncio

import pytest

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.client import LAST_WEIGHT, MIN_SLICE, SLICES, Mailbox, Turns
from streamserve.engine.core import Engine, EngineOptions
from streamserve.engine.fake import FakeRunner, FakeStep
from streamserve.engine.plan import NO_EDITS, Edits, Plan, StepResult
from streamserve.engine.policy import POLICIES
from streamserve.engine.scheduler import Limits, Scheduler
from streamserve.messages import Delta, FinishReason, GenerateRequest, SamplingParams

pytestmark = pytest.mark.anyio


class Streams:
    """Mailboxes with readers that write down what they take, in the order of their turns."""

    def __init__(self, count: int) -> None:
        self.turns = Turns()
        self.taken: list[tuple[str, tuple[int, ...]]] = []
        self.mailboxes = [Mailbox(str(number), self.turns) for number in range(count)]
        for mailbox in self.mailboxes:
            self.listen(mailbox)

    def listen(self, mailbox: Mailbox) -> None:
        mailbox.listen(lambda: self.taken.append((mailbox.request_id, mailbox.take().token_ids)))

    def step(self, token: int) -> None:
        for mailbox in self.mailboxes:
            mailbox.put_nowait(Delta((token,)))


async def test_a_loop_iteration_serves_a_slice_and_order_is_kept() -> None:
    streams = Streams(400)
    streams.step(7)
    assert streams.taken == []  # putting runs no reader
    sizes = []
    while streams.turns.are_waiting:
        before = len(streams.taken)
        await asyncio.sleep(0)
        sizes.append(len(streams.taken) - before)
    assert sizes[0] == 400 // SLICES
    assert min(sizes[:-1]) == MIN_SLICE
    assert streams.taken == [(str(number), (7,)) for number in range(400)]


async def test_last_deltas_are_given_out_a_few_at_a_time() -> None:
    streams = Streams(5 * MIN_SLICE)
    for mailbox in streams.mailboxes:
        mailbox.put_nowait(Delta((1,), finish_reason=FinishReason.LENGTH))
    sizes = []
    while streams.turns.are_waiting:
        before = len(streams.taken)
        await asyncio.sleep(0)
        sizes.append(len(streams.taken) - before)
    assert max(sizes) == MIN_SLICE // LAST_WEIGHT and sum(sizes) == 5 * MIN_SLICE


async def test_whose_turn_has_not_come_gets_both_steps_in_one_delta_and_keeps_its_place() -> None:
    streams = Streams(MIN_SLICE + 1)
    streams.step(1)
    await asyncio.sleep(0)
    streams.step(2)
    while streams.turns.are_waiting:  # noqa: ASYNC110
        await asyncio.sleep(0)
    last = str(MIN_SLICE)
    assert [tokens for name, tokens in streams.taken if name == last] == [(1, 2)]
    assert streams.taken[MIN_SLICE] == (last, (1, 2))
    assert len(streams.taken) == 2 * MIN_SLICE + 1


async def test_who_stops_listening_is_not_called_and_loses_nothing() -> None:
    streams = Streams(1)
    (mailbox,) = streams.mailboxes
    streams.step(1)
    mailbox.listen(None)
    await asyncio.sleep(0)
    assert streams.taken == []
    streams.step(2)
    streams.listen(mailbox)
    await asyncio.sleep(0)
    assert streams.taken == [("0", (1, 2))]


async def test_a_reader_may_fill_other_mailboxes_and_its_own() -> None:
    turns, taken = Turns(), []
    first, second = Mailbox("a", turns), Mailbox("b", turns)

    def read_first() -> None:
        tokens = first.take().token_ids
        taken.append(tokens)
        if len(taken) == 1:
            second.put_nowait(Delta((2,)))
            first.put_nowait(Delta((3,)))

    first.listen(read_first)
    second.listen(lambda: taken.append(second.take().token_ids))
    first.put_nowait(Delta((1,)))
    while turns.are_waiting:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert taken == [(1,), (2,), (3,)]
    assert turns.num_served == 3


class KnownStep:
    """A step that can say whether it is done, after having been asked `num_asks` times."""

    def __init__(self, step: FakeStep, num_asks: int) -> None:
        self._step, self._num_left = step, num_asks

    def sample(self, edits: Edits = NO_EDITS) -> None:
        self._step.sample(edits)

    def is_done(self) -> bool:
        self._num_left -= 1
        return self._num_left < 0

    async def done(self) -> StepResult:
        assert self._step._result is not None
        return self._step._result


class KnownRunner(FakeRunner):
    """A device whose steps last `num_asks` looks at it; notes how many streams were served between two launches."""

    def __init__(self, num_asks: int, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.num_asks = num_asks
        self.turns = Turns()  # the engine's
        self.served: list[int] = []

    def forward(self, plan: Plan) -> KnownStep:  # type: ignore[override]
        self.served.append(self.turns.num_served - sum(self.served))
        return KnownStep(super().forward(plan), self.num_asks)


@pytest.mark.parametrize("num_asks", [0, 1, 100])
async def test_a_device_that_is_done_does_not_wait_for_streams_and_starves_none(num_asks: int) -> None:
    num_streams, num_tokens = 64, 40
    runner = KnownRunner(num_asks, vocab_size=100)
    scheduler = Scheduler(KVCache(1000, 16), Limits(num_streams, 4096, frozenset()), POLICIES["fcfs"])
    engine = Engine(scheduler, runner, EngineOptions(1024, 100, frozenset()))
    runner.turns = engine._turns
    got: dict[str, list[int]] = {}
    num_turns = 0
    ended = asyncio.Event()

    def listen(mailbox: Mailbox) -> None:
        def read() -> None:
            nonlocal num_turns
            delta = mailbox.take()
            num_turns += 1
            got.setdefault(mailbox.request_id, []).extend(delta.token_ids)
            if delta.finish_reason is FinishReason.LENGTH and all(len(ids) == num_tokens for ids in got.values()):
                ended.set()

        mailbox.listen(read)

    for number in range(num_streams):
        sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
        listen(await engine.submit(GenerateRequest(str(number), (number, 1, 2), sampling)))
    running = asyncio.create_task(engine.run())
    async with asyncio.timeout(30):
        await ended.wait()
    running.cancel()
    assert [len(got[str(number)]) for number in range(num_streams)] == [num_tokens] * num_streams
    steady = runner.served[4:num_tokens]
    if num_asks == 100:  # time for all
        assert set(steady) == {num_streams}
        assert num_turns == num_streams * num_tokens
    else:  # a slice per look at the device, and one more
        assert all(0 < served <= MIN_SLICE * (num_asks + 1) for served in steady)
        assert num_turns < num_streams * num_tokens * 0.6
