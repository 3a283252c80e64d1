"""Libraries that people reach a server through, over a real one: LiteLLM, Instructor, LangChain, LlamaIndex.

Answers are scripted. What the libraries send is theirs: these tests are here to see it understood.
"""

import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

from streamserve.api.app import create_app
from streamserve.config import ServerConfig
from streamserve.text.byte_tokenizer import byte_text_model
from tests.api.scripted import ScriptedEngine, says
from tests.e2e.serving import listening

# Before the libraries are imported: nothing of a test is to leave the machine.
os.environ.update(
    LITELLM_LOCAL_MODEL_COST_MAP="True",  # else its import fetches prices
    LITELLM_OFFLINE_MODE="true",
    LANGSMITH_TRACING="false",
    LANGCHAIN_TRACING_V2="false",
)

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the libraries' own, of one another
    pytest.mark.filterwarnings("ignore:Items? .* on TypedDict class:UserWarning"),  # LiteLLM's types
]
MODEL = "gpt-4o-mini"  # LlamaIndex wants to know a model's context by its name
TOOLS = ServerConfig(tool_call_parser="hermes")
QUESTION = "What is 1 + 2?"
CALL = '<tool_call>\n{"name": "Sum", "arguments": {"total": 3}}\n</tool_call>'


class Sum(BaseModel):
    """The sum of two numbers."""

    total: int = Field(description="their sum")


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


SUM_TOOL = {"type": "function", "function": {"name": "Sum", "description": "A sum.", "parameters": Sum.model_json_schema()}}


@pytest.fixture
def engine() -> ScriptedEngine:
    scripted = ScriptedEngine(says("Three."))
    scripted.state = replace(scripted.state, context_len=4096)
    return scripted


@pytest.fixture
async def connections() -> AsyncIterator[httpx.AsyncClient]:
    """For libraries that would keep their own ones open for ever."""
    async with httpx.AsyncClient() as client:
        yield client


@pytest.fixture
async def url(engine: ScriptedEngine) -> AsyncIterator[str]:
    app = create_app(engine, byte_text_model(), TOOLS, model_name="tiny", aliases=(MODEL,))
    async with listening(app, TOOLS) as port:
        yield f"http://127.0.0.1:{port}"


async def test_litellm(url: str, engine: ScriptedEngine) -> None:
    litellm = pytest.importorskip("litellm")
    litellm.telemetry = False
    ask: dict[str, Any] = {"api_key": "none", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 200}
    for route in ("openai", "anthropic"):
        to: dict[str, Any] = {**ask, "model": f"{route}/tiny", "api_base": f"{url}/v1" if route == "openai" else url}
        engine.script = says("Three.", cached=4)
        answer = await litellm.acompletion(**to)
        assert answer.choices[0].message.content == "Three."
        assert answer.usage.prompt_tokens == len(engine.requests[-1].token_ids)
        assert answer.usage.prompt_tokens_details.cached_tokens == 4
        chunks = [chunk async for chunk in await litellm.acompletion(**to, stream=True)]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Three."
        assert chunks[-1].choices[0].finish_reason == "stop"
        engine.script = says(CALL)
        called = await litellm.acompletion(**to, tools=[SUM_TOOL], tool_choice="required")
        (call,) = called.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("Sum", {"total": 3})
        assert called.choices[0].finish_reason == "tool_calls"
    await litellm.close_litellm_async_clients()


async def test_instructor(url: str, engine: ScriptedEngine) -> None:
    instructor = pytest.importorskip("instructor")
    modes = {
        instructor.Mode.TOOLS: CALL,
        instructor.Mode.JSON_SCHEMA: '{"total":3}',
        instructor.Mode.JSON: '{"total":3}',
    }
    messages = [{"role": "user", "content": QUESTION}]
    ask: dict[str, Any] = {
        "model": "tiny",
        "response_model": Sum,
        "messages": messages,
        "max_tokens": 200,
        "max_retries": 0,
    }
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as openai_client:
        for mode, text in modes.items():
            engine.script = says(text)
            client = instructor.from_openai(openai_client, mode=mode)
            made = await client.chat.completions.create(**ask)
            assert isinstance(made, Sum) and made.total == 3
            guidance = engine.requests[-1].guidance
            assert guidance is not None and guidance.grammar is not None, mode
        client = instructor.from_openai(openai_client, mode=instructor.Mode.TOOLS)
        engine.script = says(CALL.replace("Sum", "PartialSum"))  # Instructor's name for what is built piece by piece
        partial = client.chat.completions.create_partial(**ask)
        assert [made.total async for made in partial][-1] == 3


async def test_langchain(url: str, engine: ScriptedEngine, connections: httpx.AsyncClient) -> None:
    langchain = pytest.importorskip("langchain_openai")
    to: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "http_async_client": connections}
    model = langchain.ChatOpenAI(model="tiny", max_tokens=200, stream_usage=True, **to)
    answer = await model.ainvoke(QUESTION)
    assert answer.content == "Three."
    assert answer.usage_metadata["input_tokens"] == len(engine.requests[0].token_ids)
    chunks = [chunk async for chunk in model.astream(QUESTION)]
    assert "".join(chunk.content for chunk in chunks) == "Three."
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 7
    engine.script = says(CALL)
    (call,) = (await model.bind_tools([Sum]).ainvoke(QUESTION)).tool_calls
    assert (call["name"], call["args"]) == ("Sum", {"total": 3})
    whole: Any = None
    async for chunk in model.bind_tools([Sum], tool_choice="required").astream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("Sum", {"total": 3})]
    for method, text in (("json_schema", '{"total":3}'), ("function_calling", CALL)):
        engine.script = says(text)
        assert await model.with_structured_output(Sum, method=method).ainvoke(QUESTION) == Sum(total=3)


async def test_llama_index(url: str, engine: ScriptedEngine, connections: httpx.AsyncClient) -> None:
    openai = pytest.importorskip("llama_index.llms.openai")
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool

    to: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "none", "async_http_client": connections}
    model = openai.OpenAI(model=MODEL, max_retries=0, max_tokens=200, **to)
    question = [ChatMessage(role="user", content=QUESTION)]
    assert (await model.achat(question)).message.content == "Three."
    assert [part.message.content async for part in await model.astream_chat(question)][-1] == "Three."
    engine.script = says('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>')
    answer = await model.achat_with_tools([FunctionTool.from_defaults(add)], user_msg=QUESTION)
    (call,) = model.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("add", {"a": 1, "b": 2})
    engine.script = says('{"total":3}')
    assert (await model.as_structured_llm(Sum).achat(question)).raw == Sum(total=3)
