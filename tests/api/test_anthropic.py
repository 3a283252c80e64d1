"""POST /v1/messages: what bodies become, and how they are answered. The engine is scripted."""

from dataclasses import replace
from typing import Any

import httpx
import msgspec
import pytest

from streamserve.api.anthropic_chat import Translation, translate
from streamserve.api.anthropic_results import MessageAnswer, MessageEvent, MessageFailure, TextContent
from streamserve.api.anthropic_schema import CountTokensRequest, MessagesRequest, read_body
from streamserve.api.fields import MESSAGES, Decision
from streamserve.errors import EngineStopped, InvalidRequest, QueueFull
from streamserve.messages import Delta, FinishReason
from tests.api.anthropic_checks import joined, parse_events
from tests.api.scripted import CONTEXT_LEN, ScriptedEngine, says

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "Hi"}]
BODY = {"model": "tiny", "max_tokens": 50, "messages": HI}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
ADD = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}


async def post(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/messages", json={**BODY, **fields})


def given(**fields: Any) -> Translation:
    return translate(read_body({**BODY, **fields}, MessagesRequest), {"enable_thinking", "messages"}, can_think=True)


def turns(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """The chat's messages, without what is not given."""
    made: list[dict[str, Any]] = msgspec.to_builtins(given(messages=list(messages), **fields).chat.messages)
    return [{name: value for name, value in message.items() if value is not None} for message in made]


# ---- answers ----------------------------------------------------------------------------------------------------------------


async def test_a_message_and_its_stream_agree(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = says("Hello!", cached=3)
    whole = (await post(http)).json()
    prompt = len(engine.requests[0].token_ids)
    assert whole["content"] == [{"type": "text", "text": "Hello!"}]
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("end_turn", None)
    assert whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"] == prompt
    assert (whole["usage"]["cache_read_input_tokens"], whole["usage"]["output_tokens"]) == (3, 7)
    stream = await post(http, stream=True)
    assert stream.headers["content-type"].startswith("text/event-stream")
    message = joined(parse_events(stream.text))
    assert {**message, "id": ""} == {**whole, "id": ""}
    assert message["id"] == stream.headers["request-id"]


async def test_a_stop_sequence_is_named_and_not_shown(http: httpx.AsyncClient) -> None:
    for stream in (False, True):
        answer = await post(http, stop_sequences=["zz", "lo"], stream=stream)
        message = joined(parse_events(answer.text)) if stream else answer.json()
        assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "lo")
        assert message["content"] == [{"type": "text", "text": "Hel"}]


async def test_an_answer_ends_at_max_tokens_or_with_the_context(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    assert (await post(http, max_tokens=3)).json()["stop_reason"] == "max_tokens"
    engine.script = says("x" * CONTEXT_LEN)
    long = (await post(http, max_tokens=32_000)).json()
    assert long["stop_reason"] == "model_context_window_exceeded"
    assert long["usage"]["input_tokens"] + long["usage"]["output_tokens"] == CONTEXT_LEN
    engine.script = says("Hello!")
    assert (await post(http, max_tokens=32_000)).json()["stop_reason"] == "end_turn"


async def test_no_tokens_at_all_fill_the_cache_only(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    message = (await post(http, max_tokens=0)).json()
    assert (message["content"], message["stop_reason"], message["usage"]["output_tokens"]) == ([], "max_tokens", 0)
    assert engine.requests[0].sampling.max_new_tokens == 1


async def test_an_engine_that_fails_ends_the_stream_with_an_error(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = lambda request: [Delta(tuple(b"He")), Delta(finish_reason=FinishReason.ERROR, error="the step broke")]
    *events, error = parse_events((await post(http, stream=True)).text)
    assert [event["type"] for event in events].count("content_block_delta") == 1
    assert (error["type"], error["error"]) == ("error", {"type": "api_error", "message": "the step broke"})
    whole = await post(http)
    assert (whole.status_code, whole.json()["error"]["message"]) == (500, "the step broke")


async def test_refusals_of_the_engine_have_a_status(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.refusal = QueueFull("full", retry_after_s=2.5)
    full = await post(http, stream=True)
    assert (full.status_code, full.headers["retry-after"], full.json()["error"]["type"]) == (429, "3", "rate_limit_error")
    engine.refusal = EngineStopped("draining")
    assert (await post(http)).json()["error"]["type"] == "overloaded_error"


async def test_sampling_arrives(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await post(http, temperature=0.5, top_p=0.9, top_k=7, seed=5, max_tokens=9, priority=2)
    (request,) = engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 5)
    assert (sampling.max_new_tokens, request.priority) == (9, 2)


async def test_tokens_are_counted_as_they_would_be_used(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = {"model": "tiny", "messages": HI, "system": "Be brief."}
    counted = (await http.post("/v1/messages/count_tokens", json=body)).json()
    await post(http, system="Be brief.")
    assert counted == {"input_tokens": len(engine.requests[0].token_ids)}


async def test_a_prompt_that_does_not_fit_is_counted_and_refused(http: httpx.AsyncClient) -> None:
    long = [{"role": "user", "content": "x" * CONTEXT_LEN}]
    counted = await http.post("/v1/messages/count_tokens", json={"model": "tiny", "messages": long})
    assert counted.json()["input_tokens"] > CONTEXT_LEN
    refused = await post(http, messages=long)
    assert refused.status_code == 400 and str(CONTEXT_LEN) in refused.json()["error"]["message"]


async def test_what_has_no_effect_is_said(http: httpx.AsyncClient) -> None:
    answer = await post(http, metadata={"user_id": "u"}, service_tier="standard_only")
    warning = answer.headers["x-streamserve-warning"]
    assert [part.split()[0] for part in warning.split("; ")] == ["metadata", "service_tier"]
    assert "x-streamserve-warning" not in (await post(http, service_tier="auto")).headers


def test_every_field_of_the_official_client_is_decided() -> None:
    from anthropic.types import message_count_tokens_params, message_create_params
    from anthropic.types.beta import message_create_params as beta

    in_headers = {"betas", "user_profile_id", "workspace_id"}
    decided = {field.name for field in MESSAGES}
    create = {
        *message_create_params.MessageCreateParamsStreaming.__annotations__,
        *beta.MessageCreateParamsStreaming.__annotations__,
    }
    create |= {*message_create_params.MessageCreateParamsBase.__annotations__, *beta.MessageCreateParamsBase.__annotations__}
    assert {"max_tokens", "stream"} < create
    assert create - in_headers - decided == set()
    taken = set(MessagesRequest.__struct_encode_fields__)
    assert taken == {field.name for field in MESSAGES if field.decision is not Decision.REFUSED}
    counted = set(message_count_tokens_params.MessageCountTokensParams.__annotations__) - in_headers
    assert counted <= set(CountTokensRequest.__struct_encode_fields__)


async def test_thoughts_are_a_wish(http: httpx.AsyncClient) -> None:
    """Of a model that has none; of one that cannot be stopped from having them."""
    answer = await post(http, thinking={"type": "enabled", "budget_tokens": 20})
    assert answer.json()["content"] == [{"type": "text", "text": "Hello!"}]
    assert answer.headers["x-streamserve-warning"].startswith("thinking has no effect: this model")
    request = read_body({**BODY, "thinking": {"type": "disabled"}}, MessagesRequest)
    (warning,) = translate(request, set(), can_think=True).warnings
    assert "no switch" in warning


async def test_the_field_at_fault_is_named_as_the_body_has_it(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    deferred, unnameable = {**ADD, "defer_loading": True}, {**ADD, "name": "a b"}
    error = (await post(http, tools=[deferred, unnameable])).json()["error"]
    assert error["message"].startswith("tools[1].name is")
    wrong = {**ADD, "input_schema": {"type": "object", "properties": {"function": {"type": "number", "minimum": "x"}}}}
    error = (await post(http, tools=[wrong], tool_choice={"type": "any"})).json()["error"]
    assert error["message"].startswith("tools[add].input_schema.properties.function")
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    assert (await post(http, output_config={"format": schema})).status_code == 200
    guidance = engine.requests[0].guidance  # what an engine names that cannot compile it
    assert guidance is not None and guidance.param == "output_config.format"


async def test_a_stream_can_be_gone_on_with(http: httpx.AsyncClient) -> None:
    stream = await post(http, stream=True, resumable=True)
    frames = stream.text.removeprefix("retry: 1000\n").split("\n\n")
    head = {"last-event-id": frames[2].split("\n")[0].removeprefix("id: ")}
    rest = await http.get(f"/v1/streams/{stream.headers['x-request-id']}", headers=head)
    assert rest.text.removeprefix("retry: 1000\n").split("\n\n") == frames[3:]


async def test_a_coding_agents_request_is_taken_as_it_is(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """What Claude Code sends to a server of one's own."""
    engine.state = replace(engine.state, context_len=4096)
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "properties": {}, "required": []}
    body = {
        "model": "tiny",
        "max_tokens": 32_000,
        "temperature": 1,
        "stream": True,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.107.3d9; cc_entrypoint=cli; cch=74943;"},
            {"type": "text", "text": "You are an agent.", **cached},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "<reminder/>"}, {"type": "text", "text": "Hi", **cached}]}
        ],
        "tools": [{"name": "Bash", "description": "Runs it.", "input_schema": schema, "eager_input_streaming": True}],
        "metadata": {"user_id": "user_1"},
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219,context-management-2025-06-27"}
    answer = await http.post("/v1/messages?beta=true", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert joined(parse_events(answer.text))["content"] == [{"type": "text", "text": "Hello!"}]
    counted = {name: body[name] for name in ("model", "system", "messages", "tools", "thinking", "output_config")}
    assert (await http.post("/v1/messages/count_tokens?beta=true", json=counted, headers=headers)).status_code == 200


# ---- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"temperature": 1.5}, "temperature is 1.5; allowed is 0 to 1"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"stop_sequences": [""]}, "stop_sequences has an entry of 0 characters"),
        ({"messages": []}, "messages holds no message"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "content[0].type is image; this model takes no pictures"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "content[0].source.type is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "content[0].type is document"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 'is "audio"; allowed is text, image, search_result, '),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]}, "a message of role user may hold"),
        ({"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}, "messages[0].content[0].type is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "", "a": 1}]}]}, "messages[0].content[0].a"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens is missing"),
        ({"thinking": {"type": "enabled", "budget_tokens": 50}}, "thinking.budget_tokens is 50; allowed is 1 to 49"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 'tools[0].type is "web_search_20250305"'),
        ({"tools": [{**ADD, "defer_loading": True}]}, "defer_loading is true for all tools"),
        ({"tools": [{**ADD, "allowed_callers": ["code_execution_20250825"]}]}, "tools[0].allowed_callers[0]"),
        ({"tool_choice": {"type": "any"}}, "tool_choice is any, but there are no tools"),
        ({"tools": [ADD], "tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
        ({"tools": [ADD], "tool_choice": {"type": "auto", "name": "add"}}, "tool_choice.name is given"),
        ({"mcp_servers": [{}]}, "mcp_servers is [{}], which is not supported: "),
        ({"speed": "fast"}, "speed is"),
        ({"output_config": {"task_budget": {}}}, "output_config.task_budget"),
        ({"model": "other"}, "model 'other' is not served here"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(http: httpx.AsyncClient, fields: dict[str, Any], says: str) -> None:
    body = {name: value for name, value in {**BODY, **fields}.items() if value is not None}
    answer = await http.post("/v1/messages", json={**body, "stream": True})
    assert answer.status_code == (404 if "model" in fields else 400)
    error = answer.json()
    assert says in error["error"]["message"]
    assert (error["type"], error["request_id"]) == ("error", answer.headers["request-id"])


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ([{"type": "tool_result", "tool_use_id": "b"}], 'messages[2].content[0].tool_use_id is "b"'),
        (
            [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}],
            "messages[2].content[0].content[0].source",
        ),
        ([{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "x"}]}], "allowed is text, image, search_result, "),
        (
            [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "tool_reference", "tool_name": "sub"}]}],
            'tool_name is "sub"; tools has none of that name',
        ),
        (None, "messages[1] ends with a tool_use"),
    ],
)
def test_results_have_to_fit_their_calls(last: list[dict[str, Any]] | None, says: str) -> None:
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "add", "input": {}}]}
    rest = [] if last is None else [{"role": "user", "content": last}]
    with pytest.raises(InvalidRequest) as refused:
        given(messages=[*HI, call, *rest], tools=[ADD])
    assert says in str(refused.value)


@pytest.mark.parametrize("place", ["messages[1].content[0].input", "tools[0].input_examples[0]"])
async def test_what_is_nested_without_end_is_refused_by_name(http: httpx.AsyncClient, place: str) -> None:
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    if place.startswith("tools"):
        answer = await post(http, tools=[{**ADD, "input_examples": [{"a": deep}]}])
    else:
        call = {"type": "tool_use", "id": "a", "name": "add", "input": {"a": deep}}
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}
        answer = await post(http, messages=[*HI, {"role": "assistant", "content": [call]}, result])
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, f"{place} is nested too deeply")


# ---- bodies -----------------------------------------------------------------------------------------------------------------


def test_system_texts_come_first_as_one() -> None:
    system = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two.", "cache_control": {"type": "ephemeral"}}]
    made = turns({"role": "system", "content": "Three."}, *HI, {"role": "system", "content": "Now four."}, system=system)
    assert made == [
        {"role": "system", "content": "One.\nTwo.\nThree."},
        {"role": "user", "content": "Hi"},
        {"role": "system", "content": "Now four."},
    ]


@pytest.mark.parametrize("joiner", ["blocks", "lines"])
def test_the_line_for_accounts_does_not_change_the_prefix(joiner: str) -> None:
    prompts = []
    for digest in ("a1", "b2"):
        line = f"x-anthropic-billing-header: cc_version=2.1; cch={digest};"
        blocks = [{"type": "text", "text": line}, {"type": "text", "text": "You are kind."}]
        prompts.append(turns(*HI, system=blocks if joiner == "blocks" else f"{line}\nYou are kind."))
    assert prompts[0] == prompts[1]
    assert prompts[0][0] == {"role": "system", "content": "You are kind."}


def test_neighbours_of_one_role_become_one_turn() -> None:
    made = turns(*HI, {"role": "user", "content": [{"type": "text", "text": "you"}, {"type": "text", "text": "there"}]})
    assert made == [{"role": "user", "content": "Hi\nyou\nthere"}]


def test_calls_and_results_become_turns_of_a_chat() -> None:
    made = turns(
        *HI,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "text", "text": "Adding.", "citations": None},
                {"type": "tool_use", "id": "a", "name": "add", "input": {"a": 1}, "caller": {"type": "direct"}},
                {"type": "tool_use", "id": "b", "name": "add", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "3"},
                {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "no a"}], "is_error": True},
                {"type": "text", "text": "Go on."},
                {
                    "type": "search_result",
                    "source": "https://a.b",
                    "title": "Sums",
                    "content": [{"type": "text", "text": "1+2=3"}],
                },
            ],
        },
        tools=[ADD],
    )
    calls = [
        {"function": {"name": "add", "arguments": '{"a":1}'}, "id": "a", "type": "function"},
        {"function": {"name": "add", "arguments": "{}"}, "id": "b", "type": "function"},
    ]
    assert made[1:] == [
        {"role": "assistant", "content": "Adding.", "tool_calls": calls, "reasoning_content": "Hm."},
        {"role": "tool", "content": "3", "name": "add", "tool_call_id": "a"},
        {"role": "tool", "content": "Error: no a", "name": "add", "tool_call_id": "b"},
        {"role": "user", "content": "Go on.\nSums (https://a.b)\n1+2=3"},
    ]


def test_turns_of_one_role_become_one_however_many_they_are() -> None:
    thought = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    call = {"type": "tool_use", "id": "a", "name": "add", "input": {}}
    said = {"role": "assistant", "content": [thought, {"type": "text", "text": "Let us"}]}
    and_calls = {"role": "assistant", "content": [thought, {"type": "text", "text": " see."}, call]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "1"}]}
    made = turns(*HI * 50_000, said, and_calls, and_calls, result, *HI, *HI, tools=[ADD])
    assert made[0] == {"role": "user", "content": "\n".join(["Hi"] * 50_000)}
    assert (made[1]["content"], made[1]["reasoning_content"]) == ("Let us see. see.", "Hm.\nHm.\nHm.")
    assert len(made[1]["tool_calls"]) == 2
    assert [(message["role"], message["content"]) for message in made[2:]] == [("tool", "1"), ("user", "Hi\nHi")]


def test_the_last_message_of_an_assistant_is_continued() -> None:
    chat = given(messages=[*HI, {"role": "assistant", "content": "The answer is ("}]).chat
    assert (chat.continue_final_message, chat.add_generation_prompt) == (True, False)
    chat = given(messages=[*HI, {"role": "assistant", "content": []}]).chat
    assert (chat.continue_final_message, chat.add_generation_prompt, len(chat.messages)) == (False, True, 1)


async def test_a_continued_message_holds_what_is_new(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    message = (await post(http, messages=[*HI, {"role": "assistant", "content": "The answer is"}])).json()
    assert bytes(engine.requests[0].token_ids[-13:]) == b"The answer is"
    assert message["content"] == [{"type": "text", "text": "Hello!"}]


def test_thinking_is_off_unless_asked_for() -> None:
    for thinking, wants, budget in (
        (None, False, None),
        ({"type": "disabled"}, False, None),
        ({"type": "adaptive", "display": "omitted"}, True, None),
        ({"type": "enabled", "budget_tokens": 20}, True, 20),
    ):
        chat = given(thinking=thinking).chat
        assert chat.chat_template_kwargs == {"enable_thinking": wants}
        assert chat.max_thinking_tokens == budget


def test_tools_and_choices_are_those_of_a_chat() -> None:
    example = {
        **ADD,
        "name": "sub",
        "strict": True,
        "input_examples": [{"a": 1}],
        "type": "custom",
        "eager_input_streaming": True,
    }
    chat = given(tools=[ADD, example], tool_choice={"type": "any", "disable_parallel_tool_use": True}).chat
    assert chat.tools is not None
    add, sub = (tool.function for tool in chat.tools)
    assert add is not None and sub is not None
    assert (add.name, add.description, add.parameters, add.strict) == ("add", "Adds.", ADD["input_schema"], None)
    assert (sub.description, sub.strict) == ('Adds.\nExamples of its input:\n{"a":1}', True)
    assert (chat.tool_choice, chat.parallel_tool_calls) == ("required", False)
    named = given(tools=[ADD], tool_choice={"type": "tool", "name": "add"}).chat
    assert named.tool_choice == {"type": "function", "function": {"name": "add"}}
    assert given(tools=[ADD], tool_choice={"type": "none"}).chat.tool_choice == "none"


def test_a_deferred_tool_is_known_once_a_result_refers_to_it() -> None:
    tools = [ADD, {**ADD, "name": "sub", "defer_loading": True}]
    names = [tool.function.name for tool in given(tools=tools).chat.tools or () if tool.function]
    assert names == ["add"]
    history = [
        *HI,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "add", "input": {}}]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "tool_reference", "tool_name": "sub"}]}],
        },
    ]
    chat = given(tools=tools, messages=history).chat
    assert [tool.function.name for tool in chat.tools or () if tool.function] == ["add", "sub"]
    assert chat.messages[-1].content == "The tool sub can be used now."


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_an_output_format_is_a_response_format(field: str) -> None:
    wanted = {"type": "json_schema", "schema": {"type": "object"}}
    chat = given(**{field: {"format": wanted} if field == "output_config" else wanted}).chat
    assert chat.response_format == {
        "type": "json_schema",
        "json_schema": {"name": "output", "schema": {"type": "object"}, "strict": True},
    }
    assert given(output_config={"effort": "xhigh"}).chat.reasoning_effort == "high"


def test_thoughts_of_earlier_turns_are_left_out_when_asked() -> None:
    def thinks(text: str) -> dict[str, Any]:
        return {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": text, "signature": "s"}, {"type": "text", "text": "."}],
        }

    history = [*HI, thinks("first"), *HI, thinks("second"), *HI]

    def kept(keep: Any) -> list[str | None]:
        edits = {"edits": [{"type": "clear_thinking_20251015", "keep": keep}]}
        chat = given(messages=history, context_management=edits).chat
        return [message.reasoning_content for message in chat.messages if message.role == "assistant"]

    assert kept("all") == kept({"type": "all"}) == kept({"type": "thinking_turns", "value": 2}) == ["first", "second"]
    assert kept({"type": "thinking_turns", "value": 1}) == kept(None) == [None, "second"]
    with pytest.raises(InvalidRequest, match="clear_tool_uses"):
        given(context_management={"edits": [{"type": "clear_tool_uses_20250919"}]})


async def test_what_was_left_out_is_said(http: httpx.AsyncClient) -> None:
    thought = [{"type": "thinking", "thinking": "12345", "signature": ""}, {"type": "text", "text": "Hi"}]
    history = [*HI, {"role": "assistant", "content": thought}] * 2
    edit = {"type": "clear_thinking_20251015"}
    answer = (await post(http, messages=[*history, *HI], context_management={"edits": [edit]})).json()
    applied = {"type": "clear_thinking_20251015", "cleared_thinking_turns": 1, "cleared_input_tokens": 5}
    assert answer["context_management"] == {"applied_edits": [applied]}


def test_an_omitted_thought_is_remembered_by_its_signature() -> None:
    sealed = {"type": "thinking", "thinking": "", "signature": "thought:SG0u"}
    (_, assistant, _) = turns(*HI, {"role": "assistant", "content": [sealed, {"type": "text", "text": "."}]}, *HI)
    assert assistant["reasoning_content"] == "Hm."


def test_counting_takes_no_fields_of_sampling() -> None:
    with pytest.raises(InvalidRequest, match="max_tokens"):
        read_body(BODY, CountTokensRequest)


async def test_answers_are_as_they_are_promised(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    whole = await post(http)
    assert msgspec.json.decode(whole.content, type=MessageAnswer).content == [TextContent("Hello!")]
    for event in parse_events((await post(http, stream=True)).text):
        msgspec.convert(event, MessageEvent)
    engine.script = lambda request: [Delta(finish_reason=FinishReason.ERROR, error="the step broke")]
    (failure,) = parse_events((await post(http, stream=True)).text)
    assert isinstance(msgspec.convert(failure, MessageEvent), MessageFailure)
