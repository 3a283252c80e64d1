"""Operators' routes in SGLang's shape, several names of a model, and how long an answer may take."""

import asyncio
import json
from functools import partial
from typing import Any

import anyio
import httpx
import pytest
from anyio.lowlevel import checkpoint

from streamserve.api.app import Api, create_app
from streamserve.application import settings_of
from streamserve.build import build
from streamserve.config import Config, ModelConfig, SchedulerConfig, ServerConfig, served_names
from streamserve.errors import ConfigError, QueueFull
from streamserve.messages import FinishReason
from streamserve.resolve import check
from streamserve.text.byte_tokenizer import byte_text_model
from tests.api.conftest import client_of
from tests.api.scripted import ScriptedEngine, says

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


async def test_the_cache_is_flushed_at_once_or_when_requests_have_ended(
    http: httpx.AsyncClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await http.post("/flush_cache")).json()["success"]
    assert (await http.get("/flush_cache")).status_code == 200
    busy = [True, True, True]
    monkeypatch.setattr(engine, "flush_cache", lambda: not (busy and busy.pop()))
    refused = await http.post("/flush_cache")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "timeout")
    assert (await http.post("/flush_cache?timeout=5")).status_code == 200
    for query in ("timeout=x", "timeout=-1", "timeout=nan", "timeout=1e9", "time=1"):
        assert (await http.post(f"/flush_cache?{query}")).status_code == 400, query


async def test_a_probe_generates_one_token_and_says_when_it_cannot(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    assert (await http.get("/health_generate")).status_code == 200
    assert engine.requests[0].sampling.max_new_tokens == 1
    engine.script = says("", finish=FinishReason.ERROR)
    assert (await http.get("/health_generate")).status_code == 503
    engine.refusal = QueueFull("full", retry_after_s=1)
    assert (await http.get("/health_generate")).status_code == 503
    assert (await http.get("/ping")).status_code == 200


async def test_the_served_model_and_the_settings_are_shown_without_secrets(engine: ScriptedEngine) -> None:
    config = Config(
        model=ModelConfig(served_model_name="tiny,other"),
        server=ServerConfig(fake=True, api_key=("s3cret", "s3cret2"), admin_api_key="s3cret3"),
    )
    settings = settings_of(config, build(config))
    app = create_app(engine, byte_text_model(), config.server, model_name="tiny", settings=settings)
    async with client_of(app, headers={"x-api-key": "s3cret"}) as http:
        model = (await http.get("/get_model_info")).json()
        server = await http.get("/get_server_info")
        assert (await http.get("/model_info")).json() == model
    assert (model["model_path"], model["is_generation"], model["max_model_len"]) == ("tiny", True, 512)
    template = byte_text_model().template
    assert template is not None and model["chat_template"] == {
        "source": template.plain_source,
        "special_tokens": {"eos_token": "<|im_end|>"},
        "image_marker": None,
    }
    assert "s3cret" not in server.text
    shown = server.json()
    assert (shown["api_key"], shown["admin_api_key"], shown["port"], shown["schedule_policy"]) == (
        "(set)",
        "(set)",
        30000,
        "fcfs",
    )
    assert shown["internal_states"][0]["running"] == 1
    assert shown["version"]


async def test_calls_and_thoughts_of_a_given_text_are_taken_apart(http: httpx.AsyncClient) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    text = 'One. <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    body = {"text": text, "tools": tools, "tool_call_parser": "qwen25"}
    parsed = (await http.post("/parse_function_call", json=body)).json()
    assert [(call["tool_index"], call["name"]) for call in parsed["calls"]] == [(0, "add")]
    assert json.loads(parsed["calls"][0]["parameters"]) == {"a": 1}
    assert parsed["normal_text"].strip() == "One."
    thought = {"text": "<think>Hm.</think>Yes.", "reasoning_parser": "deepseek-r1"}
    assert (await http.post("/separate_reasoning", json=thought)).json() == {"reasoning_text": "Hm.", "text": "Yes."}
    headless = {"text": "Hm.</think>Yes.", "reasoning_parser": "qwen3"}  # the prompt has begun the thought
    assert (await http.post("/separate_reasoning", json=headless)).json() == {"reasoning_text": "Hm.", "text": "Yes."}
    for path, wrong, param in [
        ("/parse_function_call", {**body, "tool_call_parser": "nope"}, "tool_call_parser"),
        ("/parse_function_call", {**body, "tools": [{"type": "smell"}]}, "tools[0].type"),
        ("/separate_reasoning", {**thought, "reasoning_parser": "nope"}, "reasoning_parser"),
        ("/separate_reasoning", {"text": "x"}, "reasoning_parser"),
    ]:
        response = await http.post(path, json=wrong)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/separate_reasoning", {"text": "<think>" * 2000, "reasoning_parser": "qwen3"}),
        ("/parse_function_call", {"text": "<tool_call>" * 2000, "tools": [], "tool_call_parser": "hermes"}),
    ],
)
async def test_a_long_text_is_read_between_everybody_elses_turns(
    http: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    num_turns = 0

    async def take_turns() -> None:
        nonlocal num_turns
        while True:
            await checkpoint()
            num_turns += 1

    async with anyio.create_task_group() as others:
        others.start_soon(take_turns)
        await checkpoint()
        num_turns = 0
        assert (await http.post(path, json={**body, "text": ""})).status_code == 200
        num_without, num_turns = num_turns, 0
        assert (await http.post(path, json=body)).status_code == 200
        others.cancel_scope.cancel()
    assert num_turns - num_without >= len(body["text"]) // 4000


@pytest.mark.parametrize(
    ("body", "status", "ended"),
    [
        ({"abort_all": True}, 200, 1),
        ({"rid": "", "abort_all": True}, 200, 1),  # as SGLang's own client says it
        ({"rid": "mi"}, 200, 1),
        ({"rid": "other"}, 200, 0),
        ({"rid": ""}, 400, None),
        ({}, 400, None),
        ({"rid": "mine", "abort_all": True}, 400, None),
    ],
)
async def test_requests_are_ended_by_name_or_all_at_once(
    http: httpx.AsyncClient, engine: ScriptedEngine, body: dict[str, Any], status: int, ended: int | None
) -> None:
    engine.script = says("Hel", finish=None)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(http.post, CHAT, json={**HI, "rid": "mine", "max_tokens": 100}))
        await anyio.wait_all_tasks_blocked()
        response = await http.post("/abort_request", json=body)
        assert (response.status_code, response.json().get("aborted")) == (status, ended)
        tasks.cancel_scope.cancel()


async def test_a_conversation_is_tokenised_with_its_tools(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    plain = (await http.post("/v1/tokenize", json=HI)).json()
    shown = (await http.post("/v1/tokenize", json={**HI, "tools": tools})).json()
    assert shown["count"] > plain["count"]
    answer = (await http.post(CHAT, json={**HI, "tools": tools})).json()
    assert answer["usage"]["prompt_tokens"] == shown["count"]
    assert list(engine.requests[-1].token_ids) == shown["tokens"]


# ---- names -----------------------------------------------------------------------------------------------------------


def with_names(engine: ScriptedEngine, served: str) -> Api:
    names = served_names(Config(model=ModelConfig(served_model_name=served)))
    return create_app(engine, byte_text_model(), ServerConfig(), model_name=names[0], aliases=names[1:])


async def test_a_wrong_model_name_is_refused_unless_any_is_taken(engine: ScriptedEngine) -> None:
    for served, accepted in [("tiny", False), ("tiny, small", False), ("tiny,gpt-9", True), ("tiny,*", True)]:
        async with client_of(with_names(engine, served)) as http:
            response = await http.post(CHAT, json={**HI, "model": "gpt-9"})
            assert response.status_code == (200 if accepted else 404), served
            assert (await http.get("/v1/models/gpt-9")).status_code == response.status_code
            if accepted:
                assert response.json()["model"] == "tiny"
            assert "*" not in [card["id"] for card in (await http.get("/v1/models")).json()["data"]]
    with pytest.raises(ConfigError, match="give the model's own first"):
        check(Config(model=ModelConfig(served_model_name="*")))


# ---- deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [{}, {"n": 2}])
async def test_a_plain_answer_that_is_late_is_a_504_and_its_work_has_stopped(
    http: httpx.AsyncClient, engine: ScriptedEngine, body: dict[str, object]
) -> None:
    engine.script = says("Hi", finish=None)  # never ends by itself
    response = await http.post("/generate", json={"text": "x", "timeout": 0.05, "sampling_params": body})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert len(engine.aborted) == len(engine.requests) and not engine.live


async def test_a_stream_that_is_late_keeps_what_was_sent_and_ends_with_an_error(
    http: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.script = says("Hi", finish=None)
    response = await http.post("/generate", json={"text": "x", "timeout": 0.05, "stream": True})
    assert response.status_code == 200
    assert '"text":"Hi' in response.text
    assert '"type":"abort"' in response.text
    assert '"code":"deadline_exceeded"' in response.text
    assert response.text.endswith("data: [DONE]\n\n")
    assert not engine.live


async def test_the_server_bounds_what_requests_ask_for(engine: ScriptedEngine) -> None:
    engine.script = says("Hi", finish=None)
    config = ServerConfig(request_timeout_s=0.05)
    async with client_of(create_app(engine, byte_text_model(), config, model_name="tiny")) as http:
        for body in ({"text": "x"}, {"text": "x", "timeout": 60}):
            assert (await http.post("/generate", json=body)).status_code == 504
        assert (await http.post(CHAT, json=HI)).status_code == 504


async def test_an_answer_in_time_is_not_touched(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    response = await http.post("/generate", json={"text": "x", "timeout": 0.2})
    assert response.json()["meta_info"]["finish_reason"]["type"] == "stop"
    await asyncio.sleep(0.25)
    assert not engine.aborted


# ---- priority --------------------------------------------------------------------------------------------------------


async def test_a_priority_that_would_have_no_effect_is_refused() -> None:
    for policy, status in [("fcfs", 400), ("priority", 200)]:
        config = Config(scheduler=SchedulerConfig(schedule_policy=policy), server=ServerConfig(fake=True, fake_step_ms=0.1))
        built = build(config)
        running = asyncio.create_task(built.engine.run())
        async with client_of(create_app(built.engine, built.text, config.server, model_name="fake")) as http:
            response = await http.post("/generate", json={"text": "x", "priority": 3, "sampling_params": {"max_new_tokens": 2}})
            assert response.status_code == status, response.text
            if status == 400:
                assert response.json()["error"]["param"] == "priority"
        running.cancel()
