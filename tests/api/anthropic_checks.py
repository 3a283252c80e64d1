"""What every stream of Anthropic's events has to be, and the message that a client would put together from it."""

import json
from collections.abc import Iterable
from typing import Any

DELTAS = {
    "text": {"text_delta": "text"},
    "thinking": {"thinking_delta": "thinking", "signature_delta": "signature"},
    "tool_use": {"input_json_delta": "partial_json"},
}


def parse_events(stream: str) -> list[dict[str, Any]]:
    """The events of a stream; each one's name is its type."""
    events = []
    for block in stream.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def joined(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The message of a stream. Fails where an event is not what may come next."""
    steps = [event for event in events if event["type"] != "ping"]
    first, *middle, delta, stop = steps
    assert (first["type"], delta["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    message: dict[str, Any] = first["message"]
    assert message["content"] == [] and message["stop_reason"] is None and message["usage"]["output_tokens"] == 0
    blocks: list[dict[str, Any]] = []
    texts: dict[str, str] | None = None  # of the open block
    for event in middle:
        if event["type"] == "content_block_start":
            assert texts is None, "one block is open at a time"
            assert event["index"] == len(blocks), "indexes count from 0"
            blocks.append(event["content_block"])
            texts = {}
        elif event["type"] == "content_block_delta":
            assert texts is not None and event["index"] == len(blocks) - 1
            kind = event["delta"]["type"]
            name = DELTAS[blocks[-1]["type"]][kind]  # a delta fits its block
            texts[name] = texts.get(name, "") + event["delta"][name]
        else:
            assert event["type"] == "content_block_stop" and texts is not None and event["index"] == len(blocks) - 1
            _close(blocks[-1], texts, delta["delta"]["stop_reason"])
            texts = None
    assert texts is None, "no block stays open"
    stop_reason = delta["delta"]["stop_reason"]
    assert stop_reason is not None
    if stop_reason == "tool_use":
        assert blocks and blocks[-1]["type"] == "tool_use"
    return {**message, **delta["delta"], "content": blocks, "usage": {**message["usage"], **delta["usage"]}}


def _close(block: dict[str, Any], texts: dict[str, str], stop_reason: str) -> None:
    if block["type"] == "tool_use":
        partial = texts["partial_json"]
        block["input"] = partial if stop_reason == "max_tokens" else json.loads(partial)
        return
    block.update(texts)
    if block["type"] == "text":
        assert block["text"].strip(), "no empty text block"
    else:
        assert block["signature"], "clients insist on a signature"
