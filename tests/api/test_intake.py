"""Requests that come at once are read one by one, so that a loop with other things to do gets to them."""

import asyncio
import itertools

import pytest

from streamserve.api.connections import Intake, TurnReader


@pytest.mark.anyio
async def test_one_connection_goes_on_in_each_turn_of_the_loop() -> None:
    intake, begun = Intake(), []

    async def connection(name: int) -> None:
        await intake.turn()
        begun.append(name)

    tasks = [asyncio.create_task(connection(name)) for name in range(5)]
    seen = []
    while len(begun) < 5:
        await asyncio.sleep(0)
        seen.append(len(begun))
    assert begun == [0, 1, 2, 3, 4]
    assert max(after - before for before, after in itertools.pairwise(seen)) == 1
    await asyncio.gather(*tasks)


@pytest.mark.anyio
async def test_who_left_the_queue_is_passed_over() -> None:
    intake = Intake()
    first, second, third = (asyncio.create_task(intake.turn()) for _ in range(3))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait_for(third, 1)
    assert first.done() and second.cancelled()
    await asyncio.wait_for(intake.turn(), 1)


@pytest.mark.anyio
async def test_a_reader_hands_on_what_came() -> None:
    stream = asyncio.StreamReader()
    reader = TurnReader(stream, Intake())
    stream.feed_data(b"abc")
    stream.feed_eof()
    assert not reader.at_eof()
    assert await reader.read(100) == b"abc"
    assert await reader.read(100) == b"" and reader.at_eof()
