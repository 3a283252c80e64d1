"""Harmony, gpt-oss's way of writing: messages in channels. `analysis` is the thought, `final` the answer, `commentary` either a
call, when it is addressed to a function, or text for the user.

Owns the format's tokens. It reads thoughts, text and calls at once, so nothing else splits such an answer.
"""

import re
from collections.abc import Mapping, Sequence

from streamserve.text.lark import ANY_TEXT, Grammar, check_part, literal, marked
from streamserve.text.markers import find_first, open_at, pieces_of
from streamserve.text.tools.format import CallBegan, CallGrew, Content, Demand, Event, Thought, Tool
from streamserve.text.tools.json_text import JsonSpan
from streamserve.text.tools.parser import joined
from streamserve.text.tools.schemas import COMPACT, allowed, arguments_value

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
_ENDS = (END, CALL, RETURN, START)
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*([a-z]+)")
_MAX_HEAD_CHARS = 1_000
_MAX_BLANK_CHARS = 16  # before a recipient


class GptOss:
    """The format. See ToolFormat. A turn holds one call: the token behind it ends the answer."""

    name = "gpt_oss"
    control_tokens: tuple[str, ...] = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
    triggers: tuple[str, ...] = (CHANNEL,)
    reads_thoughts = True

    def __init__(self, control: Mapping[str, int] | None = None) -> None:
        self._control = dict(control or {})

    def parser(self, tools: Sequence[Tool]) -> "HarmonyParser":
        """See ToolFormat."""
        return HarmonyParser(tools)

    def grammar(self, tools: Sequence[Tool], demand: Demand, answer: Grammar | None = None) -> str:
        """See ToolFormat. Begins where a thought, if there was one, has ended."""
        head = f"({self._marked(START + 'assistant')})?"
        bodies = [] if demand.max_calls == 0 else allowed(tools, demand) if tools or demand.min_calls else []
        rules = [f"call_{n}: {self._call(tool)}" for n, tool in enumerate(bodies)]
        calls = " | ".join(f"call_{n}" for n in range(len(bodies)))
        if demand.min_calls:
            return Grammar(f"{head} ({calls})", tuple(rules)).text
        final = self._marked(f"{CHANNEL}final{MESSAGE}")
        shown = Grammar("final_text", (f"final_text: {ANY_TEXT}",)) if answer is None else answer
        check_part(shown)
        rules += [f"final: {final} ({shown.start})", *shown.rules]
        if not bodies:
            return Grammar(f"{head} final", tuple(rules)).text
        preamble = f"{self._marked(f'{CHANNEL}commentary{MESSAGE}')} spoken {self._marked(f'{END}{START}assistant')}"
        rules += [f"spoken: {ANY_TEXT}"]
        return Grammar(f"{head} (final | ({preamble})? ({calls}))", tuple(rules)).text

    def _call(self, tool: Tool) -> str:
        head = self._marked(f"{CHANNEL}commentary to=functions.{tool.name} {CONSTRAIN}json{MESSAGE}")
        return f"{head} {arguments_value(tool, COMPACT)}"

    def _marked(self, text: str) -> str:
        return marked(text, self._control) if self._control else literal(text)


class HarmonyParser:
    """Reads one answer. A message's head says what its text is; text without a head is content."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._names = frozenset(tool.name for tool in tools)
        self._text = ""
        self._out: list[Event] = []
        self._num_calls = 0
        self._kind = "start"  # head, bare, thought, content, call
        self._span = JsonSpan()
        self._has_arguments = False
        self._has_spoken = False  # content was given, so that more of it stands apart
        self._is_last = False
        self._is_inside_call = False

    @property
    def is_inside_call(self) -> bool:
        """See Parser."""
        return self._is_inside_call

    def push(self, text: str) -> list[Event]:
        """See Parser."""
        for piece in pieces_of(text):
            self._text += piece
            while self._read():
                pass
        return self._take()

    def finish(self) -> list[Event]:
        """See Parser."""
        self._is_last = True
        while self._read():
            pass
        if self._kind == "head":
            self._give_as_text(self._text)
            self._text = ""
        self._end_message()
        return self._take()

    def _read(self) -> bool:
        if self._kind == "start":
            return self._read_start()
        if self._kind == "head":
            return self._read_head()
        stops = (*_ENDS, CHANNEL) if self._kind == "bare" else _ENDS
        at, marker = find_first(self._text, stops)
        if marker is None and not self._is_last:
            at = open_at(self._text, stops)
        self._give(self._text[:at])
        self._text = self._text[at:]
        if marker is None:
            return False
        self._end_message()
        if marker in (START, CHANNEL):
            self._kind = "head"
        else:
            self._text = self._text[len(marker) :]
            self._kind = "bare"
        return True

    def _read_start(self) -> bool:
        """The prompt has begun a message, whose head may go on with a recipient."""
        begin = self._text.lstrip()
        num_blank = len(self._text) - len(begin)
        if not self._is_last and num_blank <= _MAX_BLANK_CHARS and "to=".startswith(begin):
            return False
        self._kind = "head" if begin.startswith("to=") and num_blank <= _MAX_BLANK_CHARS else "bare"
        return True

    def _read_head(self) -> bool:
        """From <|start|> or <|channel|> to <|message|>."""
        end, marker = find_first(self._text, (MESSAGE,))
        if marker is None or end + len(marker) > _MAX_HEAD_CHARS:
            if len(self._text) < _MAX_HEAD_CHARS:
                return False
            self._give_as_text(self._text[:_MAX_HEAD_CHARS])
            self._text = self._text[_MAX_HEAD_CHARS:]
            return True
        head = self._text[:end]
        self._text = self._text[end + len(MESSAGE) :]
        channel = _CHANNEL.search(head)
        recipient = _RECIPIENT.search(head)
        kind = channel[1] if channel else "final"
        name = recipient[1].removeprefix("functions.") if recipient else None
        if name in self._names and name is not None:
            self._begin_call(name)
        elif recipient is not None:
            self._give_as_text(head + MESSAGE)  # addressed to what is not there
        else:
            self._kind = "thought" if kind == "analysis" else "content"
            if self._kind == "content" and self._has_spoken:
                self._out.append(Content("\n\n"))
        return True

    def _begin_call(self, name: str) -> None:
        self._kind = "call"
        self._out.append(CallBegan(self._num_calls, name))
        self._num_calls += 1
        self._span = JsonSpan()
        self._has_arguments = False
        self._is_inside_call = True

    def _give(self, text: str) -> None:
        if not text:
            return
        if self._kind == "thought":
            self._out.append(Thought(text))
        elif self._kind == "call":
            self._give_arguments(text)
        else:
            self._has_spoken = True
            self._out.append(Content(text))

    def _give_arguments(self, text: str) -> None:
        start = 0 if self._has_arguments else len(text) - len(text.lstrip())
        if start == len(text) or self._span.is_done:
            return  # white space around the arguments is none of theirs
        self._has_arguments = True
        end = self._span.feed(text, start)
        self._is_inside_call = not self._span.is_done
        self._out.append(CallGrew(self._num_calls - 1, text[start : end if self._span.is_done else len(text)]))

    def _give_as_text(self, text: str) -> None:
        self._kind = "content"
        self._give(text)

    def _end_message(self) -> None:
        if self._kind == "call" and not self._has_arguments:
            self._out.append(CallGrew(self._num_calls - 1, "{}"))
            self._is_inside_call = False

    def _take(self) -> list[Event]:
        out, self._out = self._out, []
        return joined(out) if len(out) > 1 else out
