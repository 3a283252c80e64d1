"""The real openai client, plain and async, on chats in full: calls, parsed answers, thoughts, log-probabilities. Single fields
and methods: test_openai_fields.py, test_openai_methods.py."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio.to_thread
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from streamserve.text.byte_tokenizer import byte_text_model
from streamserve.text.model import TextModel
from streamserve.text.template import ChatTemplate
from tests.e2e.serving import FakeServer, fake_server

pytestmark = pytest.mark.anyio
HI: list[Any] = [{"role": "user", "content": "Add 1 and 2, then 3 and 4"}]
THINKS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n"
)


class Flag(BaseModel):
    """Nothing in it can go on for long, so that the fake model's choices come to an end."""

    is_set: bool
    kind: None


class Add(BaseModel):
    """Adds."""

    carry: bool
    a: bool


ADD: Any = openai.pydantic_function_tool(Add, name="add")
NOW: Any = {"type": "function", "function": {"name": "now"}}


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with fake_server(step_s=0.0, answer_len=30) as running:
        yield running


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as openai_client:
        yield openai_client


def check_call(name: str, arguments: str) -> None:
    assert name in ("add", "now")
    if name == "add":
        Add.model_validate_json(arguments, strict=True)
    else:
        assert json.loads(arguments) == {}


async def test_demanded_calls_are_valid_and_streamed_as_the_client_joins_them(client: AsyncOpenAI) -> None:
    ask: Any = {"model": "tiny", "messages": HI, "tools": [ADD, NOW], "max_tokens": 600}
    named = {"type": "function", "function": {"name": "add"}}
    for fields in (
        {"tool_choice": "required"},
        {"tool_choice": named},
        {"tool_choice": "required", "parallel_tool_calls": False},
    ):
        whole = (await client.chat.completions.create(**ask, **fields)).choices[0]
        stream = await client.chat.completions.create(**ask, **fields, stream=True)
        joined: dict[int, list[Any]] = {}
        reasons = []
        async for chunk in stream:
            reasons.append(chunk.choices[0].finish_reason)
            for call in chunk.choices[0].delta.tool_calls or ():
                assert call.function is not None
                if call.index not in joined:
                    assert call.id and call.type == "function"
                    joined[call.index] = [call.function.name, ""]
                else:
                    assert call.id is call.type is call.function.name is None
                joined[call.index][1] += call.function.arguments
        assert reasons[-1] == whole.finish_reason and not any(reasons[:-1])
        calls = whole.message.tool_calls or []
        assert list(joined) == list(range(len(calls))) and calls
        assert [tuple(made) for made in joined.values()] == [(call.function.name, call.function.arguments) for call in calls]  # type: ignore[union-attr]
        assert len({call.id for call in calls}) == len(calls)
        if whole.finish_reason == "tool_calls":
            for name, arguments in joined.values():
                check_call(name, arguments)
        if "parallel_tool_calls" in fields or fields["tool_choice"] == named:
            assert (len(calls), whole.finish_reason) == (1, "tool_calls")


async def test_parsed_answers_and_calls(client: AsyncOpenAI) -> None:
    parsed = await client.chat.completions.parse(model="tiny", messages=HI, response_format=Flag, max_tokens=100)
    assert isinstance(parsed.choices[0].message.parsed, Flag)
    called = await client.chat.completions.parse(
        model="tiny", messages=HI, tools=[ADD], tool_choice="required", parallel_tool_calls=False, max_tokens=200
    )
    (call,) = called.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Add)
    with pytest.raises(openai.LengthFinishReasonError):
        await client.chat.completions.parse(model="tiny", messages=HI, response_format=Flag, max_tokens=4)


async def test_the_helper_for_streams_parses_answers_and_calls(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="tiny", messages=HI, response_format=Flag, max_tokens=100) as stream:
        kinds = {event.type async for event in stream}
        assert isinstance((await stream.get_final_completion()).choices[0].message.parsed, Flag)
    assert {"content.delta", "content.done"} <= kinds
    async with client.chat.completions.stream(
        model="tiny", messages=HI, tools=[ADD], tool_choice="required", parallel_tool_calls=False, max_tokens=200
    ) as calling:
        kinds = {event.type async for event in calling}
        (call,) = (await calling.get_final_completion()).choices[0].message.tool_calls or ()
        assert isinstance(call.function.parsed_arguments, Add)
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert "content.delta" not in kinds


async def test_the_plain_client_does_the_same(server: FakeServer) -> None:
    def ask() -> None:
        with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            complete = client.chat.completions
            assert isinstance(
                complete.parse(model="tiny", messages=HI, response_format=Flag, max_tokens=100).choices[0].message.parsed, Flag
            )
            calling: Any = {"tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
            whole = complete.create(model="tiny", messages=HI, **calling)
            with complete.stream(model="tiny", messages=HI, **calling) as stream:
                final = stream.get_final_completion()
            made = [choice.message.tool_calls[0].function.arguments for choice in (whole.choices[0], final.choices[0])]  # type: ignore[index,union-attr]
            assert made[0] == made[1]
            pieces = complete.create(model="tiny", messages=HI, max_tokens=8, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)
            assert client.completions.create(model="tiny", prompt="a", max_tokens=4, best_of=3).choices[0].index == 0

    await anyio.to_thread.run_sync(ask)


async def test_every_schema_bounded_or_not_ends_valid_or_at_the_limit(client: AsyncOpenAI) -> None:
    schemas: list[Any] = [{}, True, {"type": "object"}, {"type": "object", "additionalProperties": False}, {"type": "number"}]
    for schema in schemas:
        for seed in range(3):
            answer = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": str(seed)}], max_tokens=64, extra_body={"json_schema": schema}
            )
            choice = answer.choices[0]
            assert choice.finish_reason in ("stop", "length")
            if choice.finish_reason == "stop":
                json.loads(choice.message.content or "")
    closed = await client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=64, extra_body={"json_schema": schemas[3], "min_tokens": 64}
    )
    assert closed.choices[0].message.content == "{}"  # a grammar that has nothing more to say ends the answer


async def test_thoughts_come_apart_end_at_their_limit_and_are_counted() -> None:
    text = byte_text_model()
    thinking = TextModel(text.tokenizer, ChatTemplate(THINKS, special_tokens=text.tokenizer.special_tokens))
    async with (
        fake_server(step_s=0.0, answer_len=60, text=thinking) as server,
        AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        ask: Any = {"model": "tiny", "messages": HI, "max_tokens": 100, "extra_body": {"max_thinking_tokens": 10}}
        answer = await client.chat.completions.create(**ask)
        message = answer.choices[0].message
        thought = message.reasoning_content  # type: ignore[attr-defined]
        assert 0 < len(thought) <= 10 and message.content and "</think>" not in message.content
        usage = answer.usage
        assert usage is not None and usage.completion_tokens_details is not None
        assert 10 <= (usage.completion_tokens_details.reasoning_tokens or 0) < usage.completion_tokens
        stream = await client.chat.completions.create(**ask, stream=True)
        shown = {"reasoning_content": "", "content": ""}
        async for chunk in stream:
            for name in shown:
                shown[name] += getattr(chunk.choices[0].delta, name, None) or ""
        assert shown == {"reasoning_content": thought, "content": message.content}
        ask["extra_body"] |= {"json_schema": {"const": [1, 2]}}
        constrained = (await client.chat.completions.create(**ask)).choices[0]
        assert (constrained.message.content, constrained.finish_reason) == ("[1,2]", "stop")


async def test_log_probabilities_of_answer_and_prompt(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=6, logprobs=True, top_logprobs=1, extra_body={"prompt_logprobs": 1}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    raw = bytes(byte for entry in logprobs.content for byte in entry.bytes or ())
    assert raw.decode() == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 1 for entry in logprobs.content)
    of_prompt = answer.prompt_logprobs  # type: ignore[attr-defined]
    assert answer.usage is not None and len(of_prompt) == answer.usage.prompt_tokens
    assert of_prompt[0] is None and all(len(entry) == 1 for entry in of_prompt[1:])
    text = await client.completions.create(model="tiny", prompt="abc", max_tokens=2, extra_body={"prompt_logprobs": 1})
    scored = text.choices[0].prompt_logprobs  # type: ignore[attr-defined]
    assert [next(iter(entry.values()))["decoded_token"] for entry in scored[1:]] == ["b", "c"]
    assert text.choices[0].logprobs is None and text.choices[0].text[0] != "a"
