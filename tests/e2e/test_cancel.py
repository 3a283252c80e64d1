"""A client that leaves is noticed on every transport, and what it asked for ends."""

import asyncio
import json

import pytest
from starlette.types import Receive, Scope, Send
from websockets.asyncio.client import connect

from streamserve.api.wire import BoundedSend, Exchange, leaving_noticed
from tests.e2e.clients import chat_body, h2_client, post_h1, read_events, until
from tests.e2e.serving import FakeServer, fake_server, listening

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"


async def assert_all_ended(server: FakeServer) -> None:
    await server.until_idle()
    load = server.engine.load()
    assert load.free_tokens + load.evictable_tokens == load.total_tokens


@pytest.mark.parametrize("stream", [True, False])
async def test_closing_http1_ends_the_request(stream: bool) -> None:
    async with fake_server() as server:
        reader, writer = await post_h1(server.port, CHAT, chat_body(stream=stream, n=2))
        if stream:
            await read_events(reader, 5)
        await until(lambda: server.engine.load().running == 2)
        writer.close()
        await assert_all_ended(server)


async def test_an_aborted_http1_connection_ends_the_request() -> None:
    async with fake_server() as server:
        reader, writer = await post_h1(server.port, CHAT, chat_body(stream=True))
        await read_events(reader, 3)
        writer.transport.abort()
        await assert_all_ended(server)


@pytest.mark.parametrize("stream", [True, False])
async def test_resetting_an_http2_stream_ends_its_request_only(stream: bool) -> None:
    async with fake_server() as server, h2_client(server.port) as client:
        other = client.post(CHAT, chat_body(stream=True))
        leaving = client.post(CHAT, chat_body(stream=stream))
        await until(lambda: server.engine.load().running == 2)
        client.connection.reset_stream(leaving)
        client.flush()
        await until(lambda: server.engine.load().running == 1)
        before = client.num_events(other)
        await until(lambda: client.num_events(other) > before + 20)
    # the connection is closed now


async def test_closing_an_http2_connection_ends_every_request_on_it() -> None:
    async with fake_server() as server:
        async with h2_client(server.port) as client:
            for _ in range(5):
                client.post(CHAT, chat_body(stream=True))
            await until(lambda: server.engine.load().running == 5)
        await assert_all_ended(server)


@pytest.mark.parametrize("hard", [True, False])
async def test_closing_a_websocket_ends_every_request_on_it(hard: bool) -> None:
    async with fake_server() as server:
        async with connect(f"ws://127.0.0.1:{server.port}/v1/ws") as socket:
            for id in ("a", "b", "c"):
                await socket.send(json.dumps({"type": "chat.create", "id": id, "request": chat_body()}))
            await until(lambda: server.engine.load().running == 3)
            if hard:
                socket.transport.abort()
        await assert_all_ended(server)


async def test_leaving_while_queued_ends_the_request() -> None:
    async with fake_server(max_running=1) as server:
        first_reader, first = await post_h1(server.port, CHAT, chat_body(stream=True))
        await read_events(first_reader, 3)
        _, queued = await post_h1(server.port, CHAT, chat_body())
        await until(lambda: server.engine.load().waiting == 1)
        queued.close()
        await until(lambda: server.engine.load().waiting == 0)
        assert server.engine.load().running == 1
        first.close()
        await assert_all_ended(server)


async def test_a_stop_string_ends_the_engine_request_at_once() -> None:
    async with fake_server() as server:
        reader, writer = await post_h1(server.port, CHAT, chat_body(stream=True, stop="fox"))
        while (await read_events(reader, 1))[0]["choices"][0]["finish_reason"] is None:
            pass
        await assert_all_ended(server)
        writer.close()


async def test_abort_by_the_clients_own_id_ends_the_stream_with_its_reason() -> None:
    async with fake_server() as server:
        reader, writer = await post_h1(server.port, CHAT, chat_body(stream=True, rid="mine-1"))
        other_reader, other = await post_h1(server.port, CHAT, chat_body(stream=True, rid="other"))
        await read_events(reader, 3)
        await read_events(other_reader, 3)
        answer_reader, answer = await post_h1(server.port, "/abort", {"rid": "mine"})
        assert await asyncio.wait_for(answer_reader.readuntil(b'{"aborted":1}'), 5)
        while (event := (await read_events(reader, 1))[0])["choices"][0]["finish_reason"] is None:
            pass
        assert event["choices"][0]["finish_reason"] == "abort"
        assert server.engine.load().running == 1
        for open_writer in (writer, other, answer):
            open_writer.close()
        await assert_all_ended(server)


@pytest.mark.parametrize("method", [b"GET", b"POST"])
async def test_leaving_is_noticed_behind_a_body_that_nobody_reads(method: bytes) -> None:
    came, left = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            async with leaving_noticed(Exchange(scope, receive, BoundedSend(send, 10), ()), left.set):
                came.set()
                await asyncio.sleep(60)

    async with listening(app) as port, asyncio.timeout(20):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(method + b" / HTTP/1.1\r\nhost: x\r\ncontent-length: 5000000\r\n\r\n" + bytes(4_000_000))
        await came.wait()
        await writer.drain()
        writer.close()
        await left.wait()
