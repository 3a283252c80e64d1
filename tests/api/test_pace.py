"""Pacing: at most one send per stream and interval where one is set, and never a late end."""

import asyncio
from collections import Counter
from itertools import pairwise

import pytest

from streamserve.api.stream import Call, Pace, Piece, Prompt, Run
from streamserve.engine.client import Mailbox
from streamserve.messages import Delta, FinishReason, GenerateRequest, SamplingParams
from streamserve.text.byte_tokenizer import byte_text_model


def paces(interval_ms: float | None) -> list[float]:
    """The pauses in ms that 256 streams get which all have sent at the same moment."""
    pace = Pace(interval_ms, now=lambda: 1000.0)
    return [pace.pause_s(pace.new_phase()) * 1000 for _ in range(256)]


def test_no_interval_means_no_pause() -> None:
    assert set(paces(None)) == set(paces(0.0)) == {0.0}


def test_a_stream_may_send_again_once_an_interval() -> None:
    now_s = 1000.0
    pace = Pace(10.0, now=lambda: now_s)
    phase = pace.new_phase()
    times_s = []
    for _ in range(5):
        now_s += pace.pause_s(phase) + 0.001  # its turn comes a little later
        times_s.append(now_s)
    assert [later - earlier for earlier, later in pairwise(times_s)] == pytest.approx([0.01] * 4)


def test_streams_are_spread_over_the_interval() -> None:
    pauses_ms = paces(16.0)
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

    def emit(piece: Piece) -> None:
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
