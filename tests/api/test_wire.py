"""Writes that wait for a client, for so long and no longer."""

import asyncio
from itertools import pairwise
from time import monotonic, sleep
from typing import Any

import pytest

from streamserve.api.wire import LARGE_BODY, BoundedSend, Exchange, Turnstile
from streamserve.errors import SlowReader

pytestmark = pytest.mark.anyio
MESSAGE = {"type": "http.response.body", "body": b"x"}


class Peer:
    """An ASGI send that waits as often as it is told to, and says how it ended."""

    def __init__(self, *waits: Any) -> None:
        self.waits = waits
        self.ended = ""

    async def __call__(self, message: Any) -> None:
        try:
            for wait in self.waits:
                await wait
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        self.ended = "sent"


async def test_a_send_that_goes_through_goes_through() -> None:
    for waits in ((), (asyncio.sleep(0), asyncio.sleep(0.001), asyncio.sleep(0))):
        peer = Peer(*waits)
        await BoundedSend(peer, 5)(MESSAGE)
        assert peer.ended == "sent"


async def test_a_blocked_send_is_given_up() -> None:
    peer = Peer(asyncio.sleep(0), asyncio.Event().wait())
    with pytest.raises(SlowReader):
        await BoundedSend(peer, 0.01)(MESSAGE)
    assert peer.ended == "cancelled"


@pytest.mark.parametrize("first", [False, True])
async def test_what_the_send_raises_arrives(first: bool) -> None:
    async def fail() -> None:
        if not first:
            await asyncio.sleep(0)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await BoundedSend(Peer(fail()), 5)(MESSAGE)


async def test_cancelling_reaches_the_blocked_send() -> None:
    peer = Peer(asyncio.Event().wait())
    task = asyncio.create_task(BoundedSend(peer, 5)(MESSAGE))
    await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert peer.ended == "cancelled"


@pytest.mark.parametrize("streams", [False, True])
async def test_who_reads_slowly_has_the_time_for_every_part_of_a_long_body(streams: bool) -> None:
    got: list[Any] = []

    async def read_slowly(message: Any) -> None:
        await asyncio.sleep(len(message.get("body", b"")) / (64 * 1024) * 0.005)
        got.append(message)

    scope = {"type": "http", "method": "GET", "headers": []}
    body = bytes(range(256)) * 16_000 + b"end"
    exchange = Exchange(scope, asyncio.Event().wait, BoundedSend(read_slowly, 0.2), ())  # type: ignore[arg-type]
    if streams:
        await exchange.start(200, ())
        await exchange.write(body)
        await exchange.end()
    else:
        await exchange.answer(200, body)
    assert b"".join([message["body"] for message in got[1:]]) == body
    assert [message.get("more_body", False) for message in got[1:]] == [True] * (len(got) - 2) + [False]


async def test_large_bodies_are_handed_out_one_by_one_and_others_have_as_long_between() -> None:
    turnstile, turns = Turnstile(), []

    async def read() -> None:
        await turnstile.enter()
        began_s = monotonic()
        sleep(0.01)  # noqa: ASYNC251  (what reading it costs the loop)
        turns.append((began_s, monotonic()))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(read())
    assert all(later - ended_s >= 0.009 for (_, ended_s), (later, _) in pairwise(turns))


async def test_only_large_bodies_wait_for_each_other() -> None:
    turnstile = Turnstile()
    await turnstile.enter()
    await turnstile._lock.acquire()  # somebody's turn that does not end

    def exchange_of(body: bytes) -> Exchange:
        async def receive() -> Any:
            return {"type": "http.request", "body": body}

        scope = {"type": "http", "method": "POST", "headers": []}
        return Exchange(scope, receive, BoundedSend(receive, 1), (), turnstile)  # type: ignore[arg-type]

    assert await exchange_of(b"small").body(1 << 20) == b"small"
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(exchange_of(bytes(LARGE_BODY + 1)).body(1 << 20), 0.05)
