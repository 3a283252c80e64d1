"""One line that says what is being loaded and how far it is; it goes when the model is there. Nothing where nobody looks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TextIO

from streamserve.resolve import Reason, Resolved

CLEAR = "\r\x1b[K"


class Loading:
    """A Display (build.py) on a terminal. Use as a context: leaving it clears the line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_shown = out.isatty()
        self._model = "the model"
        self._last = ""

    def __enter__(self) -> "Loading":
        return self

    def __exit__(self, *_: object) -> None:
        self._show("")

    def hello(self, model: str, device: str) -> None:
        """See Display."""
        self._model = model
        self._show(f"loading {model}")

    def decided(self, resolved: Resolved, more: Iterable[Reason] = ()) -> None:
        """See Display. `streamserve config --explain` tells."""

    def loading(self) -> AbstractContextManager[Callable[[int, int], None]]:
        """See Display."""
        return self.phase("weights")

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """See Display."""
        self._show(f"loading {self._model}: {name}")

        def progress(done: int, total: int) -> None:
            if total > 0:
                self._show(f"loading {self._model}: {name} {done / total:.0%}")

        yield progress

    def _show(self, text: str) -> None:
        if self._is_shown and text != self._last:
            self._last = text
            self._out.write(CLEAR + text)
            self._out.flush()
