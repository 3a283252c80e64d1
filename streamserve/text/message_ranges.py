"""Which tokens of a rendered chat are a message's own: from the first to the last of its characters that the template shows.

A private letter is put before and behind each message's text, and the template renders them along. What remains without the
letters is held against the prompt's tokens, byte by byte: where they agree the letters' places are sure, and where they do not,
nothing is said. Knows nothing of how a prompt is tokenised.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from streamserve.errors import InvalidRequest
from streamserve.messages import MEDIA_BASE, Layout
from streamserve.text.pictures import filled, lettered
from streamserve.text.template import ChatTemplate, Message, free_letters
from streamserve.text.tokenizer import Tokenizer

Tools = Sequence[Mapping[str, Any]] | None
Fit = Callable[[Sequence[Message], Tools], tuple[Sequence[Message], Tools]]


class Range(NamedTuple):
    """Tokens from `start` up to `end`."""

    start: int
    end: int


class Placing(NamedTuple):
    """How pictures get into the text of a prompt: see template.encode_chat."""

    pictures: Sequence[Layout] = ()
    marker: str | None = None
    token: str | None = None


NO_PICTURES = Placing()


def message_ranges(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    token_ids: Sequence[int],
    *,
    fit: Fit,
    tools: Tools = None,
    placing: Placing = NO_PICTURES,
    **options: Any,
) -> list[Range | None] | None:
    """The range of each message in `token_ids`, its prompt; None for one that the template does not show, shows in part, or
    more than once. None instead of a list: the places of messages cannot be known.

    `fit` makes messages and tools what the template takes; `options` are those of ChatTemplate.render.
    """
    letters = list(islice(free_letters((messages, tools, options)), len(messages) + len(placing.pictures)))
    marks, stands_for = letters[: len(messages)], letters[len(messages) :]
    marked = [_marked(message, mark) for message, mark in zip(messages, marks, strict=True)]
    try:
        text = _rendered(template, marked, fit, tools, placing, stands_for, options)
    except InvalidRequest:
        return None  # a template that looks into messages need not take these
    first, *rest = re.split(f"([{''.join(marks)}])", text)
    pieces, at, found = [first.encode()], len(first.encode()), dict[str, list[int]]()
    for mark, piece in zip(rest[::2], rest[1::2], strict=True):
        found.setdefault(mark, []).append(at)
        pieces.append(piece.encode())
        at += len(pieces[-1])
    ends = _ends_of(tokenizer, b"".join(pieces), token_ids, (placing.token or "").encode())
    if ends is None:
        return None
    return [_range(found.get(mark, ()), ends) for mark in marks]


def _range(places: Sequence[int], ends: Sequence[int]) -> Range | None:
    """The tokens between two places in the bytes, those included that only begin or only end there."""
    if len(places) != 2:
        return None
    return Range(bisect_right(ends, places[0]), bisect_left(ends, places[1]) + 1)


def _rendered(
    template: ChatTemplate,
    messages: Sequence[Message],
    fit: Fit,
    tools: Tools,
    placing: Placing,
    stands_for: Sequence[str],
    options: Mapping[str, Any],
) -> str:
    """As template.encode_chat does it."""
    messages, tools = fit(messages, tools)
    pictures, marker = placing.pictures, placing.marker
    is_marked = bool(pictures) and marker is not None and template.writes(marker)
    if pictures and not is_marked:
        messages = lettered(messages, stands_for)
    text = template.render(messages, tools=tools, **options)
    if is_marked:
        assert marker is not None
        return filled(text, marker, pictures)
    for letter, picture in zip(stands_for, pictures, strict=True):
        text = text.replace(letter, picture.text if placing.token is not None else "")
    return text


def _ends_of(tokenizer: Tokenizer, text: bytes, token_ids: Sequence[int], place: bytes) -> list[int] | None:
    """Where in the text each token ends; None unless they are this text. `place`: what stands there for a picture's place."""
    at, ends = 0, []
    for id in token_ids:
        raw = place if id >= MEDIA_BASE else tokenizer.token_bytes(id)
        if not text.startswith(raw, at):
            raw = raw.removeprefix(b" ")  # SentencePiece puts a space before the first word, and behind control tokens
            if not text.startswith(raw, at):
                return None
        at += len(raw)
        ends.append(at)
    return ends if at == len(text) else None


# ---- marks -----------------------------------------------------------------------------------------------------------------


def _marked(message: Message, mark: str) -> Message:
    """The message with the mark before and behind its own text: its content, or its calls, or from one to the other."""
    content, calls = message.get("content"), message.get("tool_calls")
    head = _with_mark(content, mark, is_end=False)
    if not calls:
        return message if head is None else {**message, "content": _with_mark(head, mark, is_end=True)}
    *before, last = calls
    last = _with_end(last, mark)
    calls = [*before, last]
    if head is not None:
        return {**message, "content": head, "tool_calls": calls}
    first, *others = calls
    function = first["function"]
    return {**message, "tool_calls": [{**first, "function": {**function, "name": mark + function["name"]}}, *others]}


def _with_mark(content: Any, mark: str, *, is_end: bool) -> Any:
    """Content with the mark at its first or last character that is no white space, which templates cut off; None: it has none."""
    if isinstance(content, str):
        kept = content.rstrip() if is_end else content.lstrip()
        if not kept:
            return None
        return kept + mark + content[len(kept) :] if is_end else content[: len(content) - len(kept)] + mark + kept
    if not isinstance(content, list):
        return None
    places = [place for place, part in enumerate(content) if part.get("text", "").strip()]
    if not places:
        return None
    place = places[-1 if is_end else 0]
    part = {**content[place], "text": _with_mark(content[place]["text"], mark, is_end=is_end)}
    return [*content[:place], part, *content[place + 1 :]]


def _with_end(call: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """A call with the mark behind the last text of its arguments, inside whose quotes it is harmless; else behind its name."""
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str) and '"' in arguments:
        head, quote, tail = arguments.rpartition('"')
        return {**call, "function": {**function, "arguments": f"{head}{mark}{quote}{tail}"}}
    return {**call, "function": {**function, "name": function["name"] + mark}}
