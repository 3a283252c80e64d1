"""Bodies of Anthropic's Messages API in the words of a chat: how blocks become turns, and settings those of a chat.

Owns what these bodies mean. Knows nothing of tokens, runs or answers.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NoReturn

import orjson
from msgspec import Struct

from streamserve.api.anthropic_events import unseal
from streamserve.api.anthropic_schema import (
    ALLOWED,
    Base64Source,
    Block,
    ContextManagement,
    CountTokensRequest,
    DocumentBlock,
    FileSource,
    ImageBlock,
    Keep,
    MessagesRequest,
    OutputConfig,
    RedactedThinkingBlock,
    SearchResultBlock,
    TextBlock,
    Thinking,
    ThinkingBlock,
    Tool,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from streamserve.api.fields import MESSAGES, Decision
from streamserve.api.forms import THINKING_SWITCHES
from streamserve.api.schema import (
    ChatRequest,
    FunctionDefinition,
    ImageUrl,
    Message,
    Part,
    PartName,
    ToolCall,
    ToolDefinition,
    ToolFunction,
    check_range,
    show,
)
from streamserve.errors import InvalidRequest

# Claude Code's first line of a system prompt. It differs in every request, so that no prefix would ever be found in the cache.
BILLING_LINE = re.compile(r"x-anthropic-billing-header:[^\n]*\n?")
OLD_NAME = "output_format"  # of output_config.format
MAX_TOKENS = 10_000_000


@dataclass(frozen=True, slots=True)
class Translation:
    """A request in the words of a chat. `tool_places`: where among the request's tools those of the chat stand. `cleared`:
    thoughts that it asked to leave out. `warnings`: what of it has no effect. `names`: what the chat's parts with pictures are
    called here.
    """

    chat: ChatRequest
    tool_places: tuple[int, ...]
    cleared: tuple[str, ...]
    warnings: tuple[str, ...]
    names: Mapping[str, PartName]


def translate(request: CountTokensRequest, template_reads: Set[str], *, can_think: bool) -> Translation:
    """The request in the words of a chat. `template_reads` are the variables of the model's chat template; `can_think`: the model
    is known to reason. Raises InvalidRequest naming the field at fault."""
    turns = _Turns(request)
    tools = _tools(request, turns.references)
    thinking = request.thinking
    chat = ChatRequest(
        model=request.model,
        messages=turns.made,
        continue_final_message=turns.is_open,
        add_generation_prompt=not turns.is_open,
        chat_template_kwargs=_thinking_switch(thinking, template_reads),
        tools=[_tool(tool, f"tools[{place}]") for place, tool in tools.items()] or None,
        **_calls(request),
        **_output(request),
    )
    if can_think and thinking is not None and thinking.type == "enabled":
        chat.max_thinking_tokens = thinking.budget_tokens
    if isinstance(request, MessagesRequest):
        _add_sampling(request, chat)
    warnings = [*_thinking_warnings(thinking, chat.chat_template_kwargs is not None, can_think), *_warnings(request)]
    return Translation(chat, tuple(tools), tuple(turns.cleared), tuple(warnings), turns.names)


def _thinking_warnings(thinking: Thinking | None, has_switch: bool, can_think: bool) -> Iterator[str]:
    """Agents ask for thoughts whatever model they talk to: from one that has none they get an answer all the same."""
    if thinking is None:
        return
    if thinking.type != "disabled" and not can_think:
        yield "thinking has no effect: this model is not known to reason (--reasoning-parser)"
    if thinking.type == "disabled" and can_think and not has_switch:
        yield "thinking has no effect: the chat template has no switch to turn it off"


def _warnings(request: CountTokensRequest) -> Iterator[str]:
    """Of what has no effect here; for the rest see fields.py."""
    if any(isinstance(block, RedactedThinkingBlock) for turn in request.messages for block in _as_blocks(turn.content)):
        yield "redacted_thinking has no effect: only Anthropic can read it"
    if isinstance(request, MessagesRequest):
        for field in MESSAGES:
            if field.decision is Decision.WARNED and getattr(request, field.name) not in (None, *field.harmless):
                yield f"{field.name} has no effect: {field.note}"


def _add_sampling(request: MessagesRequest, chat: ChatRequest) -> None:
    check_range("max_tokens", request.max_tokens, 0, MAX_TOKENS)
    if request.temperature is not None and not 0 <= request.temperature <= 1:
        raise InvalidRequest(f"temperature is {request.temperature}; allowed is 0 to 1", param="temperature")
    thinking = request.thinking
    if thinking is not None and thinking.type == "enabled":
        budget = thinking.budget_tokens
        if budget is None:
            raise InvalidRequest("thinking.budget_tokens is missing", param="thinking.budget_tokens")
        if not 1 <= budget < request.max_tokens:
            raise InvalidRequest(
                f"thinking.budget_tokens is {budget}; allowed is 1 to {request.max_tokens - 1}, below max_tokens, "
                f"which holds thought and answer",
                param="thinking.budget_tokens",
            )
    chat.stop = request.stop_sequences
    chat.stream, chat.resumable = request.stream, request.resumable
    chat.temperature, chat.top_p, chat.top_k, chat.seed = request.temperature, request.top_p, request.top_k, request.seed
    chat.priority, chat.timeout = request.priority, request.timeout


def _thinking_switch(thinking: Thinking | None, template_reads: Set[str]) -> dict[str, Any] | None:
    """Who does not ask for thinking gets none, as with Anthropic; models that always think do so all the same."""
    wants = thinking is not None and thinking.type != "disabled"
    return {name: wants for name in THINKING_SWITCHES if name in template_reads} or None


def _output(request: CountTokensRequest) -> dict[str, Any]:
    config = request.output_config or OutputConfig()
    if config.format is not None and request.output_format is not None:
        raise InvalidRequest(f"{OLD_NAME} and output_config.format are both given; only one can be", param=OLD_NAME)
    made: dict[str, Any] = {}
    if (wanted := config.format or request.output_format) is not None:
        schema = {"name": "output", "schema": wanted.schema, "strict": True}
        made["response_format"] = {"type": "json_schema", "json_schema": schema}
    if config.effort is not None:  # models know three levels
        made["reasoning_effort"] = config.effort if config.effort in ("low", "medium") else "high"
    return made


# ---- tools ----------------------------------------------------------------------------------------------------------------


def _tools(request: CountTokensRequest, references: Mapping[str, str]) -> dict[int, Tool]:
    """The tools that the model knows of at this point, by their places among those of the request."""
    given = request.tools or []
    names = {tool.name for tool in given}
    for name, path in references.items():
        if name not in names:
            raise InvalidRequest(f"{path}.tool_name is {show(name)}; tools has none of that name", param=f"{path}.tool_name")
    known = {place: tool for place, tool in enumerate(given) if not tool.defer_loading or tool.name in references}
    if given and not known:
        raise InvalidRequest("defer_loading is true for all tools; the model needs one to begin with", param="tools")
    return known


def _json(value: Any, path: str) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:  # the writer does not go as deep as the reader
        raise InvalidRequest(f"{path} is nested too deeply", param=path) from None


def _tool(tool: Tool, path: str) -> ToolDefinition:
    description = tool.description or ""
    if tool.input_examples:
        lines = [_json(example, f"{path}.input_examples[{index}]") for index, example in enumerate(tool.input_examples)]
        description = "\n".join([description, "Examples of its input:", *lines]).lstrip()
    return ToolDefinition(function=FunctionDefinition(tool.name, description, tool.input_schema, tool.strict))


def _calls(request: CountTokensRequest) -> dict[str, Any]:
    choice = request.tool_choice
    if choice is None:
        return {}
    if not request.tools and choice.type != "none":
        raise InvalidRequest(f"tool_choice is {choice.type}, but there are no tools", param="tool_choice")
    made: dict[str, Any] = {}
    if choice.disable_parallel_tool_use:
        made["parallel_tool_calls"] = False
    if choice.type != "tool":
        if choice.name is not None:
            raise InvalidRequest(f"tool_choice.name is given, but tool_choice.type is {choice.type}", param="tool_choice.name")
        return {**made, "tool_choice": "required" if choice.type == "any" else choice.type}
    if choice.name is None:
        raise InvalidRequest("tool_choice.name is missing", param="tool_choice.name")
    return {**made, "tool_choice": {"type": "function", "function": {"name": choice.name}}}


# ---- messages ---------------------------------------------------------------------------------------------------------------


class _Turns:
    """The conversation as a chat's messages. Neighbours of one role become one turn: templates expect roles to alternate.

    `is_open`: the last one is the assistant's, to be continued. `references`: tools that results named, and where. `cleared`:
    thoughts that were left out. `names`: see Translation.
    """

    def __init__(self, request: CountTokensRequest) -> None:
        self.made: list[Message] = []
        self.references: dict[str, str] = {}
        self.cleared: list[str] = []
        self.names: dict[str, PartName] = {}
        self._names: dict[str, str] = {}  # of the tools that were called, by the call's id
        # Of the last message, which may still grow: joined once, however many turns it is made of.
        self._contents: list[str | _Shown] = []
        self._thoughts: list[str] = []  # likewise
        system = list(_system(request.system or ()))
        rest = list(enumerate(request.messages))
        while rest and rest[0][1].role == "system":
            index, turn = rest.pop(0)
            system += _system(_checked(turn, index))
        if text := "\n".join(system):
            self._begin(Message(role="system", content=text))
        if not rest:
            raise InvalidRequest("messages holds no message of a user; at least one is needed", param="messages")
        without_thought = _turns_to_clear(request)
        for index, turn in rest:
            blocks = _checked(turn, index)
            if turn.role == "assistant":
                self._assistant(blocks, f"messages[{index}]", keeps_thought=index not in without_thought)
            elif turn.role == "system":
                self._add("system", "\n".join(_system(blocks)))
            else:
                self._user(blocks, f"messages[{index}]")
        self._seal()
        self.is_open = self._ends_open(rest[-1][0])

    def _ends_open(self, index: int) -> bool:
        last = self.made[-1]
        if last.role != "assistant":
            return False
        if last.tool_calls:
            raise InvalidRequest(
                f"messages[{index}] ends with a tool_use; a message with its tool_result has to follow",
                param=f"messages[{index}]",
            )
        if last.content:
            return True
        self.made.pop()  # nothing to continue: an answer begins
        return False

    def _begin(self, message: Message) -> Message:
        self._seal()
        self.made.append(message)
        return message

    def _seal(self) -> None:
        """The last message is whole."""
        if self._contents:
            self.made[-1].content = self._joined(self._contents, "" if self.made[-1].role == "assistant" else "\n")
        if self._thoughts:
            self.made[-1].reasoning_content = "\n".join(self._thoughts)
        self._contents, self._thoughts = [], []

    def _joined(self, contents: Sequence["str | _Shown"], between: str) -> str | list[Part]:
        """The content of the last message."""
        texts = [content for content in contents if isinstance(content, str)]
        if len(texts) == len(contents):
            return between.join(texts)
        parts: list[Part] = []
        for content in contents:
            if isinstance(content, str):
                parts.append(Part("text", content))
            else:
                name = PartName(content.path, "image", f"{content.path}.source")
                self.names[f"messages[{len(self.made) - 1}].content[{len(parts)}]"] = name
                parts.append(Part("image_url", image_url=ImageUrl(content.source)))
        return parts

    def _turn(self, role: str) -> Message:
        """The last message where it is of that role, else a new one."""
        if self.made and self.made[-1].role == role:
            return self.made[-1]
        return self._begin(Message(role=role, content=""))

    def _add(self, role: str, *contents: "str | _Shown") -> None:
        self._turn(role)
        self._contents += contents

    def _user(self, blocks: Sequence[Block], path: str) -> None:
        for index, block in enumerate(blocks):
            where = f"{path}.content[{index}]"
            if isinstance(block, ToolResultBlock):
                self._result(block, where)
            else:
                self._add("user", _content(block, where))
        if not blocks:
            self._add("user", "")

    def _result(self, block: ToolResultBlock, path: str) -> None:
        name = self._names.get(block.tool_use_id)
        if name is None:
            raise InvalidRequest(
                f"{path}.tool_use_id is {show(block.tool_use_id)}; no tool_use before it has that id", param=f"{path}.tool_use_id"
            )
        contents: list[str | _Shown] = []
        for index, part in enumerate(_as_blocks(block.content)):
            where = f"{path}.content[{index}]"
            if isinstance(part, ToolReferenceBlock):
                self.references.setdefault(part.tool_name, where)
                contents.append(f"The tool {part.tool_name} can be used now.")
            else:
                contents.append(_content(part, where))
        if block.is_error:
            text = contents.pop(0) if contents and isinstance(contents[0], str) else ""
            assert isinstance(text, str)
            if not text.lower().startswith("error"):
                text = f"Error: {text}" if text else "Error"
            contents.insert(0, text)
        message = self._begin(Message(role="tool", content="", name=name, tool_call_id=block.tool_use_id))
        message.content = self._joined(contents, "\n")

    def _assistant(self, blocks: Sequence[Block], path: str, *, keeps_thought: bool) -> None:
        turn = self._turn("assistant")
        thoughts: list[str] = []
        for index, block in enumerate(blocks):
            if isinstance(block, TextBlock):
                self._contents.append(block.text)
            elif isinstance(block, ThinkingBlock):
                thoughts.append(block.thinking or unseal(block.signature) or "")
            elif isinstance(block, ToolUseBlock):
                self._names[block.id] = block.name
                arguments = _json(block.input, f"{path}.content[{index}].input")
                call = ToolCall(function=ToolFunction(name=block.name, arguments=arguments), id=block.id)
                turn.tool_calls = turn.tool_calls or []
                turn.tool_calls.append(call)
        if thought := "\n".join(filter(None, thoughts)):
            (self._thoughts if keeps_thought else self.cleared).append(thought)


def _turns_to_clear(request: CountTokensRequest) -> frozenset[int]:
    """The messages whose thoughts the request asks to leave out."""
    keeps: list[int] = []
    for index, edit in enumerate((request.context_management or ContextManagement()).edits or []):
        keep = Keep("all") if edit.keep == "all" else edit.keep or Keep("thinking_turns", 1)
        assert isinstance(keep, Keep)
        if keep.type == "thinking_turns":
            if keep.value is None or keep.value < 1:
                param = f"context_management.edits[{index}].keep.value"
                raise InvalidRequest(f"{param} is {show(keep.value)}; allowed is 1 and more", param=param)
            keeps.append(keep.value)
    if not keeps:
        return frozenset()
    thinking = [
        index
        for index, turn in enumerate(request.messages)
        if turn.role == "assistant" and any(isinstance(block, ThinkingBlock) for block in _as_blocks(turn.content))
    ]
    return frozenset(thinking[: -min(keeps)])


def _as_blocks(content: str | Sequence[Any] | None) -> Sequence[Any]:
    """A text is short for one block of it."""
    if isinstance(content, str):
        return (TextBlock(content),)
    return content or ()


def _checked(turn: Turn, index: int) -> Sequence[Any]:
    """A message's blocks, all of kinds that its role may have."""
    blocks = _as_blocks(turn.content)
    for position, block in enumerate(blocks):
        if not isinstance(block, ALLOWED[turn.role]):
            _refuse(block, turn.role, f"messages[{index}].content[{position}]")
    return blocks


def _refuse(block: Struct, role: str, path: str) -> NoReturn:
    kind = block.__struct_config__.tag
    if isinstance(block, DocumentBlock):
        raise InvalidRequest(f"{path}.type is {kind}; this model reads no documents, send their text", param=f"{path}.type")
    allowed = ", ".join(str(kind.__struct_config__.tag) for kind in ALLOWED[role])
    raise InvalidRequest(f"{path}.type is {kind}; a message of role {role} may hold {allowed}", param=f"{path}.type")


def _system(content: str | Iterable[TextBlock]) -> Iterator[str]:
    """Texts of a system prompt, without the line that is for Anthropic's accounts."""
    for block in _as_blocks(content if isinstance(content, str) else list(content)):
        line = BILLING_LINE.match(block.text)
        text = block.text[line.end() :] if line else block.text
        if text:
            yield text


@dataclass(frozen=True, slots=True)
class _Shown:
    """A picture in a message, and the path of its block."""

    source: str
    path: str


def _content(block: Any, path: str) -> str | _Shown:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, ImageBlock):
        return _Shown(_source(block, path), path)
    if not isinstance(block, SearchResultBlock):
        _refuse(block, "user", path)
    if block.citations is not None and block.citations.enabled:
        raise InvalidRequest(f"{path}.citations is enabled; answers here hold no citations", param=f"{path}.citations")
    return "\n".join([f"{block.title} ({block.source})", *(part.text for part in block.content)])


def _source(block: ImageBlock, path: str) -> str:
    """A URL or a file's id."""
    if block.transformations:
        raise InvalidRequest(
            f"{path}.transformations is {show(block.transformations)}, which is not supported: leave it out",
            param=f"{path}.transformations",
        )
    source = block.source
    if isinstance(source, Base64Source):
        return f"data:{source.media_type};base64,{source.data}"
    return source.file_id if isinstance(source, FileSource) else source.url
