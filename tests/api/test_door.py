"""Keys, browsers of other origins, the routes around generation."""

import json
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from starlette.routing import Match, Route

from streamserve.api.app import Api, Endpoint, create_app
from streamserve.api.auth import read_keys
from streamserve.api.gate import Gate
from streamserve.api.playground import Playground
from streamserve.config import ServerConfig
from streamserve.errors import ConfigError
from streamserve.metrics import Metrics
from streamserve.text.byte_tokenizer import byte_text_model
from tests.api.conftest import client_of
from tests.api.scripted import CONTEXT_LEN, ScriptedEngine

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
PAGE = "https://page.example"


def app_with(engine: ScriptedEngine, **settings: object) -> Api:
    return create_app(engine, byte_text_model(), ServerConfig(**settings), model_name="tiny")  # type: ignore[arg-type]


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer", 401),
        ("Basic sesame", 401),
        ("sesame", 401),
        ("Bearer sesam", 401),
        ("Bearer sesame", 200),
        ("bearer sesame", 200),
    ],
)
async def test_the_key_opens(engine: ScriptedEngine, header: str | None, status: int) -> None:
    async with client_of(app_with(engine, api_key=("sesame",))) as http:
        response = await http.post(CHAT, json=HI, headers={"authorization": header} if header else {})
        assert response.status_code == status
        if status == 401:
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert not engine.requests


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("/ready", 200),
        ("/", 200),
        ("/static/js/main.js", 200),
        ("/v1/models", 401),
        ("/cache", 401),
        ("/v1/loads", 401),
        ("/nope", 401),
    ],
)
async def test_what_needs_no_key(engine: ScriptedEngine, path: str, status: int) -> None:
    async with client_of(app_with(engine, api_key=("sesame",))) as http:
        assert (await http.get(path)).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": "second"}, 200),
        ({"x-api-key": "first"}, 200),
        ({"x-api-key": "wrong"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "first", "authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer second"}, 200),
        ({"authorization": "Bearer first, second"}, 401),
    ],
)
async def test_each_of_several_keys_opens_in_either_header(engine: ScriptedEngine, headers: dict[str, str], status: int) -> None:
    async with client_of(app_with(engine, api_key=("first", "second"))) as http:
        response = await http.post(CHAT, json=HI, headers=headers)
    assert response.status_code == status
    assert response.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)


@pytest.mark.parametrize(
    ("settings", "key", "chat", "abort"),
    [
        ({}, None, 200, 200),
        ({"api_key": ("user",)}, "user", 200, 200),
        ({"api_key": ("user",), "admin_api_key": "root"}, "user", 200, 401),
        ({"api_key": ("user",), "admin_api_key": "root"}, "root", 200, 200),
        ({"api_key": ("user",), "admin_api_key": "root"}, None, 401, 401),
        ({"admin_api_key": "root"}, None, 200, 401),
        ({"admin_api_key": "root"}, "root", 200, 200),
    ],
)
async def test_operators_routes_ask_for_the_admin_key_where_there_is_one(
    engine: ScriptedEngine, settings: dict[str, object], key: str | None, chat: int, abort: int
) -> None:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with client_of(app_with(engine, **settings)) as http:
        assert (await http.post(CHAT, json=HI, headers=headers)).status_code == chat
        for path in ("/abort_request", "/abort_request%0A"):  # routers' patterns may match a path that ends in a line's end
            assert (await http.post(path, json={"abort_all": True}, headers=headers)).status_code == abort


def test_keys_come_from_flags_files_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nfirst\n\n  second  \n  # third\n", encoding="utf-8")
    given = read_keys(ServerConfig(api_key=("zero", f"@{file}")), {"STREAMSERVE_API_KEY": "third\nfourth"})
    assert given.api_key == ("zero", "first", "second", "third", "fourth")
    assert given.admin_api_key is None
    assert read_keys(ServerConfig(), {"STREAMSERVE_ADMIN_API_KEY": "root"}).admin_api_key == "root"
    assert read_keys(ServerConfig(admin_api_key="flag"), {"STREAMSERVE_ADMIN_API_KEY": "root"}).admin_api_key == "flag"


@pytest.mark.parametrize("bad", ["", " ", "a b ", "schlüssel", "a\nb", "@/nowhere/at/all", "@{empty}"])
def test_a_key_that_no_client_could_send_stops_the_start(tmp_path: Path, bad: str) -> None:
    (tmp_path / "empty").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="--api-key"):
        read_keys(ServerConfig(api_key=(bad.format(empty=tmp_path / "empty"),)), {})


# ---- browsers --------------------------------------------------------------------------------------------------------


async def test_a_preflight_needs_no_key(engine: ScriptedEngine) -> None:
    headers = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    async with client_of(app_with(engine, api_key=("sesame",))) as http:
        response = await http.options(CHAT, headers=headers)
    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == "*"
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-headers"] == headers["access-control-request-headers"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", CHAT, 401), ("GET", "/nope", 401), ("GET", "/health", 200), ("POST", "/health", 405)],
)
async def test_every_answer_may_be_read_by_a_page(engine: ScriptedEngine, method: str, path: str, status: int) -> None:
    async with client_of(app_with(engine, api_key=("sesame",))) as http:
        response = await http.request(method, path, headers={"origin": PAGE})
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, "*")


async def test_refusals_and_failures_may_be_read_by_a_page(engine: ScriptedEngine) -> None:
    async with client_of(app_with(engine)) as http:
        for path, method, status in [(CHAT, "GET", 405), ("/nope", "GET", 404), (CHAT, "POST", 400)]:
            response = await http.request(method, path, headers={"origin": PAGE})
            assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, "*")
        stream = await http.post(CHAT, json={**HI, "stream": True}, headers={"origin": PAGE})
        assert stream.headers["access-control-allow-origin"] == "*"
        engine.submit = None  # type: ignore[method-assign,assignment]
        broken = await http.post(CHAT, json=HI, headers={"origin": PAGE})
        assert (broken.status_code, broken.headers["access-control-allow-origin"]) == (500, "*")
        assert broken.json()["error"]["code"] == "internal_error"


async def test_only_listed_origins_are_named(engine: ScriptedEngine) -> None:
    async with client_of(app_with(engine, cors_origins=(PAGE,))) as http:
        listed = await http.get("/health", headers={"origin": PAGE})
        other = await http.get("/health", headers={"origin": "https://evil.example"})
        none = await http.get("/health")
    assert listed.headers["access-control-allow-origin"] == PAGE
    assert "access-control-allow-origin" not in other.headers
    assert listed.headers["vary"] == other.headers["vary"] == "Origin"
    assert "vary" not in none.headers


@pytest.mark.parametrize(
    ("origin", "status"),
    [(PAGE, 200), (None, 200), ("http://127.0.0.1:30000", 200), ("https://evil.example", 403), ("null", 403), ("http://[", 403)],
)
async def test_pages_that_are_not_listed_change_nothing(engine: ScriptedEngine, origin: str | None, status: int) -> None:
    """A form or a script of any page can send such a POST without a preflight."""
    headers = {"content-type": "text/plain", **({"origin": origin} if origin else {})}
    async with client_of(app_with(engine, cors_origins=(PAGE,))) as http:
        response = await http.post(CHAT, content=json.dumps(HI), headers=headers)
        assert response.status_code == status
        assert (await http.post("/flush_cache", headers=headers)).status_code == status
    assert bool(engine.requests) == (status == 200)
    if status == 403:
        assert response.json()["error"]["code"] == "origin_forbidden"


@pytest.mark.parametrize(
    ("settings", "headers", "shown"),
    [
        ({}, {}, "Hi <b"),
        ({}, {"origin": "http://127.0.0.1:30000"}, "Hi <b"),
        ({}, {"origin": PAGE}, None),
        ({}, {"host": "evil.example:30000"}, None),
        ({}, {"host": "evil.example:30000", "origin": "http://evil.example:30000"}, None),
        ({}, {"host": "[", "origin": "http://["}, None),
        ({}, {"host": b"\xe9"}, None),
        ({"host": "0.0.0.0"}, {}, None),
        ({"api_key": ("sesame",)}, {"authorization": "Bearer sesame"}, None),
    ],
)
async def test_cached_texts_are_shown_only_where_they_are_ones_own(
    engine: ScriptedEngine, settings: dict[str, str], headers: dict[str, str | bytes], shown: str | None
) -> None:
    async with client_of(app_with(engine, **settings)) as http:
        summary = (await http.get("/cache", headers=headers)).json()
    assert summary["top_prefixes"][0]["preview"] == shown
    assert summary["hit_rate"] == 0.25


# ---- routes ----------------------------------------------------------------------------------------------------------


async def test_health_ready_and_draining(engine: ScriptedEngine, http: httpx.AsyncClient) -> None:
    for healthy, ready, expected in [(True, True, (200, 200)), (True, False, (200, 503)), (False, False, (503, 503))]:
        engine.state = replace(engine.state, is_healthy=healthy, is_ready=ready)
        assert ((await http.get("/health")).status_code, (await http.get("/ready")).status_code) == expected
    assert not engine.requests


async def test_tokens_round_trip(http: httpx.AsyncClient) -> None:
    for text in ("žluťoučký 🦙 世界 👩‍👩‍👧", "tab\tand\r\nline", " <|im_start|>", "x" * 3000):
        tokens = (await http.post("/tokenize", json={"prompt": text})).json()
        assert tokens["count"] == len(tokens["tokens"])
        assert tokens["max_model_len"] == CONTEXT_LEN
        back = await http.post("/detokenize", json={"tokens": tokens["tokens"], "skip_special_tokens": False})
        assert back.json()["prompt"] == text
    hidden = (await http.post("/detokenize", json={"tokens": [104, 258]})).json()
    assert hidden["text"] == "h"


async def test_models_and_aliases(http: httpx.AsyncClient) -> None:
    cards = (await http.get("/v1/models")).json()
    assert [card["id"] for card in cards["data"]] == ["tiny", "small"]
    assert (await http.get("/v1/models/small")).json()["root"] == "tiny"
    missing = await http.get("/v1/models/a/b")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert (await http.post(CHAT, json={**HI, "model": "small"})).status_code == 200


async def test_loads_and_metrics(engine: ScriptedEngine) -> None:
    metrics = Metrics()
    app = create_app(engine, byte_text_model(), ServerConfig(), model_name="tiny", metrics=metrics)
    async with client_of(app) as http:
        loads = (await http.get("/v1/loads")).json()
        load = {"running": 1, "waiting": 2, "free_tokens": 300, "evictable_tokens": 40, "total_tokens": 640}
        assert load.items() <= loads.items()
        rank = {"num_running_reqs": 1, "num_waiting_reqs": 2, "num_used_tokens": 300, "max_total_num_tokens": 640}
        assert rank.items() <= loads["loads"][0].items()
        await http.post(CHAT, json={**HI, "n": 2})
        page = await http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    assert 'streamserve_num_requests_total{outcome="stop"} 1.0' in page.text
    assert "streamserve_generation_tokens_total 14.0" in page.text
    assert "streamserve_num_running_reqs 1.0" in page.text
    assert "streamserve_time_to_first_token_seconds_count 2.0" in page.text


async def test_a_missing_or_switched_off_page_is_a_404(engine: ScriptedEngine) -> None:
    async with client_of(app_with(engine, disable_playground=True)) as http:
        assert (await http.get("/")).status_code == 404
        assert (await http.get("/static/js/main.js")).status_code == 404
    assert Playground(None)


async def test_the_page_comes_with_its_policy_and_is_sent_once(http: httpx.AsyncClient) -> None:
    page = await http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    again = await http.get("/", headers={"if-none-match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert (await http.get("/static/js/main.js")).headers["content-type"] == "text/javascript; charset=utf-8"
    for path in ("/static/", "/static/nope.js", "/static/../pyproject.toml", "/static//etc/passwd"):
        assert (await http.get(path)).status_code == 404


async def test_the_gate_answers_until_the_application_is_there(app: Api) -> None:
    gate = Gate()
    async with client_of(gate) as http:
        assert (await http.get("/health")).json() == {"status": "starting"}
        for path in ("/ready", "/v1/models"):
            response = await http.get(path)
            assert response.status_code == 503
            assert "loading" in response.json()["error"]["message"]
        gate.open(app)
        assert (await http.get("/ready")).status_code == 200


def test_a_path_that_is_looked_up_leads_where_a_search_of_the_routes_does(app: Api) -> None:
    for (method, path), found in app._plain.items():
        scope = {"type": "http", "method": method, "path": path, "headers": []}
        route = next(route for route in app._router.routes if route.matches(scope)[0] is Match.FULL)
        assert isinstance(route, Route) and isinstance(route.endpoint, Endpoint)
        assert (route.endpoint._answer, route.endpoint._admin_door) == (found._answer, found._admin_door), (method, path)
