"""How an answer looks to an Anthropic client: content blocks, whole or as a stream of server-sent events.

Owns the order of events and the shape of blocks, stop reasons and usage. Knows nothing of requests, engines or transports.

Whole answers and streams are made from the same operations on blocks, so they cannot differ. One block is open at a time; a block
is opened by the first text that is not white space (Anthropic takes no empty text back), and a call always ends with arguments
that parse as far as they came.
"""

from base64 import b64decode, urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal
from uuid import uuid4

import orjson
from msgspec import Struct

from streamserve.api.answer import TOOL_CALLS, CallBegan, CallGrew, Content, Event, Thought, new_call_id
from streamserve.api.stream import Usage
from streamserve.errors import StreamServeError
from streamserve.messages import FinishReason

NamedEvent = tuple[bytes, bytes]  # the event's name, its data
PING: NamedEvent = (b"ping", b'{"type":"ping"}')
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
SEALED = "thought:"  # a signature that starts so holds the thought itself, for clients that asked not to be shown it


class Opened(Struct, frozen=True, gc=False):
    """A block begins; `block` is its empty form."""

    block: dict[str, Any]


class Grew(Struct, frozen=True, gc=False):
    """The open block gains text: `kind` is the delta's type, `name` the field of it that holds the text."""

    kind: Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"]
    name: Literal["text", "thinking", "signature", "partial_json"]
    text: str


class Closed(Struct, frozen=True, gc=False):
    """The open block ends."""


Operation = Opened | Grew | Closed
_Open = tuple[str, "_Open | None"]  # brackets that are open: what closes the innermost one, and those around it
CLOSED = Closed()


class Blocks:
    """Turns what a reader finds in an answer into operations on blocks.

    `omits_thinking`: thoughts arrive as an empty block whose signature brings them back with the next turn.
    """

    def __init__(self, *, omits_thinking: bool = False) -> None:
        self._omits_thinking = omits_thinking
        self._open: Literal["text", "thinking", "tool_use"] | None = None
        self._space = ""  # white space that may turn out to be the start of a block
        self._space_kind: type[Content] | type[Thought] = Content
        self._thought: list[str] = []
        self._call = -1
        self._has_arguments = False

    def take(self, events: Sequence[Event]) -> list[Operation]:
        """What these events do to the blocks."""
        made: list[Operation] = []
        for event in events:
            if type(event) is Content:
                self._text(Content, event.text, made)
            elif type(event) is Thought:
                self._text(Thought, event.text, made)
            elif type(event) is CallBegan:
                self._begin_call(event, made)
            else:
                assert type(event) is CallGrew and self._open == "tool_use" and event.index == self._call, "calls do not overlap"
                if event.arguments:
                    self._has_arguments = True
                    made.append(Grew("input_json_delta", "partial_json", event.arguments))
        return made

    def finish(self) -> list[Operation]:
        """What the end of the answer does: nothing stays open."""
        made: list[Operation] = []
        self._close(made)
        return made

    def _text(self, kind: type[Content] | type[Thought], text: str, made: list[Operation]) -> None:
        wanted: Literal["text", "thinking"] = "text" if kind is Content else "thinking"
        if self._open != wanted:
            if self._space_kind is not kind:
                self._space, self._space_kind = "", kind
            text = self._space + text
            if not text or text.isspace():
                self._space = text
                return
            self._close(made)
            self._open = wanted
            empty = {"type": "text", "text": ""} if kind is Content else {"type": "thinking", "thinking": "", "signature": ""}
            made.append(Opened(empty))
        if not text:
            return
        if kind is Content:
            made.append(Grew("text_delta", "text", text))
            return
        self._thought.append(text)
        if not self._omits_thinking:
            made.append(Grew("thinking_delta", "thinking", text))

    def _begin_call(self, event: CallBegan, made: list[Operation]) -> None:
        self._close(made)
        self._open, self._call, self._has_arguments = "tool_use", event.index, False
        made.append(Opened({"type": "tool_use", "id": event.id or new_call_id(), "name": event.name, "input": {}}))

    def _close(self, made: list[Operation]) -> None:
        self._space = ""
        if self._open is None:
            return
        if self._open == "thinking":
            made.append(Grew("signature_delta", "signature", sign("".join(self._thought), seals=self._omits_thinking)))
            self._thought.clear()
        elif self._open == "tool_use" and not self._has_arguments:
            made.append(Grew("input_json_delta", "partial_json", "{}"))
        made.append(CLOSED)
        self._open = None


def whole_blocks(operations: Sequence[Operation]) -> list[dict[str, Any]]:
    """The content of a whole answer."""
    blocks: list[dict[str, Any]] = []
    texts: dict[str, list[str]] = {}
    for operation in operations:
        if type(operation) is Opened:
            blocks.append(dict(operation.block))
            texts = {}
        elif type(operation) is Grew:
            texts.setdefault(operation.name, []).append(operation.text)
        else:
            joined = {name: "".join(parts) for name, parts in texts.items()}
            if blocks[-1]["type"] == "tool_use":
                blocks[-1]["input"] = arguments_of(joined["partial_json"])
            else:
                blocks[-1].update(joined)
    return blocks


def arguments_of(text: str) -> dict[str, Any]:
    """A call's arguments as an object. Of arguments that were cut short it holds the members that are complete."""
    for candidate in (text, _completed(text)):
        try:
            value = orjson.loads(candidate)
        except orjson.JSONDecodeError:
            continue
        if isinstance(value, dict):
            return value
    return {}


def _completed(text: str) -> str:
    """The longest beginning of cut-off JSON after which closing brackets make it whole."""
    open_: _Open | None = None
    end, still_open = 0, open_  # of that beginning
    in_string = is_escaped = False
    for position, char in enumerate(text):
        if in_string:
            if is_escaped:
                is_escaped = False
            elif char == "\\":
                is_escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "{[":
            open_ = ("}" if char == "{" else "]", open_)
            end, still_open = position + 1, open_
        elif char in "}]":
            if open_ is None:
                break
            open_ = open_[1]
            end, still_open = position + 1, open_
        elif char == ",":
            end, still_open = position, open_
    closers: list[str] = []
    while still_open is not None:
        closer, still_open = still_open
        closers.append(closer)
    return text[:end] + "".join(closers)


def sign(thought: str, *, seals: bool) -> str:
    """A thought's signature. It proves nothing to us; clients insist on one. Sealed, it carries the thought itself."""
    if seals:
        return SEALED + urlsafe_b64encode(thought.encode()).decode()
    return sha256(thought.encode()).hexdigest()


def unseal(signature: str) -> str | None:
    """The thought in a signature, where there is one."""
    if not signature.startswith(SEALED):
        return None
    try:
        return b64decode(signature[len(SEALED) :], altchars=b"-_", validate=True).decode()
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class End:
    """How an answer ended."""

    reason: str
    stop_sequence: str | None = None


def end_of(finish_reason: str, matched_stop: int | str | None) -> End:
    """Anthropic's name for the end of an answer. One that somebody aborted is cut short like one that met its limit."""
    if finish_reason == TOOL_CALLS:
        return End("tool_use")
    if finish_reason == FinishReason.STOP:
        return End("stop_sequence", matched_stop) if isinstance(matched_stop, str) else End("end_turn")
    return End("max_tokens")


def usage_json(usage: Usage) -> dict[str, Any]:
    """Usage as Anthropic writes it: `input_tokens` are those that the cache did not hold. Everything is cached, so nothing
    is counted as written to the cache on request."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def message_json(
    id: str, model: str, content: list[dict[str, Any]], end: End | None, usage: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """A message. `end` None: it has only begun."""
    return {
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": None if end is None else end.reason,
        "stop_sequence": None if end is None else end.stop_sequence,
        "stop_details": None,
        "usage": {**usage, "service_tier": "standard"},
        **more,
    }


class MessageEvents:
    """The events of one streamed answer, as names and data."""

    def __init__(self) -> None:
        self._index = -1

    def opening(self, message: dict[str, Any]) -> list[NamedEvent]:
        """The first events: the message without content."""
        return [_event("message_start", {"message": message}), PING]

    def of(self, operations: Sequence[Operation]) -> list[NamedEvent]:
        """The events of what happens to blocks."""
        made: list[NamedEvent] = []
        for operation in operations:
            if type(operation) is Grew:
                parts = (self._index, operation.kind.encode(), operation.name.encode(), orjson.dumps(operation.text))
                data = b'{"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":%b}}' % parts
                made.append((b"content_block_delta", data))
            elif type(operation) is Opened:
                self._index += 1
                made.append(_event("content_block_start", {"index": self._index, "content_block": operation.block}))
            else:
                made.append(_event("content_block_stop", {"index": self._index}))
        return made

    def closing(self, end: End, usage: dict[str, Any], **more: Any) -> list[NamedEvent]:
        """The last events."""
        delta = {"stop_reason": end.reason, "stop_sequence": end.stop_sequence, "stop_details": None}
        return [_event("message_delta", {"delta": delta, "usage": usage, **more}), _event("message_stop", {})]

    def failure(self, error: StreamServeError) -> list[NamedEvent]:
        """The last event of an answer that failed."""
        return [(b"error", orjson.dumps(anthropic_error_body(error)))]


def _event(kind: str, fields: dict[str, Any]) -> NamedEvent:
    return kind.encode(), orjson.dumps({"type": kind, **fields})


def anthropic_error_body(error: StreamServeError) -> dict[str, Any]:
    """The JSON body of an error in Anthropic's shape. Its request id belongs in the header `request-id` too."""
    kind = ERROR_TYPES.get(error.status) or ("api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}, "request_id": f"req_{uuid4().hex}"}
