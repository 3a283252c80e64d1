"""What the bytes of a streamed answer say, and when: events with their times, tokens, what went wrong.

Everything is parsed after the clock has stopped. Written for any server that speaks OpenAI's streams: usage or none, chunks or
a body that ends with the connection, whatever ends its lines.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Reads = Sequence[tuple[float, bytes]]  # when a read came, and what it held

LEFT = "the client left"
STOPPED = "the run was stopped"
_EVENT = re.compile(rb"^data:( ?)([^\r\n]*)\r?\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request. Times are of the machine's monotonic clock, alike in all processes.

    `has_usage`: the server counted tokens; where it does not, `num_output` is the number of events. `num_accepted` of the
    answer's tokens had been guessed, out of `num_drafted` guesses; `num_jumped` were forced by a grammar. `text` is that of the
    only choice, with what it thought before.
    """

    sent_s: float
    events_s: tuple[float, ...] = ()
    num_prompt: int = 0
    num_output: int = 0
    num_cached: int | None = None
    has_left: bool = False
    error: str | None = None
    text: str = ""
    num_drafted: int = 0
    num_accepted: int = 0
    num_jumped: int = 0
    has_usage: bool = True


def parsed(sent_s: float, reads: Reads, error: str | None) -> Answer:
    """What came of one request."""
    if error == LEFT:
        return Answer(sent_s, has_left=True)
    if error is not None or not reads:
        return Answer(sent_s, error=error or "no answer")
    status, _, rest = b"".join(data for _, data in reads).partition(b"\r\n")
    if b" 200" not in status:
        body = rest.partition(b"\r\n\r\n")[2]
        return Answer(sent_s, error=f"{status.decode('latin1').rstrip()}: {_said(body)}")
    times: list[float] = []
    texts: list[str] = []
    usage: dict[str, Any] | None = None
    is_done = False
    for at, data in timed_events(reads):
        if data == b"[DONE]":
            is_done = True
            continue
        try:
            event = json.loads(data)
            choices, said = event.get("choices") or (), event.get("usage")
        except (ValueError, AttributeError):
            return Answer(sent_s, tuple(times), error=f"no event of a stream: {_shown(data)}")
        if event.get("error"):
            return Answer(sent_s, tuple(times), error=_shown(data))
        usage = said or usage
        for choice in choices:
            is_done = is_done or choice.get("finish_reason") is not None
            if (text := output_of(choice)) is not None:
                times.append(at)
                texts.append(text)
    if not is_done or not times:
        return Answer(sent_s, tuple(times), error="the stream ended without tokens or [DONE]")
    if usage is None:
        return Answer(sent_s, tuple(times), num_output=len(times), text="".join(texts), has_usage=False)
    details = usage.get("completion_tokens_details") or {}
    accepted = details.get("accepted_prediction_tokens") or 0
    return Answer(
        sent_s,
        tuple(times),
        usage.get("prompt_tokens") or 0,
        usage.get("completion_tokens") or 0,
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        text="".join(texts),
        num_drafted=accepted + (details.get("rejected_prediction_tokens") or 0),
        num_accepted=accepted,
        num_jumped=details.get("jumped_tokens") or 0,
    )


def output_of(choice: dict[str, Any]) -> str | None:
    """The text that a choice of an event brings, "" for tokens without one; None where it brings no token: the opening of a
    message, or a bare end."""
    delta = choice.get("delta")
    if delta is None:
        text, opens = choice.get("text") or "", False
    else:
        text = "".join(delta.get(name) or "" for name in ("reasoning_content", "reasoning", "content"))
        calls = delta.get("tool_calls")
        text += "".join(str(call.get("function")) for call in calls) if calls else ""
        opens = "role" in delta
    return text if text or not (opens or choice.get("finish_reason")) else None


def _said(body: bytes) -> str:
    """What an error says: its message where it has one in OpenAI's shape. In one line."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return " ".join(_shown(body).split())


def _shown(data: bytes) -> str:
    return data[:300].decode("utf-8", "replace")


def timed_events(reads: Reads) -> Iterator[tuple[float, bytes]]:
    """Each event's time and text, from the reads of one answer. The time is that of the read which brought the last byte of its
    `data: `. What is cut off at the end is left out."""
    raw = b"".join(data for _, data in reads)
    read_starts = []
    num_bytes = 0
    for _, data in reads:
        read_starts.append(num_bytes)
        num_bytes += len(data)
    chunks = list(_chunks(raw))
    body = b"".join(raw[start : start + size] for start, size in chunks)
    chunk_starts = []  # in the body
    num_bytes = 0
    for _, size in chunks:
        chunk_starts.append(num_bytes)
        num_bytes += size
    for found in _EVENT.finditer(body):
        marked = found.start(2) - 1
        chunk = bisect_right(chunk_starts, marked) - 1
        place = chunks[chunk][0] + marked - chunk_starts[chunk]
        yield reads[bisect_right(read_starts, place) - 1][0], found[2]


def _chunks(raw: bytes) -> Iterator[tuple[int, int]]:
    """Where the data of each chunk begins in `raw`, and how long it is. A body that is not chunked is one chunk."""
    head_end = raw.find(b"\r\n\r\n")
    at = head_end + 4
    if not is_chunked(fields_of(raw[:head_end])):
        yield at, len(raw) - at
        return
    while (line_end := raw.find(b"\r\n", at)) >= 0:
        size = int(raw[at:line_end].split(b";")[0], 16)
        if size == 0 or line_end + 2 + size > len(raw):
            return
        yield line_end + 2, size
        at = line_end + 2 + size + 2


def fields_of(head: bytes) -> dict[bytes, bytes]:
    """Names and values of an answer's head, in small letters."""
    lines = (line.lower().partition(b":") for line in head.split(b"\r\n")[1:])
    return {name.strip(): value.strip() for name, colon, value in lines if colon}


def is_chunked(fields: Mapping[bytes, bytes]) -> bool:
    """Whether the body behind this head comes in chunks."""
    return fields.get(b"transfer-encoding") == b"chunked"
