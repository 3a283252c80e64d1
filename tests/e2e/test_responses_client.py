"""The openai client's Responses API over a real server: HTTP and WebSocket."""

import asyncio
import inspect
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.resources.responses.responses import AsyncResponsesConnection
from openai.types.responses import Response
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streamserve.api.response_store import FileStore
from streamserve.config import ServerConfig
from tests.api.response_checks import check_response, check_stream, events_of_sse
from tests.e2e.clients import until
from tests.e2e.serving import FakeServer, fake_server

pytestmark = pytest.mark.anyio
HI = "Count to five"


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with fake_server(answer_len=30) as running:
        yield running


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as openai_client:
        yield openai_client


def checked(response: Response) -> Response:
    check_response(response.to_dict(mode="json"))
    return response


async def collected(stream: Any) -> list[dict[str, Any]]:
    return [event.to_dict(mode="json") async for event in stream]


async def answer(connection: AsyncResponsesConnection) -> list[dict[str, Any]]:
    """The events of the next response on a socket, which has nothing but this one under way."""
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(20):
        while not events or events[-1]["type"] not in ("response.completed", "response.incomplete", "error"):
            events.append((await connection.recv()).to_dict(mode="json"))
    return events


# ---- HTTP --------------------------------------------------------------------------------------------------------


async def test_plain_streamed_and_helped_responses_agree(client: AsyncOpenAI) -> None:
    plain = checked(await client.responses.create(model="tiny", input=HI, temperature=0))
    assert len(plain.output_text) == 30 and plain.usage is not None and plain.usage.output_tokens == 31
    stream = await client.responses.create(model="tiny", input=HI, temperature=0, stream=True)
    last = Response.model_validate(check_stream(await collected(stream)))
    assert last.output_text == plain.output_text
    kinds = []
    async with client.responses.stream(
        model="tiny", input=HI, temperature=0, include=["message.output_text.logprobs"], top_logprobs=1
    ) as helper:
        async for event in helper:
            kinds.append(event.type)
        final = await helper.get_final_response()
    assert final.output_text == plain.output_text
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed") and "response.output_text.delta" in kinds


async def test_kept_responses_are_retrieved_continued_listed_and_deleted(client: AsyncOpenAI) -> None:
    first = await client.responses.create(model="tiny", input=HI, instructions="Be kind")
    second = await client.responses.create(
        model="tiny", input=[{"role": "user", "content": "Go on"}], previous_response_id=first.id
    )
    assert await client.responses.retrieve(first.id) == first
    counted = await client.responses.input_tokens.count(model="tiny", input="Go on", previous_response_id=first.id)
    assert second.usage is not None and counted.input_tokens == second.usage.input_tokens
    items = [item async for item in client.responses.input_items.list(second.id, order="asc", limit=1)]
    assert [getattr(item, "role", None) for item in items] == ["user"]
    # Output goes in again as it came out, whatever fields the client adds to it.
    output: Any = first.output
    again = await client.responses.create(
        model="tiny", input=[{"role": "user", "content": HI}, *output, {"role": "user", "content": "Go on"}]
    )
    without = await client.responses.input_tokens.count(model="tiny", input="Go on")
    assert again.usage is not None and again.usage.input_tokens > without.input_tokens
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as broken:
        await client.responses.create(model="tiny", input="Go on", previous_response_id=second.id)
    assert (broken.value.code, broken.value.param) == ("previous_response_not_found", "previous_response_id")


async def test_a_background_response_is_followed_and_cancelled(server: FakeServer, client: AsyncOpenAI) -> None:
    stream = await client.responses.create(model="tiny", input=HI, background=True, stream=True)
    head: list[dict[str, Any]] = []
    async for event in stream:
        head.append(event.to_dict(mode="json"))
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    id = head[0]["response"]["id"]
    rest = await collected(await client.responses.retrieve(id, stream=True, starting_after=len(head) - 1))
    response = check_stream([*head, *rest], is_queued=True)
    assert Response.model_validate(response) == await client.responses.retrieve(id)

    long = await client.responses.create(model="tiny", input=HI, background=True, extra_body={"ignore_eos": True})
    assert long.status == "queued"
    await until(lambda: server.engine.load().running == 1)
    cancelled = checked(await client.responses.cancel(long.id))
    assert cancelled.status == "cancelled"
    await server.until_idle()


# Every argument of the client's create(), with a value, and what becomes of it: "" it shows in the response, else a word of the
# warning or, behind "400 ", of the refusal.
ARGUMENTS: dict[str, tuple[Any, str]] = {
    "background": (True, ""),
    "context_management": ([{"type": "compaction"}], "400 truncation"),
    "conversation": ("conv_1", "400 previous_response_id"),
    "include": (["reasoning.encrypted_content"], "in the open"),
    "input": ("Hi", "unshown"),
    "instructions": ("Be kind", ""),
    "max_output_tokens": (5, ""),
    "max_tool_calls": (2, "max_tool_calls"),
    "metadata": ({"a": "b"}, ""),
    "model": ("tiny", ""),
    "moderation": ({"model": "m"}, "400 moderation"),
    "parallel_tool_calls": (False, ""),
    "previous_response_id": ("resp_none", "400 not kept"),
    "prompt": ({"id": "p"}, "400 instructions"),
    "prompt_cache_key": ("k", "prompt_cache_key"),
    "prompt_cache_options": ({"mode": "implicit"}, "prompt_cache_options"),
    "prompt_cache_retention": ("24h", "prompt_cache_retention"),
    "reasoning": ({"summary": "auto"}, "sums it up"),
    "safety_identifier": ("me", "safety_identifier"),
    "service_tier": ("flex", "one tier"),
    "store": (False, ""),
    "stream": (False, "unshown"),
    "stream_options": ({"include_obfuscation": True}, "400 stream"),
    "temperature": (0.5, ""),
    "text": ({"format": {"type": "text"}, "verbosity": "low"}, ""),
    "tool_choice": ("auto", ""),
    "tools": ([{"type": "web_search"}], "400 function"),
    "top_logprobs": (2, ""),
    "top_p": (0.5, ""),
    "truncation": ("auto", ""),
    "user": ("me", "user"),
}


async def test_every_argument_of_the_client_is_decided(client: AsyncOpenAI) -> None:
    known = set(inspect.signature(client.responses.create).parameters)
    assert known - {"extra_headers", "extra_query", "extra_body", "timeout"} == set(ARGUMENTS)
    for name, (value, outcome) in ARGUMENTS.items():
        fields = {"model": "tiny", "input": HI, name: value}
        if outcome.startswith("400 "):
            with pytest.raises(openai.BadRequestError) as refused:
                await client.responses.create(**fields)
            assert str(refused.value.param).startswith(name) and outcome[4:] in refused.value.message, name
            continue
        raw = await client.responses.with_raw_response.create(**fields)
        shown, warnings = raw.parse().to_dict(mode="json"), raw.headers.get("x-streamserve-warning", "")
        if outcome:
            assert outcome in warnings or outcome == "unshown", name
        else:
            assert shown[name] == value, name
            assert warnings == "" or name == "text", name


async def test_errors_arrive_as_the_clients_own(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.responses.create(model="tiny", input=HI, temperature=-1)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.BadRequestError) as long:
        await client.responses.create(model="tiny", input=HI, max_output_tokens=9000, stream=True)
    assert (long.value.param, long.value.code) == ("max_output_tokens", "context_length_exceeded")


async def test_the_blocking_client_reads_streams_too(server: FakeServer) -> None:
    def ask() -> list[dict[str, Any]]:
        with (
            OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
            client.responses.create(model="tiny", input=HI, stream=True) as stream,
        ):
            return [event.to_dict(mode="json") for event in stream]

    assert check_stream(await asyncio.to_thread(ask))["status"] == "completed"


async def test_a_stream_survives_its_connection_where_that_is_asked_for(server: FakeServer, client: AsyncOpenAI) -> None:
    stream = await client.responses.create(
        model="tiny", input=HI, stream=True, extra_body={"resumable": True, "ignore_eos": True}, max_output_tokens=300
    )
    head = [await anext(aiter(stream))]
    await stream.close()
    id = head[0].to_dict()["response"]["id"]  # type: ignore[index]
    await server.until_idle()
    response = checked(await client.responses.retrieve(id))
    assert (response.status, len(response.output_text)) == ("incomplete", 300)


async def test_the_progress_of_a_long_input_is_told_beside_the_events(server: FakeServer) -> None:
    body = {"input": "word " * 600, "stream": True, "return_progress": True}
    async with httpx.AsyncClient(base_url=server.url) as http:
        text = (await http.post("/v1/responses", json=body)).text
    assert text.count(": prompt_progress {") >= 3
    assert check_stream(events_of_sse(text))["status"] == "completed"


async def test_a_client_that_leaves_ends_its_response(server: FakeServer, client: AsyncOpenAI) -> None:
    stream = await client.responses.create(model="tiny", input=HI, stream=True, extra_body={"ignore_eos": True})
    first = await anext(aiter(stream))
    await stream.close()
    await server.until_idle()
    response = checked(await client.responses.retrieve(first.to_dict()["response"]["id"]))  # type: ignore[index]
    assert response.status == "cancelled"


async def test_responses_outlive_the_server_in_a_file(tmp_path: Any) -> None:
    path = tmp_path / "responses.db"
    ids: list[str] = []
    for _ in range(2):
        store = FileStore(path)
        async with (
            fake_server(answer_len=5, response_store=store) as server,
            AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
        ):
            previous = ids[-1] if ids else None
            ids.append((await client.responses.create(model="tiny", input=HI, previous_response_id=previous)).id)
            assert (await client.responses.retrieve(ids[0])).status == "completed"
        store.close()


# ---- WebSocket ---------------------------------------------------------------------------------------------------


async def test_a_socket_carries_the_events_of_a_stream_one_response_after_the_other(client: AsyncOpenAI) -> None:
    plain = await client.responses.create(model="tiny", input=HI)
    async with client.responses.connect() as connection:
        await connection.response.create(model="tiny", input=HI)
        await connection.response.create(model="tiny", input=HI, max_output_tokens=3)
        first, second = [check_stream(await answer(connection)) for _ in range(2)]
        assert Response.model_validate(first).output_text == plain.output_text
        assert second["status"] == "incomplete"
        await connection.response.create(model="tiny", input="Go on", previous_response_id=first["id"])
        assert check_stream(await answer(connection))["previous_response_id"] == first["id"]


async def test_what_is_not_stored_is_continued_on_its_socket_only(client: AsyncOpenAI) -> None:
    async with client.responses.connect() as connection:
        previous: str | None = None
        lengths = []
        for _ in range(3):
            await connection.response.create(model="tiny", input=HI, store=False, previous_response_id=previous)
            response = check_stream(await answer(connection))
            previous = response["id"]
            lengths.append(response["usage"]["input_tokens"])
        assert lengths[1] - lengths[0] == lengths[2] - lengths[1] > 30
    async with client.responses.connect() as other:
        await other.response.create(model="tiny", input=HI, previous_response_id=previous)
        (error,) = await answer(other)
        assert (error["code"], error["status"]) == ("previous_response_not_found", 400)


async def test_a_bad_frame_is_answered_and_harms_nobody(client: AsyncOpenAI) -> None:
    async with client.responses.connect() as connection:
        bad: list[tuple[dict[str, Any] | str, str]] = [
            ("{", "body"),
            ('["a"]', "body"),
            ({"type": "response.make"}, "type"),
            ({"type": "response.create", "temperature": -1, "input": HI}, "temperature"),
            ({"type": "response.create", "input": HI, "background": True}, "background"),
            ({"type": "response.create", "input": HI, "stream": False}, "stream"),
            ({"type": "response.create", "input": HI, "stream_id": "a b"}, "stream_id"),
            ({"type": "response.create", "input": HI, "generate": 1}, "generate"),
            ({"type": "response.cancel"}, "stream_id"),
        ]
        for frame, param in bad:
            if isinstance(frame, str):
                await connection.send_raw(frame)
            else:
                await connection.send_raw(json.dumps(frame))
            (error,) = await answer(connection)
            assert (error["type"], error["param"], error["error"]["param"]) == ("error", param, param)
        await connection.response.create(model="tiny", input=HI)
        assert check_stream(await answer(connection))["status"] == "completed"


async def test_streams_of_one_socket_run_side_by_side_and_each_in_order(client: AsyncOpenAI) -> None:
    async with client.responses.connect() as connection:
        for stream_id in ("a", "b", "a"):
            body = {"type": "response.create", "model": "tiny", "input": f"{stream_id}: {HI}", "stream_id": stream_id}
            await connection.send_raw(json.dumps(body))
        events: dict[str, list[list[dict[str, Any]]]] = {"a": [[]], "b": [[]]}
        order = []
        async with asyncio.timeout(20):
            while len(events["a"]) < 3 or len(events["b"]) < 2:
                event = (await connection.recv()).to_dict(mode="json")
                stream_id = str(event.pop("stream_id"))
                order.append(stream_id)
                events[stream_id][-1].append(event)
                if event["type"] == "response.completed":
                    events[stream_id].append([])
    answers = [Response.model_validate(check_stream(one)).output_text for one in (*events["a"][:2], events["b"][0])]
    assert answers[0] == answers[1] != answers[2]
    assert order.index("b") < len(events["a"][0])  # before the first response of the other stream was over


async def test_cancelling_ends_a_stream_and_what_waits_on_it(server: FakeServer, client: AsyncOpenAI) -> None:
    async with client.responses.connect() as connection:
        for _ in range(2):
            await connection.send_raw(json.dumps({"type": "response.create", "input": HI, "ignore_eos": True}))
        events = [(await connection.recv()).to_dict(mode="json") for _ in range(6)]
        await connection.send_raw(json.dumps({"type": "response.cancel"}))
        response = check_stream([*events, *await answer(connection)])
        assert response["status"] == "cancelled"
        await server.until_idle()
        await connection.response.create(model="tiny", input=HI)
        assert check_stream(await answer(connection))["status"] == "completed"


async def test_an_input_can_be_read_ahead_of_its_answer(client: AsyncOpenAI) -> None:
    async with client.responses.connect() as connection:
        long = "word " * 200
        await connection.send_raw(json.dumps({"type": "response.create", "input": long, "generate": False}))
        read = check_stream(await answer(connection))
        assert (read["status"], read["output"], read["usage"]["output_tokens"]) == ("completed", [], 0)
        await connection.response.create(model="tiny", input="Go on", previous_response_id=read["id"])
        usage = check_stream(await answer(connection))["usage"]
        assert usage["input_tokens_details"]["cached_tokens"] >= 1000


async def test_closing_a_socket_ends_its_responses(server: FakeServer, client: AsyncOpenAI) -> None:
    async with client.responses.connect() as connection:
        for stream_id in "abc":
            body = {"type": "response.create", "input": HI, "ignore_eos": True, "stream_id": stream_id}
            await connection.send_raw(json.dumps(body))
        await until(lambda: server.engine.load().running == 3)
    await server.until_idle()


async def test_a_socket_asks_for_the_key() -> None:
    async with fake_server(ServerConfig(api_key=("sesame",)), answer_len=5) as server:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="open", max_retries=0) as client:
            with pytest.raises(InvalidStatus) as refused:
                async with client.responses.connect():
                    pass
            assert refused.value.response.status_code == 401
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="sesame", max_retries=0) as client:
            async with client.responses.connect() as connection:
                await connection.response.create(model="tiny", input=HI)
                response = check_stream(await answer(connection))
            assert (await client.responses.retrieve(response["id"])).id == response["id"]


async def test_a_key_may_come_in_a_frame_and_its_responses_are_found_by_it() -> None:
    async with fake_server(ServerConfig(api_key=("one", "two")), answer_len=5) as server:
        url = server.url.replace("http", "ws") + "/v1/responses"

        async def hear(socket: ClientConnection) -> dict[str, Any]:
            async with asyncio.timeout(10):
                heard: dict[str, Any] = json.loads(await socket.recv())
            return heard

        async with connect(url) as socket:
            await socket.send(json.dumps({"type": "auth", "api_key": "three"}))
            assert (await hear(socket))["error"]["code"] == "invalid_api_key"
            with pytest.raises(ConnectionClosed):
                await hear(socket)
            assert socket.close_code == 1008
        async with connect(url) as socket:
            for key in ("one", "two"):
                await socket.send(json.dumps({"type": "auth", "api_key": key}))
                assert await hear(socket) == {"type": "auth.ok"}
            await socket.send(json.dumps({"type": "auth", "api_key": "three"}))
            assert (await hear(socket))["error"]["param"] == "api_key"
            await socket.send(json.dumps({"type": "response.create", "input": HI}))
            events = [await hear(socket)]
            while events[-1]["type"] != "response.completed":
                events.append(await hear(socket))
            id = check_stream(events)["id"]
        async with httpx.AsyncClient(base_url=server.url) as http:
            for key, status in (("one", 404), ("two", 200)):
                found = await http.get(f"/v1/responses/{id}", headers={"authorization": f"Bearer {key}"})
                assert found.status_code == status
