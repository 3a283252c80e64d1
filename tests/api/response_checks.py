"""What every stream of /v1/responses has to obey, as a state machine that reads it event by event."""

import json
from collections.abc import Iterable
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

Json = dict[str, Any]
LAST = {"response.completed": {"completed"}, "response.incomplete": {"incomplete", "cancelled"}, "response.failed": {"failed"}}
PART_OF = {"message": "output_text", "reasoning": "reasoning_text"}
_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def events_of_sse(text: str) -> list[Json]:
    """The events of an SSE answer; each one's name is its type."""
    events = []
    for block in text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        event = json.loads(fields["data"])
        assert fields["event"] == event["type"]
        events.append(event)
    return events


def check_stream(events: Iterable[Json], *, is_queued: bool = False) -> Json:
    """Check a whole stream; returns the last event's response."""
    stream = iter(enumerate(events))

    def take(*kinds: str) -> Json:
        number, event = next(stream)
        _EVENT.validate_python(event)
        assert event["type"] in kinds, f"{event['type']} came where {kinds} should"
        assert event["sequence_number"] == number
        return event

    created = take("response.created")["response"]
    assert created["output"] == [] and created["usage"] is None
    assert created["status"] == ("queued" if is_queued else "in_progress")
    if is_queued:
        assert take("response.queued")["response"]["status"] == "queued"
    assert take("response.in_progress")["response"]["status"] == "in_progress"
    output: list[Json] = []
    while (event := take("response.output_item.added", *LAST))["type"] == "response.output_item.added":
        item = event["item"]
        assert event["output_index"] == len(output)
        assert item["status"] == "in_progress"
        assert item["id"] not in [other["id"] for other in output]
        read = _read_call if item["type"] == "function_call" else _read_text
        output.append(read(take, {"item_id": item["id"], "output_index": len(output)}, item))
    assert next(stream, None) is None, "something follows the last event"
    response: Json = event["response"]
    assert response["status"] in LAST[event["type"]]
    assert response["output"] == output
    check_response(response)
    assert {**created, "status": 0} == {**response, **{name: created[name] for name in _CHANGING}, "status": 0}
    return response


_CHANGING = ("output", "usage", "completed_at", "error", "incomplete_details")


def check_response(response: Json) -> None:
    """A response object that is over."""
    Response.model_validate(response)
    status = response["status"]
    assert (response["completed_at"] is not None) == (status == "completed")
    assert (response["error"] is not None) == (status == "failed")
    assert (response["incomplete_details"] is not None) == (status == "incomplete")
    assert all(item["status"] == "completed" for item in response["output"][:-1])
    if status == "completed":
        assert all(item["status"] == "completed" for item in response["output"])
    usage = response["usage"]
    if usage is not None:
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert usage["input_tokens_details"]["cached_tokens"] <= usage["input_tokens"]


def _read_call(take: Any, place: Json, item: Json) -> Json:
    assert item["arguments"] == "" and item["call_id"] and item["name"]
    grown = ""
    while (event := take("response.function_call_arguments.delta", "response.function_call_arguments.done")) and (
        event["type"].endswith(".delta")
    ):
        assert event["delta"] and place.items() <= event.items()
        grown += event["delta"]
    assert event["arguments"] == grown and event["name"] == item["name"] and place.items() <= event.items()
    done: Json = take("response.output_item.done")
    assert done["output_index"] == place["output_index"]
    assert done["item"] == {**item, "arguments": grown, "status": done["item"]["status"]}
    whole: Json = done["item"]
    return whole


def _read_text(take: Any, place: Json, item: Json) -> Json:
    kind = PART_OF[item["type"]]
    assert item["content"] == []
    place = {**place, "content_index": 0}
    added = take("response.content_part.added")
    assert place.items() <= added.items() and added["part"]["type"] == kind and added["part"]["text"] == ""
    text, logprobs = "", []
    while (event := take(f"response.{kind}.delta", f"response.{kind}.done"))["type"].endswith(".delta"):
        assert place.items() <= event.items()
        text += event["delta"]
        logprobs += event.get("logprobs", [])
    assert event["text"] == text and event.get("logprobs", []) == logprobs and place.items() <= event.items()
    part = take("response.content_part.done")
    assert place.items() <= part.items() and part["part"]["text"] == text and part["part"].get("logprobs", []) == logprobs
    done: Json = take("response.output_item.done")
    assert done["output_index"] == place["output_index"]
    assert done["item"] == {**item, "content": [part["part"]], "status": done["item"]["status"]}
    whole: Json = done["item"]
    return whole
