"""The routes of the Responses API, over a scripted engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from streamserve.api import responses
from streamserve.api.app import Api, create_app
from streamserve.api.fields import RESPONSES, Decision
from streamserve.api.response_items import messages_of, read_items
from streamserve.api.response_job import MAX_BATCH, Journal
from streamserve.api.response_schema import CreateResponse
from streamserve.api.response_store import FileStore
from streamserve.config import ServerConfig
from streamserve.errors import QueueFull
from streamserve.messages import Delta, FinishReason, GenerateRequest
from streamserve.text.byte_tokenizer import byte_text_model
from tests.api.conftest import client_of
from tests.api.response_checks import check_response, check_stream, events_of_sse
from tests.api.scripted import CONTEXT_LEN, ScriptedEngine, says

pytestmark = pytest.mark.anyio
URL = "/v1/responses"
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


async def make(http: httpx.AsyncClient, input: Any = "Hi", **fields: Any) -> dict[str, Any]:
    """A response that is over."""
    answer = await http.post(URL, json={"input": input, **fields})
    assert answer.status_code == 200, answer.text
    response: dict[str, Any] = answer.json()
    check_response(response)
    return response


async def refusal(http: httpx.AsyncClient, **fields: Any) -> tuple[str | None, str]:
    """The field at fault and the message of a 400."""
    answer = await http.post(URL, json={"input": "Hi", **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


async def get(http: httpx.AsyncClient, id: str, **params: Any) -> httpx.Response:
    return await http.get(f"{URL}/{id}", params=params)


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


def prompt_of(request: GenerateRequest) -> str:
    """What the model is given, control tokens written out."""
    return byte_text_model().tokenizer.decode(request.token_ids, skip_special_tokens=False)


def turns(request: GenerateRequest) -> list[tuple[str, str]]:
    """The prompt's messages; the last one is the answer's beginning."""
    blocks = prompt_of(request).split("<|im_start|>")[1:]
    return [(role, text.removesuffix("<|im_end|>\n")) for role, _, text in (block.partition("\n") for block in blocks)]


# ---- answers -----------------------------------------------------------------------------------------------------


async def test_plain_and_streamed_responses_hold_the_same(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    plain = await make(http, temperature=0.5, metadata={"a": "b"}, instructions="Be brief")
    streamed = await http.post(
        URL, json={"input": "Hi", "temperature": 0.5, "metadata": {"a": "b"}, "instructions": "Be brief", "stream": True}
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    last = check_stream(events_of_sse(streamed.text))
    assert text_of(plain) == text_of(last) == "Hello!"
    assert plain.keys() == last.keys() and plain["usage"] == last["usage"]
    assert streamed.headers["x-request-id"] == last["id"] != plain["id"]
    assert (plain["temperature"], plain["metadata"], plain["instructions"]) == (0.5, {"a": "b"}, "Be brief")
    assert turns(engine.requests[0]) == [("system", "Be brief"), ("user", "Hi"), ("assistant", "")]
    assert engine.requests[0].token_ids == engine.requests[1].token_ids


async def test_usage_counts_what_the_cache_held(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = says("Yes", cached=3)
    usage = (await make(http))["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] == 3
    assert (usage["input_tokens"], usage["output_tokens"]) == (len(engine.requests[0].token_ids), 4)


async def test_an_answer_cut_by_its_limit_says_so(http: httpx.AsyncClient) -> None:
    plain = await make(http, max_output_tokens=1)
    streamed = await http.post(URL, json={"input": "Hi", "max_output_tokens": 1, "stream": True})
    for response in (plain, check_stream(events_of_sse(streamed.text))):
        assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert text_of(response) == "H" and response["usage"]["output_tokens"] == 1


async def test_log_probabilities_come_when_they_are_asked_for(http: httpx.AsyncClient) -> None:
    asked: list[dict[str, Any]] = [{"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}]
    for fields, num_top in zip(asked, (0, 2), strict=True):
        streamed = await http.post(URL, json={"input": "Hi", "stream": True, **fields})
        (message,) = check_stream(events_of_sse(streamed.text))["output"]
        logprobs = message["content"][0]["logprobs"]
        assert "".join(entry["token"] for entry in logprobs) == "Hello!"
        assert {len(entry["top_logprobs"]) for entry in logprobs} == {num_top}
        assert bytes(logprobs[0]["bytes"]) == b"H"
    (message,) = (await make(http))["output"]
    assert message["content"][0]["logprobs"] == []


async def test_tokens_of_a_stop_string_have_their_log_probabilities_in_streams_too(http: httpx.AsyncClient) -> None:
    body = {"input": "Hi", "top_logprobs": 0, "stop": "lo"}
    streamed = await http.post(URL, json={**body, "stream": True})
    responses = [await make(http, **body), check_stream(events_of_sse(streamed.text))]
    one, other = [response["output"][0]["content"][0]["logprobs"] for response in responses]
    assert one == other and "".join(entry["token"] for entry in one) == "Hello"


async def test_errors_before_the_first_event_have_a_status(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.refusal = QueueFull("too many", retry_after_s=2.0)
    for fields in ({"stream": True}, {"background": True}, {}):
        answer = await http.post(URL, json={"input": "Hi", **fields})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    engine.refusal = None
    long = await http.post(URL, json={"input": "x" * 600, "stream": True})
    assert (long.status_code, long.json()["error"]["code"], long.json()["error"]["param"]) == (
        400,
        "context_length_exceeded",
        "input",
    )
    assert "input has" in long.json()["error"]["message"]
    assert (await http.post(URL, json={"input": "Hi", "model": "other"})).status_code == 404


async def test_a_failure_after_the_first_event_is_the_last_event(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda request: [Delta((72,)), Delta(finish_reason=FinishReason.ERROR, error="the step raised")]
    streamed = await http.post(URL, json={"input": "Hi", "stream": True})
    last = check_stream(events_of_sse(streamed.text))
    assert last["error"]["message"] == "the step raised" and text_of(last) == "H"
    kept = await get(http, last["id"])
    assert kept.json() == last
    param, message = await refusal(http, previous_response_id=last["id"])
    assert param == "previous_response_id" and "failed" in message


# ---- bodies ------------------------------------------------------------------------------------------------------


async def test_every_field_is_decided() -> None:
    accepted = {field.name for field in RESPONSES if field.decision is not Decision.REFUSED}
    assert accepted == set(CreateResponse.__struct_fields__)


@pytest.mark.parametrize(
    ("fields", "param", "says_what"),
    [
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions"),
        ({"messages": []}, "messages", "input"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
        ({"temprature": 1}, "temprature", "temperature"),
        ({"temperature": -1}, "temperature", "0 to"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0"),
        ({"max_output_tokens": 600}, "max_output_tokens", "max_output_tokens is 600"),
        ({"top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"include": ["everything"]}, "include[0]", "message.output_text.logprobs"),
        ({"service_tier": "gold"}, "service_tier", "auto"),
        ({"truncation": "middle"}, "truncation", "disabled"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options", "stream"),
        ({"background": True, "store": False}, "background", "store"),
        ({"background": True, "resumable": True}, "resumable", "starting_after"),
        ({"return_progress": True}, "return_progress", "stream"),
        ({"metadata": {"k": "v" * 513}}, "metadata", "512"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "16"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading", "leave it out"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type", "allowed_tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice", "other"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "xml"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary", "concise"),
        ({"input": []}, "input", "missing"),
        ({"input": [{"type": "message", "role": "tool", "content": "x"}]}, "input[0].role", "user"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
        ({"input": [{"role": "user", "content": "a", "contnt": "b"}]}, "input[0].contnt", "content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "no pictures"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "function_call_output"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "1"}]}, "input[0].call_id", "function_call"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id", "kept"),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
            "input[0].encrypted_content",
            "another server",
        ),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "kept"),
    ],
)
async def test_what_cannot_be_served_is_a_400_that_names_it(
    http: httpx.AsyncClient, engine: ScriptedEngine, fields: dict[str, Any], param: str, says_what: str
) -> None:
    named, message = await refusal(http, **fields)
    assert named == param and says_what in message
    assert engine.requests == []


async def test_what_is_nested_deeper_than_an_answer_can_be_is_a_400(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    schema: Any = {}
    for _ in range(260):
        schema = {"items": schema}
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object", "default": schema}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tools": [TOOL, {**TOOL, "name": "deep", "parameters": schema}], "tool_choice": "none"}, "tools[1]"),
        ({"text": {"format": form}}, "text.format"),
    ]
    for fields, param in cases:
        for stream in (False, True):
            named, message = await refusal(http, stream=stream, **fields)
            assert named == param and "nested too deeply" in message
    assert engine.requests == []
    for _ in range(15):
        schema = schema["items"]
    body = {"input": "Hi", "tools": [{**TOOL, "parameters": schema}], "tool_choice": "none", "stream": True}
    streamed = await http.post(URL, json=body)
    assert check_stream(events_of_sse(streamed.text))["status"] == "completed"


async def test_what_has_no_effect_is_named(http: httpx.AsyncClient) -> None:
    body = {
        "input": "Hi",
        "user": "me",
        "max_tool_calls": 3,
        "service_tier": "flex",
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"summary": "auto"},
    }
    answer = await http.post(URL, json=body)
    warnings = answer.headers.get_list("x-streamserve-warning")
    assert warnings == answer.json()["warnings"]
    for name in ("user", "max_tool_calls", "service_tier", "reasoning.encrypted_content", "reasoning.summary"):
        assert any(f"{name} has no effect" in warning for warning in warnings), name
    plain = await http.post(URL, json={"input": "Hi", "service_tier": "auto", "store": False, "stream": False})
    assert "x-streamserve-warning" not in plain.headers and "warnings" not in plain.json()


async def test_items_make_the_conversation_they_came_from(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    items = [
        {"role": "developer", "content": "Short."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello", "annotations": []}]},
        {"role": "user", "content": "And?"},
    ]
    await make(http, items, instructions="Kind.")
    assert turns(engine.requests[0]) == [
        ("system", "Kind.\n\nShort."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "And?"),
        ("assistant", ""),
    ]


async def test_any_number_of_system_messages_join_the_instructions() -> None:
    items = [{"role": role, "content": "Short."} for role in ("system", "developer") * 5000]
    head, last = messages_of([*read_items(items), *read_items("Hi")], "Kind.")
    assert head.value == {"role": "system", "content": "\n\n".join(["Kind.", *["Short."] * 10_000])}
    assert last.value == {"role": "user", "content": "Hi"}


# ---- kept responses ----------------------------------------------------------------------------------------------


async def test_a_response_continues_another_with_new_instructions(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    first = await make(http, "One", instructions="Old.")
    second = await make(http, [{"role": "user", "content": "Two"}], previous_response_id=first["id"], instructions="New.")
    third = await make(http, "Three", previous_response_id=second["id"])
    assert third["previous_response_id"] == second["id"]
    assert turns(engine.requests[1])[:3] == [("system", "New."), ("user", "One"), ("assistant", "Hello!")]
    assert [text for _, text in turns(engine.requests[2])] == ["One", "Hello!", "Two", "Hello!", "Three", ""]
    await http.delete(f"{URL}/{first['id']}")
    param, message = await refusal(http, previous_response_id=third["id"])
    assert param == "previous_response_id" and first["id"] in message


async def test_a_conversation_is_read_up_to_a_bound(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await make(http, "One", user="x" * 10_000)
    monkeypatch.setattr(responses, "MAX_CHAIN_BYTES", 20_000)
    second = await make(http, "Two", user="x" * 10_000, previous_response_id=first["id"])
    param, message = await refusal(http, previous_response_id=second["id"])
    assert param == "previous_response_id" and "at most 10000 and 20000" in message
    references = [{"type": "item_reference", "id": response["output"][0]["id"]} for response in (first, first, second)]
    assert await make(http, references[:2])
    param, message = await refusal(http, input=references)
    assert param == "input[2].id" and "at most 20000" in message


async def test_what_is_not_stored_is_not_found(http: httpx.AsyncClient) -> None:
    response = await make(http, store=False)
    assert (await get(http, response["id"])).status_code == 404
    answer = await http.post(URL, json={"input": "Go on", "previous_response_id": response["id"]})
    assert answer.json()["error"]["code"] == "previous_response_not_found"


async def test_a_kept_response_can_be_read_and_forgotten(http: httpx.AsyncClient) -> None:
    response = await make(http)
    assert (await get(http, response["id"])).json() == response
    assert (await http.post(f"{URL}/{response['id']}/cancel")).json() == response
    assert (await http.delete(f"{URL}/{response['id']}")).json() == {"id": response["id"], "object": "response", "deleted": True}
    for path in ("", "/input_items"):
        assert (await http.get(f"{URL}/{response['id']}{path}")).status_code == 404
    assert (await http.delete(f"{URL}/{response['id']}")).status_code == 404


async def test_an_item_can_be_given_by_its_id(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    first = await make(http, "One")
    (input_item,) = (await http.get(f"{URL}/{first['id']}/input_items")).json()["data"]
    references = [{"type": "item_reference", "id": item["id"]} for item in (input_item, *first["output"])]
    await make(http, [*references, {"role": "user", "content": "Two"}])
    assert [text for _, text in turns(engine.requests[1])] == ["One", "Hello!", "Two", ""]


async def test_input_items_come_in_pages(http: httpx.AsyncClient) -> None:
    response = await make(http, [{"role": "user", "content": str(number)} for number in range(5)])
    url = f"{URL}/{response['id']}/input_items"
    seen: list[str] = []
    page = (await http.get(url, params={"order": "asc", "limit": 2})).json()
    while True:
        seen += [item["content"][0]["text"] for item in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        if not page["has_more"]:
            break
        page = (await http.get(url, params={"order": "asc", "limit": 2, "after": page["last_id"]})).json()
    assert seen == list("01234")
    newest = (await http.get(url, params={"include[]": "message.output_text.logprobs"})).json()["data"]
    assert [item["content"][0]["text"] for item in newest] == list("43210")
    for params in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "msg_x"}, {"include": "x"}, {"page": 2}):
        answer = await http.get(url, params=params)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(params)))


async def test_a_response_belongs_to_the_key_that_made_it(engine: ScriptedEngine) -> None:
    app = create_app(engine, byte_text_model(), ServerConfig(api_key=("one", "two")), model_name="tiny")
    async with (
        client_of(app, headers={"authorization": "Bearer one"}) as mine,
        client_of(app, headers={"authorization": "Bearer two"}) as others,
    ):
        response = await make(mine)
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            assert (await others.request(method, f"{URL}/{response['id']}{path}")).status_code == 404
        param, _ = await refusal(others, previous_response_id=response["id"])
        assert param == "previous_response_id"
        assert (await get(mine, response["id"])).json() == response


async def test_input_tokens_are_those_of_the_response(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    first = await make(http, "One")
    body = {"input": "Two", "instructions": "Kind.", "previous_response_id": first["id"]}
    counted = (await http.post(f"{URL}/input_tokens", json=body)).json()
    response = await make(http, **body)
    assert counted == {"object": "response.input_tokens", "input_tokens": response["usage"]["input_tokens"]}
    assert len(engine.requests) == 2
    longer = (await http.post(f"{URL}/input_tokens", json={"input": "x" * 600})).json()["input_tokens"]
    cut = (await http.post(f"{URL}/input_tokens", json={**_long(12), "truncation": "auto"})).json()["input_tokens"]
    assert longer > CONTEXT_LEN > cut
    for field in ("temperature", "stream", "personality", "conversation"):
        answer = await http.post(f"{URL}/input_tokens", json={**body, field: 1})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def _long(num_turns: int) -> dict[str, Any]:
    """A conversation of many turns."""
    items = [{"role": "developer", "content": "Kind."}]
    for number in range(num_turns):
        items += [{"role": "user", "content": f"{number:02}" * 20}, {"role": "assistant", "content": "ok"}]
    return {"input": [*items, {"role": "user", "content": "last"}]}


async def test_truncation_leaves_out_the_oldest_turns_only_as_far_as_needed(
    http: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    items = _long(12)["input"]
    param, _ = await refusal(http, input=items, max_output_tokens=10)
    assert param == "input"
    await make(http, items, max_output_tokens=10, truncation="auto")
    given = turns(engine.requests[0])
    first = int(given[1][1][:2])
    assert given[0] == ("system", "Kind.") and given[-2] == ("user", "last") and 0 < first < 12
    num_tokens = len(engine.requests[0].token_ids)
    assert num_tokens + 10 <= CONTEXT_LEN < num_tokens + 10 + len(f"<user\n{'00' * 20}<\n<assistant\nok<\n")
    answer = await http.post(URL, json={"input": "x" * 600, "truncation": "auto"})
    assert answer.json()["error"]["code"] == "context_length_exceeded"


# ---- background --------------------------------------------------------------------------------------------------


class Held(ScriptedEngine):
    """An engine whose answers wait until a test lets them go on."""

    def __init__(self) -> None:
        super().__init__(lambda request: [])

    def say(self, text: str, finish: FinishReason | None = None) -> None:
        for mailbox in self.live.values():
            mailbox.put_nowait(Delta(tuple(text.encode()), finish_reason=finish))


@pytest.fixture
async def held() -> AsyncIterator[tuple[httpx.AsyncClient, Held]]:
    engine = Held()
    app = create_app(engine, byte_text_model(), ServerConfig(), model_name="tiny")
    async with client_of(app) as client:
        yield client, engine


async def until(http: httpx.AsyncClient, id: str, status: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while (response := (await get(http, id)).json())["status"] != status:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.002)
    found: dict[str, Any] = response
    return found


async def test_a_background_response_goes_on_alone(held: tuple[httpx.AsyncClient, Held]) -> None:
    http, engine = held
    begun = (await http.post(URL, json={"input": "Hi", "background": True})).json()
    assert (begun["status"], begun["background"], begun["output"]) == ("queued", True, [])
    assert (await get(http, begun["id"])).json() == begun
    param, message = await refusal(http, previous_response_id=begun["id"])
    assert param == "previous_response_id" and "queued" in message
    item = {"type": "item_reference", "id": f"msg_{begun['id'].partition('_')[2]}0000"}
    param, message = await refusal(http, input=[item])
    assert param == "input[0].id" and "queued" in message
    engine.say("Hel")
    assert text_of(await until(http, begun["id"], "in_progress")) == "Hel"
    engine.say("lo", FinishReason.STOP)
    response = await until(http, begun["id"], "completed")
    check_response(response)
    assert text_of(response) == "Hello"


async def test_a_background_stream_can_be_read_again_from_anywhere(held: tuple[httpx.AsyncClient, Held]) -> None:
    http, engine = held
    begun = (await http.post(URL, json={"input": "Hi", "background": True})).json()
    engine.say("Hel")
    await until(http, begun["id"], "in_progress")
    following = [asyncio.create_task(get(http, begun["id"], stream="true", **more)) for more in ({}, {"starting_after": 4})]
    await asyncio.sleep(0.01)
    engine.say("lo", FinishReason.STOP)
    live = [events_of_sse((await task).text) for task in following]
    assert text_of(check_stream(live[0], is_queued=True)) == "Hello"
    assert live[1] == live[0][5:]
    await until(http, begun["id"], "completed")
    again = events_of_sse((await get(http, begun["id"], stream="true")).text)
    assert again == live[0]
    assert events_of_sse((await get(http, begun["id"], stream="true", starting_after=len(again) - 2)).text) == again[-1:]


async def test_a_background_response_can_be_streamed_from_its_start(http: httpx.AsyncClient) -> None:
    streamed = await http.post(URL, json={"input": "Hi", "background": True, "stream": True})
    response = check_stream(events_of_sse(streamed.text), is_queued=True)
    assert text_of(response) == "Hello!"
    assert (await get(http, response["id"])).json() == response


async def test_only_background_responses_keep_their_events(http: httpx.AsyncClient) -> None:
    response = await make(http)
    for params, param in (
        ({"stream": "true"}, "stream"),
        ({"starting_after": 1}, "starting_after"),
        ({"stream": "yes"}, "stream"),
        ({"stream": "true", "starting_after": -1}, "starting_after"),
        ({"strem": "true"}, "strem"),
    ):
        answer = await get(http, response["id"], **params)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_background_response_is_not_resumable_by_the_header_either(http: httpx.AsyncClient) -> None:
    body = {"input": "Hi", "background": True, "stream": True}
    answer = await http.post(URL, json=body, headers={"x-streamserve-resumable": "1"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "resumable")


async def test_events_to_be_read_again_come_in_parts() -> None:
    journal = Journal([b"%d" % number for number in range(1000)])
    journal.end()
    again = await Journal.unpacked(await journal.packed())
    assert again is not None
    for source in (journal, again):
        batches = [batch async for batch in source.follow(10)]
        assert [event for batch in batches for event in batch] == journal.events[10:]
        assert max(map(len, batches)) == MAX_BATCH


async def begin_and_leave(app: Api, engine: Held) -> str:
    """The id of a resumable response whose reader has gone, and which has more to say than is kept for it."""
    left = asyncio.Event()
    messages = [{"type": "http.request", "body": b'{"input": "Hi", "stream": true, "resumable": true}'}]
    ids: list[str] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        ids.extend(value.decode() for name, value in message.get("headers", ()) if name == b"x-request-id")
        if b"response.in_progress" in message.get("body", b""):
            left.set()

    scope = {"type": "http", "method": "POST", "path": URL, "query_string": b"", "headers": [], "client": ("127.0.0.1", 1)}
    app._service.streams._max_bytes = 4096
    await app(scope, receive, send)
    engine.say("x" * 4096)
    await asyncio.sleep(0.01)
    return ids[0]


async def test_what_runs_when_the_engine_ends_is_kept_before_the_store_closes(tmp_path: Path) -> None:
    store, engine = FileStore(tmp_path / "responses.db"), Held()
    app = create_app(engine, byte_text_model(), ServerConfig(), model_name="tiny", response_store=store)
    async with client_of(app) as http:
        ids = [(await http.post(URL, json={"input": "Hi", "background": True})).json()["id"] for _ in range(4)]
        ids.append(await begin_and_leave(app, engine))
    for request in engine.requests:
        engine.abort(request.id)
    await app.settled()
    store.close()
    reopened = FileStore(tmp_path / "responses.db")
    kept = [await reopened.get(id, "") for id in ids]
    assert [json.loads(record.response)["status"] for record in kept if record is not None] == ["cancelled"] * 5
    reopened.close()


@pytest.mark.parametrize("says_something", [False, True])
async def test_cancelling_ends_a_response_and_keeps_what_it_said(
    held: tuple[httpx.AsyncClient, Held], says_something: bool
) -> None:
    http, engine = held
    begun = (await http.post(URL, json={"input": "Hi", "background": True})).json()
    if says_something:
        engine.say("Hel")
        await until(http, begun["id"], "in_progress")
    response = (await http.post(f"{URL}/{begun['id']}/cancel")).json()
    check_response(response)
    assert (response["status"], text_of(response)) == ("cancelled", "Hel" if says_something else "")
    assert len(engine.aborted) == 1
    assert (await get(http, begun["id"])).json() == response
    assert (await http.post(f"{URL}/{begun['id']}/cancel")).json() == response


async def test_deleting_a_response_under_way_ends_it(held: tuple[httpx.AsyncClient, Held]) -> None:
    http, engine = held
    begun = (await http.post(URL, json={"input": "Hi", "background": True})).json()
    assert (await http.delete(f"{URL}/{begun['id']}")).json()["deleted"]
    assert len(engine.aborted) == 1
    assert (await get(http, begun["id"])).status_code == 404


async def test_a_stream_whose_client_leaves_is_cancelled_and_kept(app: Api, engine: ScriptedEngine) -> None:
    engine.script = lambda request: [Delta((72,))]
    events: list[bytes] = []
    left = asyncio.Event()
    body = json.dumps({"input": "Hi", "stream": True}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        events.append(message.get("body", b""))
        if b"output_text.delta" in events[-1]:
            left.set()

    scope = {"type": "http", "method": "POST", "path": URL, "query_string": b"", "headers": [], "client": ("127.0.0.1", 1)}
    await app(scope, receive, send)
    assert len(engine.aborted) == 1
    id = json.loads(events[1].split(b"data: ")[1].split(b"\n")[0])["response"]["id"]
    async with client_of(app) as http:
        response = (await get(http, id)).json()
    check_response(response)
    assert (response["status"], text_of(response)) == ("cancelled", "H")


async def test_cancelling_on_a_slow_socket_spares_what_is_asked_for_afterwards(app: Api, engine: ScriptedEngine) -> None:
    frames: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    heard: list[dict[str, Any]] = []
    is_stuck, goes_on, goes_well = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def say(**frame: Any) -> None:
        frames.put_nowait({"type": "websocket.receive", "text": json.dumps(frame)})

    async def send(message: Any) -> None:
        if "text" not in message:
            return
        heard.append(json.loads(message["text"]))
        if heard[-1]["type"] == "response.completed":
            is_stuck.set()
            await goes_on.wait()
        if heard[-1]["type"] == "response.output_text.delta" and goes_on.is_set():
            goes_well.set()

    frames.put_nowait({"type": "websocket.connect"})
    say(type="response.create", input="Hi")
    say(type="response.create", input="Hi", temperature=-1)
    scope = {"type": "websocket", "path": URL, "query_string": b"", "headers": [], "client": ("127.0.0.1", 1)}
    serving = asyncio.create_task(app(scope, frames.get, send))
    async with asyncio.timeout(10):
        await is_stuck.wait()
        await asyncio.sleep(0.01)
        say(type="response.cancel")  # while the error of the second waits for the socket
        engine.script = lambda request: [Delta((72,))]
        say(type="response.create", input="Hi")
        await asyncio.sleep(0.01)
        goes_on.set()
        await goes_well.wait()
        assert engine.aborted == []
        frames.put_nowait({"type": "websocket.disconnect"})
        await serving
    assert [event["type"] for event in heard].count("error") == 1
    assert len(engine.aborted) == 1
