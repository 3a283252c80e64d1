"""Speculation as clients see it: predictions on their way in; counts and marks of guessed tokens on their way out."""

import dataclasses
import json
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from streamserve.api.app import create_app
from streamserve.build import build
from streamserve.config import Config, SchedulerConfig, ServerConfig
from streamserve.messages import Delta, FinishReason, GenerateRequest, TokenLogprobs
from streamserve.metrics import Metrics
from streamserve.text.byte_tokenizer import END_OF_TURN, byte_text_model
from tests.api.conftest import client_of
from tests.api.scripted import CONTEXT_LEN, Script, ScriptedEngine
from tests.api.test_chat import HI, chunks_of

pytestmark = pytest.mark.anyio
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {CHAT: {"messages": HI}, TEXT: {"prompt": "hi"}, "/generate": {"text": "hi"}}


def drafted(*steps: tuple[str, str], num_drafted: int, ends: bool = True) -> Script:
    """Each step brings guessed characters, and one or more that were not. The last delta ends the answer, or a later stop
    string does. Counts of guesses stand in every delta, as if each step had made its share of them."""

    def script(request: GenerateRequest) -> list[Delta]:
        deltas: list[Delta] = []
        num_accepted = 0
        for right, own in steps:
            num_accepted += len(right.encode())
            tokens = tuple((right + own).encode())
            marks = (True,) * len(right.encode()) + (False,) * len(own.encode())
            scored = () if request.sampling.logprobs is None else tuple(TokenLogprobs(token, -0.5) for token in tokens)
            deltas.append(
                Delta(
                    tokens,
                    scored,
                    num_drafted=num_drafted,
                    num_accepted=num_accepted,
                    accepted=marks if right else (),
                )
            )
        if ends:
            last = deltas[-1]
            tokens, marks = (*last.token_ids, END_OF_TURN), (*last.accepted, False) if last.accepted else ()
            scored = (*last.logprobs, TokenLogprobs(END_OF_TURN, -0.5)) if last.logprobs else ()
            deltas[-1] = replace(
                last,
                token_ids=tokens,
                accepted=marks,
                logprobs=scored,
                finish_reason=FinishReason.STOP,
                matched_stop=END_OF_TURN,
            )
        return deltas

    return script


def counts(usage: dict[str, Any]) -> tuple[int, int, int]:
    details = usage["completion_tokens_details"]
    return usage["completion_tokens"], details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]


async def post(http: httpx.AsyncClient, path: str, **fields: Any) -> Any:
    answer = await http.post(path, json={**BODIES[path], **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_usage_counts_guesses_that_stand_in_the_answer_and_those_that_do_not(
    http: httpx.AsyncClient, engine: ScriptedEngine, path: str
) -> None:
    engine.script = drafted(("", "The"), (" cat s", "a"), ("t", "."), num_drafted=20)
    answer = await post(http, path)
    assert counts(answer["usage"]) == (13, 7, 13)
    assert counts((await post(http, path, n=2))["usage"]) == (26, 14, 26)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_no_guess_behind_a_stop_string_counts_as_accepted(
    http: httpx.AsyncClient, engine: ScriptedEngine, path: str
) -> None:
    engine.script = drafted(("", "a"), ("bcdefg", "h"), num_drafted=8, ends=False)
    for more in ({}, {"return_draft_marks": True}):
        answer = await post(http, path, stop="de", **more)
        assert counts(answer["usage"]) == (5, 4, 4)  # "bc", and "de" itself
        assert (answer["choices"][0]["message"]["content"] if path == CHAT else answer["choices"][0]["text"]) == "abc"


async def test_guesses_behind_the_only_call_do_not_count(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    call = '{"name": "f", "arguments": {}}'
    call = f"<tool_call>\n{call}\n</tool_call>"
    engine.script = drafted((call + "and more", "!"), num_drafted=90, ends=False)
    tools = [{"type": "function", "function": {"name": "f"}}]
    answer = await post(http, CHAT, tools=tools, parallel_tool_calls=False)
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    num_tokens, num_accepted, num_rejected = counts(answer["usage"])
    assert num_tokens == num_accepted == 90 - num_rejected
    assert num_tokens <= len(call)


async def test_native_answers_say_it_in_sglangs_words_and_only_where_there_were_guesses(
    http: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.script = drafted(("", "ab"), ("cdefgh", "i"), num_drafted=8)
    meta = (await post(http, "/generate"))["meta_info"]
    assert (meta["spec_accepted_drafts"], meta["spec_proposed_drafts"], meta["spec_accept_rate"]) == (6, 8, 0.75)
    assert (meta["spec_num_correct_drafts"], meta["spec_num_proposed_drafts"]) == (6, 8)
    assert meta["spec_accept_length"] == 10 / 4 == meta["completion_tokens"] / meta["spec_verify_ct"]
    engine.script = drafted(("", "ab"), num_drafted=0)
    meta = (await post(http, "/generate"))["meta_info"]
    assert not [name for name in meta if name.startswith("spec_")]


async def test_the_length_of_native_answers_leaves_out_what_a_grammar_forced(
    http: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    marks = (False, True, True, False, False, False)
    delta = Delta(tuple(b"abcdef"), accepted=marks, num_drafted=3, num_accepted=2, num_jumped=2)
    engine.script = lambda request: [replace(delta, finish_reason=FinishReason.LENGTH)]
    meta = (await post(http, "/generate"))["meta_info"]
    assert (meta["spec_verify_ct"], meta["spec_accept_length"]) == (2, 2.0), "a, then bcd with ef forced behind it"


MARKED = [("The", False), (" cat s", True), ("a", False), ("t", True), (".", False)]


def as_marks(marks: list[tuple[str, bool]]) -> list[dict[str, Any]]:
    return [{"text": text, "drafted": is_drafted} for text, is_drafted in marks]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_marks_say_which_parts_of_the_text_were_guessed(http: httpx.AsyncClient, engine: ScriptedEngine, path: str) -> None:
    engine.script = drafted(("", "The"), (" cat s", "a"), ("t", "."), num_drafted=20)
    (choice,) = (await post(http, path, return_draft_marks=True))["choices"]
    assert choice["draft_marks"] == as_marks(MARKED)
    text = (await http.post(path, json={**BODIES[path], "return_draft_marks": True, "stream": True})).text
    events = [json.loads(line[6:])["choices"][0] for line in text.split("\n\n") if line.startswith("data: {")]
    streamed = [mark for event in events for mark in event.get("draft_marks", ())]
    assert streamed == as_marks(MARKED)
    for event in events:
        shown = event["delta"].get("content", "") if path == CHAT else event["text"]
        assert "".join(mark["text"] for mark in event.get("draft_marks", ())) == shown
    assert "draft_marks" not in (await post(http, path))["choices"][0]


async def test_marks_of_held_back_text_and_of_characters_in_pieces_join_to_the_text(
    http: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.script = drafted(("", "a"), ("é世<", "/"), ("b👩", "c"), num_drafted=30)
    given: dict[str, Any] = {"stop": ["</x>", "c!"], "return_draft_marks": True, "logprobs": True}
    whole = (await post(http, CHAT, **given))["choices"][0]
    assert whole["message"]["content"] == "aé世</b👩c"
    assert "".join(mark["text"] for mark in whole["draft_marks"]) == "aé世</b👩c"
    assert whole["draft_marks"] == as_marks([("a", False), ("é世</b👩", True), ("c", False)])
    chunks = await chunks_of(http, **given)
    marks = [mark for chunk in chunks for mark in chunk["choices"][0].get("draft_marks", ())]
    assert "".join(mark["text"] for mark in marks) == "aé世</b👩c"
    plain = (await post(http, CHAT, stop=["</x>", "c!"], logprobs=True))["choices"][0]
    assert whole["logprobs"] == plain["logprobs"]
    assert whole["matched_stop"] == plain["matched_stop"] == END_OF_TURN


async def test_text_around_a_call_is_marked_once(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    engine.script = drafted(("", "Hm"), (f", so{call}", f"or{call}"), ("then", "."), num_drafted=99)
    tools = [{"type": "function", "function": {"name": "f"}}]
    (choice,) = (await post(http, CHAT, tools=tools, return_draft_marks=True))["choices"]
    chunks = [chunk["choices"][0] for chunk in await chunks_of(http, tools=tools, return_draft_marks=True)]
    content = choice["message"]["content"]
    assert len(choice["message"]["tool_calls"]) == 2 and content.startswith("Hm, so") and "or" in content
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == content
    for marks in (choice["draft_marks"], [mark for chunk in chunks for mark in chunk.get("draft_marks", ())]):
        assert "".join(mark["text"] for mark in marks) == content


async def test_a_whole_answer_has_one_mark_for_neighbours_of_a_kind(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = drafted(("", "a"), ("", "b"), ("cd", ""), ("ef", "g"), ("", "h"), num_drafted=9)
    (choice,) = (await post(http, CHAT, return_draft_marks=True))["choices"]
    assert choice["draft_marks"] == as_marks([("ab", False), ("cdef", True), ("gh", False)])


async def test_marks_say_which_parts_a_grammar_forced(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda request: [
        Delta(tuple(b'{"a"'), jumped=(True, True, True, False), num_jumped=3),
        Delta(
            tuple(b'": 1'),
            accepted=(True, False, False, False),
            jumped=(False, True, False, True),
            num_jumped=5,
            num_drafted=1,
            num_accepted=1,
        ),
        Delta(tuple(b"1}"), finish_reason=FinishReason.LENGTH, num_jumped=5, num_drafted=1, num_accepted=1),
    ]
    (choice,) = (await post(http, CHAT, return_draft_marks=True))["choices"]
    assert choice["draft_marks"] == [
        {"text": '{"a', "drafted": False, "forced": True},
        {"text": '"', "drafted": False},
        {"text": '"', "drafted": True},
        {"text": ":", "drafted": False, "forced": True},
        {"text": " ", "drafted": False},
        {"text": "1", "drafted": False, "forced": True},
        {"text": "1}", "drafted": False},
    ]
    chunks = await chunks_of(http, return_draft_marks=True)
    streamed = [mark for chunk in chunks for mark in chunk["choices"][0].get("draft_marks", ())]
    assert "".join(mark["text"] for mark in streamed if mark.get("forced")) == '{"a:1'


async def test_an_echoed_prompt_is_marked_as_not_guessed(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = drafted(("xy", "z"), num_drafted=2)
    (choice,) = (await post(http, TEXT, echo=True, return_draft_marks=True))["choices"]
    assert choice["draft_marks"] == as_marks([("hi", False), ("xy", True), ("z", False)])


@pytest.mark.parametrize(
    "content",
    ["def f(): pass", [{"type": "text", "text": "def f():"}, {"type": "text", "text": "pass"}], "<|im_start|>", ""],
)
async def test_a_prediction_reaches_the_engine_as_plain_tokens(
    http: httpx.AsyncClient, engine: ScriptedEngine, content: Any
) -> None:
    answer = await http.post(CHAT, json={"messages": HI, "prediction": {"type": "content", "content": content}, "n": 2})
    assert answer.status_code == 200, answer.text
    assert "x-streamserve-warning" not in answer.headers
    text = content if isinstance(content, str) else "def f():\npass"
    assert [bytes(request.prediction).decode() for request in engine.requests] == [text, text]
    await post(http, CHAT)
    assert engine.requests[-1].prediction == ()


@pytest.mark.parametrize(
    "prediction, param",
    [
        ({"type": "file", "content": "x"}, "prediction.type"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "content", "content": 5}, "prediction.content"),
        ({"type": "content", "content": "x", "mood": "good"}, "prediction.mood"),
        ({"type": "content", "content": [{"type": "image_url"}]}, "prediction.content[0].type"),
        ({"type": "content", "content": "x" * CONTEXT_LEN}, "prediction.content"),
        ("x", "prediction"),
    ],
)
async def test_what_is_no_prediction_is_refused_by_its_place(
    http: httpx.AsyncClient, engine: ScriptedEngine, prediction: Any, param: str
) -> None:
    answer = await http.post(CHAT, content=json.dumps({"messages": HI, "prediction": prediction}).encode())
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert engine.requests == []


async def test_what_nothing_reads_of_a_predictions_part_is_named(http: httpx.AsyncClient) -> None:
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    answer = await http.post(CHAT, json={"messages": HI, "prediction": {"type": "content", "content": [part]}})
    assert answer.headers["x-streamserve-warning"].startswith("prediction.content[0].cache_control has no effect")


async def test_a_prediction_that_nobody_uses_is_named(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.state = dataclasses.replace(engine.state, uses_predictions=False)
    answer = await http.post(CHAT, json={"messages": HI, "prediction": {"type": "content", "content": "x"}})
    assert answer.headers["x-streamserve-warning"].startswith("prediction has no effect: ")


@pytest.mark.parametrize(("speculative", "is_used"), [("none", False), ("auto", True), ("ngram_shared", True)])
async def test_whether_predictions_are_used_is_a_matter_of_the_setting(speculative: str, is_used: bool) -> None:
    built = build(Config(server=ServerConfig(fake=True), scheduler=SchedulerConfig(speculative=speculative)))
    assert built.engine.facts().uses_predictions is is_used
    built.close()


async def test_the_servers_state_says_what_guesses_came_to(engine: ScriptedEngine) -> None:
    metrics = Metrics()
    app = create_app(engine, byte_text_model(), ServerConfig(), model_name="tiny", metrics=metrics)
    async with client_of(app) as http:
        (state,) = (await http.get("/server_info")).json()["internal_states"]
        assert (state["drafted_tokens"], state["accepted_tokens"]) == (0, 0)
        assert "spec_accept_rate" not in state
        metrics.tokens_drafted(8, 6)
        (state,) = (await http.get("/server_info")).json()["internal_states"]
        assert (state["drafted_tokens"], state["accepted_tokens"], state["spec_accept_rate"]) == (8, 6, 0.75)
