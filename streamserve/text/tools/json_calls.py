"""What parsers of JSON calls have in common.

Owns the reading of one call that is an object, and of one whose arguments are JSON. Knows no format's markers.
"""

from collections.abc import Sequence

from streamserve.text.tools.call_object import CallObject
from streamserve.text.tools.format import Tool
from streamserve.text.tools.json_text import JsonSpan
from streamserve.text.tools.parser import MAX_OBJECT_CHARS, CallParser


class JsonCallsParser(CallParser):
    """Calls that are JSON objects, or whose arguments alone are JSON behind a header of the format's own.

    A format says what follows: `_behind_object` is the state behind an object, `_ends` are texts that may stand behind bare
    arguments, in that order.
    """

    _ends: tuple[str, ...] = ()
    _needs_arguments = False  # an object without them is no call

    def __init__(self, tools: Sequence[Tool], triggers: Sequence[str]) -> None:
        super().__init__(tools, triggers)
        self._object = CallObject(())
        self._span = JsonSpan()
        self._ends_left: Sequence[str] = ()

    def _id_of(self, written: str | None) -> str | None:
        """A call's id, given the one that the model wrote."""
        return written

    # {"name": ..., "arguments": {...}}

    def _begin_object(self) -> bool:
        """An object begins at `_pos`, which may be a call."""
        if self._max_undecided and self._is_too_long():
            return self._reject()
        self._max_undecided = MAX_OBJECT_CHARS
        self._object = CallObject(self._schemas, needs_arguments=self._needs_arguments)
        self._state = self._read_object
        return True

    def _read_object(self) -> bool:
        call = self._object
        was_call = call.is_call
        self._pos = call.feed(self._text, self._pos)
        if call.is_call and not was_call:
            if self._is_too_long():
                return self._reject()
            assert call.name is not None
            self._begin_call(call.name, self._id_of(call.id))
        if not call.is_call:
            return self._reject() if call.is_bad or call.is_done else False
        self._grow(call.take())
        self._settle()
        if call.has_arguments:
            self._end_call()
        elif call.is_bad:
            self._break_call()
        if call.is_done or call.is_bad:
            self._state = self._behind_object
            return True
        return self._pos < len(self._text)

    def _behind_object(self) -> bool:
        raise NotImplementedError

    # name ... {...}

    def _begin_arguments(self, name: str, id: str | None = None) -> bool:
        """The header is read, up to `_pos`. No call when there is no such tool."""
        if name not in self._schemas or self._is_too_long():
            return self._reject()
        self._begin_call(name, self._id_of(id))
        self._span = JsonSpan()
        self._ends_left = self._ends
        self._state = self._skip_to_arguments
        return True

    def _skip_to_arguments(self) -> bool:
        return self._skip_blank() and self._go(self._read_arguments)

    def _read_arguments(self) -> bool:
        begin = self._pos
        self._pos = self._span.feed(self._text, begin)
        self._grow(self._text[begin : self._pos])
        self._settle()
        if self._span.is_done:
            self._end_call()
        elif self._span.is_bad and not self._has_arguments:
            self._grow("{}")  # the format's end stands where arguments would
            self._end_call()
        elif self._span.is_bad:
            self._break_call()
        else:
            return False
        self._state = self._behind_arguments
        return True

    def _behind_arguments(self) -> bool:
        """What the format writes behind arguments is no content."""
        while True:
            if not self._skip_blank():
                return False
            end = self._expect_one(self._ends_left)
            if end is None:
                return False
            if not end:
                return self._go_on_as_text()
            self._ends_left = self._ends_left[self._ends_left.index(end) + 1 :]
            self._settle()
