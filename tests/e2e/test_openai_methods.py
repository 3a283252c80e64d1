"""Every method of the openai client's chat, completions, responses, embeddings, models, files and batches, asynchronous and
plain: each works, or says why it does not. A method without a case fails."""

import inspect
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import openai
import pytest
from anyio import sleep, to_thread
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel

from streamserve.api.fields import UNSERVED, why_unserved
from tests.e2e.random_model import RandomServer
from tests.e2e.test_openai_fields import client, plain_client, server
from tests.media.pictures import file_of, image

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning"),  # the plain client's own
    pytest.mark.filterwarnings("ignore:The `.content..` method should be used:DeprecationWarning"),  # of files.retrieve_content
]
__all__ = ["client", "plain_client", "server"]
HI: Any = [{"role": "user", "content": "Hello"}]
ROOTS = ("chat", "completions", "responses", "embeddings", "models", "files", "batches")


class Flag(BaseModel):
    """Nothing in it can go on for long, so that a random model comes to its end."""

    is_set: bool
    kind: None


class SetFlag(BaseModel):
    """Sets a flag."""

    on: bool


def methods_of(resource: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The public methods of a resource of the client and of those below it, by their paths."""
    for name in dir(type(resource)):
        if name.startswith(("_", "with_")):
            continue
        value = getattr(resource, name)
        if hasattr(value, "_client"):
            yield from methods_of(value, f"{path}.{name}")
        elif callable(value):
            yield f"{path}.{name}", value


def method(of: AsyncOpenAI | OpenAI, path: str) -> Any:
    found: Any = of
    for name in path.split("."):
        found = getattr(found, name)
    return found


class Client:
    """One of both clients: `await call(path, ...)`, and `events` of whatever streams."""

    def __init__(self, of: AsyncOpenAI | OpenAI) -> None:
        self.of = of

    async def __call__(self, path: str, **arguments: Any) -> Any:
        return await self.run(lambda: method(self.of, path)(**arguments))

    async def run(self, ask: Callable[[], Any]) -> Any:
        if isinstance(self.of, OpenAI):
            return await to_thread.run_sync(ask)
        answer = ask()
        return await answer if inspect.isawaitable(answer) else answer

    async def events(self, stream: Any) -> list[Any]:
        """All of a stream, or of the pages of a list."""
        if isinstance(self.of, OpenAI):
            return await to_thread.run_sync(lambda: list(stream))
        return [event async for event in stream]

    async def helped(self, path: str, final: str, **arguments: Any) -> tuple[list[Any], Any]:
        """The events of a streaming helper, and what it gives at the end."""
        manager = method(self.of, path)(**arguments)
        if isinstance(self.of, OpenAI):

            def read() -> tuple[list[Any], Any]:
                with manager as stream:
                    return list(stream), getattr(stream, final)()

            return await to_thread.run_sync(read)
        async with manager as stream:
            return [event async for event in stream], await getattr(stream, final)()


Check = Callable[[Client], Awaitable[None]]
CASES: dict[str, Check] = {}


def of(path: str) -> Callable[[Check], Check]:
    """The check that follows is of this method."""

    def register(check: Check) -> Check:
        CASES[path] = check
        return check

    return register


# ---- chat and text -----------------------------------------------------------------------------------------------

CALLING: Any = {"tools": [openai.pydantic_function_tool(SetFlag)], "tool_choice": "required", "parallel_tool_calls": False}


@of("chat.completions.create")
async def chat_create(call: Client) -> None:
    ask: Any = {"model": "tiny", "messages": HI, "max_tokens": 8, "seed": 1}
    whole = await call("chat.completions.create", **ask)
    chunks = await call.events(await call("chat.completions.create", **ask, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content != ""


@of("chat.completions.parse")
async def chat_parse(call: Client) -> None:
    parsed = await call("chat.completions.parse", model="tiny", messages=HI, response_format=Flag)
    assert isinstance(parsed.choices[0].message.parsed, Flag)
    called = await call("chat.completions.parse", model="tiny", messages=HI, **CALLING)
    (made,) = called.choices[0].message.tool_calls
    assert isinstance(made.function.parsed_arguments, SetFlag)
    # What was parsed goes back as it is.
    again = [*HI, called.choices[0].message.to_dict(), {"role": "tool", "tool_call_id": made.id, "content": "set"}]
    answer = await call("chat.completions.with_raw_response.create", model="tiny", messages=again, max_tokens=4)
    assert "x-streamserve-warning" not in answer.headers


@of("chat.completions.stream")
async def chat_stream(call: Client) -> None:
    events, final = await call.helped(
        "chat.completions.stream", "get_final_completion", model="tiny", messages=HI, response_format=Flag
    )
    assert isinstance(final.choices[0].message.parsed, Flag)
    assert {"content.delta", "content.done"} <= {event.type for event in events}
    events, final = await call.helped("chat.completions.stream", "get_final_completion", model="tiny", messages=HI, **CALLING)
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, SetFlag)
    assert "tool_calls.function.arguments.done" in {event.type for event in events}


@of("completions.create")
async def text_create(call: Client) -> None:
    ask: Any = {"model": "tiny", "prompt": ["Hello", "Bye"], "max_tokens": 8, "seed": 1}
    whole = await call("completions.create", **ask)
    chunks = await call.events(await call("completions.create", **ask, stream=True))
    for choice in whole.choices:
        pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(pieces) == choice.text != ""


# ---- responses ---------------------------------------------------------------------------------------------------

RESPOND: Any = {"model": "tiny", "input": "Hello", "max_output_tokens": 8}


@of("responses.create")
async def response_create(call: Client) -> None:
    whole = await call("responses.create", **RESPOND, extra_body={"seed": 1})
    events = await call.events(await call("responses.create", **RESPOND, stream=True, extra_body={"seed": 1}))
    deltas = [event.delta for event in events if isinstance(event, ResponseTextDeltaEvent)]
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text != ""


@of("responses.parse")
async def response_parse(call: Client) -> None:
    parsed = await call("responses.parse", model="tiny", input="Hello", text_format=Flag)
    assert isinstance(parsed.output_parsed, Flag)
    called = await call(
        "responses.parse", model="tiny", input="Hello", **CALLING | {"tools": [openai.pydantic_function_tool(SetFlag)]}
    )
    (made,) = called.output
    assert isinstance(made.parsed_arguments, SetFlag) and made.name == "SetFlag"
    again: Any = [*HI, *called.output, {"type": "function_call_output", "call_id": made.call_id, "output": "set"}]
    answer = await call("responses.with_raw_response.create", model="tiny", input=again, max_output_tokens=4)
    assert "x-streamserve-warning" not in answer.headers


@of("responses.stream")
async def response_stream(call: Client) -> None:
    events, final = await call.helped("responses.stream", "get_final_response", model="tiny", input="Hello", text_format=Flag)
    assert isinstance(final.output_parsed, Flag)
    kinds = [event.type for event in events]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    begun = await call("responses.create", **RESPOND, background=True, extra_body={"regex": "a{5}"})
    events, final = await call.helped("responses.stream", "get_final_response", response_id=begun.id)
    assert (final.id, final.output_text) == (begun.id, "aaaaa")


@of("responses.connect")
async def response_connect(call: Client) -> None:
    kinds: list[str] = []
    if isinstance(call.of, OpenAI):
        plain = call.of

        def talk() -> None:
            with plain.responses.connect() as connection:
                connection.response.create(**RESPOND)
                for event in connection:
                    kinds.append(event.type)
                    if event.type == "response.incomplete":
                        return

        await to_thread.run_sync(talk)
    else:
        async with call.of.responses.connect() as connection:
            await connection.response.create(**RESPOND)
            async for event in connection:
                kinds.append(event.type)
                if event.type == "response.incomplete":
                    break
    assert kinds[0] == "response.created" and "response.output_text.delta" in kinds


@of("responses.retrieve")
async def response_retrieve(call: Client) -> None:
    made = await call("responses.create", **RESPOND)
    assert await call("responses.retrieve", response_id=made.id, include=["message.output_text.logprobs"]) == made
    begun = await call("responses.create", **RESPOND, background=True)
    events = await call.events(await call("responses.retrieve", response_id=begun.id, stream=True))
    numbers = [event.sequence_number for event in events]
    assert numbers == list(range(len(numbers))) and events[-1].response.status == "incomplete"
    rest = await call.events(await call("responses.retrieve", response_id=begun.id, stream=True, starting_after=numbers[-3]))
    assert [event.sequence_number for event in rest] == numbers[-2:]
    for wrong in ({"include": ["mood"]}, {"include_obfuscation": True, "stream": True}):
        with pytest.raises(openai.BadRequestError) as refused:
            await call("responses.retrieve", response_id=begun.id, **wrong)
        assert refused.value.param == next(iter(wrong))


@of("responses.cancel")
async def response_cancel(call: Client) -> None:
    begun = await call("responses.create", model="tiny", input="Hello", background=True, extra_body={"ignore_eos": True})
    assert (await call("responses.cancel", response_id=begun.id)).status == "cancelled"


@of("responses.delete")
async def response_delete(call: Client) -> None:
    made = await call("responses.create", **RESPOND)
    await call("responses.delete", response_id=made.id)
    with pytest.raises(openai.NotFoundError):
        await call("responses.retrieve", response_id=made.id)


@of("responses.input_items.list")
async def input_items(call: Client) -> None:
    turns: Any = [{"role": "user", "content": str(n)} for n in range(5)]
    made = await call("responses.create", **{**RESPOND, "input": turns})
    for order, expected in (("asc", "01234"), ("desc", "43210")):
        page = await call("responses.input_items.list", response_id=made.id, order=order, limit=2)
        items = await call.events(page)
        assert "".join(item.content[0].text for item in items) == expected
    page = await call("responses.input_items.list", response_id=made.id, order="desc", after=items[3].id, include=[])
    assert [item.content[0].text for item in await call.events(page)] == ["0"]


@of("responses.input_tokens.count")
async def input_tokens(call: Client) -> None:
    prompted: Any = {
        "model": "tiny",
        "input": "Hello",
        "instructions": "Be kind.",
        "tools": [{"type": "function", "name": "now", "parameters": None, "strict": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "high"},
        "text": {"verbosity": "low"},
        "truncation": "disabled",
    }
    counted = await call("responses.input_tokens.count", **prompted)
    made = await call("responses.create", **prompted, max_output_tokens=4)
    assert counted.input_tokens == made.usage.input_tokens
    longer = await call("responses.input_tokens.count", model="tiny", input="Go on", previous_response_id=made.id)
    assert longer.input_tokens > 10
    for wrong in ({"personality": "friendly"}, {"conversation": "conv_1"}):
        with pytest.raises(openai.BadRequestError) as refused:
            await call("responses.input_tokens.count", input="Hello", **wrong)
        assert refused.value.param == next(iter(wrong))


# ---- vectors and models ------------------------------------------------------------------------------------------


@of("embeddings.create")
async def embeddings_create(call: Client) -> None:
    found = await call("embeddings.create", model="vectors", input=["red fox", "a"])
    assert [len(entry.embedding) for entry in found.data] == [4, 4]


@of("models.list")
async def models_list(call: Client) -> None:
    listed = await call.events(await call("models.list"))
    assert [model.id for model in listed] == ["tiny", "small", "vectors"]


@of("models.retrieve")
async def models_retrieve(call: Client) -> None:
    for name in ("tiny", "small", "vectors"):
        assert (await call("models.retrieve", model=name)).id == name
    with pytest.raises(openai.NotFoundError):
        await call("models.retrieve", model="gpt-9")


# ---- files --------------------------------------------------------------------------------------------------------

PICTURE = ("scene.gif", file_of(image(), "GIF"))


@of("files.create")
async def files_create(call: Client) -> None:
    made = await call("files.create", file=PICTURE, purpose="vision", expires_after={"anchor": "created_at", "seconds": 3600})
    assert (made.filename, made.expires_at - made.created_at) == ("scene.gif", 3600)


@of("files.retrieve")
async def files_retrieve(call: Client) -> None:
    made = await call("files.create", file=PICTURE, purpose="user_data")
    assert await call("files.retrieve", file_id=made.id) == made


@of("files.wait_for_processing")
async def files_wait(call: Client) -> None:
    made = await call("files.create", file=PICTURE, purpose="vision")
    assert await call("files.wait_for_processing", id=made.id) == made


@of("files.list")
async def files_list(call: Client) -> None:
    made = await call("files.create", file=PICTURE, purpose="vision")
    assert made in await call.events(await call("files.list", purpose="vision", order="desc", limit=2))


@of("files.content")
async def files_content(call: Client) -> None:
    made = await call("files.create", file=PICTURE, purpose="vision")
    assert (await call("files.content", file_id=made.id)).content == PICTURE[1]


@of("files.retrieve_content")
async def files_retrieve_content(call: Client) -> None:
    made = await call("files.create", file=("words.txt", b"plain words"), purpose="user_data")
    assert await call("files.retrieve_content", file_id=made.id) == "plain words"


@of("files.delete")
async def files_delete(call: Client) -> None:
    made = await call("files.create", file=PICTURE, purpose="vision")
    assert (await call("files.delete", file_id=made.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await call("files.retrieve", file_id=made.id)


# ---- batches ------------------------------------------------------------------------------------------------------


async def batch_of(call: Client, url: str = "/v1/chat/completions", **body: Any) -> Any:
    body = body or {"messages": HI, "max_tokens": 2}
    lines = [json.dumps({"custom_id": f"r{n}", "method": "POST", "url": url, "body": body}) for n in range(3)]
    kept = await call("files.create", file=("lines.jsonl", "\n".join(lines).encode()), purpose="batch")
    return await call("batches.create", input_file_id=kept.id, endpoint=url, completion_window="24h", metadata={"k": "v"})


async def answers_of(call: Client, batch: Any) -> list[Any]:
    while batch.status != "completed":
        await sleep(0.01)
        batch = await call("batches.retrieve", batch_id=batch.id)
    lines = (await call("files.content", file_id=batch.output_file_id)).content.splitlines()
    answers = {answer["custom_id"]: answer["response"]["body"] for answer in map(json.loads, lines)}
    assert answers.keys() == {"r0", "r1", "r2"}
    return [*answers.values()]


@of("batches.create")
async def batches_create(call: Client) -> None:
    made = await batch_of(call)
    assert (made.object, made.status, made.metadata) == ("batch", "validating", {"k": "v"})


@of("batches.retrieve")
async def batches_retrieve(call: Client) -> None:
    assert [answer["object"] for answer in await answers_of(call, await batch_of(call))] == ["chat.completion"] * 3
    vectors = await answers_of(call, await batch_of(call, "/v1/embeddings", input="x", model="vectors"))
    assert all(answer["data"][0]["embedding"] == vectors[0]["data"][0]["embedding"] for answer in vectors)


@of("batches.list")
async def batches_list(call: Client) -> None:
    ids = [(await batch_of(call)).id for _ in range(2)]
    assert {*ids} <= {batch.id for batch in await call.events(await call("batches.list", limit=1))}


@of("batches.cancel")
async def batches_cancel(call: Client) -> None:
    made = await batch_of(call)
    try:
        assert (await call("batches.cancel", batch_id=made.id)).status in ("cancelling", "cancelled")
    except openai.ConflictError as late:
        assert "cannot be cancelled any more" in late.message


# ---- what there is no route for ----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat.completions.list": ("GET /v1/chat/completions", {}),
    "chat.completions.retrieve": ("GET /v1/chat/completions/{id}", {"completion_id": "x"}),
    "chat.completions.update": ("POST /v1/chat/completions/{id}", {"completion_id": "x", "metadata": {}}),
    "chat.completions.delete": ("DELETE /v1/chat/completions/{id}", {"completion_id": "x"}),
    "chat.completions.messages.list": ("GET /v1/chat/completions/{id}/messages", {"completion_id": "x"}),
    "responses.compact": ("POST /v1/responses/compact", {"model": "tiny", "input": "x"}),
    "models.delete": ("DELETE /v1/models/{id}", {"model": "tiny"}),
}


async def check_refused(call: Client, path: str) -> None:
    route, arguments = REFUSED[path]
    with pytest.raises(openai.APIStatusError) as refused:
        await call.events(await call(path, **arguments))
    assert refused.value.status_code in (404, 405)
    assert UNSERVED[route] in refused.value.body["message"]  # type: ignore[index]


# ---- the table ---------------------------------------------------------------------------------------------------


def paths_of(client: AsyncOpenAI | OpenAI) -> set[str]:
    return {path for root in ROOTS for path, _ in methods_of(getattr(client, root), root)}


async def test_every_method_has_a_case(client: AsyncOpenAI, plain_client: OpenAI) -> None:
    assert paths_of(client) == paths_of(plain_client) == {*CASES, *REFUSED}
    assert {route for route, _ in REFUSED.values()} == {route for route in UNSERVED if "/v1/messages" not in route}


@pytest.mark.parametrize("is_plain", [False, True], ids=["async", "plain"])
@pytest.mark.parametrize("path", [*CASES, *REFUSED])
async def test_a_method_works_or_says_why_not(
    server: RandomServer, client: AsyncOpenAI, plain_client: OpenAI, path: str, is_plain: bool
) -> None:
    call = Client(plain_client if is_plain else client)
    await (CASES[path](call) if path in CASES else check_refused(call, path))


def test_what_has_a_route_is_not_called_unserved() -> None:
    assert why_unserved("POST", "/v1/chat/completions") is None
    assert why_unserved("DELETE", "/v1/models/owner/name") == UNSERVED["DELETE /v1/models/{id}"]
