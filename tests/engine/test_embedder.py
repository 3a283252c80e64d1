"""The embedder's queue, on an encoder that writes down its batches."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest

from streamserve.engine.embedder import Embedder
from streamserve.errors import EngineStopped, QueueFull, StepFailed
from streamserve.messages import EncoderFacts, EncoderInput

pytestmark = pytest.mark.anyio
BAD, BOUNDLESS = 99, 98


class WritingEncoder:
    """Gives (first token, number of tokens). `gate` holds batches back; token BAD makes a batch fail, BOUNDLESS its
    row infinite."""

    facts = EncoderFacts(max_len=32, vocab_size=100, dimension=2)

    def __init__(self) -> None:
        self.batches: list[list[EncoderInput]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()

    def enter_thread(self) -> None:
        pass

    def encode(self, inputs: Sequence[EncoderInput]) -> Any:
        self.batches.append(list(inputs))
        self.began.set()
        assert self.gate.wait(20)
        if any(BOUNDLESS in given.token_ids for given in inputs):
            return np.array([[np.inf if BOUNDLESS in given.token_ids else 1.0, 2.0] for given in inputs], np.float32)
        if any(BAD in given.token_ids for given in inputs):
            raise RuntimeError("this batch cannot be computed")
        return np.array([[given.token_ids[0], len(given.token_ids)] for given in inputs], np.float32)

    async def until_busy(self) -> None:
        assert await asyncio.to_thread(self.began.wait, 20)


@pytest.fixture
def encoder() -> WritingEncoder:
    return WritingEncoder()


@pytest.fixture
async def embedder(encoder: WritingEncoder) -> AsyncIterator[Embedder]:
    embedder = Embedder(encoder, batch_tokens=64, max_queued=8)
    running = asyncio.create_task(embedder.run())
    yield embedder
    encoder.gate.set()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    embedder.shut()


def texts(*lengths: int, first: int = 1) -> list[EncoderInput]:
    return [EncoderInput((first, *[0] * (length - 1))) for length in lengths]


async def test_rows_come_back_in_the_order_of_the_inputs(embedder: Embedder, encoder: WritingEncoder) -> None:
    given = [EncoderInput((index, *[0] * (index % 31))) for index in range(90)]
    rows = await embedder.encode(given)
    assert rows.tolist() == [[one.token_ids[0], len(one.token_ids)] for one in given]
    assert all(sum(len(one.token_ids) for one in batch) <= 64 for batch in encoder.batches)
    assert (await embedder.encode([])).shape == (0, 2)


async def test_a_text_longer_than_a_batch_is_one_by_itself(encoder: WritingEncoder) -> None:
    embedder = Embedder(encoder, batch_tokens=20)
    running = asyncio.create_task(embedder.run())
    rows = await asyncio.gather(embedder.encode(texts(32, 5, 31)), embedder.encode(texts(4, first=2)))
    assert rows[0].tolist() == [[1, 32], [1, 5], [1, 31]] and rows[1].tolist() == [[2, 4]]
    assert all(len(batch) == 1 or sum(len(one.token_ids) for one in batch) <= 20 for batch in encoder.batches)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    embedder.shut()


async def test_calls_that_wait_share_the_next_batch(embedder: Embedder, encoder: WritingEncoder) -> None:
    encoder.gate.clear()
    first = asyncio.create_task(embedder.encode(texts(4)))
    await encoder.until_busy()
    many = asyncio.create_task(embedder.encode(texts(*[16] * 40, first=2)))
    few = [asyncio.create_task(embedder.encode(texts(8, first=3 + index))) for index in range(3)]
    await asyncio.sleep(0)
    encoder.gate.set()
    await asyncio.gather(first, *few)
    assert not many.done(), "forty texts do not stand before three"
    assert {given.token_ids[0] for given in encoder.batches[1]} == {2, 3, 4, 5}
    assert len(await many) == 40


async def test_a_cancelled_call_leaves_the_queue_and_harms_nobody(embedder: Embedder, encoder: WritingEncoder) -> None:
    encoder.gate.clear()
    leaving = asyncio.create_task(embedder.encode(texts(*[32] * 50)))
    await encoder.until_busy()
    staying = asyncio.create_task(embedder.encode(texts(5, first=7)))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    encoder.gate.set()
    assert (await staying).tolist() == [[7, 5]]
    await embedder.idle()
    assert sum(map(len, encoder.batches)) <= 3


async def test_a_call_that_fails_does_not_take_others_with_it(embedder: Embedder, encoder: WritingEncoder) -> None:
    encoder.gate.clear()
    first = asyncio.create_task(embedder.encode(texts(4)))
    await encoder.until_busy()
    bad = asyncio.create_task(embedder.encode([EncoderInput((BAD,)), *texts(*[32] * 20)]))
    good = asyncio.create_task(embedder.encode(texts(6, first=8)))
    await asyncio.sleep(0)
    encoder.gate.set()
    await first
    with pytest.raises(StepFailed):
        await bad
    assert (await good).tolist() == [[8, 6]]
    assert (await embedder.encode(texts(3))).tolist() == [[1, 3]]


async def test_numbers_that_are_none_fail_their_own_call_only(embedder: Embedder, encoder: WritingEncoder) -> None:
    encoder.gate.clear()
    first = asyncio.create_task(embedder.encode(texts(4)))
    await encoder.until_busy()
    bad = asyncio.create_task(embedder.encode([*texts(2), EncoderInput((BOUNDLESS,))]))
    good = asyncio.create_task(embedder.encode(texts(6)))
    await asyncio.sleep(0)
    encoder.gate.set()
    await first
    with pytest.raises(StepFailed, match="finite"):
        await bad
    assert (await good).tolist() == [[1, 2]]


async def test_a_full_queue_refuses_and_says_when_to_come_back(embedder: Embedder, encoder: WritingEncoder) -> None:
    encoder.gate.clear()
    running = asyncio.create_task(embedder.encode(texts(4)))
    await encoder.until_busy()
    waiting = [asyncio.create_task(embedder.encode(texts(32))) for _ in range(8)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match="8 requests") as refusal:
        await embedder.encode(texts(1))
    assert refusal.value.retry_after_s >= 1
    encoder.gate.set()
    await asyncio.gather(running, *waiting)


async def test_what_waits_is_finished_after_close_and_nothing_new_is_taken(embedder: Embedder, encoder: WritingEncoder) -> None:
    encoder.gate.clear()
    waiting = [asyncio.create_task(embedder.encode(texts(32, 32))) for _ in range(3)]
    await encoder.until_busy()
    embedder.close()
    with pytest.raises(EngineStopped):
        await embedder.encode(texts(1))
    encoder.gate.set()
    await embedder.idle()
    assert [len(rows) for rows in await asyncio.gather(*waiting)] == [2, 2, 2]


async def test_a_stopped_embedder_leaves_nobody_waiting(encoder: WritingEncoder) -> None:
    embedder = Embedder(encoder, batch_tokens=64)
    running = asyncio.create_task(embedder.run())
    encoder.gate.clear()
    waiting = [asyncio.create_task(embedder.encode(texts(32, 32))) for _ in range(3)]
    await encoder.until_busy()
    running.cancel()
    encoder.gate.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(error, EngineStopped) for error in found)
    embedder.shut()
