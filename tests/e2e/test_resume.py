"""A network that cuts connections at random points: the text that arrives in parts is the text that arrives in one."""

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from streamserve.config import ServerConfig
from tests.e2e.clients import H2Client, h2_client, until
from tests.e2e.serving import FakeServer, fake_server

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
NUM_CUTS = 100


def body_of(num_tokens: int, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "tell me everything"}]
    return {"messages": messages, "max_tokens": num_tokens, "ignore_eos": True, "stream": True, **fields}


class CuttingProxy:
    """Passes bytes between clients and a server, and cuts a connection once so many bytes of answer have passed."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self.limits: list[int] = []  # of the connections to come; after these nothing is cut
        self.num_cuts = 0
        self._server_port = port

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        sending = asyncio.create_task(self._pass_on(reader, up_writer))
        left = self.limits.pop() if self.limits else None
        with suppress(ConnectionError):
            while data := await up_reader.read(4096):
                if left is not None and len(data) >= left:
                    writer.write(data[:left])
                    self.num_cuts += 1
                    break
                left = None if left is None else left - len(data)
                writer.write(data)
                await writer.drain()
        sending.cancel()
        up_writer.transport.abort()
        writer.close()

    @staticmethod
    async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(4096):
                writer.write(data)


class Reader:
    """A client that takes in whole events only, and comes back until the stream has ended."""

    def __init__(self) -> None:
        self.stream: str | None = None
        self.last_id: str | None = None
        self.numbers: list[int] = []
        self.data: list[str] = []
        self._rest = b""

    def restart(self) -> None:
        self._rest = b""

    def take(self, part: bytes) -> None:
        *blocks, self._rest = (self._rest + part).split(b"\n\n")
        for block in blocks:
            fields = dict(line.split(": ", 1) for line in block.decode().split("\n") if not line.startswith(":"))
            if "data" in fields:
                self.last_id = fields["id"]
                self.numbers.append(int(fields["id"].rpartition(":")[2]))
                self.data.append(fields["data"])

    @property
    def text(self) -> str:
        choices = [json.loads(data)["choices"][0] for data in self.data if data != "[DONE]"]
        return "".join(choice["delta"].get("content", "") for choice in choices)

    @property
    def has_all(self) -> bool:
        return self.data[-1:] == ["[DONE]"]

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.last_id is None else {"last-event-id": self.last_id}


async def visit(http: httpx.AsyncClient, reader: Reader, body: dict[str, Any], *, posts: bool) -> None:
    """One connection: begin the stream, or come back to it."""
    posts = posts or reader.stream is None
    url = CHAT if posts else f"/v1/streams/{reader.stream}"
    reader.restart()
    with suppress(httpx.TransportError):
        async with http.stream("POST" if posts else "GET", url, json=body if posts else None, headers=reader.headers) as answer:
            assert answer.status_code == 200, await answer.aread()
            reader.stream = answer.headers["x-request-id"]
            async for part in answer.aiter_bytes():
                reader.take(part)


async def whole_text(server: FakeServer, num_tokens: int) -> str:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        answer = await http.post(CHAT, json=body_of(num_tokens, stream=False))
    return str(answer.json()["choices"][0]["message"]["content"])


async def test_a_hundred_cuts_lose_and_repeat_nothing() -> None:
    chance = random.Random(1)
    num_tokens = 700
    async with fake_server(step_s=0.001) as server:
        expected = await whole_text(server, num_tokens)
        before = asyncio.all_tasks()
        proxy, reader = CuttingProxy(server.port), Reader()
        # Few events between two cuts, or the middle of an event, of its id, of the answer's head.
        proxy.limits = [chance.choice([chance.randrange(1, 400), chance.randrange(400, 3500)]) for _ in range(NUM_CUTS)]
        body = body_of(num_tokens, resumable=True)
        async with proxy.running(), httpx.AsyncClient(base_url=f"http://127.0.0.1:{proxy.port}", timeout=60) as http:
            while not reader.has_all:
                # Who was cut before the first event has nothing to come back with: by its name, or anew.
                await visit(http, reader, body, posts=reader.last_id is not None and chance.random() < 0.5)
        assert proxy.num_cuts == NUM_CUTS
        assert reader.text == expected
        assert reader.numbers == list(range(1, len(reader.numbers) + 1))
        streams = server.app._service.streams
        for kept in list(streams._kept.values()):
            streams._drop(kept)
        await server.until_idle()
        assert streams.num_bytes == 0
        await until(lambda: asyncio.all_tasks() <= before)


async def read_h2(client: H2Client, stream: int, num_bytes: int) -> bytes:
    """So many bytes of a stream, or all of it."""
    await until(lambda: len(client.received[stream]) >= num_bytes or stream in client.ended)
    return bytes(client.received[stream][:num_bytes])


async def test_streams_of_an_http2_connection_are_cut_and_resumed_while_others_go_on() -> None:
    chance = random.Random(3)
    num_tokens = 600
    async with fake_server(step_s=0.001) as server, h2_client(server.port) as client:
        expected = await whole_text(server, num_tokens)
        other = client.post(CHAT, body_of(num_tokens))
        reader = Reader()
        body = body_of(num_tokens, resumable=True)
        stream = client.post(CHAT, body)
        for _ in range(12):
            reader.restart()
            reader.take(await read_h2(client, stream, chance.randrange(600, 9000)))
            if reader.has_all:
                break
            client.connection.reset_stream(stream)
            client.flush()
            stream = client.post(CHAT, body, headers=reader.headers)
        if not reader.has_all:
            await until(lambda: stream in client.ended)
            reader.restart()
            reader.take(bytes(client.received[stream]))
        assert reader.text == expected
        assert reader.numbers == list(range(1, len(reader.numbers) + 1))
        await until(lambda: other in client.ended)
        assert b"\nid: " not in client.received[other], "who did not ask pays for no ids"


@pytest.mark.parametrize(
    ("path", "body", "first", "last"),
    [
        ("/v1/responses", {"input": "hi", "max_output_tokens": 60}, "response.created", "response.incomplete"),
        (
            "/v1/messages",
            {"model": "tiny", "max_tokens": 60, "messages": [{"role": "user", "content": "hi"}]},
            "message_start",
            "message_stop",
        ),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 60}, "", ""),
    ],
)
async def test_streams_of_every_dialect_can_be_resumed(path: str, body: dict[str, Any], first: str, last: str) -> None:
    async with fake_server(step_s=0.005) as server, httpx.AsyncClient(base_url=server.url, timeout=10) as http:
        seen = b""
        async with http.stream("POST", path, json={**body, "stream": True, "resumable": True}) as answer:
            assert answer.status_code == 200, await answer.aread()
            stream = answer.headers["x-request-id"]
            async for part in answer.aiter_bytes():
                seen += part
                if seen.count(b"\n\n") > 5:
                    break
        seen = seen[: seen.rindex(b"\n\n") + 2]
        ids = re.findall(r"^id: (.*)$", seen.decode(), re.M)
        rest = await http.get(f"/v1/streams/{stream}", headers={"last-event-id": ids[-1]})
        blocks = (seen + rest.content.removeprefix(b"retry: 1000\n")).decode().removesuffix("\n\n").split("\n\n")
        assert re.findall(r"^id: (.*)$", "\n".join(blocks), re.M) == [f"{stream}:{n}" for n in range(1, len(blocks) + 1)]
        whole = await http.get(f"/v1/streams/{stream}")
        assert whole.text.split("\n\n")[1:-1] == blocks[1:]
        names = re.findall(r"^event: (.*)$", whole.text, re.M)
        assert (names[:1], names[-1:]) == ([first] if first else [], [last] if last else [])
        if path == "/v1/responses":
            kept = await http.get(f"/v1/responses/{stream}")
            assert kept.json()["usage"]["output_tokens"] == 60


async def test_pages_come_back_when_nobody_does() -> None:
    async with fake_server(ServerConfig(resume_window_s=0.3)) as server:
        http = httpx.AsyncClient(base_url=server.url, timeout=10)
        async with http, http.stream("POST", CHAT, json=body_of(8000, resumable=True)) as answer:
            async for part in answer.aiter_bytes():
                if b"data: " in part:
                    break
        load = server.engine.load()
        assert load.running == 1, "it goes on for now"
        await server.until_idle()
        load = server.engine.load()
        assert load.free_tokens + load.evictable_tokens == load.total_tokens
        assert server.app._service.streams.num_bytes == 0


async def test_the_openai_client_reads_a_resumable_stream() -> None:
    # Its decoder keeps the last id, and takes a block with nothing but a comment for an event from then on.
    config = ServerConfig(keep_alive_s=0.01)
    async with (
        fake_server(config, step_s=0.03) as server,
        AsyncOpenAI(api_key="none", base_url=server.url + "/v1", max_retries=0) as client,
    ):
        body = body_of(20)
        stream = await client.chat.completions.create(
            model="tiny", messages=body["messages"], max_tokens=20, stream=True, extra_body={"resumable": True}
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == await whole_text(server, 20)
        assert re.fullmatch(r"[ -~]{20}", text)


async def test_progress_of_a_long_prompt_comes_as_comments_where_it_is_asked_for() -> None:
    def long(fill: str, **fields: object) -> dict[str, Any]:
        return {"prompt": fill * 2000, "max_tokens": 3, "stream": True, **fields}

    async def comments(http: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, int]]:
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.text.endswith("data: [DONE]\n\n")
        return [json.loads(found) for found in re.findall(r"^: prompt_progress (.*)$", answer.text, re.M)]

    async with fake_server() as server, httpx.AsyncClient(base_url=server.url, timeout=10) as http:
        for fields in ({}, {"resumable": True}):
            fill = "y" if fields else "x"
            told = await comments(http, long(fill, return_progress=True, **fields))
            assert [one["processed"] for one in told] == [512, 1024, 1536], "steps of the fake server hold 512 tokens"
            assert {(one["index"], one["total"], one["cache"]) for one in told} == {(0, 2000, 0)}
        assert await comments(http, long("z")) == []
        assert await comments(http, long("x", return_progress=True)) == [], "all of it comes from the cache, in one step"
        refused = await http.post("/v1/completions", json=long("x", return_progress=True, stream=False))
        assert (refused.status_code, refused.json()["param"]) == (400, "return_progress")
