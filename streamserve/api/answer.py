"""How an answer's text is read: thought, content and tool calls, for every dialect alike.

Owns the reading of one choice. The dialects (chunks, responses, anthropic) give what comes out their own shapes.
"""

from dataclasses import dataclass

from streamserve.text.tools.format import Event, Parser


@dataclass(frozen=True, slots=True)
class Reading:
    """How a call's answers are to be read; made once per request, one reader per choice."""

    # reasoning format, tool format and tools, separate_reasoning …: the owner of this file fills this in


class AnswerReader:
    """Reads one choice: pieces of text in, events out."""

    def __init__(self, reading: Reading) -> None: ...

    def push(self, text: str) -> list[Event]:
        """More text of the choice."""
        raise NotImplementedError

    def finish(self, finish_reason: str) -> tuple[list[Event], str]:
        """What was held back, and the finish reason: "tool_calls" in place of "stop" when a whole call was made."""
        raise NotImplementedError


__all__ = ["AnswerReader", "Event", "Parser", "Reading"]
