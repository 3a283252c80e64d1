"""The protocol of /v1/ws, with a real client over a real server."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streamserve.config import ServerConfig
from tests.api.test_embeddings import MadeUpEncoder, app_with
from tests.e2e.clients import chat_body, until
from tests.e2e.serving import FakeServer, fake_server, listening

pytestmark = pytest.mark.anyio
HI = {"messages": [{"role": "user", "content": "hi"}]}


class Talk:
    """A socket whose frames are objects."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def say(self, **frame: Any) -> None:
        await self.socket.send(json.dumps(frame))

    async def hear(self) -> dict[str, Any]:
        async with asyncio.timeout(5):
            frame: dict[str, Any] = json.loads(await self.socket.recv())
            return frame

    async def hear_answer(self, id: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The chunks of a request and its last frame; no other request may speak."""
        chunks = []
        while (frame := await self.hear())["type"] == "chunk":
            assert frame["id"] == id
            chunks.append(frame["chunk"])
        assert frame["id"] == id
        return chunks, frame


@asynccontextmanager
async def talk(server: FakeServer, **options: Any) -> AsyncIterator[Talk]:
    async with connect(f"ws://127.0.0.1:{server.port}/v1/ws", **options) as socket:
        yield Talk(socket)


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with fake_server(ServerConfig(max_body_mb=1)) as running:
        yield running


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices)


async def test_chunks_are_those_of_sse(server: FakeServer) -> None:
    body = {**HI, "max_tokens": 12, "n": 2}
    async with httpx.AsyncClient(base_url=server.url) as http:
        plain = (await http.post("/v1/chat/completions", json=body)).json()
    async with talk(server) as socket:
        await socket.say(type="chat.create", id="a", request=body)
        chunks, done = await socket.hear_answer("a")
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [text_of(chunks, index) for index in (0, 1)] == [choice["message"]["content"] for choice in plain["choices"]]
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]] == [
        "length"
    ] * 2
    assert done["type"] == "done"
    assert done["usage"]["completion_tokens"] == 24
    assert done["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


async def test_text_completions_and_ids_that_are_used_again(server: FakeServer) -> None:
    async with talk(server) as socket:
        for stream in (True, False, None):
            await socket.say(type="completion.create", id="same", request={"prompt": "x", "max_tokens": 5, "stream": stream})
            chunks, done = await socket.hear_answer("same")
            assert (len(text_of(chunks)), done["type"]) == (5, "done")


async def test_many_requests_share_a_socket(server: FakeServer) -> None:
    async with talk(server) as socket:
        for number in range(30):
            await socket.say(type="chat.create", id=f"r{number}", request=chat_body(20 + number))
        texts: dict[str, str] = {}
        open_ids = {f"r{number}" for number in range(30)}
        while open_ids:
            frame = await socket.hear()
            if frame["type"] == "done":
                open_ids.remove(frame["id"])
                assert frame["usage"]["completion_tokens"] == len(texts[frame["id"]])
            else:
                texts[frame["id"]] = texts.get(frame["id"], "") + text_of([frame["chunk"]])
    assert {id: len(text) for id, text in texts.items()} == {f"r{number}": 20 + number for number in range(30)}


async def test_cancel_ends_with_abort_and_frees_the_id(server: FakeServer) -> None:
    async with talk(server) as socket:
        await socket.say(type="chat.create", id="a", request={**chat_body(), "n": 2})
        for _ in range(6):
            await socket.hear()
        await socket.say(type="cancel", id="a")
        chunks, done = await socket.hear_answer("a")
        reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
        assert reasons == ["abort", "abort"]
        assert (done["type"], done["usage"]["completion_tokens"] > 0) == ("done", True)
        await server.until_idle()
        await socket.say(type="chat.create", id="a", request={**HI, "max_tokens": 2})
        assert (await socket.hear_answer("a"))[1]["type"] == "done"


async def test_cancel_right_after_create_still_ends_in_order(server: FakeServer) -> None:
    async with talk(server) as socket:
        long = {"messages": [{"role": "user", "content": "y" * 5000}]}  # tokenised in a thread: the cancel overtakes it
        await socket.say(type="chat.create", id="a", request=long)
        await socket.say(type="cancel", id="a")
        chunks, done = await socket.hear_answer("a")
        assert chunks[-1]["choices"][0]["finish_reason"] == "abort"
        assert done["type"] == "done"
    await server.until_idle()


@pytest.mark.parametrize(
    ("frame", "id", "code", "param"),
    [
        ("{", None, "invalid_value", "body"),
        ("[]", None, "invalid_value", "body"),
        ("", None, "invalid_value", "body"),
        ("{}", None, "invalid_value", "type"),
        ('{"type": "dance", "id": "x"}', "x", "invalid_value", "type"),
        ('{"type": 5, "id": 5}', None, "invalid_value", "type"),
        ('{"type": ["chat.create"], "id": "x"}', "x", "invalid_value", "type"),
        ('{"type": "chat.create", "request": {}}', None, "invalid_value", "id"),
        ('{"type": "chat.create", "id": "", "request": {}}', "", "invalid_value", "id"),
        ('{"type": "chat.create", "id": "x"}', "x", "invalid_value", "request"),
        ('{"type": "chat.create", "id": "x", "request": []}', "x", "invalid_value", "request"),
        ('{"type": "chat.create", "id": "x", "request": {}}', "x", "invalid_value", "messages"),
        ('{"type": "chat.create", "id": "x", "messages": []}', "x", "invalid_value", "request"),
        ('{"type": "chat.create", "id": "x", "request": {"messages": []}, "n": 2}', "x", "invalid_value", "n"),
        (
            '{"type": "completion.create", "id": "x", "request": {"prompt": "a", "temperature": -1}}',
            "x",
            "invalid_value",
            "temperature",
        ),
        ('{"type": "completion.create", "id": "x", "request": {"prompt": "a", "model": "b"}}', "x", "model_not_found", "model"),
        ('{"type": "cancel", "id": "nobody"}', "nobody", "unknown_id", "id"),
        ('{"type": "cancel"}', None, "invalid_value", "id"),
        ('{"type": "cancel", "id": "x", "all": true}', "x", "invalid_value", "all"),
        ('{"type": "control", "id": "nobody", "action": "end_reasoning"}', "nobody", "unknown_id", "id"),
        ('{"type": "chat.create", "id": "x", "request": {"messages": []}, "timeout_s": 0}', "x", "invalid_value", "timeout_s"),
        ('{"type": "chat.create", "id": "x", "request": {"messages": []}, "timeout_s": true}', "x", "invalid_value", "timeout_s"),
        ('{"type": "chat.create", "id": "x", "request": {"messages": [], "seed": NaN}}', None, "invalid_value", "seed"),
        (b'{"type": "ping"}', None, "invalid_value", "frame"),
        ('{"type": "ping", "x": "' + "y" * (1 << 20) + '"}', None, "request_too_large", "frame"),
        ('{"type": "ping", "x": "' + "é" * (1 << 19) + '"}', None, "request_too_large", "frame"),
    ],
)
async def test_a_bad_frame_is_answered_and_the_socket_lives(
    server: FakeServer, frame: str | bytes, id: str | None, code: str, param: str
) -> None:
    async with talk(server) as socket:
        await socket.socket.send(frame)
        answer = await socket.hear()
        assert (answer["type"], answer["id"], answer["error"]["code"], answer["error"]["param"]) == ("error", id, code, param)
        await socket.say(type="ping", at=5)
        assert await socket.hear() == {"type": "pong", "at": 5}
        await socket.say(type="chat.create", id="x", request={**HI, "max_tokens": 2})
        assert (await socket.hear_answer("x"))[1]["type"] == "done"


async def test_a_second_request_under_a_live_id_is_refused_and_the_first_goes_on(server: FakeServer) -> None:
    async with talk(server) as socket:
        await socket.say(type="chat.create", id="a", request=chat_body(200))
        await socket.say(type="chat.create", id="a", request=HI)
        num_chunks = 0
        refused = False
        while (frame := await socket.hear())["type"] != "done":
            if frame["type"] == "error":
                refused = True
                assert (frame["id"], frame["error"]["code"]) == ("a", "duplicate_id")
            num_chunks += frame["type"] == "chunk"
        assert refused
        assert frame["usage"]["completion_tokens"] == 200


async def test_a_socket_holds_so_many_requests_and_no_more(server: FakeServer) -> None:
    async with talk(server, close_timeout=0.2) as socket:  # the client does not read what is on its way while it closes
        for number in range(257):
            await socket.say(type="chat.create", id=str(number), request=chat_body())
        while (frame := await socket.hear())["type"] != "error":
            pass
        assert (frame["id"], frame["error"]["code"]) == ("256", "queue_full")
    await server.until_idle()


# ---- every dialect ---------------------------------------------------------------------------------------------------


async def test_a_response_comes_as_its_events_and_can_be_had_afterwards(server: FakeServer) -> None:
    async with talk(server) as socket, httpx.AsyncClient(base_url=server.url) as http:
        await socket.say(
            type="response.create", id="r", request={"input": "hi", "max_output_tokens": 20, "return_progress": True}
        )
        events, done = await socket.hear_answer("r")
        assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
        assert events[-1]["type"] in ("response.completed", "response.incomplete")
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
        whole = events[-1]["response"]
        assert text == whole["output"][-1]["content"][0]["text"]
        assert (done["type"], done["usage"]["completion_tokens"]) == ("done", whole["usage"]["output_tokens"])
        kept = (await http.get(f"/v1/responses/{whole['id']}")).json()
        assert kept["output"] == whole["output"]

        follow = {"input": "more", "previous_response_id": whole["id"], "max_output_tokens": 5}
        await socket.say(type="response.create", id="r", request=follow)
        assert (await socket.hear_answer("r"))[1]["type"] == "done"


async def test_a_message_comes_as_its_events(server: FakeServer) -> None:
    async with talk(server) as socket:
        body = {**HI, "model": "tiny", "max_tokens": 20, "metadata": {"user_id": "me"}}
        await socket.say(type="message.create", id="m", request=body)
        warning = await socket.hear()
        assert (warning["type"], warning["id"]) == ("warning", "m")
        assert "metadata" in warning["warnings"][0]
        events, done = await socket.hear_answer("m")
        assert [events[0]["type"], *(event["type"] for event in events[-2:])] == [
            "message_start",
            "message_delta",
            "message_stop",
        ]
        assert (done["type"], done["usage"]["completion_tokens"]) == ("done", 20)


async def test_vectors_come_in_one_result_and_can_be_cancelled_or_late() -> None:
    encoder = MadeUpEncoder()
    async with listening(app_with(encoder)) as port, connect(f"ws://127.0.0.1:{port}/v1/ws") as raw:
        socket = Talk(raw)
        await socket.say(type="embedding.create", id="e", request={"input": ["red", "blue"]})
        result = await socket.hear()
        assert (result["type"], result["id"], len(result["result"]["data"])) == ("result", "e", 2)
        done = await socket.hear()
        assert (done["type"], done["usage"]) == ("done", result["result"]["usage"])

        encoder.gate.clear()
        await socket.say(type="embedding.create", id="e", request={"input": "red"})
        await until(lambda: len(encoder.calls) == 2)
        await socket.say(type="cancel", id="e")
        assert await socket.hear() == {"type": "done", "id": "e", "usage": {}}

        await socket.say(type="embedding.create", id="e", request={"input": "red"}, timeout_s=0.05)
        late = await socket.hear()
        assert (late["type"], late["id"], late["error"]["code"]) == ("error", "e", "deadline_exceeded")
        assert encoder.cancelled == 2


async def test_vectors_are_served_as_over_http() -> None:
    encoder = MadeUpEncoder()
    app = app_with(encoder, request_timeout_s=0.1)
    async with listening(app) as port, connect(f"ws://127.0.0.1:{port}/v1/ws") as raw:
        socket = Talk(raw)
        await socket.say(type="embedding.create", id="e", request={"input": "red", "user": "me"})
        warned = await socket.hear()
        assert warned["type"] == "warning" and warned["warnings"][0].startswith("user has no effect")
        assert [(await socket.hear())["type"] for _ in range(2)] == ["result", "done"]
        encoder.gate.clear()
        for fields in ({"timeout": 0.05}, {}):  # its own limit, the server's
            await socket.say(type="embedding.create", id="e", request={"input": "red", **fields})
            late = await socket.hear()
            assert (late["type"], late["error"]["code"]) == ("error", "deadline_exceeded")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            counted = (await http.get("/metrics")).text
    for outcome, count in (("stop", 1), ("deadline_exceeded", 2)):
        assert any(outcome in line and line.endswith(f" {count}.0") for line in counted.splitlines()), counted


@pytest.mark.parametrize(
    ("kind", "request_", "param"),
    [
        ("response.create", {"input": "x", "background": True}, "background"),
        ("response.create", {"input": "x", "resumable": True}, "resumable"),
        ("message.create", {"messages": [], "max_tokens": 1, "resumable": True}, "resumable"),
        ("message.create", {**HI, "model": "tiny"}, "max_tokens"),
        ("embedding.create", {"input": "x"}, "model"),
    ],
)
async def test_what_a_socket_cannot_do_is_refused(server: FakeServer, kind: str, request_: dict[str, Any], param: str) -> None:
    async with talk(server) as socket:
        await socket.say(type=kind, id="x", request=request_)
        answer = await socket.hear()
        assert (answer["type"], answer["id"], answer["error"]["param"]) == ("error", "x", param)
    assert not server.engine.load().running


# ---- beside the answer -----------------------------------------------------------------------------------------------


async def test_a_request_whose_time_is_over_ends_with_an_error_and_others_go_on(server: FakeServer) -> None:
    async with talk(server) as socket:
        await socket.say(type="chat.create", id="late", request=chat_body(4000), timeout_s=0.2)
        await socket.say(type="chat.create", id="other", request=chat_body(300), timeout_s=30)
        ends: dict[str, dict[str, Any]] = {}
        while len(ends) < 2:
            frame = await socket.hear()
            if frame["type"] != "chunk":
                ends[frame["id"]] = frame
        assert ends["late"]["error"]["code"] == "deadline_exceeded"
        assert ends["other"]["usage"]["completion_tokens"] == 300
    await server.until_idle()


async def test_a_long_prompt_reports_its_progress(server: FakeServer) -> None:
    async with talk(server) as socket:
        body = {"prompt": "x" * 2000, "max_tokens": 2, "return_progress": True}
        await socket.say(type="completion.create", id="p", request=body)
        told = [await socket.hear() for _ in range(3)]
        assert [frame["progress"]["processed"] for frame in told] == [512, 1024, 1536]
        assert {(frame["type"], frame["id"], frame["progress"]["total"]) for frame in told} == {("progress", "p", 2000)}
        assert (await socket.hear_answer("p"))[1]["type"] == "done"


async def test_the_end_of_a_thought_is_asked_for_by_its_request(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def end_thought(id: str) -> bool:
        asked.append(id)
        return True

    monkeypatch.setattr(server.engine, "end_thought", end_thought)
    async with talk(server) as socket:
        await socket.say(type="chat.create", id="t", request=chat_body(n=2))
        name = (await socket.hear())["chunk"]["id"]
        await socket.say(type="control", id="t", action="end_reasoning")
        while (frame := await socket.hear())["type"] == "chunk":
            pass
        assert frame == {"type": "control.ok", "id": "t", "action": "end_reasoning", "ended": 2}
        assert asked == [f"{name}-0", f"{name}-1"]
        await socket.say(type="cancel", id="t")
        assert (await socket.hear_answer("t"))[1]["type"] == "done"


# ---- who may talk ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def locked_server() -> AsyncIterator[FakeServer]:
    async with fake_server(ServerConfig(api_key=("sesame",), cors_origins=("https://page.example",))) as running:
        yield running


async def test_the_key_comes_in_a_header_or_in_the_first_frame() -> None:
    async with locked_server() as server:
        async with talk(server, additional_headers={"authorization": "Bearer sesame"}) as socket:
            await socket.say(type="ping")
            assert await socket.hear() == {"type": "pong"}
        async with talk(server) as socket:
            await socket.say(type="auth", api_key="sesame")
            assert await socket.hear() == {"type": "auth.ok"}
            await socket.say(type="chat.create", id="a", request={**HI, "max_tokens": 1})
            assert (await socket.hear_answer("a"))[1]["type"] == "done"


@pytest.mark.parametrize(
    "frame", ['{"type": "auth", "api_key": "x"}', '{"type": "auth"}', '{"type": "ping"}', '{"type": "auth", "api_key": 5}']
)
async def test_without_the_key_the_socket_closes(frame: str) -> None:
    async with locked_server() as server, talk(server) as socket:
        await socket.socket.send(frame)
        answer = await socket.hear()
        assert (answer["id"], answer["error"]["code"]) == (None, "invalid_api_key")
        with pytest.raises(ConnectionClosed) as closed:
            await socket.hear()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
        assert not server.engine.load().running


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": "Bearer wrong"}, 401),
        ({"origin": "https://evil.example"}, 401),
    ],
)
async def test_a_wrong_header_or_origin_is_refused_before_the_socket_opens(headers: dict[str, str], status: int) -> None:
    async with locked_server() as server:
        with pytest.raises(InvalidStatus) as refused:
            async with talk(server, additional_headers=headers):
                pass
        assert refused.value.response.status_code == status
        assert json.loads(refused.value.response.body)["error"]["message"]


async def test_listed_and_own_origins_may_open_a_socket() -> None:
    async with locked_server() as server:
        for origin in ("https://page.example", server.url):
            async with talk(server, additional_headers={"origin": origin}) as socket:
                await socket.say(type="auth", api_key="sesame")
                assert await socket.hear() == {"type": "auth.ok"}


async def test_no_socket_elsewhere(server: FakeServer) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"ws://127.0.0.1:{server.port}/v1/other"):
            pass
    assert refused.value.response.status_code == 404


async def test_at_shutdown_idle_sockets_close_and_busy_ones_finish_first(server: FakeServer) -> None:
    async with talk(server) as idle, talk(server) as busy:
        await busy.say(type="chat.create", id="a", request=chat_body(100))
        await until(lambda: server.engine.load().running == 1)
        server.app.close_idle_sockets()
        with pytest.raises(ConnectionClosed) as closed:
            await idle.hear()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        _, done = await busy.hear_answer("a")
        assert done["usage"]["completion_tokens"] == 100
        with pytest.raises(ConnectionClosed):
            await busy.hear()
