"""Blocks and events of Anthropic's dialect, from scripted readings."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve.api.answer import CallBegan, CallGrew, Content, Event, Thought
from streamserve.api.anthropic_events import (
    Blocks,
    MessageEvents,
    NamedEvent,
    anthropic_error_body,
    arguments_of,
    end_of,
    message_json,
    unseal,
    usage_json,
    whole_blocks,
)
from streamserve.api.stream import Usage
from streamserve.errors import EngineStopped, InvalidRequest, NotFound, QueueFull, StreamServeError
from tests.api.anthropic_checks import joined, parse_events

CALL = [CallBegan(0, "add", "call_a"), CallGrew(0, '{"a": '), CallGrew(0, "1}")]
TURN: list[Event] = [Thought("Let me "), Thought("see."), Content("\n\n"), Content("Adding."), Content("\n"), *CALL]


def whole(events: list[Event], **options: bool) -> list[dict[str, Any]]:
    blocks = Blocks(**options)
    return whole_blocks([*blocks.take(events), *blocks.finish()])


def streamed(pieces: list[list[Event]], finish_reason: str = "stop", **options: bool) -> dict[str, Any]:
    blocks, shape = Blocks(**options), MessageEvents()
    usage = usage_json(Usage(10, 5, 4))
    made: list[NamedEvent] = shape.opening(message_json("msg-1", "tiny", [], None, {**usage, "output_tokens": 0}))
    for piece in pieces:
        made += shape.of(blocks.take(piece))
    made += shape.of(blocks.finish())
    made += shape.closing(end_of(finish_reason, None), usage)
    return joined(parse_events("".join(f"event: {name.decode()}\ndata: {data.decode()}\n\n" for name, data in made)))


def test_thought_text_and_call_are_blocks_in_order() -> None:
    thought, text, call = whole(TURN)
    assert (thought["type"], thought["thinking"]) == ("thinking", "Let me see.")
    assert text == {"type": "text", "text": "\n\nAdding.\n"}
    assert call == {"type": "tool_use", "id": "call_a", "name": "add", "input": {"a": 1}}


def test_white_space_alone_makes_no_block() -> None:
    assert whole([Thought("\n"), Content(" "), Content("\n\n"), *CALL, Content("\n")]) == whole(list(CALL))
    assert whole([Content(" \n")]) == []


def test_a_call_without_arguments_has_an_empty_object() -> None:
    events: list[Event] = [CallBegan(0, "now"), CallBegan(1, "then"), CallGrew(1, '{"days":2}')]
    first, second = streamed([events], "tool_calls")["content"]
    assert (first["input"], second["input"]) == ({}, {"days": 2})
    assert first["id"] != second["id"]


def test_text_after_a_call_is_a_block_of_its_own() -> None:
    assert [block["type"] for block in whole([*CALL, Content("Done.")])] == ["tool_use", "text"]


def test_an_omitted_thought_comes_back_with_its_signature() -> None:
    (block,) = whole([Thought("Über 9000")], omits_thinking=True)
    assert block["thinking"] == ""
    assert unseal(block["signature"]) == "Über 9000"
    shown = whole([Thought("Über 9000")])[0]
    assert unseal(shown["signature"]) is None
    assert unseal("thought:%%%") is None and unseal("thought:gICA") is None  # not ours: base64 of no text


EVENTS = st.lists(
    st.one_of(st.builds(Content, st.text("a \n", max_size=3)), st.builds(Thought, st.text("b \n", max_size=3)), st.just(None)),
    max_size=12,
)


@settings(deadline=None)
@given(EVENTS, st.data())
def test_any_answer_streams_as_it_is_whole(drawn: list[Event | None], data: st.DataObject) -> None:
    events: list[Event] = []
    num_calls = 0
    for event in drawn:
        if event is not None:
            events.append(event)
            continue
        events.append(CallBegan(num_calls, "f", f"id{num_calls}"))
        events += [CallGrew(num_calls, part) for part in data.draw(st.sampled_from([[], ["{}"], ["{", '"x":', "1}"]]))]
        num_calls += 1
    cuts = sorted(data.draw(st.lists(st.integers(0, len(events)), max_size=3)))
    pieces = [events[start:end] for start, end in zip([0, *cuts], [*cuts, len(events)], strict=True)]
    assert streamed(pieces)["content"] == whole(events)


@pytest.mark.parametrize(
    ("cut_short", "kept"),
    [
        ('{"a": [1, {"b": "x', {"a": [1, {}]}),
        ('{"a": "\\"}", "b": tr', {"a": '"}'}),
        ('{"a": 1, "b"', {"a": 1}),
        ('{"a": {"b": 2}', {"a": {"b": 2}}),
        ("{", {}),
        ("", {}),
        ("[1", {}),
        ("}{", {}),
        ('{"a": 1}', {"a": 1}),
    ],
)
def test_of_arguments_cut_short_the_complete_members_stay(cut_short: str, kept: dict[str, Any]) -> None:
    assert arguments_of(cut_short) == kept
    events: list[Event] = [CallBegan(0, "f"), CallGrew(0, cut_short)]
    assert streamed([events], "length")["content"][0]["input"] == (cut_short or "{}")


def test_long_and_deep_arguments_cut_short_keep_what_is_complete() -> None:
    assert arguments_of('{"a":[' + "1," * 100_000 + "2") == {"a": [1] * 100_000}
    assert arguments_of('{"a":' + "[" * 100_000) == {}  # deeper than JSON is read


@pytest.mark.parametrize(
    ("finish_reason", "matched_stop", "reason"),
    [
        ("stop", 258, "end_turn"),
        ("stop", None, "end_turn"),
        ("stop", "END", "stop_sequence"),
        ("length", None, "max_tokens"),
        ("tool_calls", 258, "tool_use"),
        ("abort", None, "max_tokens"),
    ],
)
def test_ends_have_anthropics_names(finish_reason: str, matched_stop: int | str | None, reason: str) -> None:
    end = end_of(finish_reason, matched_stop)
    assert (end.reason, end.stop_sequence) == (reason, "END" if reason == "stop_sequence" else None)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("x"), "invalid_request_error"),
        (NotFound("x"), "not_found_error"),
        (QueueFull("x", retry_after_s=1), "rate_limit_error"),
        (EngineStopped("x"), "overloaded_error"),
        (StreamServeError("x"), "api_error"),
    ],
)
def test_errors_have_anthropics_shape(error: StreamServeError, kind: str) -> None:
    body = anthropic_error_body(error)
    assert (body["type"], body["error"]) == ("error", {"type": kind, "message": "x"})
    assert body["request_id"].startswith("req_")
