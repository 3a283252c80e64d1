"""Sixty-four streams at once, half over SSE and half over four WebSockets: nothing lost, nothing late, nothing kept."""

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect

from streamserve.engine.fake import VirtualClock
from tests.e2e.clients import post_h1, read_events, until
from tests.e2e.serving import FakeServer, fake_server

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
NUM_SSE = 32
NUM_SOCKETS, PER_SOCKET = 4, 8
NUM_TOKENS = 300


def body_of(number: int, num_tokens: int = NUM_TOKENS) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": f"{number} is my number"}],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
        "cache_salt": str(number),  # nobody shares a page, so pages can be counted
    }


class Heard:
    """What one stream has received."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None

    def take(self, chunk: dict[str, Any]) -> None:
        (choice,) = chunk["choices"]
        assert self.finish_reason is None, "nothing comes behind the end"
        self.text += choice["delta"].get("content", "")
        self.token_ids += choice.get("token_ids", [])
        self.finish_reason = choice["finish_reason"]


async def read_sse(port: int, number: int, heard: Heard) -> None:
    reader, writer = await post_h1(port, CHAT, {**body_of(number), "stream": True})
    try:
        while heard.finish_reason is None:
            (event,) = await read_events(reader, 1)
            heard.take(event)
        assert b"data: [DONE]" in await reader.readuntil(b"[DONE]")
    finally:
        writer.close()


async def read_socket(socket: ClientConnection, numbers: range, heard: dict[int, Heard]) -> None:
    for number in numbers:
        await socket.send(json.dumps({"type": "chat.create", "id": str(number), "request": body_of(number)}))
    live = set(numbers)
    while live:
        frame = json.loads(await socket.recv())
        number = int(frame["id"])
        if frame["type"] == "chunk":
            heard[number].take(frame["chunk"])
        else:
            assert frame["type"] == "done", frame
            assert frame["usage"]["completion_tokens"] == NUM_TOKENS
            live.remove(number)


class Crowd:
    """All the streams of one test, each a task."""

    def __init__(self, server: FakeServer, stack: AsyncExitStack) -> None:
        self._server = server
        self._stack = stack
        self.heard = {number: Heard() for number in range(NUM_SSE + NUM_SOCKETS * PER_SOCKET)}
        self.sse: list[asyncio.Task[None]] = []
        self.sockets: list[ClientConnection] = []
        self.readers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self.sse = [asyncio.create_task(read_sse(self._server.port, n, self.heard[n])) for n in range(NUM_SSE)]
        for index in range(NUM_SOCKETS):
            socket = await self._stack.enter_async_context(connect(f"ws://127.0.0.1:{self._server.port}/v1/ws"))
            numbers = range(NUM_SSE + index * PER_SOCKET, NUM_SSE + (index + 1) * PER_SOCKET)
            self.sockets.append(socket)
            self.readers.append(asyncio.create_task(read_socket(socket, numbers, self.heard)))

    async def close_half(self) -> set[int]:
        """Every second stream leaves; the result is who stays."""
        for task in self.sse[::2]:
            task.cancel()
        for socket, reader in zip(self.sockets[::2], self.readers[::2], strict=True):
            reader.cancel()
            await socket.close()
        stay = set(range(1, NUM_SSE, 2))
        for index in range(1, NUM_SOCKETS, 2):
            stay |= set(range(NUM_SSE + index * PER_SOCKET, NUM_SSE + (index + 1) * PER_SOCKET))
        return stay


async def test_no_event_of_64_streams_is_lost_or_out_of_order() -> None:
    async with fake_server(step_s=0.002) as server, AsyncExitStack() as stack:
        crowd = Crowd(server, stack)
        await crowd.start()
        await asyncio.gather(*crowd.sse, *crowd.readers)
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as http:
            plain = await asyncio.gather(*(http.post(CHAT, json=body_of(number)) for number in crowd.heard))
        for answer, heard in zip(plain, crowd.heard.values(), strict=True):
            assert heard.token_ids == answer.json()["choices"][0]["token_ids"]
            assert len(heard.token_ids) == NUM_TOKENS
            assert bytes(heard.token_ids).decode() == heard.text
            assert heard.finish_reason == "length"
        await server.until_idle()
        load = server.engine.load()
        assert load.free_tokens + load.evictable_tokens == load.total_tokens


def held_pages(server: FakeServer) -> int:
    load = server.engine.load()
    return (load.total_tokens - load.free_tokens - load.evictable_tokens) // server.engine.facts().page_size


def pages_of_live(server: FakeServer) -> set[int]:
    return {page for request in server.scheduler.live() if request.lease is not None for page in request.lease.pages}


async def test_closing_32_of_64_streams_frees_their_pages_before_the_next_plan() -> None:
    clock = VirtualClock()
    async with fake_server(step_s=0.002, clock=clock) as server, AsyncExitStack() as stack:
        plans = server.runner.plans = []

        async def step() -> None:
            num_plans = len(plans)
            clock.advance(0.002)
            await until(lambda: len(plans) > num_plans)

        crowd = Crowd(server, stack)
        await crowd.start()
        await until(lambda: server.engine.load().running + server.engine.load().waiting == 64)
        while not all(len(heard.token_ids) > 40 for heard in crowd.heard.values()):
            await step()
        assert len(plans[-1].rows) == 64

        num_plans = len(plans)
        stay = await crowd.close_half()
        await until(lambda: server.engine.load().running == 32)
        assert len(plans) == num_plans, "time stands still: no plan was made meanwhile"
        assert held_pages(server) == len(pages_of_live(server))
        slots = {request.slot for request in server.scheduler.live()}

        await step()
        assert {row.slot for row in plans[-1].rows} == slots
        assert len(slots) == 32

        while any(crowd.heard[number].finish_reason is None for number in stay):
            clock.advance(0.002)
            await asyncio.sleep(0.001)
        await asyncio.gather(*crowd.sse[1::2], *crowd.readers[1::2])
        for number in stay:
            assert len(crowd.heard[number].token_ids) == NUM_TOKENS
            assert bytes(crowd.heard[number].token_ids).decode() == crowd.heard[number].text
