"""What a program has written so far: text, turns, pictures, variables.

Owns them and how each expression changes them. Waits for nothing and knows no threads: the executor sees to it that one at a time
writes here.
"""

from dataclasses import dataclass, field
from typing import Any

from streamserve.lang.backend import Piece, Prompt, Roles


class Live:
    """An answer that is being streamed, for those who watch."""

    __slots__ = ("is_done", "pieces")

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.is_done = False


@dataclass(slots=True)
class Transcript:
    """A program's words. `copy` is what a fork starts from."""

    text: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    live: dict[str, Live] = field(default_factory=dict)
    role: str | None = None
    fork_at: int = 0  # where the fork began that this is
    _role_at: int = 0  # where the content of the open turn begins
    _turn_images: list[tuple[int, int, str]] = field(default_factory=list)  # of the open turn: marker's begin, end, URL
    _scopes: list[tuple[str, int]] = field(default_factory=list)  # that are open, and where they began
    _spans: dict[str, tuple[int, int]] = field(default_factory=dict)  # where answers stand

    def copy(self) -> "Transcript":
        """The same words, for a fork. What is streamed to this one's readers is not its."""
        return Transcript(
            text=self.text,
            messages=list(self.messages),
            variables=dict(self.variables),
            meta=dict(self.meta),
            images=list(self.images),
            role=self.role,
            fork_at=len(self.text),
            _role_at=self._role_at,
            _turn_images=list(self._turn_images),
            _scopes=list(self._scopes),
            _spans=dict(self._spans),
        )

    def answer(self, name: str | None, text: str, value: Any, meta: Any) -> None:
        """An answer, whole."""
        start = len(self.text)
        self.text += text
        self.keep(name, start, value, meta)

    def keep(self, name: str | None, start: int, value: Any, meta: Any) -> None:
        """An answer whose text stands already, from `start` to the end."""
        if name is not None:
            self.variables[name] = value
            self.meta[name] = meta
            self._spans[name] = (start, len(self.text))

    def begin_role(self, role: str, roles: Roles, *, is_written: bool = False) -> None:
        """A turn begins."""
        if self.role is not None:
            raise ValueError(f"a turn of {role!r} begins inside a turn of {self.role!r}; end that one first")
        self.text += roles.begin(self.spoken(), role, is_written=is_written)
        self.role = role
        self._role_at = len(self.text)

    def end_role(self, role: str, roles: Roles) -> None:
        """A turn ends, and becomes a message."""
        if self.role != role:
            raise ValueError(f"a turn of {role!r} ends, but {'none' if self.role is None else repr(self.role)} is open")
        self.messages.append({"role": role, "content": self._content()})
        self.text += roles.end(self.spoken()[:-1], role)
        self.role = None
        self._turn_images = []

    def spoken(self) -> tuple[str, ...]:
        """The roles of all closed turns."""
        return tuple(message["role"] for message in self.messages)

    def show(self, url: str, marker: str) -> None:
        """A picture stands here."""
        start = len(self.text)
        self.text += marker
        self.images.append(url)
        if self.role is not None:
            self._turn_images.append((start, len(self.text), url))

    def begin_scope(self, name: str) -> None:
        """What follows becomes a variable."""
        self._scopes.append((name, len(self.text)))

    def end_scope(self, name: str) -> None:
        """Up to here."""
        place = max(place for place, (opened, _) in enumerate(self._scopes) if opened == name)
        self.variables[name] = self.text[self._scopes.pop(place)[1] :]

    def span(self, name: str) -> tuple[int, int] | None:
        """Where the answer of that name stands; None where it is no answer."""
        return self._spans.get(name)

    def rewrite(self, name: str, text: str) -> None:
        """Puts other words in the place of an answer; answers behind it move."""
        start, end = self._spans[name]
        moved = len(text) - (end - start)
        self.text = self.text[:start] + text + self.text[end:]
        self.variables[name] = text
        self._spans[name] = (start, start + len(text))
        for other, (begin, finish) in self._spans.items():
            if other != name and begin >= end:
                self._spans[other] = (begin + moved, finish + moved)

    def prompt(self) -> Prompt:
        """All of it, for an answer."""
        return Prompt(
            text=self.text,
            messages=tuple(self.messages),
            images=tuple(self.images),
            role=self.role,
            opened="" if self.role is None else self.text[self._role_at :],
            opened_images=tuple(url for _, _, url in self._turn_images),
        )

    def _content(self) -> str | list[dict[str, Any]]:
        """The open turn's content in OpenAI's shape: a string, or parts where there are pictures."""
        if not self._turn_images:
            return self.text[self._role_at :]
        parts: list[dict[str, Any]] = []
        at = self._role_at
        for start, end, url in (*self._turn_images, (len(self.text), len(self.text), "")):
            if start > at:
                parts.append({"type": "text", "text": self.text[at:start]})
            if url:
                parts.append({"type": "image_url", "image_url": {"url": url}})
            at = end
        return parts
