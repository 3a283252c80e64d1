"""Two hundred bad requests over a real server: each is a 4xx that names the field, and a good request in between works."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.serving import FakeServer, fake_server

pytestmark = pytest.mark.anyio
CHAT, TEXT, TOKENIZE, DETOKENIZE, ABORT = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/abort"
HI = [{"role": "user", "content": "hi"}]
BIG = "x" * 10_000_000

# A field of both bodies, values that it must refuse. The param of the error is the field's name unless a third entry says so.
SHARED: list[tuple[str, list[Any]]] = [
    ("temperature", [-1, 1e9, "hot", [], {}, True, -0.001]),
    ("top_p", [-0.5, 0, 1.5, "x", [0.5]]),
    ("top_k", [-2, 1.5, "4", 10**9, True]),
    ("min_p", [-0.1, 1.1, "x"]),
    ("repetition_penalty", [0, -1, 2.5, "x"]),
    ("presence_penalty", [9, -2.1, "x"]),
    ("frequency_penalty", [9, -2.1, {}]),
    ("n", [0, -1, 100000, 1.5, "2", [], True]),
    ("max_tokens", [-5, 1e12, 10**12, "many", 1.5, [], 10**7]),
    ("min_tokens", [-1, "x", 10**12]),
    ("seed", ["x", 1.5, 2**63, -(2**64), []]),
    ("stop", [5, [5], "", [""], ["a"] * 33, ["x" * 2000], {"a": 1}]),
    ("stop_regex", [5, [5], "", ["a", "b*"], ["a"] * 33, "(a", "^a", "(?=a)b", "a{9999}", {"a": 1}]),
    ("logit_bias", [[], "x", {"x": 1}, {"-1": 1}, {"999": 1}, {"1": 101}, {"1": "a"}, {"1": None}, {"٣": 1}]),
    ("stream", ["yes", 1, []]),
    ("stream_options", ["x", [], {"include_usage": "x"}, {"include_usages": True}, {"include_usage": True}]),
    ("ignore_eos", ["x", 0]),
    ("skip_special_tokens", ["x"]),
    ("no_stop_trim", [1]),
    ("return_token_ids", ["x"]),
    ("return_timings", ["x", 1]),
    ("return_draft_marks", ["x", 1]),
    ("cache_salt", [5, "x" * 300]),
    ("rid", [5, "", "x" * 300]),
    ("request_id", [5, "x" * 300]),
    ("model", [5, "gpt-9", ""]),
    ("user", [5]),
    ("metadata", ["x"]),
    ("response_format", ["x", {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_object", "x": 1}]),
    ("temprature", [1]),
    ("regex", ["[a-z", 5]),
    ("json_schema", ["{", 5, {"type": "x"}]),
    ("priority", ["x", 1.5]),
    ("timeout", [0, -1, "x", 1e9]),
]

CHAT_ONLY: list[tuple[str, list[Any]]] = [
    ("messages", [[], "hi", None, 5, {}]),
    ("max_completion_tokens", [0, -1, "x", 10**12]),
    ("logprobs", [1, "x"]),
    ("top_logprobs", [3]),
    ("tools", [[{"type": "smell"}], [{"type": "function"}], [{"type": "function", "function": {"name": "a b"}}], "x"]),
    ("tool_choice", ["required", "always", {"type": "function"}]),
    ("reasoning_effort", ["loud", 5]),
    ("modalities", [["audio"]]),
    (
        "prediction",
        ["x", {}, {"type": "content"}, {"type": "file", "content": "x"}, {"type": "content", "content": [{"type": "x"}]}],
    ),
    ("audio", [{}]),
    ("functions", [[{"name": "a b"}], "x"]),
    ("chat_template_kwargs", ["x", {"a": [1]}, {"messages": "x"}]),
    ("continue_final_message", [True, "x"]),
    ("prompt", ["x"]),
]

TEXT_ONLY: list[tuple[str, list[Any]]] = [
    ("prompt", [None, "", [], 5, {}, [1.5], ["a", 1], [[]], ["a", ""], [[1], "a"], [-1], [259], [[1, 10**12]], ["a"] * 2000]),
    ("logprobs", [-1, 21, True, "x"]),
    ("echo", ["x", 1]),
    ("best_of", [0, -1, "x", 10**6]),
    ("suffix", ["x", 5]),
    ("max_tokens", [0]),
    ("messages", [HI]),
]

# messages, and the param that is named
MESSAGES: list[tuple[Any, str]] = [
    ([5], "messages[0]"),
    ([{}], "messages[0].role"),
    ([{"content": "x"}], "messages[0].role"),
    ([{"role": "wizard", "content": "x"}], "messages[0].role"),
    ([{"role": 5, "content": "x"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": 7}], "messages[0].content"),
    ([*HI, {"role": "user", "content": {"a": 1}}], "messages[1].content"),
    ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "smell", "text": "x"}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0].text"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}}]}],
        "messages[0].content[0].type",
    ),
    ([*HI, {"role": "assistant", "tool_calls": "x"}], "messages[1].tool_calls"),
    ([*HI, {"role": "assistant", "tool_calls": [{}]}], "messages[1].tool_calls[0].function"),
    ([*HI, {"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[1].tool_calls[0].function.name"),
    ([{"role": "user", "content": BIG}], "messages"),
    ([{"role": "user", "content": "y" * 9000}], "messages"),
]

# path, raw body, the param that is named
RAW: list[tuple[str, bytes, str]] = [
    (CHAT, b"", "body"),
    (CHAT, b"{", "body"),
    (CHAT, b"[]", "body"),
    (CHAT, b"5", "body"),
    (CHAT, b'"x"', "body"),
    (CHAT, b"null", "body"),
    (CHAT, b"\xff\xfe", "body"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\xff"}]}', "content"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "content"),
    (CHAT, b'{"messages": [], "temperature": NaN}', "temperature"),
    (CHAT, b'{"messages": [], "temperature": Infinity}', "temperature"),
    (CHAT, b'{"messages": [], "top_p": -Infinity}', "top_p"),
    (CHAT, b'{"messages": [], "temperature": 1e999}', "temperature"),
    (CHAT, b'{"messages": [], "seed": 0x10}', "seed"),
    (CHAT, b'{"messages": [], "stop": "half', "stop"),
    (CHAT, b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", "body"),
    (CHAT, b'{"messages": [{"role": "user", "content": ' + b"[" * 500 + b"]" * 500 + b"}]}", "messages[0].content[0]"),
    (CHAT, b"a=b&c=d", "body"),
    (TEXT, json.dumps({"prompt": BIG}).encode(), "prompt"),
    (TEXT, json.dumps({"prompt": "x", "stop": BIG}).encode(), "stop"),
    (TEXT, json.dumps({"prompt": "x", "model": BIG}).encode(), "model"),
    (TEXT, json.dumps({"prompt": "x", BIG: 1}).encode(), "x" * 256),
    (TEXT, json.dumps({"prompt": "x" * 8192}).encode(), "prompt"),
    (TEXT, json.dumps({"prompt": "x" * 8000, "max_tokens": 193}).encode(), "max_tokens"),
    (TEXT, json.dumps({"prompt": ["a"] * 500, "n": 100}).encode(), "n"),
    (TEXT, b'{"prompt": "x", "max_tokens": NaN}', "max_tokens"),
    (TOKENIZE, b"{}", "prompt"),
    (TOKENIZE, b'{"prompt": 5}', "prompt"),
    (TOKENIZE, b'{"prompt": "x", "messages": []}', "prompt"),
    (TOKENIZE, b'{"messages": []}', "messages"),
    (TOKENIZE, b'{"text": "x"}', "text"),
    (DETOKENIZE, b"{}", "tokens"),
    (DETOKENIZE, b'{"tokens": [-1]}', "tokens[0]"),
    (DETOKENIZE, b'{"tokens": [1, 259]}', "tokens[1]"),
    (DETOKENIZE, b'{"tokens": ["a"]}', "tokens[0]"),
    (DETOKENIZE, b'{"tokens": "a"}', "tokens"),
    (ABORT, b"{}", "rid"),
    (ABORT, b'{"rid": ""}', "rid"),
    (ABORT, b'{"rid": 5}', "rid"),
    (ABORT, b'{"rid": "x", "abort_all": true}', "rid"),
]


def bad_requests() -> Iterator[tuple[str, bytes, str]]:
    for name, values in [*SHARED, *CHAT_ONLY]:
        yield from ((CHAT, json.dumps({"messages": HI, name: value}).encode(), name) for value in values)
    for name, values in [*SHARED, *TEXT_ONLY]:
        yield from ((TEXT, json.dumps({"prompt": "hi", name: value}).encode(), name) for value in values)
    for messages, param in MESSAGES:
        yield CHAT, json.dumps({"messages": messages}).encode(), param
    yield from RAW


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with fake_server(step_s=0.0005) as running:
        yield running


async def test_every_bad_request_is_refused_by_name_and_good_ones_go_on(server: FakeServer) -> None:
    cases = list(bad_requests())
    assert len(cases) >= 200
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as http:
        good = await http.post(CHAT, json={"messages": HI, "max_tokens": 4, "temperature": 0})
        wrong: list[str] = []
        for index, (path, body, param) in enumerate(cases):
            response = await http.post(path, content=body)
            problem = what_is_wrong(response, param)
            if problem:
                wrong.append(f"{path} {body[:150]!r}: {problem}")
            if index % 20 == 0:
                again = await http.post(CHAT, json={"messages": HI, "max_tokens": 4, "temperature": 0})
                assert again.json()["choices"] == good.json()["choices"]
        assert not wrong, "\n".join(wrong)
        assert (await http.get("/health")).status_code == 200
    assert server.engine.load().running == server.engine.load().waiting == 0


def what_is_wrong(response: httpx.Response, param: str) -> str | None:
    if not 400 <= response.status_code < 500:
        return f"status {response.status_code}: {response.text[:200]}"
    body = response.json()
    error = body["error"]
    if {key: body[key] for key in error} != error or not error["message"] or len(error["message"]) > 1000:
        return f"body {response.text[:300]}"
    # An element of a field, or the field an element belongs to, is the field named more or less exactly.
    if error["param"] is None or error["param"].split("[")[0].split(".")[0] != param.split("[")[0].split(".")[0]:
        return f"param {error['param']!r} instead of {param!r}: {error['message']}"
    if "[" in param and error["param"] != param:
        return f"param {error['param']!r} instead of {param!r}: {error['message']}"
    return None


async def test_bodies_over_the_limit_are_refused_and_the_client_sees_it(server: FakeServer) -> None:
    async def upload(num_mib: int) -> AsyncIterator[bytes]:
        for _ in range(num_mib):
            yield b" " * (1 << 20)

    async with httpx.AsyncClient(base_url=server.url, timeout=20) as http:
        announced = await http.post(CHAT, content=b" " * (40 << 20))
        chunked = await http.post(CHAT, content=upload(40))
        for response in (announced, chunked):
            assert response.status_code == 413
            assert response.json()["error"]["param"] == "body"
        assert (await http.post(CHAT, json={"messages": HI, "max_tokens": 1})).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", CHAT, 405, "POST"),
        ("PUT", TEXT, 405, "POST"),
        ("POST", "/health", 405, "GET, HEAD"),
        ("DELETE", "/v1/models", 405, "GET, HEAD"),
        ("GET", "/nope", 404, None),
        ("POST", "/v1/chat/completions/", 404, None),
        ("GET", "/static/../pyproject.toml", 404, None),
        ("GET", "/static/%2e%2e/pyproject.toml", 404, None),
        ("GET", "/v1/models/other", 404, None),
        ("GET", "/v1/ws", 400, None),
    ],
)
async def test_wrong_paths_and_methods_are_openai_errors(
    server: FakeServer, method: str, path: str, status: int, allow: str | None
) -> None:
    async with httpx.AsyncClient(base_url=server.url) as http:
        response = await http.request(method, path)
        assert (response.status_code, response.headers.get("allow")) == (status, allow)
        assert response.json()["error"]["message"]
        assert (await http.get("/health")).status_code == 200


async def test_a_connection_lives_on_after_a_refusal(server: FakeServer) -> None:
    async with httpx.AsyncClient(base_url=server.url, limits=httpx.Limits(max_connections=1)) as http:
        for _ in range(3):
            assert (await http.post(CHAT, content=b"{")).status_code == 400
            response = await http.post(CHAT, json={"messages": HI, "max_tokens": 2})
            assert response.status_code == 200
        assert (await http.head("/health")).content == b""
