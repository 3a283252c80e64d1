"""Reasoning before an answer: how models mark it, and its telling apart from the answer while both arrive.

Owns the formats by name and the splitting of one answer's text. Knows no token ids and no requests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamserve.errors import InvalidRequest
from streamserve.text.markers import find_first, first_letters, may_hold, open_at, pieces_of
from streamserve.text.tools.format import Content, Event, Thought


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How one family of models marks its reasoning.

    `begin` and `end` enclose it; they may be control tokens and must reach the splitter then. `is_open_always`: an answer begins
    inside the thought whether the prompt says so or not. `calls_interrupt`: where a call begins inside the thought, the thought
    has ended. `lead`: what the model writes between `end` and its answer, for a grammar that begins there. `is_channelled`: the
    text is in harmony's channels, read by the tool format gpt_oss even without tools; then there is nothing to split here.
    """

    name: str
    begin: str
    end: str
    is_open_always: bool = False
    calls_interrupt: bool = True
    lead: str = "\n\n"
    is_channelled: bool = False

    def is_open(self, prompt: str, *, continues: bool = False) -> bool:
        """Whether a prompt ends inside a thought. `continues`: its last message is an answer to go on with."""
        if self.is_open_always:
            return self.end not in prompt[-len(self.end) - 8 :]
        if continues:
            return prompt.rfind(self.begin) > prompt.rfind(self.end)
        return prompt.rstrip().endswith(self.begin)

    def splitter(self, *, is_open: bool, triggers: Sequence[str] = ()) -> "ThoughtSplitter":
        """A splitter for one answer. `triggers`: texts that begin a call (ToolFormat.triggers)."""
        return ThoughtSplitter(self, is_open=is_open, triggers=triggers if self.calls_interrupt else ())


FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat("deepseek-r1", "<think>", "</think>", is_open_always=True),
    ReasoningFormat("qwen3", "<think>", "</think>"),
    ReasoningFormat("glm45", "<think>", "</think>", lead="\n"),
    ReasoningFormat("kimi", "◁think▷", "◁/think▷", lead=""),
    ReasoningFormat("kimi_k2", "<think>", "</think>", lead=""),
    ReasoningFormat("gpt-oss", "<|channel|>analysis<|message|>", "<|end|>", lead="", is_channelled=True),
)


def names() -> tuple[str, ...]:
    """Names that `find` knows, beside "START,END"."""
    return tuple(format.name for format in FORMATS)


def find(name: str) -> ReasoningFormat:
    """A format by its name, or by its two markers as "START,END"."""
    begin, comma, end = name.partition(",")
    if comma and begin.strip() and end.strip():
        return ReasoningFormat(name, begin.strip(), end.strip())
    for format in FORMATS:
        if format.name == name:
            return format
    raise InvalidRequest(f"the reasoning format {name!r} is not known; allowed are {', '.join(names())}, or START,END")


def auto(template: str) -> ReasoningFormat | None:
    """The format that a chat template's source shows; None for a model that does not reason."""
    if "<|channel|>" in template and "analysis" in template:
        return find("gpt-oss")
    if "◁think▷" in template:
        return find("kimi")
    if "<think>" not in template and "</think>" not in template:
        return None
    if "<arg_key>" in template:
        return find("glm45")
    if "<|tool_calls_section_begin|>" in template:
        return find("kimi_k2")
    return find("qwen3")


class ThoughtSplitter:
    """Splits one answer. White space between markers and text belongs to neither; a begin marker that is repeated is dropped.

    The result does not depend on how the text is cut. `is_inside`: the thought has begun and not ended.
    """

    def __init__(self, format: ReasoningFormat, *, is_open: bool, triggers: Sequence[str] = ()) -> None:
        self._begin, self._end = format.begin, format.end
        self._stops = (self._end, self._begin, *triggers)  # of a thought
        self._letters = first_letters(self._stops)
        self._text = ""
        self._is_last = False
        self._blank: list[str] = []  # white space that counts once text follows
        self._has_shown = False  # whether the part that is read now has shown anything
        self._state: Callable[[list[Event]], bool] = self._inside if is_open else self._before
        self.is_inside = is_open

    def push(self, text: str) -> list[Event]:
        """More text of the answer."""
        events: list[Event] = []
        for piece in pieces_of(text):
            self._text += piece
            while self._state(events):
                pass
        return events

    def finish(self) -> list[Event]:
        """The answer has ended: what was held back."""
        self._is_last = True
        events: list[Event] = []
        while self._state(events):
            pass
        return events

    def _before(self, events: list[Event]) -> bool:
        """Nothing but white space has come: a thought may begin."""
        stripped = self._text.lstrip()
        if stripped.startswith(self._begin):
            self._text = stripped[len(self._begin) :]
            self._enter(self._inside)
            return True
        if self._begin.startswith(stripped) and not self._is_last:
            self._blank.append(self._text[: len(self._text) - len(stripped)])
            self._text = stripped
            return False
        self._text = "".join((*self._blank, self._text))
        self._has_shown = True  # white space before an answer without a thought is the answer's
        self._state = self._behind
        return True

    def _inside(self, events: list[Event]) -> bool:
        text = self._text
        if not may_hold(text, self._letters):
            self._text = ""
            self._think(text, events)
            return False
        at, marker = find_first(text, self._stops)
        end = at if marker is not None or self._is_last else open_at(text, self._stops)
        self._think(text[:end], events)
        self._text = text[end:]
        if marker is None:
            return False
        if marker == self._begin:  # repeated: it says nothing new
            self._text = self._text[len(marker) :]
            return True
        if marker == self._end:
            self._text = self._text[len(marker) :]
        self._enter(self._behind)
        return True

    def _behind(self, events: list[Event]) -> bool:
        text = self._text if self._has_shown else self._text.lstrip()
        self._text = ""
        if text:
            self._has_shown = True
            events.append(Content(text))
        return False

    def _think(self, text: str, events: list[Event]) -> None:
        text = text if self._has_shown else text.lstrip()
        kept = text.rstrip()
        if kept:
            self._has_shown = True
            events.append(Thought("".join((*self._blank, kept)) if self._blank else kept))
            self._blank.clear()
        if len(kept) < len(text):
            self._blank.append(text[len(kept) :])

    def _enter(self, state: Callable[[list[Event]], bool]) -> None:
        self.is_inside = state == self._inside
        self._blank.clear()
        self._has_shown = False
        self._state = state
