"""Whatever the grouping of tokens into deltas and wherever characters are cut: streams say what plain answers say."""

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from streamserve.api.app import create_app
from streamserve.config import ServerConfig
from streamserve.messages import Delta, FinishReason, GenerateRequest
from streamserve.text.byte_tokenizer import END_OF_TURN, byte_text_model
from tests.api.conftest import client_of
from tests.api.scripted import ScriptedEngine

TEXTS = st.text(st.sampled_from('ab \n"\\:data😀世é👩‍👧ž\u2028'), max_size=24)
CHAT = "/v1/chat/completions"


def grouped(deltas: Sequence[Delta], cuts: Sequence[int]) -> list[Delta]:
    """The same deltas, merged as a mailbox merges them while nobody takes them."""
    groups: list[Delta] = []
    left = iter(deltas)
    for size in (*cuts, *[1] * len(deltas)):
        group = list(islice(left, size))
        if group:
            groups.append(Delta.merged(group))
    return groups


@settings(max_examples=150, deadline=None)
@given(
    data=TEXTS.map(str.encode) | st.binary(max_size=30),
    cuts=st.lists(st.integers(1, 9), max_size=12),
    stops=st.lists(st.text("ab :世", min_size=1, max_size=4), max_size=3),
    ends=st.booleans(),
)
def test_streams_join_to_the_plain_answer(data: bytes, cuts: list[int], stops: list[str], ends: bool) -> None:
    ids = [*data, END_OF_TURN] if ends else list(data or b"a")

    def script(sizes: Sequence[int]) -> Any:
        def deltas(request: GenerateRequest) -> list[Delta]:
            single = [Delta((token,)) for token in ids]
            single[-1] = replace(
                single[-1],
                finish_reason=FinishReason.STOP if ends else FinishReason.LENGTH,
                matched_stop=END_OF_TURN if ends else None,
            )
            return grouped(single, sizes)

        return deltas

    async def answers() -> tuple[dict[str, Any], list[str]]:
        engine = ScriptedEngine()
        app = create_app(engine, byte_text_model(), ServerConfig(), model_name="tiny")
        body = {"messages": [{"role": "user", "content": "x"}], "stop": stops}
        async with client_of(app) as http:
            engine.script = script([len(ids)])
            plain = (await http.post(CHAT, json=body)).json()
            engine.script = script(cuts)
            stream = await http.post(CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}})
        lines = stream.text.split("\n\n")
        assert lines[-1] == ""
        return plain, lines[:-1]

    plain, events = anyio.run(answers)
    assert events[-1] == "data: [DONE]"
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    chunks = [json.loads(event[6:]) for event in events[:-1]]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]]
    choice = plain["choices"][0]
    assert "".join(pieces) == choice["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert chunks[-2]["choices"][0]["matched_stop"] == choice["matched_stop"]
    assert chunks[-1]["usage"] == plain["usage"]
    assert not any(stop in "".join(pieces) for stop in stops)
    try:
        data.decode()
    except UnicodeDecodeError:
        return
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.anyio
async def test_a_silent_stream_is_kept_alive_by_comments() -> None:
    engine = ScriptedEngine(lambda request: [Delta((72,))])
    app = create_app(engine, byte_text_model(), ServerConfig(keep_alive_s=0.02), model_name="tiny")
    async with client_of(app) as http, anyio.create_task_group() as tasks:

        async def finish() -> None:
            await anyio.sleep(0.15)
            await engine_put(engine)

        tasks.start_soon(finish)
        response = await http.post(CHAT, json={"messages": [{"role": "user", "content": "x"}], "stream": True})
    parts = response.text.split("\n\n")
    assert parts.count(": keep-alive") >= 2
    events = [part for part in parts if part.startswith("data: {")]
    assert "".join(json.loads(event[6:])["choices"][0]["delta"].get("content", "") for event in events) == "Hi"
    for name, value in {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache, no-transform",
        "x-accel-buffering": "no",
    }.items():
        assert response.headers[name] == value


async def engine_put(engine: ScriptedEngine) -> None:
    (mailbox,) = engine.live.values()
    mailbox.put_nowait(Delta((105,), finish_reason=FinishReason.LENGTH))
