"""Every field of a body is decided, the page says how, and nothing is ignored in silence."""

from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from streamserve.api.fields import CHAT, COMPLETION, TABLES, Decision, Field, page
from streamserve.api.schema import ChatRequest, CompletionRequest

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
    ("route", "name"), [(CHAT_ROUTE, "CreateChatCompletionRequest"), (COMPLETION_ROUTE, "CreateCompletionRequest")]
)
def test_every_official_field_is_decided(route: str, name: str) -> None:
    schemas = _official_schemas()

    def properties(schema: dict[str, Any]) -> set[str]:
        if "$ref" in schema:
            return properties(schemas[schema["$ref"].rsplit("/", 1)[-1]])
        return set(schema.get("properties", ())).union(*map(properties, schema.get("allOf", ())))

    official = properties(schemas[name])
    assert len(official) > 15
    assert official <= {field.name for field in TABLES[route]}


def _value(field: Field) -> Any:
    """Something of the field's type that asks for an effect."""
    kinds = {"metadata": {"a": "b"}, "store": True, "prediction": {"type": "content"}, "prompt_cache_options": {"a": 1}}
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
