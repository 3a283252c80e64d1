"""Pacing: off while the loop has time, at most one send per interval when it has not, and never a late end."""

import asyncio
from collections import Counter

import pytest

from streamserve.api.stream import Call, Pace, Piece, Prompt, Run
from streamserve.engine.client import Mailbox
from streamserve.messages import Delta, FinishReason, GenerateRequest, SamplingParams
from streamserve.text.byte_tokenizer import byte_text_model


class Loop:
    """A clock, and how much of its time the loop's thread has used."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.cpu_s = 50.0

    def pace(self, interval_ms: float | None = None) -> Pace:
        return Pace(interval_ms, now=lambda: self.now_s, used_cpu_s=lambda: self.cpu_s)

    def run(self, pace: Pace, seconds: float, use: float, num_streams: int = 100) -> float:
        """Let time pass in steps of 5 ms; the interval in ms that the last sends got."""
        pauses = []
        for _ in range(int(seconds / 0.005)):
            self.now_s += 0.005
            self.cpu_s += 0.005 * use
            pauses = [pace.pause_s(self.now_s, phase / 100) for phase in range(num_streams)]
        return max(pauses) * 1000


def test_an_idle_loop_sends_at_once_and_a_busy_one_less_and_less_often() -> None:
    loop = Loop()
    pace = loop.pace()
    assert loop.run(pace, 5.0, use=0.6) == 0.0
    assert 3.9 < loop.run(pace, 0.15, use=0.9) <= 8.0
    assert 15.8 < loop.run(pace, 2.0, use=0.9) <= 16.0
    assert 15.8 < loop.run(pace, 5.0, use=0.5) <= 16.0  # what pacing brought is not given away again
    assert loop.run(pace, 2.0, use=0.2) == 0.0


def test_a_loop_that_is_busy_with_other_things_than_sends_is_not_slowed() -> None:
    loop = Loop()
    assert loop.run(loop.pace(), 5.0, use=1.0, num_streams=2) == 0.0


def test_time_in_which_nothing_ran_is_not_use() -> None:
    loop = Loop()
    pace = loop.pace()
    loop.now_s += 3600
    loop.cpu_s += 1.0
    assert loop.run(pace, 0.05, use=1.0) == 0.0


def test_a_given_interval_is_kept_and_zero_means_never() -> None:
    loop = Loop()
    assert loop.run(loop.pace(0.0), 2.0, use=1.0) == 0.0
    assert 9.9 < loop.run(loop.pace(10.0), 2.0, use=0.0) <= 10.0


def test_streams_are_spread_over_the_interval() -> None:
    loop = Loop()
    pace = loop.pace(16.0)
    pauses_ms = [pace.pause_s(loop.now_s, pace.new_phase()) * 1000 for _ in range(256)]
    assert all(0 < pause <= 16 for pause in pauses_ms)
    per_ms = Counter(int(pause) for pause in pauses_ms)
    assert max(per_ms.values()) <= 2 * 256 / 16


class OneMailbox:
    """The part of an engine that a run needs."""

    def __init__(self) -> None:
        self.mailbox = Mailbox("")

    async def submit(self, request: GenerateRequest) -> Mailbox:
        return self.mailbox

    def abort(self, request_id: str) -> bool:
        return False


@pytest.mark.anyio
async def test_the_first_and_the_last_piece_are_sent_at_once_and_those_between_are_merged() -> None:
    engine = OneMailbox()
    call = Call("a", (Prompt((1,)),), SamplingParams())
    run = Run(engine, byte_text_model().tokenizer, call, pace=Pace(60_000.0))  # type: ignore[arg-type]
    texts: list[str] = []

    async def emit(piece: Piece) -> None:
        texts.append(piece.text)

    async def until(num_texts: int) -> None:
        async with asyncio.timeout(10):
            while len(texts) < num_texts:  # noqa: ASYNC110
                await asyncio.sleep(0)

    await run.start()
    delivering = asyncio.create_task(run.deliver(emit))
    engine.mailbox.put_nowait(Delta(tuple(b"a")))
    await until(1)
    for text in (b"b", b"c"):
        engine.mailbox.put_nowait(Delta(tuple(text)))
        await asyncio.sleep(0.01)
    assert texts == ["a"]
    engine.mailbox.put_nowait(Delta(tuple(b"d"), finish_reason=FinishReason.LENGTH))
    await until(2)
    await delivering
    assert texts == ["a", "bcd"]
