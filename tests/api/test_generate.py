"""SGLang's native /generate: shapes of answers and streams, batches, log-probabilities, what is refused."""

import json
from itertools import pairwise
from typing import Any

import httpx
import pytest

from streamserve.api import service
from streamserve.messages import FinishReason
from tests.api.scripted import CONTEXT_LEN, ScriptedEngine, says

pytestmark = pytest.mark.anyio
GENERATE = "/generate"


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


async def test_an_answer_has_text_tokens_and_meta_info(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = (await http.post(GENERATE, json={"text": "hi", "rid": "mine"})).json()
    latency = answer["meta_info"].pop("e2e_latency")
    assert latency >= 0
    assert answer == {
        "text": "Hello!",
        "output_ids": [*b"Hello!", 258],
        "meta_info": {
            "id": "mine",
            "finish_reason": {"type": "stop", "matched": 258},
            "prompt_tokens": 2,
            "completion_tokens": 7,
            "cached_tokens": 0,
            "cached_tokens_details": {"device": 0, "host": 0},
            "reasoning_tokens": 0,
            "weight_version": "default",
        },
    }
    assert engine.requests[0].token_ids == tuple(b"hi")
    assert engine.requests[0].sampling.max_new_tokens == 128
    assert engine.requests[0].sampling.temperature == 1.0


async def test_native_names_reach_the_engine(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    params = {
        "max_new_tokens": 5,
        "min_new_tokens": 1,
        "temperature": 0.5,
        "top_k": 3,
        "stop_token_ids": [7],
        "sampling_seed": 11,
        "logit_bias": {"65": -1},
    }
    body = {"input_ids": [1, 2, 3], "sampling_params": params, "cache_salt": "a", "extra_key": "b"}
    answer = (await http.put(GENERATE, json=body)).json()
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 5}
    request = engine.requests[0]
    assert (request.token_ids, request.salt) == ((1, 2, 3), "a\nb")
    sampling = request.sampling
    assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.temperature, sampling.top_k) == (5, 1, 0.5, 3)
    assert (sampling.stop_token_ids, sampling.seed, sampling.logit_bias) == (frozenset({7}), 11, ((65, -1.0),))


async def test_streams_are_cumulative_unless_asked_otherwise(http: httpx.AsyncClient) -> None:
    events = events_of(await http.post(GENERATE, json={"text": "hi", "stream": True}))
    texts = [event["text"] for event in events]
    assert texts[-1] == "Hello!" and all(later.startswith(text) for text, later in pairwise(texts))
    assert events[-1]["output_ids"] == [*b"Hello!", 258]
    reasons = [event["meta_info"]["finish_reason"] for event in events]
    assert reasons[-1] == {"type": "stop", "matched": 258} and set(map(str, reasons[:-1])) == {"None"}
    events = events_of(await http.post(GENERATE, json={"text": "hi", "stream": True, "incremental": True}))
    assert "".join(event["text"] for event in events) == "Hello!" != events[-1]["text"]
    assert [token for event in events for token in event["output_ids"]] == [*b"Hello!", 258]


async def test_a_batch_is_a_list_with_each_prompts_own_parameters(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = {
        "text": ["one", "two"],
        "sampling_params": [{"max_new_tokens": 2}, {"max_new_tokens": 4, "n": 2}],
        "rid": "r",
    }
    answers = (await http.post(GENERATE, json=body)).json()
    assert [(answer["index"], answer["text"]) for answer in answers] == [(0, "He"), (1, "Hell"), (2, "Hell")]
    assert [answer["meta_info"]["id"] for answer in answers] == ["r_0", "r_1", "r_1"]
    events = events_of(await http.post(GENERATE, json={**body, "stream": True}))
    last = {event["index"]: event["text"] for event in events if event["meta_info"]["finish_reason"]}
    assert last == {0: "He", 1: "Hell", 2: "Hell"}
    one = (await http.post(GENERATE, json={"text": ["one"]})).json()
    assert isinstance(one, list) and len(one) == 1
    two = (await http.post(GENERATE, json={"text": "one", "sampling_params": {"n": 2}})).json()
    assert [answer["index"] for answer in two] == [0, 1]
    assert not engine.live or not engine.aborted


async def test_logprobs_of_output_and_prompt(http: httpx.AsyncClient) -> None:
    body = {"text": "abc", "return_logprob": True, "sampling_params": {"max_new_tokens": 2}}
    meta = (await http.post(GENERATE, json=body)).json()["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, 72, None], [-0.5, 101, None]]
    assert meta["input_token_logprobs"] == []
    assert "output_top_logprobs" not in meta
    more = {**body, "logprob_start_len": 0, "top_logprobs_num": 2, "return_text_in_logprobs": True}
    meta = (await http.post(GENERATE, json=more)).json()["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 97, "a"], [-0.25, 98, "b"], [-0.25, 99, "c"]]
    assert meta["input_top_logprobs"][0] is None
    assert meta["input_top_logprobs"][1] == [[-0.25, 98, "b"]]
    assert [entry[1] for entry in meta["output_top_logprobs"][0]] == [72, 65]
    meta = (await http.post(GENERATE, json={**more, "logprob_start_len": 2})).json()["meta_info"]
    assert meta["input_token_logprobs"] == [[-0.25, 99, "c"]]
    scored = {**more, "sampling_params": {"max_new_tokens": 0}}
    answer = (await http.post(GENERATE, json=scored)).json()
    assert (answer["text"], answer["output_ids"], answer["meta_info"]["completion_tokens"]) == ("", [], 0)
    assert len(answer["meta_info"]["input_token_logprobs"]) == 3


async def test_many_log_probabilities_are_spelt_out_off_the_loop_and_are_the_same(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"text": ["a" * 300, "b"], "return_logprob": True, "logprob_start_len": 0, "sampling_params": {"max_new_tokens": 2}}
    chat = {"messages": [{"role": "user", "content": "a" * 300}], "prompt_logprobs": 1, "max_tokens": 2}

    async def answers() -> list[Any]:
        native = (await http.post(GENERATE, json=body)).json()
        streamed = events_of(await http.post(GENERATE, json={**body, "stream": True}))
        whole = (await http.post("/v1/chat/completions", json=chat)).json()["prompt_logprobs"]
        first = next(
            event
            for event in events_of(await http.post("/v1/chat/completions", json={**chat, "stream": True}))
            if "prompt_logprobs" in event
        )
        assert len(native) == 2 and len(whole) > 300 and first["prompt_logprobs"] == whole
        streamed.sort(key=lambda event: (event["index"], len(event["output_ids"])))
        lists = [event["meta_info"]["input_token_logprobs"] for event in (*native, *streamed)]
        assert [len(entries) for entries in lists] == [300, 1, 300, 300, 1, 1]
        return [lists, whole]

    aside = await answers()
    monkeypatch.setattr(service, "INLINE_LOGPROBS", 10_000)
    assert await answers() == aside


@pytest.mark.parametrize("stop", [{}, {"stop": "never"}])
async def test_every_output_token_has_its_logprob_the_final_stop_token_too(http: httpx.AsyncClient, stop: dict[str, Any]) -> None:
    body = {"text": "abc", "return_logprob": True, "top_logprobs_num": 1, "sampling_params": stop}
    answer = (await http.post(GENERATE, json=body)).json()
    assert answer["text"] == "Hello!" and answer["output_ids"][-1] == 258
    assert [token for _, token, _ in answer["meta_info"]["output_token_logprobs"]] == answer["output_ids"]
    assert len(answer["meta_info"]["output_top_logprobs"]) == answer["meta_info"]["completion_tokens"] == 7


async def test_streams_repeat_log_probabilities_unless_only_what_is_new_is_asked_for(http: httpx.AsyncClient) -> None:
    wishes = {"return_logprob": True, "logprob_start_len": 1, "top_logprobs_num": 2, "return_text_in_logprobs": True}
    body = {"text": "abc", "sampling_params": {"n": 2}, **wishes}
    whole = [answer["meta_info"] for answer in (await http.post(GENERATE, json=body)).json()]
    names = ("input_token_logprobs", "input_top_logprobs", "output_token_logprobs", "output_top_logprobs")
    events = events_of(await http.post(GENERATE, json={**body, "stream": True}))
    parts = events_of(await http.post(GENERATE, json={**body, "stream": True, "incremental": True}))
    for index in (0, 1):
        own = [event["meta_info"] for event in events if event["index"] == index]
        assert {name: own[-1][name] for name in names} == {name: whole[index][name] for name in names}
        assert all(meta["input_token_logprobs"] == whole[index]["input_token_logprobs"] for meta in own)
        assert [len(meta["output_top_logprobs"]) for meta in own] == list(range(1, 8))
        new = [event["meta_info"] for event in parts if event["index"] == index]
        assert {name: [entry for meta in new for entry in meta.get(name, ())] for name in names} == {
            name: whole[index][name] for name in names
        }


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": ""}, "text"),
        ({"text": []}, "text"),
        ({"text": ["a", ""]}, "text[1]"),
        ({"text": [5]}, "text[0]"),
        ({"input_ids": [-1]}, "input_ids[0]"),
        ({"input_ids": [[1], 2]}, "input_ids"),
        ({"input_ids": [1, [2]]}, "input_ids"),
        ({"input_ids": [[1], [999]]}, "input_ids[1][0]"),
        ({"text": "a" * CONTEXT_LEN}, "text"),
        ({"text": "a", "sampling_params": []}, "sampling_params"),
        ({"text": "a", "sampling_params": [{}]}, "sampling_params"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": ["a", "b"], "sampling_params": [{}, {"top_p": 2}]}, "sampling_params[1].top_p"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"temprature": 1}}, "sampling_params.temprature"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 10**6}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"sampling_seed": 2**63}}, "sampling_params.sampling_seed"),
        ({"text": "a", "sampling_params": {"n": 0}}, "sampling_params.n"),
        ({"text": ["a"] * 100, "sampling_params": {"n": 100}}, "sampling_params.n"),
        ({"text": "a", "sampling_params": {"stop": ""}}, "sampling_params.stop"),
        ({"text": "a", "sampling_params": {"logit_bias": {"x": 1}}}, "sampling_params.logit_bias"),
        ({"text": "a", "sampling_params": {"logit_bias": {"7": 1, "07": 2}}}, "sampling_params.logit_bias"),
        ({"text": "a", "sampling_params": {"stop_token_ids": [-5]}}, "sampling_params.stop_token_ids[0]"),
        ({"text": "a", "sampling_params": {"min_new_tokens": 500}}, "sampling_params.min_new_tokens"),
        ({"text": "a", "sampling_params": {"beam_width": 4}}, "sampling_params.beam_width"),
        ({"text": "a", "rid": ["x"]}, "rid"),
        ({"text": ["a", "b"], "rid": ["x"]}, "rid"),
        ({"text": "a", "rid": ""}, "rid"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len"),
        ({"text": "a", "image_data": "http://127.0.0.1/x.png"}, "image_data"),
        ({"text": "a", "session_params": {"id": "s"}}, "session_params"),
        ({"text": "a", "streem": True}, "streem"),
        ({"text": "a", "model": "other"}, "model"),
        ({"text": "a", "timeout": -1}, "timeout"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(
    http: httpx.AsyncClient, engine: ScriptedEngine, body: dict[str, Any], param: str
) -> None:
    response = await http.post(GENERATE, json=body)
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert param.split(".")[-1].split("[")[0] in error["message"] or param == "text"
    assert not engine.requests


async def test_what_the_answer_must_match_reaches_the_engine(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    given: list[dict[str, Any]] = [{"json_schema": schema}, {"json_schema": json.dumps(schema)}, {"regex": "a+"}, {}]
    await http.post(GENERATE, json={"text": ["a"] * 4, "sampling_params": given})
    guidances = [request.guidance for request in engine.requests]
    assert guidances[0] is not None and guidances[0].grammar == guidances[1].grammar  # type: ignore[union-attr]
    assert [guidance.param for guidance in guidances if guidance] == [
        "sampling_params[0].json_schema",
        "sampling_params[1].json_schema",
        "sampling_params[2].regex",
    ]
    assert guidances[3] is None
    for bad in ({"regex": "[a-z"}, {"regex": "a", "ebnf": 'root ::= "a"'}, {"json_schema": "{"}, {"json_schema": {"type": "x"}}):
        response = await http.post(GENERATE, json={"text": "a", "sampling_params": bad})
        assert response.status_code == 400, bad
        assert response.json()["error"]["param"].startswith("sampling_params."), response.text


async def test_fields_that_ask_for_nothing_are_passed_over(http: httpx.AsyncClient) -> None:
    body = {
        "text": "a",
        "image_data": None,
        "return_hidden_states": False,
        "log_metrics": True,
        "sampling_params": {"spaces_between_special_tokens": True, "regex": None, "json_schema": None},
    }
    assert (await http.post(GENERATE, json=body)).status_code == 200


async def test_a_failure_inside_a_stream_is_an_event_that_says_whether_to_retry(
    http: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.script = says("Hi", finish=FinishReason.ERROR)
    events = events_of(await http.post(GENERATE, json={"text": ["a", "b"], "stream": True}))
    error = events[-1]["error"]
    assert (error["code"], error["retryable"]) == ("step_failed", False)
