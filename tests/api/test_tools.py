"""Tools, constraints and thoughts of chats: what reaches the engine, and what comes back."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from streamserve.api.app import create_app
from streamserve.config import ServerConfig
from streamserve.messages import Delta, GenerateRequest, Guidance
from streamserve.text.byte_tokenizer import END_OF_TURN, START_OF_TURN, ByteTokenizer, byte_text_model
from streamserve.text.model import TextModel
from streamserve.text.template import ChatTemplate
from tests.api.conftest import client_of
from tests.api.scripted import ScriptedEngine, says
from tests.text.grammars import Grammar

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
INTEGERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
ADD = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": INTEGERS}}
NOW = {"type": "function", "function": {"name": "now"}}
CALLS = (
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
MADE = [("add", '{"a": 1, "b": 2}'), ("now", "{}")]
# Writes tools and calls itself; begins a thought unless told otherwise.
TEMPLATE = (
    "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or () %}<tool_call>{{ call | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)


def thinker() -> TextModel:
    """A model whose template opens a thought, and shows tools."""
    text = byte_text_model()
    return TextModel(text.tokenizer, ChatTemplate(TEMPLATE, special_tokens=text.tokenizer.special_tokens))


@pytest.fixture
def engine() -> ScriptedEngine:
    engine = ScriptedEngine(says(CALLS))
    engine.state = replace(engine.state, context_len=8192)
    return engine


@pytest.fixture
async def thinking(engine: ScriptedEngine) -> Any:
    async with client_of(create_app(engine, thinker(), ServerConfig(), model_name="tiny")) as client:
        yield client


async def post(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post(CHAT, json={"messages": HI, "max_tokens": 2000, **fields})


async def choice_of(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await post(http, **fields)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    found: dict[str, Any] = choice
    return found


async def deltas_of(http: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a stream's chunks."""
    response = await post(http, stream=True, **fields)
    assert response.status_code == 200, response.text
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event.startswith("data: {")]
    return [json.loads(event)["choices"][0] for event in events]


def made(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]


def guidance_of(engine: ScriptedEngine) -> Guidance:
    guidance = engine.requests[-1].guidance
    assert guidance is not None
    return guidance


def prompt_of(engine: ScriptedEngine) -> str:
    return ByteTokenizer().decode(engine.requests[-1].token_ids, skip_special_tokens=False)


# ---- calls -----------------------------------------------------------------------------------------------------------


async def test_calls_come_back_whole_and_streamed_alike(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    whole = await choice_of(http, tools=[ADD, NOW])
    assert (made(whole["message"]), whole["message"]["content"]) == (MADE, None)
    assert whole["finish_reason"] == "tool_calls"
    assert engine.requests[-1].guidance is None  # nobody forces a call

    first, *chunks, last = await deltas_of(http, tools=[ADD, NOW])
    assert first["delta"] == {"role": "assistant", "content": None}
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")
    calls: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for chunk in chunks:
        assert chunk["finish_reason"] is None
        (call,) = chunk["delta"].pop("tool_calls")
        assert chunk["delta"] == {}  # no stray content beside calls
        calls[call["index"]].append(call)
    for (index, (begin, *pieces)), (name, arguments) in zip(calls.items(), MADE, strict=True):
        assert begin == {"index": index, "id": begin["id"], "type": "function", "function": {"name": name, "arguments": ""}}
        assert all(piece == {"index": index, "function": {"arguments": piece["function"]["arguments"]}} for piece in pieces)
        assert "".join(piece["function"]["arguments"] for piece in pieces) == arguments
    assert calls[0][0]["id"] != calls[1][0]["id"]


async def test_tools_reach_the_model_as_text_where_the_template_shows_none(
    http: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    await choice_of(http, tools=[ADD], messages=[{"role": "system", "content": "Be kind."}, *HI])
    assert prompt_of(engine).startswith("<|im_start|>system\nBe kind.\n\nYou may call functions")
    assert '"name": "add"' in prompt_of(engine)
    await choice_of(http, tools=[ADD], tool_choice="none")
    assert '"name": "add"' not in prompt_of(engine)


async def test_what_tools_hold_is_plain_text(thinking: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    marked = {"name": "f", "description": "<|im_end|>", "parameters": {"description": "<|im_start|>"}}
    call = {"id": "c", "type": "function", "function": {"name": "<|im_end|>", "arguments": '{"a": "\\u003c|im_start|>"}'}}
    chat = [*HI, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "<|im_start|>"}]
    await choice_of(thinking, tools=[{"type": "function", "function": marked}], messages=chat)
    ids = engine.requests[-1].token_ids
    assert prompt_of(engine).count("<|im_start|>") == 8
    assert (ids.count(START_OF_TURN), ids.count(END_OF_TURN)) == (5, 4)
    await choice_of(
        thinking, tools=[{"type": "function", "function": marked}], messages=chat, allow_control_tokens=True
    )  # the one option
    assert engine.requests[-1].token_ids.count(START_OF_TURN) == 8


async def test_no_call_is_read_where_none_may_be_made(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    choice = await choice_of(http, tools=[ADD, NOW], tool_choice="none")
    assert choice["message"] == {"role": "assistant", "content": CALLS, "refusal": None}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("choice", "calls"),
    [
        ("required", ["add", "now"]),
        ({"type": "function", "function": {"name": "add"}}, ["add"]),
        ({"type": "function", "name": "now"}, ["now"]),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [ADD]}}, ["add"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}, ["now"]),
    ],
)
async def test_a_demanded_call_is_held_to_its_schema_by_a_grammar(
    http: httpx.AsyncClient, engine: ScriptedEngine, choice: Any, calls: list[str]
) -> None:
    if isinstance(choice, dict) and "allowed_tools" in choice:
        choice["allowed_tools"]["tools"] = [{"type": "function", "function": {"name": "add"}}]
    await choice_of(http, tools=[ADD, NOW], tool_choice=choice)
    grammar = guidance_of(engine).grammar
    assert grammar is not None and guidance_of(engine).param == "tools"
    texts = dict(zip(("add", "now"), CALLS.replace("\n<tool_call>", "|<tool_call>").split("|"), strict=True))
    assert [name for name, text in texts.items() if Grammar(grammar).accepts(text)] == calls
    assert not Grammar(grammar).begins(texts["add"].replace("1", "true"))
    assert all(f'"name": "{name}"' in prompt_of(engine) for name in ("add", "now"))  # the prompt stays what it was


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}, "tools": []}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "name": "add", "nmae": 1}}, "tool_choice.nmae"),
        ({"tools": [ADD], "tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice.type"),
        ({"tools": [ADD], "tool_choice": {"type": "allowed_tools", "mode": "maybe"}}, "tool_choice.mode"),
        ({"tools": [ADD], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.tools"),
        ({"tools": [ADD, ADD]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "paramters": {}}}]}, "tools[0].function.paramters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 7}}]}, "tools[0].function.parameters"),
        ({"tools": [ADD], "functions": [ADD["function"]]}, "functions"),
        ({"function_call": {"name": "add"}}, "function_call"),
        ({"functions": [ADD["function"]], "function_call": "required"}, "function_call"),
        ({"functions": [ADD["function"]], "function_call": {"name": "nope"}}, "function_call"),
        ({"max_thinking_tokens": 5}, "max_thinking_tokens"),
        ({"reasoning_effort": "very"}, "reasoning_effort"),
        ({"verbosity": "mute"}, "verbosity"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "structural_tag", "structures": [], "triggers": [], "x": 1}}, "response_format.x"),
        ({"response_format": {"type": "structural_tag", "format": {"type": "odd"}}}, "response_format.format.type"),
        ({"regex": "a", "ebnf": "root ::= 'a'"}, "ebnf"),
        ({"response_format": {"type": "json_object"}, "choice": ["a"]}, "choice"),
        ({"json_schema": "{"}, "json_schema"),
        ({"regex": "[a-z"}, "regex"),
        ({"regex": r"(?=a)b"}, "regex"),
        ({"choice": []}, "choice"),
        ({"response_format": {"type": "json_object"}, "json_whitespace": "(a"}, "json_whitespace"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"properties": {"a": {"type": "array", "uniqueItems": True}}}},
                }
            },
            "response_format.json_schema.schema.properties.a.uniqueItems",
        ),
    ],
)
async def test_what_cannot_be_is_refused_by_name_before_the_engine_sees_it(
    http: httpx.AsyncClient, engine: ScriptedEngine, fields: dict[str, Any], param: str
) -> None:
    response = await post(http, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert engine.requests == []


async def test_what_is_nested_without_end_is_refused_or_served(http: httpx.AsyncClient) -> None:
    deep: Any = {}
    for _ in range(400):
        deep = {"type": "object", "properties": {"a": deep}}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    strict = {"type": "function", "function": {"name": "f", "parameters": deep, "strict": True}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": deep}}
    for fields in (
        {"tools": [tool]},
        {"tools": [tool], "tool_choice": "required"},
        {"tools": [strict]},
        {"tools": [tool], "response_format": {"type": "json_object"}},
        {"json_schema": deep},
        {"messages": [*HI, {"role": "assistant", "tool_calls": [call]}]},
    ):
        body = json.dumps({"messages": HI, **fields})
        response = await http.post(CHAT, content=body)
        assert response.status_code in (200, 400), response.text
        assert response.status_code == 200 or response.json()["error"]["param"]


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}}])
async def test_parameters_may_be_left_out_empty_or_of_any_enum(http: httpx.AsyncClient, parameters: Any) -> None:
    function = {"name": "now"} if parameters is None else {"name": "now", "parameters": parameters}
    for choice in ("auto", "required"):
        await choice_of(http, tools=[{"type": "function", "function": function}], tool_choice=choice)


async def test_without_parallel_calls_the_answer_ends_with_the_first(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    response = (await post(http, tools=[ADD, NOW], parallel_tool_calls=False)).json()
    (whole,) = response["choices"]
    assert (made(whole["message"]), whole["finish_reason"]) == (MADE[:1], "tool_calls")
    assert response["usage"]["completion_tokens"] == CALLS.index("}") + 1
    assert engine.live == {}
    chunks = await deltas_of(http, tools=[ADD, NOW], parallel_tool_calls=False)
    assert {call["index"] for chunk in chunks for call in chunk["delta"].get("tool_calls", ())} == {0}
    assert chunks[-1]["finish_reason"] == "tool_calls"


async def test_the_older_form_is_answered_in_the_older_form(http: httpx.AsyncClient) -> None:
    functions = [ADD["function"], NOW["function"]]
    whole = await choice_of(http, functions=functions)
    assert whole["message"]["function_call"] == {"name": "add", "arguments": '{"a": 1, "b": 2}'}
    assert ("tool_calls" in whole["message"], whole["finish_reason"]) == (False, "function_call")
    chunks = await deltas_of(http, functions=functions, function_call={"name": "add"})
    parts = [chunk["delta"]["function_call"] for chunk in chunks if "function_call" in chunk["delta"]]
    assert parts[0] == {"name": "add", "arguments": ""}
    assert "".join(part["arguments"] for part in parts[1:]) == '{"a": 1, "b": 2}'
    assert chunks[-1]["finish_reason"] == "function_call"


async def test_a_stop_string_holds_for_content_only(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = says(f"Sum {CALLS} now and then")
    unstopped = await choice_of(http, tools=[ADD, NOW], stop='"a"')
    assert made(unstopped["message"]) == MADE
    stopped = await choice_of(http, tools=[ADD, NOW], stop=" and")
    assert (made(stopped["message"]), stopped["message"]["content"]) == (MADE, "Sum now")
    assert (stopped["finish_reason"], stopped["matched_stop"]) == ("tool_calls", " and")
    by_pattern = await choice_of(http, tools=[ADD, NOW], stop_regex=r" a\w+|.a.:")  # nor for what stands around a call
    assert (made(by_pattern["message"]), by_pattern["message"]["content"]) == (MADE, "Sum now")
    early = await choice_of(http, tools=[ADD, NOW], stop="um")
    assert (early["message"], early["finish_reason"]) == ({"role": "assistant", "content": "S", "refusal": None}, "stop")


async def test_log_probabilities_are_those_of_the_content(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = says(f"Ä < b?\n{CALLS}")
    whole = await choice_of(http, tools=[ADD, NOW], logprobs=True, top_logprobs=1)
    raw = [byte for entry in whole["logprobs"]["content"] for byte in entry["bytes"]]
    assert bytes(raw).decode() == "Ä < b?" == whole["message"]["content"]
    chunks = await deltas_of(http, tools=[ADD, NOW], logprobs=True, top_logprobs=1)
    scored = [entry for chunk in chunks for entry in (chunk["logprobs"] or {}).get("content", ())]
    assert scored == whole["logprobs"]["content"]


# ---- constraints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 7}}}}, '"const":7'),
        ({"json_schema": {"const": 7}}, '"const":7'),
        ({"json_schema": '{"const": 7}'}, '"const":7'),
        ({"regex": "a+b"}, "a+b"),
        ({"ebnf": 'root ::= "a" | "b"'}, '"a"'),
        ({"ebnf": 'start: "a" | "b"'}, '"a"'),
        ({"choice": ["yes", "no"]}, '"yes" | "no"'),
        ({"guided_choice": ["yes", "no"]}, '"yes" | "no"'),
    ],
)
async def test_a_constraint_reaches_the_engine_as_a_grammar(
    http: httpx.AsyncClient, engine: ScriptedEngine, given: dict[str, Any], part: str
) -> None:
    for path, body in ((CHAT, {"messages": HI}), ("/v1/completions", {"prompt": "hi"})):
        response = await http.post(path, json={**body, **given, "jump_forward": False})
        assert response.status_code == 200, response.text
        guidance = guidance_of(engine)
        assert guidance.grammar is not None and part in guidance.grammar
        assert (guidance.param, guidance.may_jump, guidance.thought) == (next(iter(given)), False, None)
    await choice_of(http, **given)
    assert guidance_of(engine).may_jump


async def test_structural_tags_constrain_what_stands_in_them(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    form = {
        "type": "structural_tag",
        "structures": [{"begin": "<f>", "schema": {"const": 7}, "end": "</f>"}],
        "triggers": ["<f"],
    }
    await choice_of(http, response_format=form)
    grammar = Grammar(str(guidance_of(engine).grammar))
    assert [grammar.accepts(text) for text in ("Text", "So: <f>7</f>!", "So: <f>8</f>!")] == [True, True, False]


async def test_plain_text_is_no_constraint(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await choice_of(http, response_format={"type": "text"})
    await choice_of(http, response_format=None, tools=None, regex=None)
    assert [request.guidance for request in engine.requests] == [None, None]


async def test_white_space_is_compact_unless_asked_for(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for given, part in (({}, '"whitespace_flexible":false'), ({"json_whitespace": "flexible"}, '"whitespace_flexible":true')):
        await choice_of(http, json_schema={"type": "string"}, **given)
        assert part in str(guidance_of(engine).grammar)
    text = {"prompt": "hi", "json_whitespace": "flexible", "regex": "a"}
    for response in (await post(http, json_whitespace="flexible", regex="a"), await http.post("/v1/completions", json=text)):
        assert response.headers["x-streamserve-warning"].startswith("json_whitespace has no effect")


async def test_with_tools_a_constraint_is_for_answers_without_calls(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = says('{"z": 1}')
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"z": {}}}}}
    choice = await choice_of(http, tools=[ADD], response_format=form)
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"z": 1}', "stop")
    grammar = Grammar(str(guidance_of(engine).grammar))
    call = CALLS.split("\n<tool_call>")[0]
    assert [grammar.accepts(text) for text in (call, '{"z":1}', "text", f'{{"z":1}}{call}')] == [True, True, False, False]
    response = await post(http, tools=[ADD], tool_choice="required", response_format=form)
    assert response.headers["x-streamserve-warning"].startswith("response_format has no effect")
    assert '"z"' not in str(guidance_of(engine).grammar)


async def test_strict_tools_are_held_to_their_schema_even_where_the_model_decides(
    http: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    odd = {"name": "odd", "parameters": {"type": "object", "properties": {"u": {"type": "array", "uniqueItems": True}}}}
    await choice_of(http, tools=[ADD, {"type": "function", "function": odd}])
    assert engine.requests[-1].guidance is None
    strict = {"type": "function", "function": {**ADD["function"], "strict": True}}  # type: ignore[dict-item]
    await choice_of(http, tools=[strict, {"type": "function", "function": odd}])
    grammar = Grammar(str(guidance_of(engine).grammar))
    right = CALLS.split("\n<tool_call>")[0]
    texts = ("Any text", f"Text.\n{right}", right.replace("1", "true"), right.replace("add", "odd"))
    assert [grammar.accepts(text) for text in texts] == [True, True, False, True]
    refused = await post(http, tools=[{"type": "function", "function": {**odd, "strict": True}}])
    assert refused.status_code == 400 and "uniqueItems" in refused.text


# ---- thoughts --------------------------------------------------------------------------------------------------------

THINKING = "One and two.\n</think>\n\nThree"


def counts_thoughts(text: str, num_thought: int) -> Any:
    def script(request: GenerateRequest) -> list[Delta]:
        return [
            Delta(delta.token_ids, delta.logprobs, None, 0, delta.finish_reason, delta.matched_stop, num_thought=num_thought)
            for delta in says(text)(request)
        ]

    return script


async def test_thoughts_stand_apart_and_are_counted(thinking: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = counts_thoughts(THINKING, 13)
    response = (await post(thinking)).json()
    message = response["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("One and two.", "Three")
    assert response["usage"]["completion_tokens_details"]["reasoning_tokens"] == 13
    thought = guidance_of(engine).thought
    assert thought is not None and (thought.is_open, thought.end, thought.max_tokens) == (True, b"</think>", None)
    chunks = await deltas_of(thinking)
    assert all({"reasoning_content", "content"} <= set(chunk["delta"]) for chunk in chunks[:-1])
    assert await deltas_of(thinking, stream_options={"continuous_usage_stats": True}) == chunks
    assert "".join(chunk["delta"].get("reasoning_content") or "" for chunk in chunks) == "One and two."
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == "Three"


async def test_thoughts_stay_in_the_content_or_come_as_one_where_asked(
    thinking: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.script = says(THINKING)
    message = (await choice_of(thinking, separate_reasoning=False))["message"]
    assert (message["content"], "reasoning_content" in message) == (THINKING, False)
    chunks = await deltas_of(thinking, stream_reasoning=False)
    assert [text for chunk in chunks if (text := chunk["delta"].get("reasoning_content"))] == ["One and two."]


async def test_thinking_is_off_where_the_template_says_so(thinking: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = says("Three")
    for given in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        message = (await choice_of(thinking, **given))["message"]
        assert (message["content"], message["reasoning_content"]) == ("Three", None)
        assert engine.requests[-1].guidance is None
    response = await post(thinking, reasoning_effort="none", max_thinking_tokens=3)
    assert "thinking is off" in response.headers["x-streamserve-warning"]


@pytest.mark.parametrize("name", ["max_thinking_tokens", "thinking_budget"])
async def test_a_limit_of_thinking_reaches_the_engine_with_what_ends_it(
    thinking: httpx.AsyncClient, engine: ScriptedEngine, name: str
) -> None:
    await choice_of(thinking, **{name: 7})
    thought = guidance_of(engine).thought
    assert thought is not None and thought.max_tokens == 7
    assert thought.end in ByteTokenizer().decode(thought.end_ids).encode()


async def test_a_grammar_leaves_room_for_what_stands_behind_a_thought(
    thinking: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    await choice_of(thinking, json_schema={"const": 7})
    assert str(guidance_of(engine).grammar).startswith('start: "\\n\\n" ')
    await choice_of(thinking, json_schema={"const": 7}, reasoning_effort="none")
    assert "start" not in str(guidance_of(engine).grammar)


async def test_an_answer_that_is_continued_is_read_from_where_it_stands(
    thinking: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    for begun, is_open in (("<think>\nOne", True), ("<think>\nOne\n</think>\n\nTh", False)):
        engine.script = says(" and two.\n</think>\n\nThree" if is_open else "ree")
        chat = [*HI, {"role": "assistant", "content": begun}]
        message = (await choice_of(thinking, messages=chat, continue_final_message=True))["message"]
        expected = ("and two.", "Three") if is_open else (None, "ree")
        assert (message["reasoning_content"], message["content"]) == expected


# ---- control ---------------------------------------------------------------------------------------------------------


async def test_reasoning_can_be_ended_from_outside(thinking: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    asked: list[str] = []

    def end_thought(request_id: str) -> bool:
        asked.append(request_id)
        return True

    engine.end_thought = end_thought  # type: ignore[method-assign]
    engine.script = says(THINKING)
    ended: list[httpx.Response] = []

    async def control(**body: Any) -> httpx.Response:
        return await thinking.post(f"{CHAT}/control", json={"action": "end_reasoning", **body})

    original = engine.submit

    async def submit(request: GenerateRequest) -> Any:
        mailbox = await original(request)
        if request.id.endswith("-1"):
            ended.append(await control(id="mine"))
        return mailbox

    engine.submit = submit  # type: ignore[method-assign]
    assert (await post(thinking, rid="mine", n=2)).status_code == 200
    assert ended[0].status_code == 200 and ended[0].json()["ended"] == 2
    assert asked == [request.id for request in engine.requests]
    assert (await control(id="mine")).status_code == 404  # it is over
    assert (await control(id="x", action="stop")).json()["error"]["param"] == "action"
