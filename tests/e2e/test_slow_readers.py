"""A reader that stops reading is aborted within the bound, costs little memory, and nobody else notices."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

from streamserve.api.app import Api, create_app
from streamserve.config import ServerConfig
from streamserve.engine.client import Mailbox
from streamserve.messages import Delta, FinishReason, GenerateRequest
from streamserve.text.byte_tokenizer import ByteTokenizer, byte_text_model
from tests.api.scripted import ScriptedEngine
from tests.e2e.clients import H2Client, h2_client, post_h1, read_events, until
from tests.e2e.serving import listening

pytestmark = pytest.mark.anyio
TEXT = "/v1/completions"
LIMIT_S = 0.4
MIB = 1 << 20
FIRST = 1000


class WideTokenizer(ByteTokenizer):
    """Tokens from 1000 on are eight kilobytes of text each, with a number in front: a client sees what it has missed."""

    vocab_size = 200_000  # more than any test gets to see; the server looks at each once

    def token_bytes(self, id: int) -> bytes:
        return super().token_bytes(id) if id < FIRST else f"<{id - FIRST}>".encode().ljust(8192, b".")


class Flood(Mailbox):
    """A wide token every millisecond while somebody listens, numbered from 1 to max_tokens."""

    __slots__ = ("_is_due", "num_left", "num_sent")

    def __init__(self, request: GenerateRequest) -> None:
        super().__init__(request.id)
        self._is_due = False
        self.num_sent = 0
        self.num_left = request.sampling.max_new_tokens or 0

    def listen(self, reader: Callable[[], object] | None) -> None:
        super().listen(reader)
        if reader is not None:
            self._go_on()

    def take(self) -> Delta:
        self._go_on()
        return super().take()

    def _go_on(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(0.001, self._send)

    def _send(self) -> None:
        self._is_due = False
        if self._reader is not None and not self._pending and self.num_sent != self.num_left:
            self.num_sent += 1
            is_last = self.num_sent == self.num_left
            self.put_nowait(Delta((FIRST + self.num_sent,), finish_reason=FinishReason.LENGTH if is_last else None))


def body(max_tokens: int, **fields: object) -> dict[str, Any]:
    return {"prompt": "go on", "max_tokens": max_tokens, **fields}


class FloodingEngine(ScriptedEngine):
    """Answers every request with a flood of max_tokens deltas."""

    def __init__(self) -> None:
        super().__init__()
        self.state = replace(self.state, context_len=10**7)
        self.floods: dict[str, Flood] = {}

    async def submit(self, request: GenerateRequest) -> Mailbox:
        self.requests.append(request)
        self.floods[request.id] = flood = Flood(request)
        return flood

    def abort(self, request_id: str) -> bool:
        flood = self.floods.pop(request_id, None)
        if flood is not None and flood.num_sent != flood.num_left:
            self.aborted.append(request_id)
            flood.put_nowait(Delta(finish_reason=FinishReason.ABORT))
        return flood is not None


@pytest.fixture
def engine() -> FloodingEngine:
    return FloodingEngine()


@asynccontextmanager
async def server(engine: FloodingEngine) -> AsyncIterator[int]:
    config = ServerConfig(write_timeout_s=LIMIT_S)
    app: Api = create_app(engine, replace(byte_text_model(), tokenizer=WideTokenizer()), config, model_name="tiny")
    async with listening(app, config) as port:
        yield port


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Healthy:
    """One reader that reads, and misses nothing, until some time after `enough` is set."""

    def __init__(self) -> None:
        self.num_seen = 0

    async def run(self, port: int, enough: asyncio.Event) -> None:
        reader, writer = await post_h1(port, TEXT, body(10**6, stream=True))
        num_left = 50
        while num_left:
            num_left -= enough.is_set()
            (event,) = await read_events(reader, 1)
            for number in re.findall(r"<(\d+)>", event["choices"][0]["text"]):
                self.num_seen += 1
                assert int(number) == self.num_seen
        writer.close()


async def assert_cut(engine: FloodingEngine, port: int) -> None:
    """The one request that is live is aborted soon, while eight healthy readers go on, in little memory."""
    await until(lambda: len(engine.floods) == 1)
    stalled = engine.requests[0].id
    enough = asyncio.Event()
    healthy = [Healthy() for _ in range(8)]
    reading = [asyncio.create_task(reader.run(port, enough)) for reader in healthy]
    await until(lambda: all(reader.num_seen > 50 for reader in healthy))  # their own buffers have their size by now
    before = rss_bytes()
    await until(lambda: stalled in engine.aborted, within_s=30)
    assert engine.aborted == [stalled]
    assert rss_bytes() - before < 20 * MIB
    enough.set()
    await asyncio.gather(*reading)
    await until(lambda: not engine.floods)


async def test_a_stalled_http1_reader_is_cut(engine: FloodingEngine) -> None:
    async with server(engine) as port:
        reader, writer = await post_h1(port, TEXT, body(10**6, stream=True), window=4096)
        await assert_cut(engine, port)
        received = b""
        with suppress(ConnectionError):
            async with asyncio.timeout(10):  # what was under way, then the end: not a well-formed one
                while part := await reader.read(65536):
                    received += part
        assert b"[DONE]" not in received
        writer.close()


async def test_a_stalled_plain_json_reader_is_cut(engine: FloodingEngine) -> None:
    async with server(engine) as port:
        _, writer = await post_h1(port, TEXT, body(1500), window=4096)  # an answer of 12 MB
        await until(lambda: any(flood.num_sent == flood.num_left for flood in engine.floods.values()))
        assert num_open_connections(port) == 1
        await until(lambda: num_open_connections(port) == 0)
        writer.close()


def num_open_connections(port: int) -> int:
    """Connections of this process's server on `port` that the kernel still holds open."""
    wanted = f":{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(1 for row in rows if row[1].endswith(wanted) and row[3] == "01")


async def test_a_stalled_http2_stream_is_cut_and_others_on_its_connection_flow(engine: FloodingEngine) -> None:
    async with server(engine) as port, h2_client(port) as client:
        stalled = client.post(TEXT, body(10**6, stream=True), reads=False)
        await until(lambda: len(client.received[stalled]) > 60_000)
        neighbour = client.post(TEXT, body(10**6, stream=True))
        before = rss_bytes()
        await until(lambda: stalled in client.reset, within_s=20)
        assert engine.aborted == [engine.requests[0].id]
        seen = client.num_events(neighbour)
        assert seen > 20
        await until(lambda: client.num_events(neighbour) > seen + 20)
        assert rss_bytes() - before < 20 * MIB + len(client.received[neighbour]) * 2
        assert len(client.received[stalled]) < 70_000  # the window, and nothing beyond it


async def test_an_http2_reader_that_reads_misses_nothing(engine: FloodingEngine) -> None:
    async with server(engine) as port, h2_client(port) as client:
        streams = [client.post(TEXT, body(100, stream=True)) for _ in range(4)]
        await until(lambda: client.ended == set(streams), within_s=30)
        for stream in streams:
            events = [line[6:] for line in bytes(client.received[stream]).split(b"\n") if line.startswith(b"data: {")]
            texts = "".join(json.loads(event)["choices"][0]["text"] for event in events)
            assert [int(part.split(">")[0]) for part in texts.split("<")[1:]] == list(range(1, 101))


async def test_a_plain_answer_beyond_the_http2_window_waits_for_it(engine: FloodingEngine) -> None:
    async with server(engine) as port, h2_client(port) as client:
        stream = client.post(TEXT, body(30), reads=False)
        await until(lambda: len(client.received[stream]) > 60_000)
        open_window(client, stream)
        await until(lambda: stream in client.ended)
        assert json.loads(client.received[stream])["choices"][0]["text"].count("<") == 30


def open_window(client: H2Client, stream: int) -> None:
    client.reads.add(stream)
    client.connection.increment_flow_control_window(10**6, stream)
    client.flush()


async def test_a_stalled_websocket_is_cut(engine: FloodingEngine) -> None:
    async with server(engine) as port:
        socket = await connect(f"ws://127.0.0.1:{port}/v1/ws", max_queue=2, compression=None, close_timeout=0.5)
        await socket.send(json.dumps({"type": "completion.create", "id": "a", "request": body(10**6)}))
        await assert_cut(engine, port)
        await until(lambda: num_open_connections(port) == 0)
        await socket.close()
        assert socket.close_code == 1006
