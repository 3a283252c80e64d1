"""Every field of a body is decided, the page says how, and nothing is ignored in silence."""

from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from streamserve.api.fields import CHAT, COMPLETION, TABLES, Decision, Field, page
from streamserve.api.schema import ChatRequest, CompletionRequest
from streamserve.api.wire import header_text
from streamserve.text.byte_tokenizer import byte_text_model
from tests.api.scripted import ScriptedEngine

ROOT = Path(__file__).parents[2]
OFFICIAL = ROOT.parent / "shared" / "data" / "openai_openapi.yaml"
HI = [{"role": "user", "content": "hi"}]
CHAT_ROUTE, COMPLETION_ROUTE = "POST /v1/chat/completions", "POST /v1/completions"
BODIES = {CHAT_ROUTE: (ChatRequest, {"messages": HI}), COMPLETION_ROUTE: (CompletionRequest, {"prompt": "hi"})}


def test_the_page_is_printed_from_the_decisions() -> None:
    assert (ROOT / "docs" / "api-fields.md").read_text() == page(), "python -m streamserve.api.fields > docs/api-fields.md"


@pytest.mark.parametrize("route", BODIES)
def test_every_field_that_is_read_is_on_the_page_and_no_other(route: str) -> None:
    names = [field.name for field in TABLES[route]]
    assert len(names) == len(set(names))
    taken = {field.name for field in TABLES[route] if field.decision is not Decision.REFUSED}
    assert taken == set(BODIES[route][0].__struct_encode_fields__)


@cache
def _official_schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = yaml.load(OFFICIAL.read_text(), Loader=yaml.CSafeLoader)["components"]["schemas"]
    return schemas


@pytest.mark.skipif(not OFFICIAL.exists(), reason="needs the official schema in ../shared/data")
@pytest.mark.parametrize(
    ("route", "name", "least"),
    [
        (CHAT_ROUTE, "CreateChatCompletionRequest", 30),
        (COMPLETION_ROUTE, "CreateCompletionRequest", 15),
        ("POST /v1/responses", "CreateResponse", 25),
        ("POST /v1/embeddings", "CreateEmbeddingRequest", 5),
    ],
)
def test_every_official_field_is_decided(route: str, name: str, least: int) -> None:
    schemas = _official_schemas()

    def properties(schema: dict[str, Any]) -> set[str]:
        if "$ref" in schema:
            return properties(schemas[schema["$ref"].rsplit("/", 1)[-1]])
        return set(schema.get("properties", ())).union(*map(properties, schema.get("allOf", ())))

    official = properties(schemas[name])
    assert len(official) >= least
    assert official <= {field.name for field in TABLES[route]}


def _value(field: Field) -> Any:
    """Something of the field's type that asks for an effect."""
    kinds = {"metadata": {"a": "b"}, "store": True, "prompt_cache_options": {"a": 1}}
    return kinds.get(field.name, "x")


@pytest.mark.anyio
@pytest.mark.parametrize("route", BODIES)
async def test_what_has_no_effect_is_named_and_what_is_refused_says_why(http: httpx.AsyncClient, route: str) -> None:
    path, body = route.split()[1], BODIES[route][1]
    quiet = await http.post(path, json={**body, "stream": True})
    assert "x-streamserve-warning" not in quiet.headers
    for field in TABLES[route]:
        if field.decision is Decision.WARNED:
            for stream in (False, True):
                loud = await http.post(path, json={**body, field.name: _value(field), "stream": stream})
                assert loud.status_code == 200, loud.text
                assert loud.headers["x-streamserve-warning"] == f"{field.name} has no effect: {field.note}"
        elif field.decision is Decision.REFUSED:
            refused = await http.post(path, json={**body, field.name: _value(field)})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == field.name
            assert field.note in refused.json()["error"]["message"]
    for field in (*CHAT, *COMPLETION):
        if field in TABLES[route]:
            for harmless in field.harmless:
                calm = await http.post(path, json={**body, field.name: harmless})
                assert calm.status_code == 200, calm.text
                assert "x-streamserve-warning" not in calm.headers


@pytest.mark.anyio
async def test_what_the_template_does_not_read_is_named(http: httpx.AsyncClient) -> None:
    for given, named in (
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": "none"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ):
        answer = await http.post("/v1/chat/completions", json={"messages": HI, **given})
        assert answer.headers["x-streamserve-warning"].startswith(f"{named} has no effect: ")


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def part(**more: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": "x", **more}]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"role": "user", "content": "x", "mood": "good"}, "messages[1].mood"),
        ({"role": "user", "content": part(cache_control={"type": "ephemeral"})}, "messages[1].content[0].cache_control"),
        (
            {"role": "user", "content": part(prompt_cache_breakpoint={"mode": "x"})},
            "messages[1].content[0].prompt_cache_breakpoint",
        ),
        ({"role": "assistant", "tool_calls": [{**CALL, "mood": 1}]}, "messages[1].tool_calls[0].mood"),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "function": {**CALL["function"], "mood": 1}}]},  # type: ignore[dict-item]
            "messages[1].tool_calls[0].function.mood",
        ),
        # As answers come back:
        ({"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None, "parsed": {"a": 1}}, None),
        ({"role": "assistant", "tool_calls": [{**CALL, "index": 0}], "provider_specific_fields": None}, None),
    ],
)
async def test_what_nothing_reads_in_a_message_is_named(
    http: httpx.AsyncClient, message: dict[str, Any], place: str | None
) -> None:
    answer = await http.post("/v1/chat/completions", json={"messages": [*HI, message]})
    assert answer.status_code == 200, answer.text
    expected = None if place is None else f"{place} has no effect: nothing here reads it"
    assert answer.headers.get("x-streamserve-warning") == expected


@pytest.mark.anyio
async def test_what_nothing_reads_in_an_input_is_named(http: httpx.AsyncClient) -> None:
    for item, place in (
        ({"role": "assistant", "content": "x", "phase": "commentary"}, "input[0].phase"),
        ({"role": "user", "content": [{"type": "input_text", "text": "x", "mood": 1}]}, "input[0].content[0].mood"),
    ):
        answer = await http.post("/v1/responses", json={"input": [item]})
        assert answer.json()["warnings"] == [f"{place} has no effect: nothing here reads it"]
    output = answer.json()["output"]
    again = await http.post("/v1/responses", json={"input": [*output, {"role": "user", "content": "x"}]})
    assert "warnings" not in again.json()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({"role": "assistant", "content": None, "refusal": "I will not"}, "assistant\nI will not"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not"}]}, "assistant\nI will not"),
        ({"role": "assistant", "content": "Hm.", "refusal": "I will not"}, "assistant\nHm.\nI will not"),
    ],
)
async def test_a_refusal_is_what_an_assistant_said(
    http: httpx.AsyncClient, engine: ScriptedEngine, message: dict[str, Any], shown: str
) -> None:
    answer = await http.post("/v1/chat/completions", json={"messages": [*HI, message]})
    assert answer.status_code == 200 and "x-streamserve-warning" not in answer.headers
    assert shown in byte_text_model().tokenizer.decode(engine.requests[-1].token_ids)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat/completions", {"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]}, "messages[0].audio"),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}]},
            "messages[0].tool_calls[0].type",
        ),
        ("chat/completions", {"messages": HI, "response_format": {"type": "text", "mood": 1}}, "response_format.mood"),
        ("responses", {"input": "x", "text": {"format": {"type": "text", "mood": 1}}}, "text.format.mood"),
        ("chat/completions", {"messages": HI, "max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ("chat/completions", {"messages": HI, "rid": "a", "request_id": "b"}, "request_id"),
    ],
)
async def test_what_contradicts_itself_or_cannot_be_served_is_refused_by_its_place(
    http: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = await http.post(f"/v1/{path}", json=fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.anyio
async def test_the_same_wish_under_two_names_is_one(http: httpx.AsyncClient) -> None:
    fields = {"max_tokens": 4, "max_completion_tokens": 4, "rid": "a", "request_id": "a"}
    answer = await http.post("/v1/chat/completions", json={"messages": HI, **fields})
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_names_that_clients_chose_cannot_end_a_header() -> None:
    assert header_text("a\r\nx-evil: 1\0 ü has no effect") == b"a??x-evil: 1? ? has no effect"
