"""HTTP/1.1 answers take a short way to the socket: what arrives is well-formed, and no rule is skipped."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import h11
import pytest
from starlette.types import Receive, Scope, Send

from streamserve.api.wire import PUT_PART, PutPart
from tests.e2e.clients import chat_body, until
from tests.e2e.serving import fake_server, listening

pytestmark = pytest.mark.anyio
Answer = Callable[[Scope, Send, PutPart], Awaitable[None]]
START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b""}


async def exchange(
    port: int, connection: h11.Connection, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], *sent: h11.Event
) -> tuple[h11.Response, bytes]:
    """One request and its whole answer, read by h11."""
    reader, writer = streams
    for event in sent:
        writer.write(connection.send(event) or b"")
    head: h11.Response | None = None
    body = b""
    async with asyncio.timeout(20):
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(65536))
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                assert isinstance(event, h11.EndOfMessage) and head is not None, event
                return head, body


def post(body: dict[str, object]) -> tuple[h11.Event, ...]:
    data = json.dumps(body).encode()
    head = [("host", "x"), ("content-length", str(len(data)))]
    return h11.Request(method="POST", target="/v1/chat/completions", headers=head), h11.Data(data=data), h11.EndOfMessage()


async def test_streams_on_one_connection_are_well_formed() -> None:
    async with fake_server(step_s=0.0) as server:
        streams = await asyncio.open_connection("127.0.0.1", server.port)
        connection = h11.Connection(h11.CLIENT)
        answers = []
        for _ in range(3):
            head, body = await exchange(server.port, connection, streams, *post({**chat_body(200), "stream": True}))
            assert (b"transfer-encoding", b"chunked") in list(head.headers)
            answers.append([json.loads(line[6:]) for line in body.split(b"\n\n") if line.startswith(b"data: {")])
            assert body.endswith(b"data: [DONE]\n\n")
            connection.start_next_cycle()
            _, body = await exchange(server.port, connection, streams, *post(chat_body(5)))  # a plain one on the same wire
            assert json.loads(body)["usage"]["completion_tokens"] == 5
            connection.start_next_cycle()
        texts = {"".join(chunk["choices"][0]["delta"].get("content", "") for chunk in answer) for answer in answers}
        assert [len(text) for text in texts] == [200]  # one byte per token, the same each time
        streams[1].close()


async def test_a_client_without_chunks_gets_a_plain_body() -> None:
    async with fake_server(step_s=0.0) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        data = json.dumps({**chat_body(50), "stream": True}).encode()
        writer.write(b"POST /v1/chat/completions HTTP/1.0\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data))
        async with asyncio.timeout(20):
            answer = await reader.read()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n") and b"\r\n" not in body
        writer.close()


class Asked:
    """An application that lets a test use the shortcut itself."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.is_done = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(scope, send, scope["extensions"][PUT_PART])
            self.is_done.set()


async def raw_get(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    return reader, writer


async def test_parts_are_taken_only_while_a_chunked_answer_runs() -> None:
    taken = []

    async def answer(scope: Scope, send: Send, put: PutPart) -> None:
        taken.append(put(b"too early"))
        await send(START)
        taken.append(put(b"one"))
        taken.append(put(b""))  # would be the end mark
        await send({"type": "http.response.body", "body": b"two", "more_body": True})
        taken.append(put(b"three"))
        await send(END)
        taken.append(put(b"too late"))

    app = Asked(answer)
    async with listening(app) as port:
        reader, writer = await raw_get(port)
        async with asyncio.timeout(10):
            assert await reader.readuntil(b"\r\n\r\n")
            body = await reader.readuntil(b"0\r\n\r\n")
        writer.close()
    assert body == b"3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n"
    assert taken == [False, True, False, True, False]


async def test_a_body_of_known_length_takes_no_parts() -> None:
    taken = []

    async def answer(scope: Scope, send: Send, put: PutPart) -> None:
        await send({**START, "headers": [(b"content-length", b"2")]})
        taken.append(put(b"no"))
        await send({"type": "http.response.body", "body": b"ok"})

    async with listening(Asked(answer)) as port:
        reader, writer = await raw_get(port)
        async with asyncio.timeout(10):
            assert (await reader.readuntil(b"ok")).endswith(b"\r\n\r\nok")
        writer.close()
    assert taken == [False]


async def test_parts_are_refused_when_the_client_stops_reading_and_when_it_leaves() -> None:
    full = asyncio.Event()
    gone = asyncio.Event()
    num_bytes = 0

    async def answer(scope: Scope, send: Send, put: PutPart) -> None:
        nonlocal num_bytes
        await send(START)
        while put(bytes(8192)):
            num_bytes += 8192
            await asyncio.sleep(0)
        full.set()
        await gone.wait()
        await until(lambda: not put(b"x"))

    app = Asked(answer)
    async with listening(app) as port:
        _, writer = await raw_get(port)
        async with asyncio.timeout(20):
            await full.wait()
            assert 8192 <= num_bytes < 64 << 20  # what the kernel's buffers hold, and 16 KiB beyond them
            writer.transport.abort()
            await asyncio.sleep(0.05)
            gone.set()
            await app.is_done.wait()


async def answered(app: Answer, request: bytes, *, until: bytes = b"", idle_s: float = 5.0) -> bytes:
    """What comes back for one request: all up to some bytes, or up to the connection's end."""
    async with listening(Asked(app), idle_s=idle_s) as port, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        answer = await (reader.readuntil(until) if until else reader.read())
        writer.close()
    return answer


GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def test_a_whole_answer_has_its_headers_once_and_its_body_as_it_is() -> None:
    async def answer(scope: Scope, send: Send, put: PutPart) -> None:
        await send({**START, "status": 429, "headers": [(b"content-length", b"4"), (b"retry-after", b"2")]})
        await send({"type": "http.response.body", "body": b"full"})

    head, _, body = (await answered(answer, GET, until=b"full")).partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    names = [line.split(b":")[0] for line in lines]
    assert status.startswith(b"HTTP/1.1 429 ") and body == b"full"
    assert sorted(names) == [b"content-length", b"date", b"retry-after", b"server"]


@pytest.mark.parametrize("method", [b"HEAD", b"GET"])
async def test_an_answer_without_a_body_has_none(method: bytes) -> None:
    async def answer(scope: Scope, send: Send, put: PutPart) -> None:
        await send({**START, "status": 200 if method == b"HEAD" else 204})
        assert not put(b"no")
        await send({"type": "http.response.body", "body": b"no"})

    request = method + b" / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    assert (await answered(answer, request)).endswith(b"\r\n\r\n")


@pytest.mark.parametrize("header", [(b"x-name", b"one\r\nset-cookie: two"), (b"x name", b"one"), (b"x-name", b"\0")])
async def test_a_header_that_would_break_the_head_is_not_sent(header: tuple[bytes, bytes]) -> None:
    async def answer(scope: Scope, send: Send, put: PutPart) -> None:
        with pytest.raises(h11.LocalProtocolError):
            await send({**START, "headers": [header]})

    received = await answered(answer, GET)
    assert b"set-cookie" not in received and b"x-name" not in received and b"x name" not in received


async def test_an_answer_of_the_wrong_length_is_refused() -> None:
    async def answer(scope: Scope, send: Send, put: PutPart) -> None:
        await send({**START, "headers": [(b"content-length", b"2")]})
        with pytest.raises(h11.LocalProtocolError):
            await send({"type": "http.response.body", "body": b"too long"})

    assert (await answered(answer, GET)).endswith(b"\r\n\r\n")


async def test_an_answer_that_is_broken_off_shows_that_it_was() -> None:
    async def answer(scope: Scope, send: Send, put: PutPart) -> None:
        await send(START)
        await send({"type": "http.response.body", "body": b"some", "more_body": True})

    assert (await answered(answer, GET)).endswith(b"\r\n\r\n4\r\nsome\r\n")  # and no end mark


async def test_a_head_does_not_wait_for_a_body() -> None:
    goes_on = asyncio.Event()

    async def answer(scope: Scope, send: Send, put: PutPart) -> None:
        await send(START)
        await goes_on.wait()
        assert put(b"late")
        await send(END)

    async with listening(Asked(answer)) as port, asyncio.timeout(10):
        reader, writer = await raw_get(port)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        goes_on.set()
        assert await reader.readuntil(b"0\r\n\r\n") == b"4\r\nlate\r\n0\r\n\r\n"
        writer.close()


async def test_a_connection_without_requests_is_closed_in_time_but_not_one_that_waits_for_its_answer() -> None:
    async def answer(scope: Scope, send: Send, put: PutPart) -> None:
        await asyncio.sleep(0.2)
        await send(START)
        await send(END)

    assert (await answered(answer, GET, idle_s=0.05)).endswith(b"\r\n\r\n0\r\n\r\n")  # then the end of the connection


async def test_a_server_that_stops_closes_connections_without_requests() -> None:
    async def answer(scope: Scope, send: Send, put: PutPart) -> None:
        await send(START)
        await send(END)

    async with asyncio.timeout(20):
        async with listening(Asked(answer), idle_s=1000.0) as port:
            reader, writer = await raw_get(port)
            await reader.readuntil(b"0\r\n\r\n")
            silent, other = await asyncio.open_connection("127.0.0.1", port)
        assert (await reader.read(), await silent.read()) == (b"", b"")
        writer.close()
        other.close()
