"""Fields and answers of text completions, where they differ from chat."""

import json
from typing import Any

import httpx
import pytest

from streamserve.messages import Delta, FinishReason, GenerateRequest, TokenLogprobs
from tests.api.scripted import ScriptedEngine, says
from tests.api.test_chat import HI, chunks_of

pytestmark = pytest.mark.anyio
PATH = "/v1/completions"


async def ask(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await http.post(PATH, json={"prompt": "hi", **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", [b"hi"]),
        ([104, 105], [b"hi"]),
        (["a", "bc"], [b"a", b"bc"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
    ],
)
async def test_prompts_of_every_kind(http: httpx.AsyncClient, engine: ScriptedEngine, prompt: Any, expected: list[bytes]) -> None:
    answer = await ask(http, prompt=prompt, n=2)
    assert [bytes(request.token_ids) for request in engine.requests] == [text for text in expected for _ in range(2)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected) * 2))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([104, "i"], "prompt"),
        (["h", 105], "prompt"),
        (["h", [105]], "prompt"),
        ([104, [105]], "prompt"),
        ([104, 259], "prompt[1]"),
        ([[104], [105, -1]], "prompt[1][1]"),
        ([104, 2**70], "prompt[1]"),
    ],
)
async def test_what_is_no_prompt_is_refused_by_its_place(http: httpx.AsyncClient, prompt: Any, param: str) -> None:
    response = await http.post(PATH, json={"prompt": prompt})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_control_tokens_written_out_in_a_prompt_are_control_tokens(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await ask(http, prompt="<|im_start|>x")
    assert engine.requests[0].token_ids == (257, 120)


@pytest.mark.parametrize(
    ("given", "asked"), [({}, 16), ({"max_tokens": None}, 16), ({"max_tokens": 3}, 3), ({"prompt": "x" * 505}, 7)]
)
async def test_length_left_out_is_sixteen_or_what_is_left(
    http: httpx.AsyncClient, engine: ScriptedEngine, given: dict[str, Any], asked: int
) -> None:
    await ask(http, **given)
    assert engine.requests[0].sampling.max_new_tokens == asked


async def test_log_probabilities_with_offsets(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = says("né!")
    logprobs = (await ask(http, logprobs=2))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["n", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["top_logprobs"][0] == {"n": -0.5, "A": -2.65}
    chunks = [chunk["choices"][0]["logprobs"] for chunk in await chunks_of(http, PATH, logprobs=2)]
    for key, values in logprobs.items():
        assert [value for part in chunks if part for value in part[key]] == values


async def test_echo_repeats_the_prompt_and_scores_it(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await ask(http, echo=True, logprobs=1, max_tokens=2)
    assert engine.requests[0].sampling.prompt_logprobs == 1
    choice = answer["choices"][0]
    assert choice["text"] == "hiHe"
    assert choice["logprobs"]["tokens"] == ["h", "i", "H", "e"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert "".join(chunk["choices"][0]["text"] for chunk in await chunks_of(http, PATH, echo=True)) == "hiHello!"
    assert (await ask(http, prompt=[104, 258, 105], echo=True, max_tokens=1))["choices"][0]["text"] == "h<|im_end|>iH"


async def test_scoring_a_prompt_generates_nothing(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await ask(http, echo=True, logprobs=0, max_tokens=0, return_token_ids=True)
    assert engine.requests[0].sampling.max_new_tokens == 1
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("hi", "length", [])
    assert len(choice["logprobs"]["tokens"]) == 2
    assert answer["usage"]["completion_tokens"] == 0


async def test_chunks_have_the_shape_of_text_completions(http: httpx.AsyncClient) -> None:
    chunks = await chunks_of(http, PATH)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == "Hello!"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


async def test_best_of_gives_the_likeliest_by_mean_log_probability(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    def script(request: GenerateRequest) -> list[Delta]:
        nth = int(request.id.rsplit("-", 1)[1])
        logprob = [-3.0, -0.5, -1.0][nth]
        entries = [TokenLogprobs(token, logprob) for token in b"abc"[: nth + 1]]
        return [Delta((entry.token_id,), (entry,)) for entry in entries[:-1]] + [
            Delta((entries[-1].token_id,), (entries[-1],), finish_reason=FinishReason.LENGTH)
        ]

    engine.script = script
    answer = (await http.post("/v1/completions", json={"prompt": "hi", "best_of": 3, "n": 2})).json()
    assert [(choice["index"], choice["text"], choice["logprobs"]) for choice in answer["choices"]] == [
        (0, "ab", None),
        (1, "abc", None),
    ]
    assert answer["usage"]["completion_tokens"] == 6  # all of them were generated
    for fields in ({"best_of": 1, "n": 2}, {"best_of": 2, "stream": True}, {"best_of": 0}):
        refused = await http.post("/v1/completions", json={"prompt": "hi", **fields})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "best_of")


async def test_prompt_logprobs_stand_beside_the_answer(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for path, body in (("/v1/completions", {"prompt": "hi"}), ("/v1/chat/completions", {"messages": HI})):
        answer = (await http.post(path, json={**body, "prompt_logprobs": 1})).json()
        place = answer["choices"][0] if path == "/v1/completions" else answer
        scored = place["prompt_logprobs"]
        assert len(scored) == answer["usage"]["prompt_tokens"]
        assert scored[0] is None
        assert scored[1][str(engine.requests[-1].token_ids[1])]["logprob"] == -0.25
        assert answer["choices"][0]["logprobs"] is None
        text = (await http.post(path, json={**body, "prompt_logprobs": 1, "stream": True})).text
        events = [json.loads(event[6:]) for event in text.split("\n\n") if event.startswith("data: {")]
        shown = [event for event in events if "prompt_logprobs" in event or "prompt_logprobs" in event["choices"][0]]
        (first,) = shown
        assert (first["choices"][0] if path == "/v1/completions" else first)["prompt_logprobs"] == scored
        refused = await http.post(path, json={**body, "prompt_logprobs": 21})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")


async def test_no_more_tokens_were_jumped_over_than_the_answer_has(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda request: [Delta(tuple(b"abcdef"), finish_reason=FinishReason.STOP, num_jumped=6)]
    usage = (await ask(http, stop="c"))["usage"]
    assert (usage["completion_tokens"], usage["completion_tokens_details"]["jumped_tokens"]) == (3, 3)
