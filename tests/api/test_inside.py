"""Calls of the application that go over no socket: whole answers, streams, errors, leaving."""

import json

import pytest

from streamserve.api.app import Api
from streamserve.api.inside import Inside
from tests.api.scripted import ScriptedEngine, says

pytestmark = pytest.mark.anyio
PROMPT = json.dumps({"prompt": "hi", "max_tokens": 4}).encode()


async def test_a_whole_answer_is_what_a_client_gets(app: Api) -> None:
    reply = await Inside(app).ask("POST", "/v1/completions", PROMPT)
    assert reply.status == 200
    assert json.loads(reply.body)["object"] == "text_completion"
    assert dict(reply.headers)[b"content-type"] == b"application/json"


async def test_an_error_is_an_answer_too(app: Api) -> None:
    reply = await Inside(app).ask("POST", "/v1/completions", b'{"prompt": "x", "temperature": 900}')
    assert reply.status == 400
    assert json.loads(reply.body)["error"]["param"] == "temperature"
    assert (await Inside(app).ask("GET", "/nowhere?x=1")).status == 404


async def test_a_stream_comes_in_parts(app: Api) -> None:
    body = json.dumps({"prompt": "hi", "max_tokens": 4, "stream": True}).encode()
    async with Inside(app).reading("POST", "/v1/completions", body) as reading:
        assert reading.status == 200
        parts = [part async for part in reading.parts]
    assert len(parts) > 1
    assert b"".join(parts).endswith(b"data: [DONE]\n\n")


async def test_who_leaves_a_stream_ends_its_request(app: Api, engine: ScriptedEngine) -> None:
    engine.script = says("words without an end", finish=None)
    body = json.dumps({"prompt": "hi", "max_tokens": 40, "stream": True, "ignore_eos": True}).encode()
    async with Inside(app).reading("POST", "/v1/completions", body) as reading:
        async for _ in reading.parts:
            break
    assert engine.aborted == [engine.requests[0].id]
