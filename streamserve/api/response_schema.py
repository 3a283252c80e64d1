"""Bodies of the Responses API as typed values, and the chat request that each of them asks for.

Owns field names and types of these bodies, and what they mean in terms of chat completions. Knows nothing of items beyond their
messages, of stores, engines or transports.

Names that chat completions share with these bodies mean the same here; api/fields.py lists what becomes of every field.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from msgspec import Struct

from streamserve.api.fields import RESPONSES, Decision
from streamserve.api.response_items import Json, Message
from streamserve.api.schema import ChatRequest, check_range, convert, show
from streamserve.errors import InvalidRequest, RequestError
from streamserve.messages import MAX_LOGPROBS

MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
LOGPROBS = "message.output_text.logprobs"
INCLUDES: Mapping[str, str] = {  # what may be included, and why it is nothing here
    LOGPROBS: "",
    "reasoning.encrypted_content": "reasoning is given in the open, in the item's content; send the item back as it is",
    "file_search_call.results": "the server runs no tools of its own",
    "web_search_call.results": "the server runs no tools of its own",
    "web_search_call.action.sources": "the server runs no tools of its own",
    "code_interpreter_call.outputs": "the server runs no tools of its own",
    "computer_call_output.output.image_url": "the server runs no tools of its own",
    "message.input_image.image_url": "",  # it is there anyway
}
SERVICE_TIERS = ("auto", "default", "flex", "scale", "priority", "fast")
REFUSED = {field.name: field for field in RESPONSES if field.decision is Decision.REFUSED}


class ResponseStreamOptions(Struct, forbid_unknown_fields=True):
    """`include_obfuscation`: random characters in every delta hide its length from who listens on the wire. Off by default."""

    include_obfuscation: bool | None = None


class TextOptions(Struct, forbid_unknown_fields=True):
    """What form the answer has."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningOptions(Struct, forbid_unknown_fields=True):
    """How much the model reasons."""

    effort: str | None = None
    summary: str | None = None  # without effect
    generate_summary: str | None = None  # without effect; its older name
    context: str | None = None  # without effect
    mode: str | None = None


class FunctionTool(Struct, kw_only=True):
    """A function that the model may call. `parameters` is a JSON schema; strict calls are held to it."""

    type: str
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    output_schema: dict[str, Any] | None = None


class Prompted(Struct, kw_only=True):
    """Fields that make the prompt: what a response and the count of its input tokens share."""

    model: str | None = None
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: str | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None
    allow_control_tokens: bool = False


class CountInputTokens(Prompted, kw_only=True):
    """Body of POST /v1/responses/input_tokens."""


class CreateResponse(Prompted, kw_only=True):
    """Body of POST /v1/responses."""

    max_output_tokens: int | None = None
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    resumable: bool = False
    return_progress: bool = False
    store: bool = True
    background: bool = False
    include: list[str] | None = None
    top_logprobs: int | None = None
    metadata: dict[str, str] | None = None
    # As in chat completions:
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    max_thinking_tokens: int | None = None
    regex: str | None = None
    ebnf: str | None = None
    choice: list[str] | None = None
    json_whitespace: str | None = None
    jump_forward: bool = True
    cache_salt: str = ""
    rid: str | None = None
    request_id: str | None = None
    priority: int = 0
    timeout: float | None = None
    # Checked for their types, without effect here:
    max_tool_calls: int | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    service_tier: str | None = None


# Handed to chat completions as they are, under the same names.
SHARED = tuple(
    name
    for name in CreateResponse.__struct_fields__
    if name in ChatRequest.__struct_fields__
    and name not in ("stream", "stream_options", "store", "tools", "tool_choice", "metadata", "top_logprobs", "resumable", "user")
    and not any(field.name == name and field.decision is Decision.WARNED for field in RESPONSES)
)


def read_create(given: Json) -> CreateResponse:
    """A body of POST /v1/responses, checked as far as that needs no tokens. Raises InvalidRequest naming the field."""
    _refuse(given)
    request = convert(given, CreateResponse)
    _check_prompted(request)
    check_range("top_logprobs", request.top_logprobs, 0, MAX_LOGPROBS)
    for index, name in enumerate(request.include or ()):
        if name not in INCLUDES:
            raise InvalidRequest(f"include[{index}] is {show(name)}; allowed is {', '.join(INCLUDES)}", param=f"include[{index}]")
    if request.service_tier is not None and request.service_tier not in SERVICE_TIERS:
        tiers = ", ".join(SERVICE_TIERS)
        raise InvalidRequest(f"service_tier is {show(request.service_tier)}; allowed is {tiers}", param="service_tier")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is given but stream is not true", param="stream_options")
    if request.background and not request.store:
        raise InvalidRequest(
            "background is true but store is false: a response that nobody waits for has to be kept", param="background"
        )
    if request.background and request.resumable:
        raise InvalidRequest(
            "resumable and background are both true; a background response's stream can be had again with "
            "GET /v1/responses/{id}?stream=true&starting_after=N",
            param="resumable",
        )
    if request.return_progress and (request.background or not request.stream):
        raise InvalidRequest(
            "return_progress is given but there is no stream to say it in: stream true and background false are needed",
            param="return_progress",
        )
    check_metadata(request.metadata or {})
    _check_repeatable(request)
    return request


def _check_repeatable(request: CreateResponse) -> None:
    """What a response repeats of its request has to be written again, and the writer goes less deep than the reader went."""
    given = [("tool_choice", request.tool_choice), ("text.format", request.text and request.text.format)]
    for path, value in (*given, *((f"tools[{index}]", tool) for index, tool in enumerate(request.tools or ()))):
        try:
            orjson.dumps([[[[value]]]])  # an event holds a response, which holds a list, of what holds it
        except orjson.JSONEncodeError:
            raise InvalidRequest(f"{path} is nested too deeply; at most 250 levels of JSON are allowed", param=path) from None


def read_count(given: Json) -> CreateResponse:
    """A body of POST /v1/responses/input_tokens, as the response whose input it counts."""
    _refuse(given)
    if given.get("personality") is not None:
        raise InvalidRequest("personality is not supported: write what you want into instructions", param="personality")
    request = convert({name: value for name, value in given.items() if name != "personality"}, CountInputTokens)
    _check_prompted(request)
    return CreateResponse(**{name: getattr(request, name) for name in CountInputTokens.__struct_fields__})


def _refuse(given: Json) -> None:
    for name, value in given.items():
        refused = REFUSED.get(name)
        if refused is not None and value is not None and value not in refused.harmless:
            raise InvalidRequest(f"{name} is {show(value)}, which is not supported: {refused.note}", param=name)
    for name in REFUSED.keys() & given.keys():
        del given[name]


def _check_prompted(request: Prompted) -> None:
    if request.truncation not in (None, "auto", "disabled"):
        raise InvalidRequest(f"truncation is {show(request.truncation)}; allowed is auto, disabled", param="truncation")
    reasoning = request.reasoning
    if reasoning is not None:
        for name, allowed in _REASONING.items():
            value = getattr(reasoning, name)
            if value is not None and value not in allowed:
                place = f"reasoning.{name}"
                raise InvalidRequest(f"{place} is {show(value)}; allowed is {', '.join(allowed)}", param=place)


_SUMMARIES = ("auto", "concise", "detailed")
_REASONING = {
    "summary": _SUMMARIES,
    "generate_summary": _SUMMARIES,
    "context": ("auto", "current_turn", "all_turns"),
    "mode": ("standard",),
}


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raises InvalidRequest for more than OpenAI allows."""
    if len(metadata) > MAX_METADATA:
        raise InvalidRequest(f"metadata has {len(metadata)} entries; at most {MAX_METADATA} are allowed", param="metadata")
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE:
            raise InvalidRequest(
                f"metadata has the entry {show(key)} of {len(key)} and {len(value)} characters; keys may have "
                f"{MAX_METADATA_KEY}, values {MAX_METADATA_VALUE}",
                param="metadata",
            )


def warnings_for(request: CreateResponse) -> tuple[str, ...]:
    """A sentence for each wish that has no effect."""
    warnings = [
        f"{field.name} has no effect: {field.note}"
        for field in RESPONSES
        if field.decision is Decision.WARNED and getattr(request, field.name) not in (None, *field.harmless)
    ]
    warnings += [f"include {name} has no effect: {INCLUDES[name]}" for name in request.include or () if INCLUDES[name]]
    reasoning = request.reasoning
    if reasoning is not None and (reasoning.summary or reasoning.generate_summary):
        warnings.append("reasoning.summary has no effect: the reasoning itself is given, and nobody sums it up")
    if reasoning is not None and reasoning.context not in (None, "auto"):
        warnings.append("reasoning.context has no effect: the chat template decides which reasoning the model sees again")
    return tuple(warnings)


# ---- in terms of chat completions --------------------------------------------------------------------------------


def chat_of(request: CreateResponse, messages: Sequence[Message]) -> ChatRequest:
    """The chat request that a response is the answer to. Raises InvalidRequest naming the field of the response's body."""
    given: Json = {name: getattr(request, name) for name in SHARED}
    given["messages"] = [message.value for message in messages]
    given["max_completion_tokens"] = request.max_output_tokens
    given["logprobs"] = wants_logprobs(request)
    given["top_logprobs"] = (request.top_logprobs or 0) if wants_logprobs(request) else None
    given["tools"] = [_chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())] or None
    given["tool_choice"] = _chat_choice(request.tool_choice)
    if request.text is not None:
        given["response_format"] = _chat_format(request.text.format)
        given["verbosity"] = request.text.verbosity
    if request.reasoning is not None:
        given["reasoning_effort"] = request.reasoning.effort
    try:
        return convert(given, ChatRequest)
    except InvalidRequest as error:
        raise renamed(error, messages) from None


def wants_logprobs(request: CreateResponse) -> bool:
    """Whether the answer carries log-probabilities."""
    return request.top_logprobs is not None or LOGPROBS in (request.include or ())


def _chat_tool(given: Json, path: str) -> Json:
    kind = given.get("type")
    if kind != "function":
        raise InvalidRequest(
            f"{path}.type is {show(kind)}; allowed is function: the server runs no tools of its own", param=f"{path}.type"
        )
    try:
        tool = convert(given, FunctionTool)
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error}", param=f"{path}.{error.param}") from None
    for name, harmless in (("defer_loading", (False,)), ("allowed_callers", (["direct"],)), ("output_schema", ())):
        value = getattr(tool, name)
        if value is not None and value not in harmless:
            place = f"{path}.{name}"
            raise InvalidRequest(f"{place} is {show(value)}, which is not supported: leave it out", param=place)
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _chat_choice(given: str | Json | None) -> str | Json | None:
    if not isinstance(given, dict):
        return given
    if given.get("type") == "function":
        return {"type": "function", "function": {name: value for name, value in given.items() if name != "type"}}
    if given.get("type") == "allowed_tools":
        named = given.get("tools")
        if isinstance(named, list):
            named = [_chat_choice(tool) if isinstance(tool, dict) else tool for tool in named]
        more = {name: value for name, value in given.items() if name not in ("type", "tools")}
        return {"type": "allowed_tools", "allowed_tools": {**more, "tools": named}}
    raise InvalidRequest(
        f"tool_choice.type is {show(given.get('type'))}; allowed is function, allowed_tools", param="tool_choice.type"
    )


def _chat_format(given: Json | None) -> Json | None:
    if given is None or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


_FIELDS = (
    (r"max_completion_tokens|max_tokens", "max_output_tokens"),
    (r"response_format\.json_schema|response_format", "text.format"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"verbosity", "text.verbosity"),
    (r"logprobs", "include"),
)


def renamed(error: RequestError, messages: Sequence[Message]) -> RequestError:
    """The same error, naming the field of these bodies that a chat's field was made from."""
    param = error.param or ""
    ours = own_name(param, messages)
    if ours == param:
        return error
    same = type(error)(str(error).replace(param, ours, 1), param=ours)
    assert isinstance(same, RequestError)
    return same


def own_name(param: str, messages: Sequence[Message]) -> str:
    """What a chat's field is called in these bodies."""
    if message := re.match(r"messages\[(\d+)\]", param):
        return messages[int(message[1])].path + param[message.end() :]
    if re.match(r"messages\b", param):
        return "input" + param[len("messages") :]
    if re.match(r"tools\b|tool_choice\b", param):
        return param.replace(".function", "").replace(".allowed_tools", "")
    for theirs, name in _FIELDS:
        if found := re.match(rf"({theirs})(?![a-z_])", param):
            return name + param[found.end() :]
    return param


# ---- what a response repeats of its request ----------------------------------------------------------------------


def repeated(request: CreateResponse) -> Json:
    """The fields of a response object that are its request's."""
    text = request.text or TextOptions()
    reasoning = request.reasoning or ReasoningOptions()
    return {
        "background": request.background,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": request.store,
        "text": {"format": _shown_format(text.format), "verbosity": text.verbosity or "medium"},
        "tool_choice": request.tool_choice if request.tool_choice is not None else "auto",
        "tools": [_shown_tool(tool) for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "truncation": request.truncation or "disabled",
        "user": request.user,
    }


def _shown_tool(tool: Json) -> Json:
    return {"description": None, "parameters": None, **tool, "strict": bool(tool.get("strict"))}


def _shown_format(given: Json | None) -> Json:
    if given is None:
        return {"type": "text"}
    return {"description": None, **given, "strict": bool(given.get("strict"))} if given.get("type") == "json_schema" else given
