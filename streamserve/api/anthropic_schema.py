"""Bodies of Anthropic's Messages API as typed values.

Owns field names and types of these bodies. Knows nothing of what they mean (anthropic_chat.py).

Unknown fields are refused, like everywhere. What the model cannot take (documents, tools that Anthropic runs) is refused by name.
`cache_control` is accepted wherever it may stand: every prompt is cached, and its longest known prefix reused.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta, Struct

from streamserve.api.fields import MESSAGES, Decision
from streamserve.api.schema import convert, show
from streamserve.errors import InvalidRequest

T = TypeVar("T", bound=Struct)
REFUSED = {field.name: field for field in MESSAGES if field.decision is Decision.REFUSED}


class CacheControl(Struct, forbid_unknown_fields=True):
    """Where Anthropic's cache is to begin an entry."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None
    scope: str | None = None


class Citations(Struct, forbid_unknown_fields=True):
    """Whether the answer is to cite the block."""

    enabled: bool | None = None


class TextBlock(Struct, tag="text", tag_field="type", forbid_unknown_fields=True):
    """Text. `citations` of earlier answers say where a text came from; the text is whole without them."""

    text: str
    cache_control: CacheControl | None = None
    citations: list[dict[str, Any]] | None = None


class Base64Source(Struct, tag="base64", tag_field="type", forbid_unknown_fields=True):
    """A file. What it is is seen by its bytes."""

    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str


class UrlSource(Struct, tag="url", tag_field="type", forbid_unknown_fields=True):
    """Where a file is."""

    url: str


class FileSource(Struct, tag="file", tag_field="type", forbid_unknown_fields=True):
    """A file that was uploaded."""

    file_id: str


class ImageBlock(Struct, tag="image", tag_field="type", forbid_unknown_fields=True):
    """A picture."""

    source: Base64Source | UrlSource | FileSource
    cache_control: CacheControl | None = None
    transformations: dict[str, Any] | None = None


class DocumentBlock(Struct, tag="document", tag_field="type"):
    """Named to be refused."""


class SearchResultBlock(Struct, tag="search_result", tag_field="type", forbid_unknown_fields=True):
    """A finding, given to the model as text."""

    source: str
    title: str
    content: list[TextBlock]
    cache_control: CacheControl | None = None
    citations: Citations | None = None


class ToolReferenceBlock(Struct, tag="tool_reference", tag_field="type", forbid_unknown_fields=True):
    """A search for tools found this one: from here on the model knows it (see Tool.defer_loading)."""

    tool_name: str
    cache_control: CacheControl | None = None


class ThinkingBlock(Struct, tag="thinking", tag_field="type", forbid_unknown_fields=True):
    """A thought of an earlier answer."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Struct, tag="redacted_thinking", tag_field="type", forbid_unknown_fields=True):
    """A thought that only Anthropic can read; no answer of this server holds one."""

    data: str


class Caller(Struct, forbid_unknown_fields=True):
    """Who made a call."""

    type: Literal["direct"]


class ToolUseBlock(Struct, tag="tool_use", tag_field="type", forbid_unknown_fields=True):
    """A call of an earlier answer."""

    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: Caller | None = None
    toolset_name: None = None


ResultBlock = TextBlock | SearchResultBlock | ToolReferenceBlock | ImageBlock | DocumentBlock


class ToolResultBlock(Struct, tag="tool_result", tag_field="type", forbid_unknown_fields=True):
    """What a call gave."""

    tool_use_id: str
    content: str | list[ResultBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: None = None


Block = (
    TextBlock
    | ImageBlock
    | DocumentBlock
    | SearchResultBlock
    | ThinkingBlock
    | RedactedThinkingBlock
    | ToolUseBlock
    | ToolResultBlock
)
ALLOWED: Mapping[str, tuple[type[Struct], ...]] = {
    "user": (TextBlock, ImageBlock, SearchResultBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
    "system": (TextBlock,),
}


class Turn(Struct, forbid_unknown_fields=True):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(Struct, forbid_unknown_fields=True):
    """A function that the client runs. `defer_loading`: the model gets to know it when a tool_reference names it.

    Without effect: `eager_input_streaming` (arguments are streamed as they come, always).
    """

    name: str
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    eager_input_streaming: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Struct, forbid_unknown_fields=True):
    """Whether calls are to be made."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct, forbid_unknown_fields=True):
    """Whether the model is to think first."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct, forbid_unknown_fields=True):
    """What the answer's text must be."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct, forbid_unknown_fields=True):
    """How the answer is to be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Struct, forbid_unknown_fields=True):
    """About the request."""

    user_id: str | None = None


class Keep(Struct, forbid_unknown_fields=True):
    """How many of the last thoughts stay."""

    type: Literal["thinking_turns", "all"]
    value: int | None = None


class ClearThinking(Struct, forbid_unknown_fields=True):
    """Leave thoughts of earlier turns out. The one edit of a context that is done here; Anthropic's default keeps the last."""

    type: Literal["clear_thinking_20251015"]
    keep: Keep | Literal["all"] | None = None


class ContextManagement(Struct, forbid_unknown_fields=True):
    """What is to be left out of long conversations."""

    edits: list[ClearThinking] | None = None


class CountTokensRequest(Struct, kw_only=True):
    """Body of POST /v1/messages/count_tokens."""

    model: str
    messages: list[Turn]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    context_management: ContextManagement | None = None
    cache_control: CacheControl | None = None
    speed: Literal["standard"] | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """Body of POST /v1/messages. The last fields are this server's own, with the meaning they have for a chat."""

    max_tokens: Annotated[int, Meta(extra_json_schema={"minimum": 0})]
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: Annotated[float, Meta(extra_json_schema={"maximum": 1})] | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    seed: int | None = None
    priority: int = 0
    timeout: float | None = None
    resumable: bool = False


def read_body(given: Mapping[str, Any], kind: type[T]) -> T:
    """A body as a checked value of `kind`. Raises InvalidRequest naming the field."""
    for name, value in given.items():
        if name in REFUSED and value is not None and value not in REFUSED[name].harmless:
            raise InvalidRequest(f"{name} is {show(value)}, which is not supported: {REFUSED[name].note}", param=name)
    _refuse_foreign_tools(given.get("tools"))
    try:
        return convert({name: value for name, value in given.items() if name not in REFUSED}, kind)
    except InvalidRequest as error:
        raise _explained(error) from None


def _refuse_foreign_tools(tools: Any) -> None:
    """Before anything else is said of their fields, which are other ones."""
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind not in (None, "custom"):
            raise InvalidRequest(
                f"tools[{index}].type is {show(kind)}; this server runs no tools of its own and knows none by name: "
                f"allowed is custom, with an input_schema",
                param=f"tools[{index}].type",
            )


def _explained(error: InvalidRequest) -> InvalidRequest:
    """For a block of unknown type, say which there are."""
    block = re.fullmatch(r"(messages|system)\[\d+\](\.content\[\d+\])*\.type", error.param or "")
    if block is None:
        return error
    is_result = (error.param or "").count(".content[") > 1
    kinds: tuple[type[Struct], ...] = ALLOWED["system"]
    if block[1] == "messages":
        known = (TextBlock, ImageBlock, SearchResultBlock, ToolReferenceBlock)
        kinds = known if is_result else (*ALLOWED["user"], *ALLOWED["assistant"][1:])
    tags = ", ".join(str(kind.__struct_config__.tag) for kind in kinds)
    return InvalidRequest(f"{str(error).partition(';')[0]}; allowed is {tags}", param=error.param)
