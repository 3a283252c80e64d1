"""Tools for chat templates that know none, or not all of them: what such a template would leave out, in ordinary messages.

Owns how calls and their results look then: as in Hermes' format, which most models have read. Knows nothing of who parses the
answer. The words that explain the tools come from text/tools/find.py.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


def explained(messages: Sequence[Message], instructions: str, *, takes_system: bool = True) -> list[Message]:
    """The conversation with `instructions` at the end of its system message; before the user's first words, for a template that
    takes no such message."""
    if not takes_system:
        place = next((place for place, message in enumerate(messages) if message["role"] == "user"), None)
        if place is None:
            return [{"role": "user", "content": instructions}, *messages]
        told = {**messages[place], "content": _joined("\n\n", [instructions, messages[place]["content"]])}
        return [*messages[:place], told, *messages[place + 1 :]]
    first = messages[0] if messages else None
    if first is None or first["role"] != "system":
        return [{"role": "system", "content": instructions}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{instructions}".lstrip()}, *messages[1:]]


def spelt_out(messages: Sequence[Message]) -> list[Message]:
    """The conversation with calls as the assistant's text, and their results as the user's. Results that follow each other, and
    what the user says behind them, are one message: some templates take turns only."""
    chat: list[Message] = []
    results: list[Any] = []
    for message in messages:
        if message["role"] == "tool":
            results.append(_joined("\n", ["<tool_response>", message["content"], "</tool_response>"]))
            continue
        if results and message["role"] == "user":
            message = {**message, "content": _joined("\n\n", [_joined("\n", results), *filter(None, [message["content"]])])}
        elif results:
            chat.append({"role": "user", "content": _joined("\n", results)})
        results = []
        calls = message.get("tool_calls")
        if not calls:
            chat.append(message)
            continue
        said = [message["content"]] if message.get("content") else []
        said += [f"<tool_call>\n{_call(call['function'])}\n</tool_call>" for call in calls]
        chat.append({**{key: value for key, value in message.items() if key != "tool_calls"}, "content": "\n".join(said)})
    if results:
        chat.append({"role": "user", "content": _joined("\n", results)})
    return chat


def pictures_apart(messages: Sequence[Message]) -> list[Message]:
    """The conversation with pictures of results in the user's message behind them, for a template that shows none in results."""
    chat: list[Message] = []
    waiting: list[Any] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "tool" and isinstance(content, list):
            texts = [part["text"] for part in content if "text" in part]
            waiting += [part for part in content if "text" not in part]
            message = {**message, "content": "\n".join(texts) or "The picture follows."}
        elif message["role"] == "user" and waiting:
            message = {**message, "content": _joined("\n", [waiting, content])}
            waiting = []
        elif message["role"] != "tool" and waiting:
            chat.append({"role": "user", "content": waiting})
            waiting = []
        chat.append(message)
    return [*chat, {"role": "user", "content": waiting}] if waiting else chat


def _joined(between: str, contents: Sequence[Any]) -> Any:
    """Contents of messages as one: a text, or parts where one of them has parts."""
    if all(isinstance(content, str) for content in contents):
        return between.join(contents)
    parts: list[Any] = []
    for content in contents:
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if parts and "text" in parts[-1] and "text" in part:
                part = {**part, "text": f"{parts.pop()['text']}{between}{part['text']}"}
            parts.append(part)
    return parts


def _call(function: Mapping[str, Any]) -> str:
    name, arguments = json.dumps(function["name"], ensure_ascii=False), function.get("arguments") or "{}"
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'{{"name": {name}, "arguments": {written}}}'
