"""Bodies of POST /generate and of the chat route out of an engine's arguments: one for all, or one for each entry of a list.

Owns what counts as a list, what a list among the arguments means, and how pictures become what a body can hold, for which files
are read: when a body is sent, since those of thousands of prompts are too much at once. Knows no field beside those that may be
lists.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamserve.api.generate_schema import each, rids_of
from streamserve.errors import InvalidRequest
from streamserve.lang.pictures import check_picture, url_of
from streamserve.llm.sampling import chat_fields, native_fields

_LISTS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "image_data")


def listed(value: Any) -> list[Any] | None:
    """The entries of a list, an array, a data set's column, a generator; None: it is one value."""
    if value is None or isinstance(value, str | bytes | bytearray | Mapping):
        return None
    if callable(tolist := getattr(value, "tolist", None)):  # arrays and columns of numpy, pandas, torch
        value = tolist()
    return list(value) if isinstance(value, Iterable) else None


def generate_body(prompt: Any, sampling: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """One body for a prompt, or for a whole list of them."""
    body = {**_given(fields), **({} if prompt is None else {"text": _texts(prompt)})}
    if not _is_list(sampling):
        return {**native_fields(sampling), **body}
    each_of = [native_fields(entry) for entry in sampling]
    beside = next((set(entry) - {"sampling_params"} for entry in each_of if len(entry) > 1), set())
    if beside:
        raise InvalidRequest(
            "logprobs stand in a list of sampling_params; where the answer is a stream, give return_logprob and top_logprobs_num",
            param="sampling_params",
        )
    return {"sampling_params": [entry["sampling_params"] for entry in each_of], **body}


def generate_bodies(prompt: Any, sampling: Any, fields: Mapping[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
    """A body for one prompt; a list of them for a list."""
    alike = _given(fields)
    if prompt is not None and "input_ids" in alike:
        raise InvalidRequest("give either prompt or input_ids", param="prompt")
    name, entries = ("text", _texts(prompt)) if prompt is not None else ("input_ids", alike.get("input_ids"))
    if not isinstance(entries, list) or (name == "input_ids" and not (entries and _is_list(entries[0]))):
        return generate_body(None if prompt is None else entries, sampling, alike)
    num = len(entries)
    alike.pop("input_ids", None)
    own: dict[str, Sequence[Any]] = {name: each(name, alike.pop(name), num, True) for name in _LISTS if name in alike}
    if "rid" in alike:
        own["rid"] = rids_of(alike.pop("rid"), num, True)
    own[name] = entries
    sampled = each("sampling_params", list(sampling) if _is_list(sampling) else sampling, num, True)
    return [
        {**native_fields(sampled[at]), **alike, **{name: values[at] for name, values in own.items() if values[at] is not None}}
        for at in range(num)
    ]


def chat_bodies(messages: Any, sampling: Any, fields: Mapping[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
    """A body of the chat route for one conversation; a list of them for a list."""
    chats = listed(messages)
    if chats is None:
        raise InvalidRequest(
            f"messages is {_shown(messages)}; allowed is a list of messages, or a list of such lists", param="messages"
        )
    if chats and isinstance(chats[0], Mapping):
        return _chat_body(chats, sampling, fields)
    if wrong := [at for at, chat in enumerate(chats) if listed(chat) is None]:
        at = wrong[0]
        raise InvalidRequest(f"messages[{at}] is {_shown(chats[at])}; a message is a dictionary", param=f"messages[{at}]")
    if _is_list(sampling) and len(sampling) != len(chats):
        raise InvalidRequest(
            f"sampling_params is a list of {len(sampling)}, but there are {len(chats)} conversations", param="sampling_params"
        )
    many = sampling if _is_list(sampling) else [sampling] * len(chats)
    return [_chat_body(listed(chat), params, fields) for chat, params in zip(chats, many, strict=True)]


def _chat_body(messages: Any, sampling: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    params = chat_fields(sampling)
    twice = next((name for name in fields if name in params), None)
    if twice is not None:
        raise InvalidRequest(f"{twice} is given twice: in sampling_params, and as an argument", param=twice)
    return {**fields, **params, "messages": messages}


async def with_pictures(body: dict[str, Any]) -> dict[str, Any]:
    """The body with its pictures as URLs."""
    if "image_data" in body:
        return {**body, "image_data": await asyncio.to_thread(_urls, body["image_data"], "image_data")}
    if any(isinstance(message, Mapping) and _is_list(message.get("content")) for message in body.get("messages") or ()):
        return {**body, "messages": await asyncio.to_thread(_with_urls, body["messages"])}
    return body


def _with_urls(messages: Sequence[Any]) -> list[Any]:
    shown: list[Any] = []
    for at, message in enumerate(messages):
        parts = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(parts, list | tuple):
            message = {**message, "content": [_part(part, f"messages[{at}].content[{n}]") for n, part in enumerate(parts)]}
        shown.append(message)
    return shown


def _part(part: Any, name: str) -> Any:
    picture = part.get("image_url") if isinstance(part, Mapping) else None
    if picture is None:
        return part
    if isinstance(picture, Mapping):
        return {**part, "image_url": {**picture, "url": _urls(picture.get("url"), f"{name}.image_url.url")}}
    return {**part, "image_url": _urls(picture, f"{name}.image_url")}


def _urls(pictures: Any, name: str) -> Any:
    """Pictures as URLs: paths are read, and so are bytes and open pictures. Other words are for the server to judge."""
    if _is_list(pictures):
        return [_urls(picture, f"{name}[{at}]") for at, picture in enumerate(pictures)]
    if pictures is None or (isinstance(pictures, str) and (":" in pictures or not _is_file(pictures))):
        return pictures
    try:
        check_picture(pictures)
        return url_of(pictures)
    except (TypeError, OSError) as error:
        raise InvalidRequest(f"{name}: {error}", param=name) from None


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except OSError:  # too long to be a name: base64
        return False


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are None, and token ids as lists."""
    given = {name: value for name, value in fields.items() if value is not None}
    if (ids := listed(given.get("input_ids"))) is not None:
        given["input_ids"] = [entry if (own := listed(entry)) is None else own for entry in ids]
    return given


def _texts(prompt: Any) -> str | list[str]:
    """A text or a list of them. Entries that are no texts are for the server to judge, but for token ids."""
    if isinstance(prompt, str):
        return prompt
    texts = listed(prompt)
    if texts is None:
        raise InvalidRequest(f"prompt is {_shown(prompt)}; allowed is a text, or a list of texts", param="prompt")
    if any(isinstance(text, int) or listed(text) is not None for text in texts):
        raise InvalidRequest("prompt has token ids where texts belong: give them as input_ids", param="prompt")
    return texts


def _shown(value: Any) -> str:
    """In an error message, cut where it gets long."""
    return f"{value!r:.100}"


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
