"""The real anthropic client over a real server. Answers are scripted, so that they hold thoughts and calls."""

import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import Message, MessageParam, ToolParam
from anyio import to_thread
from pydantic import BaseModel

from streamserve.api.app import create_app
from streamserve.config import ServerConfig
from streamserve.messages import Delta, FinishReason
from streamserve.text.byte_tokenizer import byte_text_model
from tests.api.scripted import ScriptedEngine, says
from tests.e2e.serving import listening

pytestmark = pytest.mark.anyio
HI: list[MessageParam] = [{"role": "user", "content": "What is 1 + 2?"}]
ADD: ToolParam = {
    "name": "add",
    "description": "Adds two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
THOUGHT = "<think>\nAdd them.\n</think>\n\n"
SETTINGS = ServerConfig(api_key=("sesame",), tool_call_parser="hermes", reasoning_parser="qwen3")


@pytest.fixture
def engine() -> ScriptedEngine:
    scripted = ScriptedEngine(says("Three.", cached=5))
    scripted.state = replace(scripted.state, context_len=4096)
    return scripted


@pytest.fixture
async def url(engine: ScriptedEngine) -> AsyncIterator[str]:
    app = create_app(engine, byte_text_model(), SETTINGS, model_name="tiny")
    async with listening(app, SETTINGS) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def client(url: str) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=url, api_key="sesame", max_retries=0) as anthropic_client:
        yield anthropic_client


def same(one: Message, other: Message) -> bool:
    """Whether two messages differ in nothing but the ids of them and their calls."""
    texts = [re.sub(r'"id":"[^"]*"', "", message.to_json(indent=None)) for message in (one, other)]
    return texts[0] == texts[1]


async def both(client: AsyncAnthropic, **fields: Any) -> Message:
    """The answer, after making sure that its stream is the same."""
    whole: Message = await client.messages.create(model="tiny", max_tokens=300, messages=HI, **fields)
    async with client.messages.stream(model="tiny", max_tokens=300, messages=HI, **fields) as stream:
        streamed = await stream.get_final_message()
    assert same(streamed, whole)
    return whole


async def test_a_plain_message(client: AsyncAnthropic, engine: ScriptedEngine) -> None:
    message = await both(client, system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}])
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "Three."}]
    assert (message.stop_reason, message.usage.cache_read_input_tokens, message.usage.output_tokens) == ("end_turn", 5, 7)
    assert b"Be brief." in bytes(token for token in engine.requests[0].token_ids if token < 256)


async def test_events_of_a_stream(client: AsyncAnthropic) -> None:
    texts, kinds = [], []
    async with client.messages.stream(model="tiny", max_tokens=300, messages=HI, stop_sequences=["."]) as stream:
        async for event in stream:
            kinds.append(event.type)
            if event.type == "text":
                texts.append(event.text)
    assert "".join(texts) == "Three"
    assert (kinds[0], kinds[-1], kinds.count("content_block_start")) == ("message_start", "message_stop", 1)
    message = await stream.get_final_message()
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ".")
    raw = await client.messages.create(model="tiny", max_tokens=300, messages=HI, stream=True)
    assert "content_block_delta" in [event.type async for event in raw]


async def test_a_thought_and_two_calls(client: AsyncAnthropic, engine: ScriptedEngine) -> None:
    engine.script = says(f"{THOUGHT}Adding.\n{CALL}\n{CALL}")
    message = await both(client, tools=[ADD], thinking={"type": "enabled", "budget_tokens": 100})
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.stop_reason == "tool_use"
    ids = set()
    for block in message.content:
        if block.type == "thinking":
            assert block.thinking.strip() == "Add them." and block.signature
        elif block.type == "text":
            assert block.text.strip() == "Adding."
        elif block.type == "tool_use":
            assert (block.name, block.input) == ("add", {"a": 1, "b": 2})
            ids.add(block.id)
    assert len(ids) == 2


async def test_an_answer_goes_back_as_it_came(client: AsyncAnthropic, engine: ScriptedEngine) -> None:
    engine.script = says(f"{THOUGHT}{CALL}")
    message = await client.messages.create(
        model="tiny", max_tokens=300, messages=HI, tools=[ADD], thinking={"type": "adaptive", "display": "omitted"}
    )
    thought, call = message.content
    assert thought.type == "thinking" and thought.thinking == "" and call.type == "tool_use"
    engine.script = says("Three.")
    history: list[MessageParam] = [
        *HI,
        message.to_param(),
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "3"}]},
    ]
    last = await client.messages.create(model="tiny", max_tokens=300, messages=history, tools=[ADD])
    assert [block.to_dict() for block in last.content] == [{"type": "text", "text": "Three."}]


async def test_a_call_cut_short(client: AsyncAnthropic, engine: ScriptedEngine) -> None:
    engine.script = says(CALL)
    limits = {"model": "tiny", "max_tokens": len(CALL) - 22, "tools": [ADD], "messages": HI}
    whole = await client.messages.create(**limits)  # type: ignore[call-overload]
    async with client.messages.stream(**limits) as stream:  # type: ignore[arg-type]
        streamed = await stream.get_final_message()
    for message in (whole, streamed):
        (block,) = message.content
        assert (message.stop_reason, block.type, block.input) == ("max_tokens", "tool_use", {"a": 1})


async def test_every_choice_of_tools(client: AsyncAnthropic, engine: ScriptedEngine) -> None:
    engine.script = says(CALL)
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "add"}):
        message = await both(client, tools=[ADD], tool_choice=choice)
        assert (message.stop_reason, message.content[0].type) == ("tool_use", "tool_use")
        guidance = engine.requests[-1].guidance
        assert guidance is not None and guidance.grammar
    engine.script = says("Three.")
    assert (await both(client, tools=[ADD], tool_choice={"type": "none"})).content[0].type == "text"


class Sum(BaseModel):
    total: int


async def test_parsed_output(client: AsyncAnthropic, engine: ScriptedEngine) -> None:
    engine.script = says('{"total":3}')
    message = await client.messages.parse(model="tiny", max_tokens=300, messages=HI, output_format=Sum)
    assert message.parsed_output == Sum(total=3)
    guidance = engine.requests[-1].guidance
    assert guidance is not None and guidance.grammar is not None and "total" in guidance.grammar


async def test_tokens_are_counted(client: AsyncAnthropic, engine: ScriptedEngine) -> None:
    counted = await client.messages.count_tokens(model="tiny", messages=HI, tools=[ADD], system="Be brief.")
    message = await client.messages.create(model="tiny", max_tokens=9, messages=HI, tools=[ADD], system="Be brief.")
    cached = message.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == message.usage.input_tokens + cached == len(engine.requests[0].token_ids)


async def test_errors_arrive_as_the_clients_own(client: AsyncAnthropic, url: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as bad:
        await client.messages.create(model="tiny", max_tokens=9, messages=HI, extra_body={"temperature": 2})
    assert bad.value.type == "invalid_request_error"
    assert bad.value.api_message == "temperature is 2.0; allowed is 0 to 1" and bad.value.request_id
    with pytest.raises(anthropic.NotFoundError):
        await client.messages.create(model="other", max_tokens=9, messages=HI)
    async with AsyncAnthropic(base_url=url, api_key="open", max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError) as refused:
            await stranger.messages.create(model="tiny", max_tokens=9, messages=HI)
        assert refused.value.type == "authentication_error"
    async with AsyncAnthropic(base_url=url, auth_token="sesame", api_key=None, max_retries=0) as bearer:
        assert (await bearer.messages.create(model="tiny", max_tokens=9, messages=HI)).stop_reason == "end_turn"


async def test_an_error_in_mid_stream_is_raised(client: AsyncAnthropic, engine: ScriptedEngine) -> None:
    engine.script = lambda request: [Delta(tuple(b"Th")), Delta(finish_reason=FinishReason.ERROR, error="the step broke")]
    with pytest.raises(anthropic.APIStatusError, match="the step broke"):
        async with client.messages.stream(model="tiny", max_tokens=300, messages=HI) as stream:
            await stream.get_final_message()


async def test_models_are_listed(client: AsyncAnthropic) -> None:
    (model,) = [model async for model in client.models.list()]
    assert (model.id, model.type, model.display_name, model.max_input_tokens) == ("tiny", "model", "tiny", 4096)
    assert (await client.models.retrieve("tiny")).created_at == model.created_at
    with pytest.raises(anthropic.NotFoundError):
        await client.models.retrieve("other")


async def test_the_synchronous_client(url: str, engine: ScriptedEngine) -> None:
    engine.script = says(f"{THOUGHT}Adding.\n{CALL}")

    def talk() -> tuple[Message, Message, Sequence[str]]:
        with Anthropic(base_url=url, api_key="sesame", max_retries=0) as client:
            whole = client.messages.create(model="tiny", max_tokens=300, messages=HI, tools=[ADD])
            partial = []
            with client.messages.stream(model="tiny", max_tokens=300, messages=HI, tools=[ADD]) as stream:
                for event in stream:
                    if event.type == "input_json":
                        partial.append(event.partial_json)
                return whole, stream.get_final_message(), partial

    whole, streamed, partial = await to_thread.run_sync(talk)
    assert same(whole, streamed)
    assert json.loads("".join(partial)) == {"a": 1, "b": 2}


async def test_beta_methods_work_as_well(client: AsyncAnthropic) -> None:
    message = await client.beta.messages.create(
        model="tiny",
        max_tokens=300,
        messages=HI,
        betas=["context-management-2025-06-27"],
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    )
    assert message.context_management is not None and message.context_management.applied_edits == []
