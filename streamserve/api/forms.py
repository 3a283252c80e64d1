"""What form an answer is to have: the constraint, the tools and the thoughts that a body asks for.

Owns what those fields mean together, and which formats the served model writes calls and thoughts in. What comes out is guidance
for the engine (a grammar, limits of the thought) and a reading for the text (api/answer.py). Knows nothing of sampling, of
answers' shapes or of how a grammar is spelt (text/structure.py, text/tools).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamserve.api.answer import Reading
from streamserve.api.schema import (
    ChatRequest,
    CompletionRequest,
    FunctionDefinition,
    Sampled,
    TokenizeRequest,
    ToolDefinition,
    check_range,
    show,
)
from streamserve.config import ServerConfig
from streamserve.errors import InvalidRequest
from streamserve.messages import Guidance
from streamserve.text.model import TextModel
from streamserve.text.tools.format import Demand, Tool

MAX_TOOLS = 1024
MAX_THOUGHT_TOKENS = 10_000_000
TAIL_LEN = 64  # tokens at a prompt's end among which the template may have opened or closed a thought
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")
VERBOSITIES = ("low", "medium", "high")
THINKING_SWITCHES = ("enable_thinking", "thinking")  # as chat templates call them
_NAME = re.compile(r"[a-zA-Z0-9_.:/-]{1,128}")


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of one request: what the template shows of them, those that may be called, and how many calls there are to be.

    `demand.min_calls` 0: the model decides. `param` is the field that brought them. `is_legacy`: OpenAI's older form.
    """

    shown: tuple[dict[str, Any], ...]
    callable: tuple[Tool, ...]
    demand: Demand
    param: str = "tools"
    is_legacy: bool = False


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must match. `param` is the field that says so, `kind` how `value` says it."""

    param: str
    kind: str
    value: Any


# ---- tools -----------------------------------------------------------------------------------------------------------------


def tools_of(request: ChatRequest) -> Tools | None:
    """The request's tools; None when there are none, or none may be called. Raises InvalidRequest naming the field."""
    if request.functions is not None or request.function_call is not None:
        return _legacy_tools(request)
    definitions = [_function(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())]
    tools = _checked(definitions, "tools", ".function")
    choice = request.tool_choice
    max_calls = 1 if request.parallel_tool_calls is False else None
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest(f"tool_choice is {show(choice)}, but there are no tools", param="tool_choice")
        return None
    if choice == "none":
        return None
    if choice in (None, "auto"):
        return Tools(_shown(definitions), tools, Demand(0, max_calls))
    if choice == "required":
        return Tools(_shown(definitions), tools, Demand(1, max_calls))
    if isinstance(choice, Mapping):
        if choice.get("type") == "allowed_tools":
            return _allowed(choice, definitions, tools, max_calls)
        name = _named(choice, "tool_choice")
        _find(name, tools, "tool_choice", "tools")
        return Tools(_shown(definitions), tools, Demand(1, 1, name))
    raise InvalidRequest(
        f'tool_choice is {show(choice)}; allowed is "none", "auto", "required" or '
        f'{{"type": "function", "function": {{"name": …}}}}',
        param="tool_choice",
    )


def _legacy_tools(request: ChatRequest) -> Tools | None:
    for name in ("tools", "tool_choice"):
        if getattr(request, name) is not None:
            older = "functions" if request.functions is not None else "function_call"
            raise InvalidRequest(f"{name} and {older} are both given; leave the older one out", param=older)
    definitions = request.functions or []
    tools = _checked(definitions, "functions", "")
    choice = request.function_call
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest(f"function_call is {show(choice)}, but there are no functions", param="function_call")
        return None
    if choice == "none":
        return None
    if choice in (None, "auto"):
        return Tools(_shown(definitions), tools, Demand(0, 1), "functions", is_legacy=True)
    if not isinstance(choice, Mapping):
        raise InvalidRequest(
            f'function_call is {show(choice)}; allowed is "none", "auto" or {{"name": …}}', param="function_call"
        )
    name = _named(choice, "function_call")
    _find(name, tools, "function_call", "functions")
    return Tools(_shown(definitions), tools, Demand(1, 1, name), "functions", is_legacy=True)


def _function(tool: ToolDefinition, path: str) -> FunctionDefinition:
    if tool.type != "function":
        raise InvalidRequest(f"{path}.type is {show(tool.type)}; only functions can be called here", param=f"{path}.type")
    if tool.custom is not None:
        raise InvalidRequest(f"{path}.custom is given; only functions can be called here", param=f"{path}.custom")
    if tool.function is None:
        raise InvalidRequest(f"{path}.function is missing", param=f"{path}.function")
    return tool.function


def _checked(definitions: Sequence[FunctionDefinition], param: str, inside: str) -> tuple[Tool, ...]:
    if len(definitions) > MAX_TOOLS:
        raise InvalidRequest(f"{param} has {len(definitions)} entries; at most {MAX_TOOLS} are allowed", param=param)
    seen: set[str] = set()
    for index, given in enumerate(definitions):
        path = f"{param}[{index}]{inside}.name"
        if not _NAME.fullmatch(given.name):
            raise InvalidRequest(
                f"{path} is {show(given.name)}; allowed are 1 to 128 letters, digits and the characters _ . : / -", param=path
            )
        if given.name in seen:
            raise InvalidRequest(f"{path} is {show(given.name)}, as another one's is already", param=path)
        seen.add(given.name)
    return tuple(Tool(given.name, given.description or "", given.parameters, given.strict is True) for given in definitions)


def _shown(definitions: Sequence[FunctionDefinition]) -> tuple[dict[str, Any], ...]:
    """As templates know tools; what is left out has the value that models have seen most."""
    nothing: Mapping[str, Any] = {"type": "object", "properties": {}}
    return tuple(
        {
            "type": "function",
            "function": {"name": given.name, "description": given.description or "", "parameters": given.parameters or nothing},
        }
        for given in definitions
    )


def shown_tools(tools: Sequence[ToolDefinition] | None) -> tuple[dict[str, Any], ...]:
    """Tools as templates know them. Raises InvalidRequest."""
    definitions = [_function(tool, f"tools[{index}]") for index, tool in enumerate(tools or ())]
    _checked(definitions, "tools", ".function")
    return _shown(definitions)


def _named(choice: Mapping[str, Any], param: str) -> str:
    """The name in a choice, in either spelling: {"type", "function": {"name"}}, or {"type", "name"}."""
    if choice.get("type", "function") != "function":
        raise InvalidRequest(
            f'{param}.type is {show(choice["type"])}; allowed is "function" or "allowed_tools"', param=f"{param}.type"
        )
    inner = choice.get("function", choice)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str):
        raise InvalidRequest(f"{param} is {show(choice)}; it names no function", param=param)
    if unknown := sorted({*choice, *inner} - {"type", "function", "name"}):
        raise InvalidRequest(f"unknown field {show(unknown[0])} in {param}; leave it out", param=f"{param}.{unknown[0]}"[:256])
    return name


def _find(name: str, tools: Sequence[Tool], param: str, where: str) -> Tool:
    for tool in tools:
        if tool.name == name:
            return tool
    raise InvalidRequest(f"{param} names {show(name)}, which is not in {where}", param=param)


def _allowed(
    choice: Mapping[str, Any], definitions: Sequence[FunctionDefinition], tools: Sequence[Tool], max_calls: int | None
) -> Tools:
    """Some of the tools may be called; the model is shown all of them, so that the prompt's prefix stays what it was."""
    path = "tool_choice.allowed_tools" if "allowed_tools" in choice else "tool_choice"
    given = choice.get("allowed_tools", choice)
    mode = given.get("mode") if isinstance(given, Mapping) else None
    names = given.get("tools") if isinstance(given, Mapping) else None
    if mode not in ("auto", "required"):
        raise InvalidRequest(f'{path}.mode is {show(mode)}; allowed is "auto" or "required"', param=f"{path}.mode")
    if not isinstance(names, list) or not names or not all(isinstance(entry, Mapping) for entry in names):
        raise InvalidRequest(f"{path}.tools is {show(names)}; it must name at least one tool", param=f"{path}.tools")
    wanted = {_named(entry, f"{path}.tools[{index}]") for index, entry in enumerate(names)}
    for name in sorted(wanted):
        _find(name, tools, f"{path}.tools", "tools")
    may = tuple(tool for tool in tools if tool.name in wanted)
    return Tools(_shown(definitions), may, Demand(1 if mode == "required" else 0, max_calls))


# ---- constraints -----------------------------------------------------------------------------------------------------------

FORMATS = ("text", "json_object", "json_schema", "structural_tag")


def constraint_of(request: Sampled) -> Constraint | None:
    """What the answer must match. Raises InvalidRequest when that is said twice, or not clearly."""
    given: list[Constraint] = []
    if request.response_format is not None:
        kind = request.response_format.get("type")
        if kind not in FORMATS:
            raise InvalidRequest(
                f"response_format.type is {show(kind)}; allowed is {', '.join(FORMATS)}", param="response_format.type"
            )
        if kind != "text":
            given.append(Constraint("response_format", kind, request.response_format))
    for name, kind in (
        ("json_schema", "schema"),
        ("regex", "regex"),
        ("ebnf", "ebnf"),
        ("choice", "choice"),
        ("guided_choice", "choice"),
    ):
        if (value := getattr(request, name)) is not None:
            given.append(Constraint(name, kind, value))
    if len(given) > 1:
        raise InvalidRequest(
            f"{given[0].param} and {given[1].param} are both given; an answer has one form", param=given[1].param
        )
    if request.json_whitespace is not None and request.json_whitespace not in ("compact", "flexible"):
        raise InvalidRequest(
            f'json_whitespace is {show(request.json_whitespace)}; allowed is "compact" or "flexible"', param="json_whitespace"
        )
    return given[0] if given else None


# ---- thoughts --------------------------------------------------------------------------------------------------------------


def thought_limit_of(request: ChatRequest) -> int | None:
    """The most tokens of thought; None: no limit."""
    for name in ("max_thinking_tokens", "thinking_budget"):
        check_range(name, getattr(request, name), 0, MAX_THOUGHT_TOKENS)
    if request.max_thinking_tokens is not None and request.thinking_budget is not None:
        raise InvalidRequest("max_thinking_tokens and thinking_budget are both given; they say the same", param="thinking_budget")
    return request.max_thinking_tokens if request.thinking_budget is None else request.thinking_budget


def template_variables(request: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """What the request says to the chat template. `chat_template_kwargs` has the last word."""
    said: dict[str, Any] = {}
    if request.reasoning_effort is not None:
        if request.reasoning_effort not in EFFORTS:
            raise InvalidRequest(
                f"reasoning_effort is {show(request.reasoning_effort)}; allowed is {', '.join(EFFORTS)}", param="reasoning_effort"
            )
        said["reasoning_effort"] = request.reasoning_effort
        if request.reasoning_effort == "none":
            said |= {name: False for name in THINKING_SWITCHES}
    if request.verbosity is not None:
        if request.verbosity not in VERBOSITIES:
            raise InvalidRequest(
                f"verbosity is {show(request.verbosity)}; allowed is {', '.join(VERBOSITIES)}", param="verbosity"
            )
        said["verbosity"] = request.verbosity
    return {**said, **(request.chat_template_kwargs or {})}


# ---- all of it -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Form:
    """What a chat's answer is to look like, before its prompt is known."""

    shown_tools: tuple[dict[str, Any], ...] = ()

    def behind(self, prompt: Sequence[int]) -> tuple[Guidance | None, Reading | None]:
        """What that is for the engine and for the text, behind this prompt."""
        return None, None


class Forms:
    """Makes forms, of one model."""

    def __init__(self, text: TextModel, config: ServerConfig) -> None:
        self._text = text

    async def of_chat(self, request: ChatRequest) -> Form:
        """A chat's form. Raises InvalidRequest naming the field."""
        for name, value in (
            ("tools", tools_of(request)),
            ("response_format", constraint_of(request)),
            ("max_thinking_tokens", thought_limit_of(request)),
        ):
            if value is not None:
                raise InvalidRequest(f"{name}: not supported yet, leave it out", param=name)
        return Form()

    async def of_completion(self, request: CompletionRequest) -> Guidance | None:
        """A completion's constraint. Raises InvalidRequest naming the field."""
        if (constraint := constraint_of(request)) is not None:
            raise InvalidRequest(f"{constraint.param} is not supported yet, leave it out", param=constraint.param)
        return None

    def warnings_of(self, request: ChatRequest) -> tuple[str, ...]:
        """What is meant for the chat template, and the template does not read."""
        if self._text.template is None:
            return ()
        read = self._text.template.variables
        warnings: list[str] = []
        if (effort := request.reasoning_effort) is not None:
            wanted = {"reasoning_effort", *(THINKING_SWITCHES if effort == "none" else ())}
            if not wanted & read:
                warnings.append("reasoning_effort has no effect: the chat template does not read it")
        if request.verbosity not in (None, "medium") and "verbosity" not in read:
            warnings.append("verbosity has no effect: the chat template does not read it")
        if unread := sorted(set(request.chat_template_kwargs or ()) - read):
            warnings.append(f"chat_template_kwargs.{unread[0][:64]} has no effect: the chat template does not read it")
        return tuple(warnings)
