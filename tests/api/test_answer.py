"""What an AnswerReader, and a choice that has one, make of a text, however it comes."""

import random
from functools import partial

import pytest

from streamserve.api.answer import Answer, AnswerReader, CallBegan, CallGrew, Content, Event, Reading, Thought, fold
from streamserve.api.stream import Call, Choice, Collected, Prompt
from streamserve.messages import Delta, FinishReason, SamplingParams, TokenLogprobs
from streamserve.text.byte_tokenizer import byte_text_model
from streamserve.text.reasoning import find as find_reasoning
from streamserve.text.stop_patterns import StopPatterns
from streamserve.text.tools.find import find as find_format
from streamserve.text.tools.format import Tool

TOOLS = (Tool("add", parameters={"type": "object"}), Tool("now"))
QWEN, HERMES = find_reasoning("qwen3"), find_format("hermes")
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "}"]}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
TEXT = f"<think>\nOne and two?\n</think>\n\nLet me see.\n{ADD}\n{NOW}"


def reading(*, is_open: bool = False, streams_thought: bool = True, max_calls: int | None = None) -> Reading:
    return Reading(
        partial(QWEN.splitter, is_open=is_open, triggers=HERMES.triggers),
        partial(HERMES.parser, TOOLS),
        has_thoughts=True,
        streams_thought=streams_thought,
        max_calls=max_calls,
    )


def read(of: Reading, pieces: list[str], reason: str = "stop") -> tuple[list[Event], str]:
    reader = AnswerReader(of)
    events: list[Event] = []
    for piece in pieces:
        events += reader.push(piece)
        if reader.is_over:
            return events, "tool_calls"
    rest, reason = reader.finish(reason)
    return [*events, *rest], reason


def without_ids(answer: Answer) -> tuple[str, str, list[tuple[str, str]]]:
    return answer.thought, answer.content, [(call.name, call.arguments) for call in answer.calls]


WHOLE = ("One and two?", "Let me see.", [("add", '{"a": 1, "b": [2, "}"]}'), ("now", "{}")])


def test_any_cutting_of_the_text_gives_the_same_answer() -> None:
    rng = random.Random(5)
    for _ in range(200):
        cuts = sorted(rng.sample(range(1, len(TEXT)), rng.randrange(1, 30)))
        pieces = [TEXT[start:end] for start, end in zip([0, *cuts], [*cuts, len(TEXT)], strict=True)]
        events, reason = read(reading(), pieces)
        assert without_ids(fold(events)) == WHOLE
        assert reason == "tool_calls"


def test_a_call_has_its_name_first_then_its_arguments_and_an_id_of_its_own() -> None:
    events, _ = read(reading(), list(TEXT))
    calls = [event for event in events if isinstance(event, CallBegan | CallGrew)]
    for index in (0, 1):
        first, *rest = [event for event in calls if event.index == index]
        assert isinstance(first, CallBegan)
        assert rest and all(isinstance(event, CallGrew) for event in rest)
    ids = [event.id for event in calls if isinstance(event, CallBegan)]
    assert len(set(ids)) == 2
    assert all(id is not None and id.startswith("call_") and len(id) == 29 for id in ids)


@pytest.mark.parametrize(
    ("text", "given", "reason"),
    [
        (TEXT, "stop", "tool_calls"),
        (TEXT, "length", "length"),
        (TEXT[: TEXT.index("[2") + 1], "stop", "stop"),  # inside the arguments
        (TEXT[: TEXT.index("[2") + 1], "length", "length"),
        ("Only text", "stop", "stop"),
        ('<tool_call>\n{"name": "nope", "arguments": {}}\n</tool_call>', "stop", "stop"),
    ],
)
def test_the_finish_reason_is_tool_calls_only_when_every_call_is_whole(text: str, given: str, reason: str) -> None:
    assert read(reading(), [text], given)[1] == reason


def test_a_thought_comes_as_one_event_where_it_is_not_to_be_streamed() -> None:
    events, _ = read(reading(streams_thought=False), list(TEXT))
    assert events[0] == Thought("One and two?")
    assert not any(isinstance(event, Thought) for event in events[1:])
    assert isinstance(events[1], Content)
    cut, _ = read(reading(is_open=True, streams_thought=False), list("I think and th"), "length")
    assert cut == [Thought("I think and th")]


def test_an_answer_of_at_most_one_call_is_over_with_its_last_brace() -> None:
    for pieces in (list(TEXT), [TEXT]):
        events, reason = read(reading(max_calls=1), pieces)
        assert without_ids(fold(events)) == (*WHOLE[:2], WHOLE[2][:1])
        assert reason == "tool_calls"


def test_texts_of_control_tokens_do_not_reach_the_content() -> None:
    of = Reading(parser=partial(HERMES.parser, TOOLS), hidden=("<tool_call>", "<|x|>"))
    events, _ = read(of, ["a<|x|>b<tool_call>no call"])
    assert fold(events).content == "abno call"


PIECES = (
    *("<think>", "</think>", "<tool_call>\n", '{"name": "add", "arguments": {"a": "x<y"}}', "\n</tool_call>", "<tool", "{}", '"'),
    *("ab", "é", "世界", "🦙 ok", "stop", "st", " ", "\n", "\n\n"),
)
PATTERNS = ((), (), (r"s.?t", "é+"), ("[ab]+.*b|界",))
BYTES = byte_text_model().tokenizer


def played(
    text: bytes,
    cuts: list[int],
    stops: tuple[str, ...],
    has_logprobs: bool,
    max_calls: int | None,
    patterns: tuple[str, ...] = (),
) -> tuple[object, ...]:
    """What a choice makes of a text whose bytes, one a token, come in deltas cut there."""
    sampling = SamplingParams(logprobs=0 if has_logprobs else None)
    compiled = StopPatterns(patterns) if patterns else None
    of = reading(max_calls=max_calls)
    choice = Choice(Call("c", (Prompt((1,)),), sampling, stops=stops, stop_patterns=compiled, reading=of), 0, BYTES)
    whole = Collected(0)
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        part = text[start:end]
        scores = tuple(TokenLogprobs(token, -1.0) for token in part) if has_logprobs else ()
        whole.add(choice.take(Delta(tuple(part), scores, finish_reason=FinishReason.STOP if end == len(text) else None)))
        if choice.is_finished:
            break
    piece = whole.as_piece()
    answer = fold(piece.events or ())
    scored = bytes(entry.token_id for entry in piece.logprobs).decode()
    if has_logprobs:
        assert scored.strip() == answer.content.strip()  # white space around content may be nobody's
    counted = choice.num_tokens if stops or patterns or has_logprobs or max_calls else None
    return without_ids(answer), piece.finish_reason, piece.matched_stop, counted, scored


@pytest.mark.parametrize("ends", [" done st", " done <tool"])  # the second is held back until the answer's end
def test_a_stop_string_behind_calls_leaves_the_finish_reason_to_them(ends: str) -> None:
    text = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>' + ends
    stop = ends.split()[-1]
    data = text.encode()
    _, reason, matched, _, _ = played(data, list(range(1, len(data))), (stop,), False, None)
    assert (reason, matched) == ("tool_calls", stop)


def test_merged_deltas_change_nothing_whatever_else_is_asked_for() -> None:
    rng = random.Random(9)
    for _ in range(300):
        text = "".join(rng.choices(PIECES, k=rng.randrange(1, 14))).encode()
        asked = (
            rng.choice([(), ("stop",), ("b", "st "), ("世",)]),
            rng.random() < 0.5,
            rng.choice([None, 1]),
            rng.choice(PATTERNS),
        )
        one_by_one = played(text, list(range(1, len(text))), *asked)
        for _ in range(3):
            cuts = sorted(rng.sample(range(1, len(text)), rng.randrange(min(len(text), 9)))) if len(text) > 1 else []
            assert played(text, cuts, *asked) == one_by_one
