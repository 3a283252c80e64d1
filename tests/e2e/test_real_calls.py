"""The default model, made to call: every call is valid against its tool's schema, streamed and not."""

import json
from typing import Any

import pytest

from streamserve.default_model import find_default_model
from streamserve.errors import CheckpointError
from tests.e2e.test_real_model import RealServer, server

try:
    find_default_model()
except CheckpointError as error:
    pytest.skip(str(error), allow_module_level=True)

jsonschema = pytest.importorskip("jsonschema")
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]
__all__ = ["server"]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
ADD = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
SCHEMAS = {"get_weather": WEATHER, "add": ADD}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": "Does what it says.", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]


def check(name: str, arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])


async def test_demanded_calls_are_valid(server: RealServer) -> None:
    questions = ["How is the weather in Paris?", "Add 1 and 2, then 3 and 4", "Tell me a joke"]
    named = {"type": "function", "function": {"name": "add"}}
    async with server.client as client:
        for seed, question in enumerate(questions):
            ask: Any = {
                "model": server.parts.model_name,
                "messages": [{"role": "user", "content": question}],
                "tools": TOOLS,
                "parallel_tool_calls": False,
                "temperature": 0.8,
                "seed": seed,
                "max_tokens": 120,
            }
            for choice in ("required", named):
                whole = (await client.chat.completions.create(**ask, tool_choice=choice)).choices[0]
                assert whole.finish_reason == "tool_calls"
                (call,) = whole.message.tool_calls or ()
                check(call.function.name, call.function.arguments)  # type: ignore[union-attr]
                assert choice == "required" or call.function.name == "add"  # type: ignore[union-attr]
            stream = await client.chat.completions.create(**ask, tool_choice="required", stream=True)
            name, arguments = "", ""
            async for chunk in stream:
                for part in chunk.choices[0].delta.tool_calls or ():
                    assert part.function is not None and part.index == 0
                    name, arguments = name + (part.function.name or ""), arguments + (part.function.arguments or "")
            check(name, arguments)


async def test_a_text_that_a_schema_fixes_comes_whole_at_any_limit(server: RealServer) -> None:
    text = "žluťoučký 🦙 世界 👩‍👩‍👧"
    async with server.client as client:
        ask: Any = {"model": server.parts.model_name, "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
        form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"const": text}}}
        whole = (await client.chat.completions.create(**ask, response_format=form)).choices[0]
        assert (json.loads(whole.message.content or ""), whole.finish_reason) == (text, "stop")
        for limit in (1, 3, 4, 7, 12):
            cut = (await client.chat.completions.create(**ask, response_format=form, max_tokens=limit)).choices[0]
            stream = await client.chat.completions.create(**ask, response_format=form, max_tokens=limit, stream=True)
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
            assert "".join(parts) == cut.message.content
            assert (whole.message.content or "").startswith(cut.message.content or "") and cut.finish_reason == "length"
