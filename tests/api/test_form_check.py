"""POST /forms/check: what a chat would be refused with, as data, without a chat."""

import asyncio
from typing import Any

import httpx
import pytest

from streamserve.api.form_check import MAX_CHECKS
from streamserve.errors import InvalidRequest
from tests.api.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio
PATH = "/forms/check"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def of_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    "body",
    [
        {},
        of_schema(SCHEMA),
        {"regex": "[ab]+"},
        {"choice": ["a", "b"]},
        {"tools": [tool("f", SCHEMA)], "tool_choice": "required"},
    ],
)
async def test_a_form_that_answers_can_have_is_valid(http: httpx.AsyncClient, engine: ScriptedEngine, body: Any) -> None:
    response = await http.post(PATH, json=body)
    assert response.json() == {"valid": True, "error": None, "warnings": []}
    assert len(engine.checked) == bool(body) and engine.requests == []


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (of_schema({"properties": {"a": {"uniqueItems": True}}}), ".properties.a.uniqueItems", "not supported"),
        ({"regex": "[0-9"}, "regex", "not closed"),
        ({"choice": ["a"], "regex": "a"}, "choice", "both given"),
        ({"tools": [tool("f", SCHEMA)], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", '"g"'),
        ({"tools": [tool("no spaces", SCHEMA)]}, "tools[0].function.name", "letters"),
    ],
)
async def test_what_a_chat_would_be_refused_with_comes_as_data(
    http: httpx.AsyncClient, engine: ScriptedEngine, body: Any, param: str, words: str
) -> None:
    response = await http.post(PATH, json=body)
    found = response.json()
    assert response.status_code == 200 and found["valid"] is False and engine.checked == []
    assert found["error"]["param"].endswith(param) and words in found["error"]["message"]
    refused = await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], **body})
    assert refused.status_code == 400
    assert {name: refused.json()["error"][name] for name in ("message", "param", "code")} == found["error"]


async def test_a_grammar_that_does_not_compile_is_no_failure_of_the_question(
    http: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.refusal = InvalidRequest("the grammar cannot be used: at 1(8): unknown name", param="ebnf")
    found = (await http.post(PATH, json={"ebnf": "start: foo"})).json()
    assert found["error"] == {"message": str(engine.refusal), "param": "ebnf", "code": "invalid_value"}


async def test_what_is_no_form_at_all_is_refused(http: httpx.AsyncClient) -> None:
    for body, param in (({"regex": 5}, "regex"), ({"messages": []}, "messages"), ({"regexp": "a"}, "regexp")):
        response = await http.post(PATH, json=body)
        assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert (await http.post(PATH, json={"model": "other"})).status_code == 404


async def test_only_so_many_are_checked_at_once(http: httpx.AsyncClient, engine: ScriptedEngine, monkeypatch: Any) -> None:
    are_full, goes_on = asyncio.Event(), asyncio.Event()

    async def wait(grammar: str, param: str) -> None:
        engine.checked.append(grammar)
        if len(engine.checked) == MAX_CHECKS:
            are_full.set()
        await goes_on.wait()

    monkeypatch.setattr(engine, "check_grammar", wait)
    asked = [asyncio.create_task(http.post(PATH, json={"regex": f"a{n}"})) for n in range(MAX_CHECKS)]
    await are_full.wait()
    refused = await http.post(PATH, json={"regex": "b"})
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    goes_on.set()
    assert {response.status_code for response in await asyncio.gather(*asked)} == {200}
    assert (await http.post(PATH, json={"regex": "b"})).json()["valid"]
