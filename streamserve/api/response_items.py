"""Items of the Responses API: what a client may give as input, and the chat messages they make.

Owns the types of input items, how they are checked, kept and turned into messages. Knows nothing of requests, stores, engines.

Items that an earlier response put out are valid input. Reasoning goes with the assistant's message that follows it, calls
with the one before them: one response is one turn, as it was when the model wrote it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from streamserve.api.schema import PartName, convert, note_unread, show
from streamserve.errors import InvalidRequest

Json = dict[str, Any]
MAX_ITEMS = 10_000
ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
PICTURE = "input_image"
OTHER_PARTS = ("input_file", "input_audio", "computer_screenshot")
HISTORY = "previous_response_id"  # the path of items that an earlier response brings
_OWN_ID = re.compile(r"[a-z]+_([0-9a-f]{32})i?[0-9a-f]{4,}")


class Part(Struct):
    """A part of an item's content: text, or a picture (input_image) by its URL or by the id of an uploaded file. Fields that are
    not here are passed over with a warning (unread_in), but for those of answers that come back as they were given (annotations,
    …)."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    file_id: str | None = None
    detail: str | None = None


class MessageItem(Struct, kw_only=True):
    """A message of any role; an assistant's may be one that an earlier response put out."""

    role: str
    content: str | list[Part]
    type: str = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class FunctionCallItem(Struct, kw_only=True):
    """A call that the model made earlier."""

    call_id: str
    name: str
    arguments: str
    type: str = "function_call"
    id: str | None = None
    status: str | None = None
    namespace: str | None = None
    created_by: str | None = None
    caller: Json | None = None
    parsed_arguments: Any = None  # the openai client's parse() adds it


class FunctionCallOutputItem(Struct, kw_only=True):
    """What a client's function gave back."""

    call_id: str
    output: str | list[Part]
    type: str = "function_call_output"
    id: str | None = None
    status: str | None = None
    name: str | None = None
    namespace: str | None = None
    created_by: str | None = None
    caller: Json | None = None


class ReasoningItem(Struct, kw_only=True):
    """What the model thought before it answered, as an earlier response put it out."""

    summary: list[Part] = []
    content: list[Part] | None = None
    type: str = "reasoning"
    id: str | None = None
    status: str | None = None
    encrypted_content: str | None = None


class ItemReference(Struct, kw_only=True):
    """An item of a stored response, by its id."""

    id: str
    type: str = "item_reference"


KINDS: Mapping[str, type[Struct]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningItem,
    "item_reference": ItemReference,
}


@dataclass(frozen=True, slots=True)
class Item:
    """A checked item and where it came from: the request's field to name when it turns out to be wrong."""

    value: Struct
    path: str


def read_items(given: str | Sequence[Any], path: str = "input") -> list[Item]:
    """Input as items. A text is a user's message. Raises InvalidRequest naming what is wrong."""
    if isinstance(given, str):
        return [Item(MessageItem(role="user", content=given), path)]
    if len(given) > MAX_ITEMS:
        raise InvalidRequest(f"{path} has {len(given)} items; at most {MAX_ITEMS} are allowed", param=path)
    return [Item(_read(item, f"{path}[{index}]"), f"{path}[{index}]") for index, item in enumerate(given)]


def _read(given: Any, path: str) -> Struct:
    if not isinstance(given, dict):
        raise InvalidRequest(f"{path} is {show(given)}; an item (an object) is expected", param=path)
    kind = given.get("type") or ("message" if "role" in given else None)
    if kind is None:
        raise InvalidRequest(f"{path}.type is missing", param=f"{path}.type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InvalidRequest(f"{path}.type is {show(kind)}; allowed is {', '.join(KINDS)}", param=f"{path}.type")
    try:
        item = convert(given, KINDS[kind])
        if isinstance(item, MessageItem) and item.role not in ROLES:
            raise InvalidRequest(f"role is {show(item.role)}; allowed is {', '.join(ROLES)}", param="role")
        if isinstance(item, ReasoningItem) and item.encrypted_content and not (item.content or item.summary):
            raise InvalidRequest(
                "encrypted_content comes from another server, which alone can read it; leave the item out",
                param="encrypted_content",
            )
        shows_pictures = isinstance(item, FunctionCallOutputItem) or (isinstance(item, MessageItem) and item.role == "user")
        for field in ("content", "output", "summary"):
            _check_parts(getattr(item, field, None), field, shows_pictures=shows_pictures)
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error}", param=f"{path}.{error.param}") from None
    return item


def _check_parts(parts: Any, field: str, *, shows_pictures: bool) -> None:
    for index, part in enumerate(parts if isinstance(parts, list) else ()):
        place = f"{field}[{index}]"
        if part.type in OTHER_PARTS:
            raise InvalidRequest(f"{place}.type is {part.type}; allowed are texts and pictures", param=f"{place}.type")
        if part.type == PICTURE and shows_pictures:
            continue
        if part.type == PICTURE:
            raise InvalidRequest(
                f"{place}.type is {PICTURE}; only messages of users and outputs of functions may show pictures",
                param=f"{place}.type",
            )
        if part.type == "refusal" and part.refusal is not None:
            continue
        if part.type not in TEXT_PARTS:
            allowed = f"input_text, output_text, {PICTURE}"
            raise InvalidRequest(f"{place}.type is {show(part.type)}; allowed is {allowed}", param=f"{place}.type")
        if part.text is None:
            raise InvalidRequest(f"{place}.text is missing", param=f"{place}.text")


# Fields that are checked for their types and say something to other servers only; and those that say something here.
_UNREAD_OF_ITEM = ("phase", "namespace", "caller")
_READ_OF_PART = frozenset((*Part.__struct_fields__, "annotations", "logprobs", "parsed"))


def unread_in(given: str | Sequence[Json], path: str = "input") -> tuple[str, ...]:
    """A sentence for each field of a checked input that nothing reads, about the first place where it stands."""
    found: dict[str, str] = {}
    for index, item in enumerate(given if not isinstance(given, str) else ()):
        for name in _UNREAD_OF_ITEM:
            if name in item:
                note_unread({name: item[name]}, frozenset(), found, f"{path}[{index}]")
        for field in ("content", "output", "summary"):
            parts = item.get(field)
            for at, part in enumerate(parts if isinstance(parts, list) else ()):
                note_unread(part, _READ_OF_PART, found, f"{path}[{index}].{field}[{at}]")
    return tuple(found.values())


def text_of(content: str | list[Part] | None) -> str:
    """The text of a content, parts joined as chat messages join theirs."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join([part.text if part.text is not None else part.refusal or "" for part in content])


def _shown(content: str | list[Part]) -> str | list[Json]:
    """A content as a chat has it: a text, or a part for each part where there is a picture."""
    if isinstance(content, str) or not any(part.type == PICTURE for part in content):
        return text_of(content)
    return [_picture(part) if part.type == PICTURE else {"type": "text", "text": text_of([part])} for part in content]


def _picture(part: Part) -> Json:
    given = {"image_url": part.image_url, "file_id": part.file_id, "detail": part.detail}
    return {"type": PICTURE, **{name: value for name, value in given.items() if value is not None}}


# ---- messages ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """A chat message as chat completions take it, and the path of the item it began with."""

    value: Json
    path: str


def messages_of(items: Iterable[Item], instructions: str | None = None) -> list[Message]:
    """The conversation that items make. Instructions come first; system messages right behind them join them, because many
    templates take one system message only. Raises InvalidRequest for an output without its call."""
    made: list[Message] = []
    head = [instructions] if instructions else []  # the texts of the first message: joined once, however many they are
    if instructions:
        made.append(Message({"role": "system", "content": instructions}, "instructions"))
    open_calls: set[str] = set()
    for item in items:
        value, path = item.value, item.path
        if isinstance(value, MessageItem) and head and len(made) == 1 and value.role in ("system", "developer"):
            head.append(text_of(value.content))
        elif isinstance(value, MessageItem):
            _add_message(made, value, path)
        elif isinstance(value, ReasoningItem):
            made.append(Message({"role": "assistant", "content": "", "reasoning_content": _thought(value)}, path))
        elif isinstance(value, FunctionCallItem):
            turn = _assistant(made, path)
            call = {"id": value.call_id, "type": "function", "function": {"name": value.name, "arguments": value.arguments}}
            turn.setdefault("tool_calls", []).append(call)
            open_calls.add(value.call_id)
        elif isinstance(value, FunctionCallOutputItem):
            if value.call_id not in open_calls:
                raise InvalidRequest(
                    f"{path}.call_id is {show(value.call_id)}, but no function_call before it has this call_id",
                    param=f"{path}.call_id",
                )
            made.append(Message({"role": "tool", "tool_call_id": value.call_id, "content": _shown(value.output)}, path))
        else:
            raise AssertionError("references are resolved before messages are made")
    if head:
        made[0].value["content"] = "\n\n".join(head)
    return made


def _add_message(made: list[Message], item: MessageItem, path: str) -> None:
    if item.role == "assistant":
        text = text_of(item.content)
        last = made[-1].value if made else None
        if last is not None and last["role"] == "assistant" and not last["content"] and "tool_calls" not in last:
            last["content"] = text  # what it thought before it said so
        else:
            made.append(Message({"role": "assistant", "content": text}, path))
    else:
        made.append(Message({"role": item.role, "content": _shown(item.content)}, path))


def names_of(messages: Sequence[Message]) -> dict[str, PartName]:
    """What parts of a chat that may be pictures are called in these bodies, by their paths in the chat."""
    names: dict[str, PartName] = {}
    for index, message in enumerate(messages):
        content = message.value["content"]
        field = "output" if message.value["role"] == "tool" else "content"
        for place in range(len(content) if isinstance(content, list) else 0):
            name = PartName(f"{message.path}.{field}[{place}]")
            names[f"messages[{index}].content[{place}]"] = PartName(HISTORY, None, HISTORY) if message.path == HISTORY else name
    return names


def _assistant(made: list[Message], path: str) -> Json:
    if not made or made[-1].value["role"] != "assistant":
        made.append(Message({"role": "assistant", "content": ""}, path))
    return made[-1].value


def _thought(item: ReasoningItem) -> str:
    return text_of(item.content) if item.content else text_of(item.summary)


def groups_of(messages: Sequence[Message]) -> list[list[Message]]:
    """Messages that can only be left out together: what begins with a user's message and ends before the next one."""
    groups: list[list[Message]] = []
    for message in messages:
        if not groups or message.value["role"] == "user":
            groups.append([])
        groups[-1].append(message)
    return groups


# ---- kept items --------------------------------------------------------------------------------------------------


def kept_items(items: Iterable[Item], suffix: str) -> list[Json]:
    """Items as they are kept and listed; each has an id. `suffix` is the response's id without its prefix."""
    return [_kept(item.value, f"{suffix}i{index:04x}") for index, item in enumerate(items)]


def _kept(item: Struct, name: str) -> Json:
    if isinstance(item, MessageItem):
        is_answer = item.role == "assistant"
        parts: list[Json] = (
            [{"type": "output_text", "text": text, "annotations": [], "logprobs": []} for text in _texts(item.content)]
            if is_answer
            else _kept_parts(item.content)
        )
        kept: Json = {"type": "message", "role": item.role, "content": parts}
        prefix = "msg"
    elif isinstance(item, FunctionCallItem):
        kept = {"type": "function_call", "call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        prefix = "fc"
    elif isinstance(item, FunctionCallOutputItem):
        output = item.output if isinstance(item.output, str) else _kept_parts(item.output)
        kept = {"type": "function_call_output", "call_id": item.call_id, "output": output}
        prefix = "fco"
    else:
        assert isinstance(item, ReasoningItem), "references are resolved before items are kept"
        content = [{"type": "reasoning_text", "text": text} for text in _texts(item.content or [])]
        summary = [{"type": "summary_text", "text": text} for text in _texts(item.summary)]
        kept = {"type": "reasoning", "summary": summary, "content": content}
        prefix = "rs"
    given = item.id
    return {"id": given or f"{prefix}_{name}", **kept, "status": item.status or "completed"}


def _kept_parts(content: str | list[Part]) -> list[Json]:
    parts = [Part("input_text", content)] if isinstance(content, str) else content
    return [
        {"detail": "auto", **_picture(part)} if part.type == PICTURE else {"type": "input_text", "text": text_of([part])}
        for part in parts
    ]


def _texts(content: str | list[Part]) -> list[str]:
    return [content] if isinstance(content, str) else [text_of([part]) for part in content]


def response_of(item_id: str) -> str | None:
    """The id of the response that an item belongs to, which its own id names; None for an id that is not ours."""
    match = _OWN_ID.fullmatch(item_id)
    return f"resp_{match[1]}" if match else None
