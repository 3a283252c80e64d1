"""What form an answer is to have: the constraint, the tools and the thoughts that a body asks for.

Owns what those fields mean together, and which formats the served model writes calls and thoughts in. What comes out is guidance
for the engine (a grammar, limits of the thought) and a reading for the text (api/answer.py). Knows nothing of sampling, of
answers' shapes or of how a grammar is spelt (text/structure.py, text/tools).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import orjson
from anyio import CapacityLimiter, to_thread

from streamserve.api.answer import Reading
from streamserve.api.prompts import chars_of
from streamserve.api.schema import (
    ChatRequest,
    FunctionDefinition,
    Sampled,
    TokenizeRequest,
    ToolDefinition,
    check_range,
    show,
)
from streamserve.config import ServerConfig
from streamserve.errors import ConfigError, InvalidRequest
from streamserve.messages import Guidance, ThoughtLimits
from streamserve.text import reasoning as reasoning_formats
from streamserve.text import structure
from streamserve.text.lark import Grammar, led
from streamserve.text.model import TextModel
from streamserve.text.reasoning import ReasoningFormat
from streamserve.text.structure import text_of
from streamserve.text.tokenizer import Tokenizer
from streamserve.text.tools import find as tool_formats
from streamserve.text.tools.format import Demand, Tool, ToolFormat
from streamserve.text.tools.schemas import parameters_of

T = TypeVar("T")

MAX_TOOLS = 1024
INLINE_CHARS = 8000  # of schemas; about a millisecond
DESCRIBED = "hermes"  # the format that tools are described in where the template leaves them out (text/tools/find.py)
CHANNELLED = "gpt_oss"  # the format that reads thoughts too
JSON_KINDS = ("json_object", "json_schema", "schema", "structural_tag")
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
        if kind == "text":
            _check_keys(request.response_format, ("type",), "response_format")
        else:
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
    return given[0] if given else None


# ---- thoughts --------------------------------------------------------------------------------------------------------------


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
class Fitted:
    """A form behind its prompt: what it is for the engine, and for the text."""

    guidance: Guidance | None = None
    reading: Reading | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Form:
    """What a chat's answer is to look like, before its prompt is known."""

    request: ChatRequest
    tools: Tools | None = None
    grammar: str | None = None
    param: str = "response_format"
    warnings: tuple[str, ...] = ()

    @property
    def shown_tools(self) -> tuple[dict[str, Any], ...]:
        """The tools as the template sees them."""
        return () if self.tools is None else self.tools.shown


class Forms:
    """Makes forms, of one model. Raises ConfigError for a format that is not known."""

    def __init__(self, text: TextModel, config: ServerConfig) -> None:
        self._text = text
        self._control = control_tokens(text.tokenizer)
        source = None if text.template is None else text.template.source
        self.reasoning = _reasoning(config.reasoning_parser, source)
        self._is_channelled = self.reasoning is not None and self.reasoning.is_channelled
        self.tool_format = _tool_format(config.tool_call_parser, text, source, self._control, self._is_channelled)
        self._limiter = CapacityLimiter(1)  # threads for large schemas

    async def of_chat(self, request: ChatRequest) -> Form:
        """A chat's form. Raises InvalidRequest naming the field."""
        tools, constraint = tools_of(request), constraint_of(request)
        for name in ("max_thinking_tokens", "thinking_budget"):
            check_range(name, getattr(request, name), 0, MAX_THOUGHT_TOKENS)
            if getattr(request, name) is not None and self.reasoning is None:
                raise InvalidRequest(
                    f"{name} is {getattr(request, name)}, but this model is not known to reason (--reasoning-parser)", param=name
                )
        if request.max_thinking_tokens is not None and request.thinking_budget is not None:
            raise InvalidRequest(
                "max_thinking_tokens and thinking_budget are both given; they say the same", param="thinking_budget"
            )
        whitespace = request.json_whitespace or "compact"
        grammar = await self._made(lambda: self._grammar(tools, constraint, whitespace), _size(tools, constraint))
        is_forced = tools is not None and tools.demand.min_calls > 0
        warnings: list[str] = []
        if is_forced and constraint is not None:
            warnings.append(f"{constraint.param} has no effect: a call is demanded, and it has a form of its own")
        else:
            warnings += whitespace_warnings(request, constraint)
        param = constraint.param if constraint is not None and not is_forced else "tools"
        return Form(request, tools, grammar, param, tuple(warnings))

    async def of_completion(self, request: Sampled) -> Guidance | None:
        """A completion's constraint. Raises InvalidRequest naming the field."""
        return await self.guidance(constraint_of(request), request.json_whitespace or "compact", may_jump=request.jump_forward)

    async def guidance(
        self, constraint: Constraint | None, whitespace: str = "compact", *, may_jump: bool = True
    ) -> Guidance | None:
        """A constraint as the engine takes it, for answers without thoughts. Raises InvalidRequest naming its field."""
        if constraint is None:
            return None
        grammar = await self._made(lambda: text_of(grammar_of(constraint, whitespace, self._control)), _size(None, constraint))
        return Guidance(grammar, constraint.param, may_jump)

    async def _made(self, make: Callable[[], T], size: int) -> T:
        if size <= INLINE_CHARS:
            return make()
        return await to_thread.run_sync(make, limiter=self._limiter)

    def _grammar(self, tools: Tools | None, constraint: Constraint | None, whitespace: str) -> str | None:
        is_forced = tools is not None and tools.demand.min_calls > 0
        answer = None if constraint is None or is_forced else grammar_of(constraint, whitespace, self._control)
        if tools is not None and (is_forced or answer is not None or any(tool.is_strict for tool in tools.callable)):
            held = tools.callable if is_forced else [_held(tool) for tool in tools.callable]
            return self.tool_format.grammar(held, tools.demand, answer)
        if answer is None:
            return None
        if self._is_channelled:
            return self.tool_format.grammar((), Demand(0, 0), answer)
        return text_of(answer)

    def fit(self, form: Form, prompt: Sequence[int]) -> Fitted:
        """The form behind this prompt, in which a template may have begun a thought, or ruled it out."""
        request, tools, reasoning = form.request, form.tools, self.reasoning
        is_open, may_think = self._thinks(request, prompt)
        warnings = list(form.warnings)
        thought: ThoughtLimits | None = None
        limit = request.thinking_budget if request.max_thinking_tokens is None else request.max_thinking_tokens
        if reasoning is not None and may_think:
            thought = ThoughtLimits(reasoning.begin.encode(), reasoning.end.encode(), self._end_ids(reasoning), is_open, limit)
        elif limit is not None:
            warnings.append("the limit of thinking has no effect: thinking is off")
        guidance = None
        if form.grammar is not None or thought is not None:
            lead = "" if thought is None or reasoning is None else reasoning.lead
            grammar = form.grammar if form.grammar is None or not lead else led(form.grammar, lead)
            guidance = Guidance(grammar, form.param, request.jump_forward, thought)
        return Fitted(guidance, self._reading(request, tools, is_open), tuple(warnings))

    def _thinks(self, request: ChatRequest, prompt: Sequence[int]) -> tuple[bool, bool]:
        """Whether the prompt ends inside a thought; whether the answer may hold one."""
        reasoning = self.reasoning
        if reasoning is None:
            return False, False
        if request.continue_final_message:
            content = request.messages[-1].content
            is_open = reasoning.is_open(content if isinstance(content, str) else "", continues=True)
            return is_open, is_open
        tail = self._text.tokenizer.decode(prompt[-TAIL_LEN:], skip_special_tokens=False)
        is_open = reasoning.is_open(tail)
        return is_open, is_open or not tail.rstrip().endswith(reasoning.end)

    def _end_ids(self, reasoning: ReasoningFormat) -> tuple[int, ...]:
        end = reasoning.end if reasoning.is_channelled else "\n" + reasoning.end
        return tuple(self._text.tokenizer.encode(end, continues=True))

    def _reading(self, request: ChatRequest, tools: Tools | None, is_open: bool) -> Reading | None:
        reasoning, format = self.reasoning, self.tool_format
        splits = reasoning is not None and not reasoning.is_channelled and request.separate_reasoning
        markers: list[str] = []
        splitter = parser = None
        if reasoning is not None and not reasoning.is_channelled:
            markers += (reasoning.begin, reasoning.end)
            if splits:
                splitter = partial(reasoning.splitter, is_open=is_open, triggers=() if tools is None else format.triggers)
        if tools is not None or self._is_channelled:
            markers += format.control_tokens
            parser = partial(format.parser, () if tools is None else tools.callable)
        found = {text: id for text, id in self._control.items() if any(text in marker for marker in markers)}
        if splitter is None and parser is None and not found:
            return None
        return Reading(
            splitter,
            parser,
            frozenset(found.values()),
            hidden=tuple(found) if request.skip_special_tokens and request.separate_reasoning else (),
            has_thoughts=splits or (self._is_channelled and request.separate_reasoning),
            streams_thought=request.stream_reasoning,
            max_calls=None if tools is None else tools.demand.max_calls,
        )

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


def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The vocabulary's control tokens by their texts."""
    ids = (id for id in range(tokenizer.vocab_size) if tokenizer.is_special(id))
    return {text: id for id in ids if (text := tokenizer.id_to_text(id))}


def _tool_format(name: str, text: TextModel, source: str | None, control: Mapping[str, int], is_channelled: bool) -> ToolFormat:
    if is_channelled:
        if name not in ("auto", CHANNELLED):
            raise ConfigError(
                f"--tool-call-parser is {name}, but the model's thoughts are in {CHANNELLED}'s channels, as calls are then"
            )
        return tool_formats.find(CHANNELLED, control)
    has_own = text.template is not None and text.template.renders_tools
    if name == "auto":
        return tool_formats.auto(source, control) if has_own else tool_formats.find(DESCRIBED, control)
    try:
        found = tool_formats.find(name, control)
    except InvalidRequest as error:
        raise ConfigError(f"--tool-call-parser: {error}") from None
    if not has_own and found.name != DESCRIBED:
        raise ConfigError(
            f"--tool-call-parser is {name}, but the chat template shows no tools to the model, so that they are described to it "
            f"with calls in the form of {DESCRIBED}; leave the flag out, or give a template with --chat-template"
        )
    if found.name == CHANNELLED:
        raise ConfigError(
            f"--tool-call-parser is {name}, whose calls stand among thoughts: --reasoning-parser must be gpt-oss then"
        )
    return found


def _reasoning(name: str, source: str | None) -> ReasoningFormat | None:
    if name == "none" or (name == "auto" and source is None):
        return None
    try:
        return reasoning_formats.auto(source or "") if name == "auto" else reasoning_formats.find(name)
    except InvalidRequest as error:
        raise ConfigError(f"--reasoning-parser: {error}; none and auto are too") from None


def whitespace_warnings(request: Sampled, constraint: Constraint | None) -> tuple[str, ...]:
    """A wish for white space where there is no JSON to put it into."""
    if request.json_whitespace is None or (constraint is not None and constraint.kind in JSON_KINDS):
        return ()
    return ("json_whitespace has no effect: the answer is not constrained to be JSON",)


def _held(tool: Tool) -> Tool:
    """A tool that the model may call or not: one that is not strict is held to its schema only where a grammar can."""
    if not tool.is_strict:
        try:
            parameters_of(tool)
        except InvalidRequest:
            return replace(tool, parameters={})
    return tool


def grammar_of(constraint: Constraint, whitespace: str, control: Mapping[str, int]) -> Grammar:
    """What a constraint allows. Raises InvalidRequest naming the place in the request that cannot be."""
    param, value = constraint.param, constraint.value
    match constraint.kind:
        case "json_object":
            _check_keys(value, ("type",), param)
            return structure.json_object(whitespace)
        case "json_schema":
            return _described_schema(value, param, whitespace)
        case "schema":
            return structure.json_schema(_loaded(value, param), param, whitespace, closes_objects=True)
        case "regex":
            return structure.regex(value, param)
        case "ebnf":
            return structure.ebnf(value, param)
        case "choice":
            return structure.choice(value, param)
    assert constraint.kind == "structural_tag", constraint.kind
    return structure.structural_tag(_loaded(value, param), param, whitespace, control)


def _described_schema(value: Mapping[str, Any], param: str, whitespace: str) -> Grammar:
    _check_keys(value, ("type", "json_schema"), param)
    described = value.get("json_schema")
    path = f"{param}.json_schema"
    if not isinstance(described, Mapping):
        raise InvalidRequest(f"{path} is {show(described)}; it must be an object with a schema", param=path)
    _check_keys(described, ("name", "description", "schema", "strict"), path)
    schema = described.get("schema")
    if schema is None:
        raise InvalidRequest(f"{path}.schema is missing", param=f"{path}.schema")
    return structure.json_schema(schema, f"{path}.schema", whitespace, closes_objects=True)


def _check_keys(value: Mapping[str, Any], known: Sequence[str], path: str) -> None:
    if unknown := sorted(set(value) - set(known)):
        raise InvalidRequest(f"unknown field {show(unknown[0])} in {path}; leave it out", param=f"{path}.{unknown[0]}"[:256])


def _loaded(value: Any, param: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"{param} is {show(value)}, which is not JSON: {error.msg} (at {error.pos})", param=param) from None


def _size(tools: Tools | None, constraint: Constraint | None) -> int:
    """About how many characters there are to go through."""
    size = 0 if constraint is None else chars_of(constraint.value)
    if tools is not None and (tools.demand.min_calls or constraint is not None or any(t.is_strict for t in tools.callable)):
        size += sum(chars_of(tool.parameters) for tool in tools.callable)
    return size
