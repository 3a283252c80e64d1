"""Answers of the Messages API as types: what /openapi.json promises of them, as api/results.py does for the other routes.

Owns the promises only: answers are written by anthropic_events.py, nothing is made from these types.
"""

from typing import Any, Literal

from msgspec import Struct

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class ThinkingTokens(Struct):
    """Of a message's output."""

    thinking_tokens: int


class MessageUsage(Struct):
    """Tokens of a message. `input_tokens` are those of the prompt that the cache did not hold."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens


class TextContent(Struct, tag="text", tag_field="type"):
    """Text of the answer."""

    text: str


class ThinkingContent(Struct, tag="thinking", tag_field="type"):
    """The thought before it."""

    thinking: str
    signature: str


class ToolUseContent(Struct, tag="tool_use", tag_field="type"):
    """A call for the client to carry out."""

    id: str
    name: str
    input: dict[str, Any]


MessageContent = TextContent | ThinkingContent | ToolUseContent


class MessageAnswer(Struct):
    """A whole message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageContent]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Struct):
    """How long a prompt is."""

    input_tokens: int


class MessageStart(Struct, tag="message_start", tag_field="type"):
    """The first event: the message without content."""

    message: MessageAnswer


class Ping(Struct, tag="ping", tag_field="type"):
    """Nothing."""


class ContentBlockStart(Struct, tag="content_block_start", tag_field="type"):
    """A block begins, empty. One is open at a time."""

    index: int
    content_block: MessageContent


class TextDelta(Struct, tag="text_delta", tag_field="type"):
    """More of a text."""

    text: str


class ThinkingDelta(Struct, tag="thinking_delta", tag_field="type"):
    """More of a thought."""

    thinking: str


class SignatureDelta(Struct, tag="signature_delta", tag_field="type"):
    """A thought's signature, at its end."""

    signature: str


class InputJsonDelta(Struct, tag="input_json_delta", tag_field="type"):
    """More of a call's input, which is one JSON text when joined."""

    partial_json: str


class ContentBlockDelta(Struct, tag="content_block_delta", tag_field="type"):
    """The open block grows."""

    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class ContentBlockStop(Struct, tag="content_block_stop", tag_field="type"):
    """The open block ends."""

    index: int


class MessageEnd(Struct):
    """How the message ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Struct, tag="message_delta", tag_field="type"):
    """The message ends; `usage` counts all of it."""

    delta: MessageEnd
    usage: MessageUsage


class MessageStop(Struct, tag="message_stop", tag_field="type"):
    """The last event."""


class ErrorContent(Struct):
    """What went wrong."""

    type: str
    message: str


class MessageFailure(Struct, tag="error", tag_field="type"):
    """The last event of a message that failed."""

    error: ErrorContent
    request_id: str


MessageEvent = (
    MessageStart | Ping | ContentBlockStart | ContentBlockDelta | ContentBlockStop | MessageDelta | MessageStop | MessageFailure
)
