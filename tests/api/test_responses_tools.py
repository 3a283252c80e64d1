"""Tools, forms and reasoning through the Responses API, with the real openai client in this process, over a scripted engine."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from msgspec import structs
from openai import AsyncOpenAI
from pydantic import BaseModel

from streamserve.api.app import create_app
from streamserve.config import ServerConfig
from streamserve.text.byte_tokenizer import byte_text_model
from tests.api.conftest import client_of
from tests.api.response_checks import check_response, check_stream
from tests.api.scripted import ScriptedEngine, says
from tests.api.test_responses import prompt_of, text_of

pytestmark = pytest.mark.anyio
ASKED = "Weather in Oslo?"
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


class City(BaseModel):
    """What a form is filled in as."""

    name: str
    people: int


@pytest.fixture
def engine() -> ScriptedEngine:
    engine = ScriptedEngine()
    engine.state = replace(engine.state, context_len=4096)
    return engine


@pytest.fixture
async def client(engine: ScriptedEngine) -> AsyncIterator[AsyncOpenAI]:
    config = ServerConfig(tool_call_parser="hermes", reasoning_parser="<think>,</think>")
    app = create_app(engine, byte_text_model(), config, model_name="tiny")
    async with AsyncOpenAI(
        base_url="http://127.0.0.1:30000/v1", api_key="none", max_retries=0, http_client=client_of(app)
    ) as made:
        yield made


async def both(client: AsyncOpenAI, **fields: Any) -> dict[str, Any]:
    """The response, plain and streamed: they hold the same but their ids."""
    asked: dict[str, Any] = {"model": "tiny", "input": ASKED, "max_output_tokens": 400, **fields}
    plain = (await client.responses.create(**asked)).to_dict(mode="json")
    check_response(plain)
    stream: Any = await client.responses.create(**asked, stream=True)
    streamed = check_stream([event.to_dict(mode="json") async for event in stream])
    assert [_nameless(item) for item in streamed["output"]] == [_nameless(item) for item in plain["output"]]
    assert streamed["usage"] == plain["usage"]
    return streamed


def _nameless(item: Any) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}


async def test_a_call_is_an_item_and_its_output_goes_on_from_it(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = says(f"Let me look.\n{CALL}")
    response = await both(client, tools=[WEATHER])
    message, call = response["output"]
    assert text_of(response).strip() == "Let me look." and message["status"] == "completed"
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "weather", {"city": "Oslo"})
    assert response["tools"][0]["name"] == "weather" and response["tool_choice"] == "auto"
    engine.script = says("Rain.")
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": '{"sky": "rain"}'}
    fields: dict[str, Any] = {"model": "tiny", "max_output_tokens": 400, "tools": [WEATHER]}
    items: list[Any] = [{"role": "user", "content": ASKED}, *response["output"], output]
    by_id = await client.responses.create(**fields, previous_response_id=response["id"], input=items[-1:])
    in_full = await client.responses.create(**fields, input=items)
    assert by_id.output_text == in_full.output_text == "Rain."
    prompts = [prompt_of(request) for request in engine.requests[-2:]]
    assert prompts[0] == prompts[1]
    for text in (ASKED, "Let me look.", '"Oslo"', '"sky": "rain"'):
        assert text in prompts[0]


async def test_several_calls_are_several_items(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = says(f"{CALL}\n{CALL}")
    first, second = (await both(client, tools=[WEATHER], tool_choice="required"))["output"]
    assert first["call_id"] != second["call_id"] and first["arguments"] == second["arguments"]
    (only,) = (await both(client, tools=[WEATHER], parallel_tool_calls=False))["output"]
    assert _nameless(only) == _nameless(first)


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
    ],
)
async def test_a_demanded_call_is_held_to_a_grammar(client: AsyncOpenAI, engine: ScriptedEngine, choice: Any) -> None:
    engine.script = says(CALL)
    other = {"type": "function", "name": "other", "parameters": {"type": "object", "properties": {}}}
    response = await both(client, tools=[WEATHER, other], tool_choice=choice)
    assert [item["name"] for item in response["output"]] == ["weather"] and response["tool_choice"] == choice
    guidance = engine.requests[0].guidance
    assert guidance is not None and guidance.grammar is not None and "weather" in guidance.grammar
    if choice != "required":
        assert '"other' not in guidance.grammar


async def test_a_call_that_is_cut_short_is_incomplete(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = says(CALL)
    response = await both(client, tools=[WEATHER], max_output_tokens=len(CALL) - 25)
    (call,) = response["output"]
    assert (response["status"], call["status"]) == ("incomplete", "incomplete")
    assert '{"city": "Oslo"}'.startswith(call["arguments"])


async def test_reasoning_is_an_item_of_its_own_and_counted(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    said = says("<think>\nIt is north.\n</think>\n\nCold.")
    engine.script = lambda request: [structs.replace(delta, num_thought=12) for delta in said(request)]
    response = await both(client, reasoning={"effort": "low"}, include=["message.output_text.logprobs"])
    thought, message = response["output"]
    assert (thought["type"], thought["summary"]) == ("reasoning", [])
    assert thought["content"][0]["text"].strip() == "It is north."
    assert text_of(response).strip() == "Cold."
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 12}
    logged = "".join(entry["token"] for entry in message["content"][0]["logprobs"])
    assert logged.strip() == "Cold."
    engine.script = says("Yes.")
    again: list[Any] = [{"role": "user", "content": ASKED}, *response["output"], {"role": "user", "content": "Sure?"}]
    await client.responses.create(model="tiny", input=again)
    assert "Cold." in prompt_of(engine.requests[-1])


async def test_reasoning_cut_short_is_all_there_is(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = says("<think>It is north.</think>Cold.")
    response = await both(client, max_output_tokens=12)
    assert [(item["type"], item["status"]) for item in response["output"]] == [("reasoning", "incomplete")]


async def test_a_form_is_asked_for_by_schema_and_parsed_by_the_client(client: AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = says('{"name":"Oslo","people":717710}')
    parsed = await client.responses.parse(model="tiny", input=ASKED, text_format=City)
    assert parsed.output_parsed == City(name="Oslo", people=717710)
    guidance = engine.requests[-1].guidance
    assert guidance is not None and guidance.grammar is not None and guidance.param == "text.format"
    async with client.responses.stream(model="tiny", input=ASKED, text_format=City) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert final.output_parsed == parsed.output_parsed
    loose = await both(client, text={"format": {"type": "json_object"}})
    assert loose["text"]["format"] == {"type": "json_object"}


async def test_a_schema_that_cannot_be_held_to_names_its_place(client: AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    for body, param in (
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}, "text.format"),
        ({"tools": [{**WEATHER, "parameters": schema, "strict": True}]}, "tools["),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(model="tiny", input=ASKED, extra_body=body)
        assert str(refused.value.param).startswith(param) and "function" not in str(refused.value.param)
