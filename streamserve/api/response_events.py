"""A response of /v1/responses as it grows: its output items, and the events that tell of every change, in OpenAI's order.

Owns the order and shape of the events, and the response object at any moment. Knows nothing of requests, engines, stores or
transports: what a model said comes in as events of api/answer.py, what leaves are JSON objects as bytes.

    response.created  [response.queued]  response.in_progress
      response.output_item.added                                     one item at a time, in the order of `output`
        response.content_part.added    message or reasoning          response.function_call_arguments.delta …
        response.output_text.delta …   or reasoning_text.delta …     response.function_call_arguments.done
        response.output_text.done      or reasoning_text.done
        response.content_part.done
      response.output_item.done
    response.completed | response.incomplete | response.failed

Every event begins with its type, and its sequence number is its place in the stream, from 0.
"""

from collections.abc import Iterable, Sequence
from secrets import token_urlsafe
from time import time
from typing import Any, Protocol

import orjson

from streamserve.errors import RequestError, StreamServeError
from streamserve.text.tools.format import CallBegan, CallGrew, Content, Event, Thought

LAST_EVENTS = frozenset({b"response.completed", b"response.incomplete", b"response.failed"})
OBFUSCATED_CHARS = 32  # deltas are filled up to a multiple of so many characters

Json = dict[str, Any]


def event_name(event: bytes) -> bytes:
    """The type of an event made here; SSE repeats it as the event's name."""
    return event[9 : event.index(b'"', 9)]  # {"type":"NAME"


class _Item(Protocol):
    """An output item that is being written."""

    id: str

    def done(self) -> list[Json]:
        """The events that end it, before its own output_item.done."""
        ...

    def as_json(self, status: str) -> Json: ...


class _Text:
    """A message, or a thought: an item with one part of text."""

    def __init__(self, id: str, place: int, *, is_thought: bool) -> None:
        self.id = id
        self._place = {"item_id": id, "output_index": place, "content_index": 0}
        self._kind = "reasoning_text" if is_thought else "output_text"
        self._is_thought = is_thought
        self._parts: list[str] = []
        self._logprobs: list[Json] = []
        self._has_part = False
        # All but the text and what follows it; a stream of tokens is thousands of these.
        head = orjson.dumps({"type": f"response.{self._kind}.delta", **self._place})
        self._delta_head = head[:-1] + b',"delta":'

    @property
    def _text(self) -> str:
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def begin_part(self) -> Json:
        self._has_part = True
        return {"type": "response.content_part.added", **self._place, "part": self._part("", [])}

    def delta(self, text: str, logprobs: list[Json]) -> bytes:
        """The head of a delta's event: without its sequence number and its end."""
        self._parts.append(text)
        self._logprobs += logprobs
        head = self._delta_head + orjson.dumps(text)
        return head if self._is_thought else head + b',"logprobs":' + (orjson.dumps(logprobs) if logprobs else b"[]")

    def done(self) -> list[Json]:
        text = self._text
        more: Json = {"text": text} if self._is_thought else {"text": text, "logprobs": self._logprobs}
        return [
            {"type": f"response.{self._kind}.done", **self._place, **more},
            {"type": "response.content_part.done", **self._place, "part": self._part(text, self._logprobs)},
        ]

    def as_json(self, status: str) -> Json:
        parts = [self._part(self._text, self._logprobs)] if self._has_part else []
        if self._is_thought:
            return {"id": self.id, "type": "reasoning", "summary": [], "content": parts, "status": status}
        return {"id": self.id, "type": "message", "role": "assistant", "content": parts, "status": status}

    def _part(self, text: str, logprobs: list[Json]) -> Json:
        if self._is_thought:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


class _Call:
    """A call of a client's function."""

    def __init__(self, id: str, place: int, call: CallBegan) -> None:
        self.id = id
        self.index = call.index
        self._call_id = call.id
        self._name = call.name
        self._place = {"item_id": id, "output_index": place}
        self._parts: list[str] = []

    def delta(self, arguments: str) -> bytes:
        self._parts.append(arguments)
        event = {"type": "response.function_call_arguments.delta", **self._place, "delta": arguments}
        return orjson.dumps(event)[:-1]

    def done(self) -> list[Json]:
        arguments = "".join(self._parts)
        kind = "response.function_call_arguments.done"
        return [{"type": kind, **self._place, "name": self._name, "arguments": arguments}]

    def as_json(self, status: str) -> Json:
        return {
            "id": self.id,
            "type": "function_call",
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._parts),
            "status": status,
        }


class Growing:
    """One response from its creation to its last event.

    `fields`: what of the response object does not change. `is_queued`: it waits for others to finish before it is in progress.
    `obfuscates`: deltas carry random characters that hide their lengths from who listens on the wire.
    """

    def __init__(self, fields: Json, *, is_queued: bool = False, obfuscates: bool = False) -> None:
        self._fields = fields
        self._suffix = str(fields["id"]).partition("_")[2]
        self._obfuscates = obfuscates
        self._num_events = 0
        self._done: list[Json] = []
        self._open: _Text | _Call | None = None
        self._space = ""  # white space that a message may begin with, or that only stands between other items
        self._space_logprobs: list[Json] = []
        self._usage: Json | None = None
        self._error: Json | None = None
        self._reason: str | None = None
        self._completed_s: int | None = None
        self.status = "queued" if is_queued else "in_progress"

    @property
    def is_over(self) -> bool:
        """Whether its last event was made."""
        return self.status not in ("queued", "in_progress")

    def as_json(self) -> Json:
        """The response object now."""
        output = [*self._done] if self._open is None else [*self._done, self._open.as_json("in_progress")]
        return {
            **self._fields,
            "status": self.status,
            "completed_at": self._completed_s,
            "error": self._error,
            "incomplete_details": None if self._reason is None else {"reason": self._reason},
            "output": output,
            "usage": self._usage,
        }

    # ---- events --------------------------------------------------------------------------------------------------

    def opening(self) -> list[bytes]:
        """The events before anything was generated."""
        events = [self._with_response("response.created")]
        return [*events, self._with_response("response.queued") if self.status == "queued" else self._began()]

    def begin(self) -> list[bytes]:
        """A queued response is in progress now; nothing for one that was before."""
        if self.status != "queued":
            return []
        self.status = "in_progress"
        return [self._began()]

    def _began(self) -> bytes:
        return self._with_response("response.in_progress")

    def take(self, events: Iterable[Event], logprobs: list[Json] | None = None) -> list[bytes]:
        """What the model said since the last call. `logprobs` belong to the content among it."""
        made: list[bytes] = []
        left = logprobs or []
        for event in events:
            if type(event) is Content:
                self._take_content(event.text, left, made)
                left = []
            elif type(event) is Thought:
                item = self._text_item(made, is_thought=True)
                made.append(self._delta(item.delta(event.text, []), event.text))
            elif type(event) is CallBegan:
                self._close(made, "completed")
                call = self._open = _Call(self._item_id("fc"), len(self._done), event)
                made.append(self._added(call))
            elif type(event) is CallGrew:
                call_now = self._open
                assert isinstance(call_now, _Call) and call_now.index == event.index, "calls come one after the other"
                made.append(self._delta(call_now.delta(event.arguments), event.arguments))
        if left:
            self._space_logprobs += left  # of tokens whose text is still held back
        return made

    def _take_content(self, text: str, logprobs: list[Json], made: list[bytes]) -> None:
        is_open = self._is_in_message
        if not is_open or self._space_logprobs:
            text, logprobs = self._space + text, [*self._space_logprobs, *logprobs]
            self._space, self._space_logprobs = "", []
            if not is_open and (not text or text.isspace()):
                self._space, self._space_logprobs = text, logprobs
                return
        item = self._text_item(made, is_thought=False)
        made.append(self._delta(item.delta(text, logprobs), text))

    def finish(self, reason: str, usage: Json, *, is_silent: bool = False) -> list[bytes]:
        """The model has ended, with a finish reason of chat completions; the last events."""
        status = {"length": "incomplete", "abort": "cancelled"}.get(reason, "completed")
        self._usage = usage
        self._reason = "max_output_tokens" if status == "incomplete" else None
        made = self.begin()
        left, logprobs = self._space, self._space_logprobs
        is_wordless = not self._done and self._open is None and not is_silent  # not even one word: a message all the same
        if is_wordless or (logprobs and self._is_in_message):  # of tokens whose text was never given, as a stop string's
            item = self._text_item(made, is_thought=False)
            if left or logprobs:
                made.append(self._delta(item.delta(left, logprobs), left))
        self._close(made, "completed" if status == "completed" else "incomplete")
        return [*made, *self._end(status)]

    def fail(self, error: StreamServeError, usage: Json | None = None) -> list[bytes]:
        """It failed after it had begun; the last events."""
        made = self.begin()
        self._close(made, "incomplete")
        self._usage = usage
        self._error = {"code": "invalid_prompt" if isinstance(error, RequestError) else "server_error", "message": str(error)}
        return [*made, *self._end("failed")]

    def _end(self, status: str) -> list[bytes]:
        self.status = status
        if status == "completed":
            self._completed_s = int(time())
        # There is no event for a cancelled response: it is one that was not completed.
        return [self._with_response("response.incomplete" if status == "cancelled" else f"response.{status}")]

    # ---- items ---------------------------------------------------------------------------------------------------

    @property
    def _is_in_message(self) -> bool:
        return type(self._open) is _Text and self._open.id.startswith("msg")

    def _item_id(self, prefix: str) -> str:
        """Ids name their response, so that an item can be found by its id (see response_items.response_of)."""
        return f"{prefix}_{self._suffix}{len(self._done):04x}"

    def _text_item(self, made: list[bytes], *, is_thought: bool) -> _Text:
        """The open item of the kind; another one is closed first."""
        prefix = "rs" if is_thought else "msg"
        if type(self._open) is _Text and self._open.id.startswith(prefix):
            return self._open
        self._close(made, "completed")
        item = self._open = _Text(self._item_id(prefix), len(self._done), is_thought=is_thought)
        made.append(self._added(item))
        made.append(self._event(item.begin_part()))
        return item

    def _added(self, item: _Item) -> bytes:
        place = {"output_index": len(self._done), "item": item.as_json("in_progress")}
        return self._event({"type": "response.output_item.added", **place})

    def _close(self, made: list[bytes], status: str) -> None:
        self._space, self._space_logprobs = "", []
        item, self._open = self._open, None
        if item is None:
            return
        made += map(self._event, item.done())
        whole = item.as_json(status)
        made.append(self._event({"type": "response.output_item.done", "output_index": len(self._done), "item": whole}))
        self._done.append(whole)

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def _with_response(self, kind: str) -> bytes:
        return self._event({"type": kind, "response": self.as_json()})

    def _event(self, event: Json) -> bytes:
        event["sequence_number"] = self._num_events
        self._num_events += 1
        return orjson.dumps(event)

    def _delta(self, head: bytes, text: str) -> bytes:
        number = self._num_events
        self._num_events += 1
        if self._obfuscates:
            return b'%b,"obfuscation":"%b","sequence_number":%d}' % (head, _filling(text), number)
        return b'%b,"sequence_number":%d}' % (head, number)


def _filling(text: str) -> bytes:
    num_chars = OBFUSCATED_CHARS - len(text) % OBFUSCATED_CHARS
    return token_urlsafe(num_chars)[:num_chars].encode()


def usage_json(
    prompt_tokens: int, cached_tokens: int, completion_tokens: int, thought_tokens: int, image_tokens: int = 0
) -> Json:
    """Usage as the Responses API writes it. Nothing is billed for being written to the cache."""
    images = {"image_tokens": image_tokens} if image_tokens else {}
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0, **images},
        "output_tokens": completion_tokens,
        "output_tokens_details": {"reasoning_tokens": thought_tokens},
        "total_tokens": prompt_tokens + completion_tokens,
    }


def named(events: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Events with their names, as SSE sends them."""
    return [(event_name(event), event) for event in events]
