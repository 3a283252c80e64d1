"""How long the parts of an answer took: on its last chunk, in llama.cpp's names, for those who ask."""

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from streamserve.api import stream
from streamserve.api.chunks import timings_json
from streamserve.api.stream import Timings
from streamserve.messages import Delta, GenerateRequest
from tests.api.scripted import ScriptedEngine, says

pytestmark = pytest.mark.anyio
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "Once upon a time"},
}


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes whenever the clock is looked at."""
    now = 100.0

    def monotonic() -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr(stream, "monotonic", monotonic)


def after_a_wait(text: str, queued_s: float) -> Any:
    said = says(text, cached=3)

    def script(request: GenerateRequest) -> Sequence[Delta]:
        first, *rest = said(request)
        return [replace(first, queued_s=queued_s), *rest]

    return script


async def chunks_of(http: httpx.AsyncClient, path: str, **more: Any) -> list[dict[str, Any]]:
    text = (await http.post(path, json={**BODIES[path], "stream": True, **more})).text
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("path", list(BODIES))
async def test_the_last_chunk_and_a_plain_answer_say_where_the_time_went(
    http: httpx.AsyncClient, engine: ScriptedEngine, ticks: None, path: str
) -> None:
    engine.script = after_a_wait("abcd", 0.25)
    whole = (await http.post(path, json={**BODIES[path], "return_timings": True})).json()
    expected = {
        "queue_ms": 250.0,
        "cache_n": 3,
        "prompt_n": whole["usage"]["prompt_tokens"] - 3,
        "prompt_ms": 750.0,
        "predicted_n": 5,
        "predicted_ms": 4000.0,
        "predicted_per_token_ms": 1000.0,
        "predicted_per_second": 1.0,
    }
    assert expected.items() <= whole["timings"].items()
    last = (await chunks_of(http, path, return_timings=True))[-1]
    assert (last["choices"], last["timings"], "usage" in last) == ([], whole["timings"], False)
    last = (await chunks_of(http, path, return_timings=True, stream_options={"include_usage": True}))[-1]
    assert (last["choices"], last["timings"], last["usage"]) == ([], whole["timings"], whole["usage"])


@pytest.mark.parametrize("path", list(BODIES))
async def test_nobody_gets_times_that_were_not_asked_for(http: httpx.AsyncClient, path: str) -> None:
    assert "timings" not in (await http.post(path, json=BODIES[path])).json()
    assert not any("timings" in chunk for chunk in await chunks_of(http, path))


async def test_choices_side_by_side_share_their_time(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = after_a_wait("abcd", 0.25)
    whole = (await http.post("/v1/completions", json={"prompt": "hello", "n": 3, "return_timings": True})).json()
    assert (whole["timings"]["predicted_n"], whole["timings"]["queue_ms"]) == (15, 250.0)


def test_there_is_no_rate_of_what_took_no_time() -> None:
    found = timings_json(Timings(0.0, 0.0, 0.0, 4, 0, 1, 1, 0, 0))
    assert set(found) == {"queue_ms", "cache_n", "prompt_n", "prompt_ms", "predicted_n", "predicted_ms"}
    drafted = timings_json(Timings(0.0, 0.5, 2.0, 4, 10, 8, 4, 6, 3))
    assert (drafted["draft_n"], drafted["draft_n_accepted"], drafted["predicted_per_second"]) == (6, 3, 2.0)
