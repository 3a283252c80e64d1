"""The prefix cache over HTTP: its tree, what it knows of a prompt and of which message, pins; and who may see texts."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from streamserve.api.app import Api, create_app
from streamserve.api.prefixes import MAX_PREVIEWED
from streamserve.config import ServerConfig
from streamserve.media.family import Family
from streamserve.media.fixed import FixedFamily
from streamserve.messages import MEDIA_BASE, CacheSummary
from streamserve.text.byte_tokenizer import byte_text_model
from tests.api.conftest import client_of
from tests.api.pictures import BLUE_URL, RED_URL, said, shown
from tests.api.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
KEYS = {"api_key": ("sesame",), "admin_api_key": "root"}


class RememberingEngine(ScriptedEngine):
    """One whose cache can be asked about."""

    def cache_summary(self, max_prefixes: int = 10) -> CacheSummary:
        return self.cache.summary(max_prefixes)


@pytest.fixture
def engine() -> RememberingEngine:
    return RememberingEngine()


def app_with(engine: ScriptedEngine, family: Family | None = None, **settings: Any) -> Api:
    return create_app(engine, byte_text_model(), ServerConfig(**settings), model_name="tiny", family=family)


def remember(engine: ScriptedEngine, token_ids: list[int], salt: str = "") -> None:
    """As if a request with these tokens had run."""
    lease = engine.cache.open(salt, token_ids, len(token_ids) - 1)
    assert lease is not None and engine.cache.grow(lease, len(token_ids))
    engine.cache.close(lease, token_ids)


async def tokens_of(http: httpx.AsyncClient, **body: Any) -> list[int]:
    tokens: list[int] = (await http.post("/tokenize", json=body)).json()["tokens"]
    return tokens


async def look_up(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await http.post("/cache/lookup", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def said_by(*roles_and_texts: str) -> list[dict[str, Any]]:
    parts: Iterator[str] = iter(roles_and_texts)
    return [{"role": role, "content": next(parts)} for role in parts]


# ---- the tree --------------------------------------------------------------------------------------------------------


async def test_the_tree_is_opened_level_by_level_and_says_what_a_node_begins_with(
    http: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    for text in ("Once upon a time", "Once upon a midnight", "Twice"):
        remember(engine, list(text.encode()))
    remember(engine, [*b"See ", MEDIA_BASE + 5, MEDIA_BASE + 9, *b"?"], salt="mine")
    tree = (await http.get("/cache/tree")).json()
    assert [(node["preview"], node["parent"], node["is_salted"]) for node in tree["nodes"]] == [
        ("See [picture]?", 0, True),
        ("Twice", 0, False),
        ("Once upon a ", 0, False),
    ]
    once = tree["nodes"][2]
    assert (once["num_tokens"], once["end"], once["num_children"], once["hits"], once["is_pinned"]) == (12, 12, 2, 1, False)
    assert (tree["num_nodes"], tree["is_cut"], tree["previews"], tree["previews_reason"]) == (5, False, True, None)
    below = (await http.get("/cache/tree", params={"node": once["id"], "depth": 3, "preview": 2})).json()
    assert [(node["id"] == once["id"], node["preview"], node["end"]) for node in below["nodes"]] == [
        (True, "On", 12),
        (False, "mi", 20),
        (False, "ti", 16),
    ]
    cut = (await http.get("/cache/tree", params={"limit": 2, "depth": 16})).json()
    assert ([node["preview"] for node in cut["nodes"]], cut["is_cut"]) == (["See [picture]?", "Twice"], True)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/cache/tree?depth=0", "depth"),
        ("/cache/tree?depth=17", "depth"),
        ("/cache/tree?limit=x", "limit"),
        ("/cache/tree?limit=1001", "limit"),
        ("/cache/tree?node=-1", "node"),
        ("/cache/tree?nodes=1", "nodes"),
        (f"/cache/tree?limit=1000&preview={MAX_PREVIEWED // 1000 + 1}", "preview"),
        ("/cache/pins?limit=1", "limit"),
        ("/engine/steps?since=x", "since"),
        ("/engine/steps?limit=601", "limit"),
    ],
)
async def test_wrong_parameters_are_named(http: httpx.AsyncClient, path: str, param: str) -> None:
    response = await http.get(path)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_node_that_is_gone_is_not_found(http: httpx.AsyncClient) -> None:
    for response in (
        await http.get("/cache/tree?node=5"),
        await http.post("/cache/pin", json={"node": 5}),
        await http.post("/cache/evict", json={"node": 0}),
        await http.delete("/cache/pin/5"),
        await http.delete("/cache/pin/five"),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found"), response.text


@pytest.mark.parametrize(
    ("settings", "key", "sees", "is_admin"),
    [
        ({}, None, True, True),
        ({"host": "0.0.0.0"}, None, False, True),
        ({"api_key": ("sesame",)}, "sesame", False, True),
        (KEYS, "sesame", False, False),
        (KEYS, "root", True, True),
        ({**KEYS, "host": "0.0.0.0"}, "root", True, True),
    ],
)
async def test_texts_of_others_are_for_loopback_or_the_admin_and_pins_for_the_admin(
    engine: ScriptedEngine, settings: dict[str, Any], key: str | None, sees: bool, is_admin: bool
) -> None:
    remember(engine, list(b"secret"))
    async with client_of(app_with(engine, **settings), headers={"x-api-key": key} if key else {}) as http:
        tree = (await http.get("/cache/tree")).json()
        config = (await http.get("/playground/config.json")).json()
        found = await look_up(http, prompt="secrets", cache_salt="x")
        differs = await look_up(http, prompt="seller")
        pinned = await http.post("/cache/pin", json={"node": tree["nodes"][0]["id"]})
        evicted = await http.post("/cache/evict", json={"node": tree["nodes"][0]["id"]})
        unpinned = await http.delete(f"/cache/pin/{tree['nodes'][0]['id']}")
        steps = (await http.get("/engine/steps")).json()
    assert ("preview" in tree["nodes"][0], tree["previews"], tree["previews_reason"] is None) == (sees, sees, sees)
    assert config["allowed"] == {"previews": sees, "previews_reason": tree["previews_reason"], "admin": is_admin}
    assert found["reason"]["code"] == ("other_salt" if sees else "new")
    assert differs["reason"]["cached_token"] == ("c" if sees else None)
    assert (differs["reason"]["code"], "'c'" in differs["reason"]["message"]) == ("differs", sees)
    statuses = (pinned.status_code, evicted.status_code, unpinned.status_code)
    assert statuses == ((200, 409, 200) if is_admin else (401, 401, 401))
    assert steps["shows_ids"] is sees


# ---- a prompt --------------------------------------------------------------------------------------------------------


async def test_of_each_message_it_is_said_how_much_is_known(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    chat = said_by("system", "Be brief.", "user", "Hello!", "assistant", "Hi.")
    known = await tokens_of(http, messages=chat, add_generation_prompt=False)
    remember(engine, known)
    before = [node.released_s for node in engine.cache._tree.nodes()], list(engine.cache._tree._idle)
    found = await look_up(http, messages=[*chat, *said_by("user", "More?")], temperature=0.5, stream=True, max_tokens=9)
    whole = [(part["role"], part["tokens"], part["matched"]) for part in found["per_message"]]
    assert whole == [("system", 9, 9), ("user", 6, 6), ("assistant", 3, 3), ("user", 5, 0)]
    assert (found["matched"], found["reason"]["code"], found["reason"]["in_message"]) == (len(known), "new", None)
    other = await look_up(http, messages=said_by("system", "Be brief.", "user", "Help!"))
    assert [part["matched"] for part in other["per_message"]] == [9, 3]
    reason = other["reason"]
    assert (reason["code"], reason["in_message"], reason["token"], reason["cached_token"]) == ("differs", 1, "p", "l")
    assert reason["position"] == other["matched"] == other["per_message"][1]["start"] + 3
    same = await look_up(http, prompt=known)
    assert (same["matched"], same["reason"]["code"], same["path"]) == (len(known) - 1, "complete", found["path"])
    assert before == ([node.released_s for node in engine.cache._tree.nodes()], list(engine.cache._tree._idle))
    assert engine.requests == []


async def test_calls_that_the_template_does_not_know_are_found_where_they_are_written_out(http: httpx.AsyncClient) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": "one"}'}}
    chat = [
        *said_by("user", "Add."),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "three"},
        *said_by("user", "Thanks"),
    ]
    found = await look_up(http, messages=chat, tools=TOOLS)
    ids = await tokens_of(http, messages=chat, tools=TOOLS)
    text = [bytes(ids[part["start"] : part["start"] + part["tokens"]]).decode() for part in found["per_message"]]
    assert text == ["Add.", 'add", "arguments": {"a": "one', "three", "Thanks"]
    assert found["tokens"] == len(ids)


async def test_a_pictures_places_belong_to_its_message(engine: ScriptedEngine) -> None:
    async with client_of(app_with(engine, FixedFamily(num_places=5))) as http:
        parts = [shown(RED_URL), said("What?"), shown(BLUE_URL), shown(RED_URL)]
        chat = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "Red."},
            {"role": "user", "content": [shown(BLUE_URL)]},
        ]
        await http.post("/v1/chat/completions", json={"messages": chat[:1]})
        (asked,) = engine.requests
        remember(engine, list(asked.token_ids[:-8]))
        found = await look_up(http, messages=chat)
    places = [(one["message"], one["kind"], one["tokens"], one["matched"]) for one in found["pictures"]]
    assert places == [(0, "image", 5, 5), (0, "image", 5, 5), (0, "image", 5, 5), (2, "image", 5, 0)]
    first, _, last = found["per_message"]
    assert (first["tokens"], first["matched"], last["tokens"], last["matched"]) == (23, 23, 5, 0)  # with newlines between
    assert last["start"] == found["pictures"][3]["start"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": said_by("user", "x"), "prompt": "x"}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": [1, 999]}, 400, "prompt[1]"),
        ({"prompt": [1, MEDIA_BASE]}, 400, "prompt[1]"),
        ({"prompt": {"a": 1}}, 400, "prompt"),
        ({"prompt": "x", "temprature": 1}, 400, "temprature"),
        ({"prompt": "x", "model": "gpt-9"}, 404, "model"),
        ({"messages": [{"role": "user", "content": [shown()]}]}, 400, "messages[0].content[0].type"),
    ],
)
async def test_what_cannot_be_looked_up_is_named(http: httpx.AsyncClient, body: dict[str, Any], status: int, param: str) -> None:
    response = await http.post("/cache/lookup", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


async def test_a_prompt_over_the_context_is_counted(http: httpx.AsyncClient) -> None:
    assert (await look_up(http, prompt="x" * 1000))["tokens"] == 1000


# ---- pins ------------------------------------------------------------------------------------------------------------


async def test_a_pin_holds_until_it_is_undone_and_a_flush_says_what_stays(
    http: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    for text in ("Once upon a time", "Twice"):
        remember(engine, list(text.encode()))
    twice, once = (node["id"] for node in (await http.get("/cache/tree")).json()["nodes"])
    pinned = await http.post("/cache/pin", json={"node": once})
    expected = {"node": once, "is_pinned": True, "num_pins": 1, "pinned_tokens": 16, "max_pinned_tokens": 320, "pins_given_up": 0}
    assert pinned.json() == expected
    (shown_pin,) = (await http.get("/cache/pins")).json()["nodes"]
    assert (shown_pin["id"], shown_pin["is_pinned"], shown_pin["pins"], shown_pin["requests"]) == (once, True, 1, 0)
    refused = await http.post("/cache/evict", json={"node": once})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert (await http.post("/cache/evict", json={"node": twice})).json() == {"node": twice, "num_nodes": 1, "freed_tokens": 16}
    assert (await look_up(http, prompt="Twice"))["reason"]["code"] == "evicted"
    engine.cache.flush()
    assert "1 pins keep 16 tokens" in (await http.post("/flush_cache")).json()["message"]
    assert (await look_up(http, prompt="Once upon a time"))["matched"] == 15
    assert (await http.delete(f"/cache/pin/{once}")).json() == {**expected, "is_pinned": False, "num_pins": 0, "pinned_tokens": 0}
    remember(engine, list(b"x" * 330))
    (long, *_) = (await http.get("/cache/tree")).json()["nodes"]
    too_long = await http.post("/cache/pin", json={"node": long["id"]})
    assert too_long.status_code == 409 and "320" in too_long.json()["error"]["message"]


async def test_the_page_learns_what_the_server_takes(engine: ScriptedEngine) -> None:
    async with client_of(app_with(engine, FixedFamily(), resume_window_s=12.0, max_body_mb=3)) as http:
        config = (await http.get("/playground/config.json")).json()
    assert (config["model"], config["context_len"], config["resume_window_s"]) == ("tiny", 512, 12.0)
    assert config["takes"] | {"images": True, "videos": False, "chat": True} == config["takes"]
    assert config["image_limits"]["max_file_bytes"] == config["max_body_bytes"] == 3 << 20
    assert config["cache"] == {"page_size": 16, "total_tokens": 640, "reuse": True, "max_pinned_tokens": 320}
    async with client_of(app_with(engine, api_key=("sesame",))) as http:
        assert (await http.get("/playground/config.json")).status_code == 401
