"""The events of a growing response, from scripted events of an answer."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve.api.response_events import Growing, event_name, usage_json
from streamserve.errors import StepFailed
from streamserve.text.tools.format import CallBegan, CallGrew, Content, Event, Thought
from tests.api.response_checks import check_stream

ID = "resp_" + "0123456789abcdef" * 2
FIELDS: dict[str, Any] = {
    "id": ID,
    "object": "response",
    "created_at": 1,
    "model": "tiny",
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "metadata": {},
    "temperature": 1.0,
    "top_p": 1.0,
    "instructions": None,
}
USAGE = usage_json(7, 3, 5, 2)


def play(*batches: Sequence[Event], reason: str = "stop", **options: bool) -> dict[str, Any]:
    """A response whose answer comes in these batches, checked; the last event's response."""
    growing = Growing(FIELDS, **options)
    events = growing.opening()
    events += growing.begin()
    for batch in batches:
        events += growing.take(batch)
    events += growing.finish(reason, USAGE)
    for event in events:
        assert event_name(event).decode() == json.loads(event)["type"]
    last = check_stream(map(json.loads, events), is_queued=options.get("is_queued", False))
    assert last == growing.as_json()
    return last


def kinds(response: dict[str, Any]) -> list[str]:
    return [item["type"] for item in response["output"]]


def text_of(item: dict[str, Any]) -> str:
    return "".join(part["text"] for part in item["content"])


CALL: list[Event] = [CallBegan(0, "weather", "call_1"), CallGrew(0, '{"city":'), CallGrew(0, '"Oslo"}')]
SECOND: list[Event] = [CallBegan(1, "time", "call_2"), CallGrew(1, "{}")]


def test_thought_text_and_calls_become_items_in_the_order_they_came() -> None:
    response = play([Thought("Hm"), Thought("m."), Content("Let me "), Content("look."), *CALL, *SECOND, Content("Done")])
    assert kinds(response) == ["reasoning", "message", "function_call", "function_call", "message"]
    thought, message, call, second, last = response["output"]
    assert (text_of(thought), text_of(message), text_of(last)) == ("Hmm.", "Let me look.", "Done")
    assert (call["name"], call["call_id"], call["arguments"]) == ("weather", "call_1", '{"city":"Oslo"}')
    assert (second["name"], second["arguments"]) == ("time", "{}")
    assert response["status"] == "completed" and response["usage"] == USAGE


@pytest.mark.parametrize("reason", ["length", "abort"])
@pytest.mark.parametrize(
    "batch",
    [[Content("He")], [Thought("He")], CALL[:2], [Content("a"), *CALL], []],
    ids=["text", "thought", "call", "later-call", "nothing"],
)
def test_an_answer_that_is_cut_short_leaves_its_last_item_incomplete(batch: list[Event], reason: str) -> None:
    response = play(batch, reason=reason)
    assert response["output"][-1]["status"] == "incomplete"
    if reason == "length":
        assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    else:
        assert (response["status"], response["incomplete_details"]) == ("cancelled", None)


def test_an_answer_without_a_word_is_an_empty_message() -> None:
    (message,) = play()["output"]
    assert text_of(message) == "" and message["role"] == "assistant"


def test_white_space_between_calls_is_no_message() -> None:
    assert kinds(play([Content("\n"), *CALL, Content("\n"), *SECOND, Content("\n\n")])) == ["function_call", "function_call"]


def test_white_space_at_the_head_of_a_text_stays_and_alone_it_is_the_text() -> None:
    (message,) = play([Content("\n")], [Content(" Hello "), Content("\n")])["output"]
    assert text_of(message) == "\n Hello \n"
    (message,) = play([Content("\n")], [Content(" ")])["output"]
    assert text_of(message) == "\n "


def test_a_queued_response_begins_before_its_first_item() -> None:
    assert play([Content("x")], is_queued=True)["status"] == "completed"
    growing = Growing(FIELDS, is_queued=True)
    events = growing.opening()
    assert growing.as_json()["status"] == "queued"
    events += growing.finish("abort", USAGE)  # cancelled while it waited
    assert check_stream(map(json.loads, events), is_queued=True)["status"] == "cancelled"


def test_a_failure_in_mid_item_ends_the_stream_in_order() -> None:
    growing = Growing(FIELDS)
    events = [*growing.opening(), *growing.take([Content("Hel")]), *growing.fail(StepFailed("the step raised"), USAGE)]
    response = check_stream(map(json.loads, events))
    assert response["error"] == {"code": "server_error", "message": "the step raised"}
    assert response["output"][0]["status"] == "incomplete"


def test_a_response_in_progress_shows_what_it_has_so_far() -> None:
    growing = Growing(FIELDS)
    growing.opening()
    growing.take([Thought("a"), Content("b"), Content("c")])
    now = growing.as_json()
    assert now["status"] == "in_progress" and not growing.is_over
    assert [(item["type"], text_of(item), item["status"]) for item in now["output"]] == [
        ("reasoning", "a", "completed"),
        ("message", "bc", "in_progress"),
    ]


def test_log_probabilities_stay_with_their_text_when_it_is_held_back() -> None:
    growing = Growing(FIELDS)
    entries = [{"token": token, "logprob": -1.0, "bytes": [], "top_logprobs": []} for token in "abc"]
    events = growing.opening()
    events += growing.take([Content("\n")], entries[:1])
    events += growing.take([Content("b")], entries[1:2])
    events += growing.take([Content("c")], entries[2:])
    response = check_stream(map(json.loads, [*events, *growing.finish("stop", USAGE)]))
    assert response["output"][0]["content"][0]["logprobs"] == entries


def test_obfuscation_hides_how_long_deltas_are() -> None:
    growing = Growing(FIELDS, obfuscates=True)
    growing.opening()
    made = [json.loads(growing.take([Content(text)])[-1]) for text in ("a", "bb", "c" * 9, "d" * 40)]
    assert {len(event["delta"] + event["obfuscation"]) for event in made} == {32, 64}


EVENTS = st.one_of(
    st.builds(Content, st.text(max_size=3)),
    st.builds(Thought, st.text(min_size=1, max_size=3)),
    st.just(CALL),
    st.just([]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(EVENTS, max_size=8), st.lists(st.integers(0, 12), max_size=4), st.sampled_from(["stop", "length", "abort"]))
def test_any_answer_in_any_batches_makes_a_valid_stream(drawn: list[Any], cuts: list[int], reason: str) -> None:
    events: list[Event] = []
    for index, entry in enumerate(drawn):
        if isinstance(entry, list):  # calls count from 0 on
            entry = [CallBegan(index, "f", f"call_{index}"), CallGrew(index, "{}")] if entry else []
        events += entry if isinstance(entry, list) else [entry]
    places = [0, *sorted(cuts), len(events)]
    batches = [events[start:end] for start, end in pairwise(places)]
    response = play(*batches, reason=reason)
    said = "".join(event.text for event in events if isinstance(event, Content))
    told = "".join(text_of(item) for item in response["output"] if item["type"] == "message")
    assert "".join(said.split()) == "".join(told.split())
    assert kinds(response).count("function_call") == sum(isinstance(event, CallBegan) for event in events)
