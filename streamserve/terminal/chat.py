"""One conversation: what was said, how it is asked on, and the pieces of an answer as they come.

Owns messages and settings. Talks to any server of OpenAI's API through a Transport; knows no terminal.
"""

import time
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from streamserve.errors import ConfigError, NotFound, Unreachable
from streamserve.lang import loops
from streamserve.lang.pictures import url_of
from streamserve.lang.streams import Stream
from streamserve.lang.transport import Transport

PATH = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer: of its thought, or of what it says."""

    text: str
    is_thought: bool = False


@dataclass(slots=True)
class Told:
    """What an answer was: filled while it comes. `usage` as the server counts; None where it does not."""

    text: str = ""
    usage: dict[str, Any] | None = None
    num_events: int = 0
    asked_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    last_s: float = 0.0
    finish_reason: str | None = None

    def line(self) -> str:
        """How fast, in one line."""
        usage = self.usage or {}
        count = usage.get("completion_tokens") or self.num_events
        words = [f"{count} tokens"]
        if self.first_s is not None:
            if count > 1 and self.last_s > self.first_s:
                words.append(f"{(count - 1) / (self.last_s - self.first_s):.1f} tokens/s")
            words.append(f"first after {self.first_s - self.asked_s:.2f} s")
        if prompt := usage.get("prompt_tokens"):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            share = "" if cached is None else f", {cached / prompt:.0%} of them cached"
            words.append(f"prompt {prompt} tokens{share}")
        return ", ".join(words)


class Chat:
    """A conversation with one model."""

    def __init__(self, transport: Transport, model: str | None, settings: dict[str, Any], system: str | None = None) -> None:
        self.model = model
        self.settings = settings
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[str] = []  # data: URLs that go with the next message
        self.told = Told()
        self._transport = transport

    def find_model(self) -> str:
        """The name of the model: the first that the server lists, unless one was given."""
        if self.model is None:
            listed = loops.run(self._transport.call("GET", "/v1/models"))
            try:
                self.model = str(listed["data"][0]["id"])
            except (KeyError, IndexError, TypeError):
                raise NotFound("the server lists no model; name one") from None
        return self.model

    def attach(self, path: str) -> None:
        """A picture for the next message. Raises ConfigError."""
        try:
            self.pictures.append(url_of(Path(path)))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None

    def clear(self) -> None:
        """Forget what was said. The system text and settings stay."""
        self.messages.clear()
        self.pictures.clear()

    def say(self, text: str) -> Generator[Piece, None, None]:
        """The answer to a message. Closing the iterator stops it; what came by then stays said. A message to which nothing
        came is taken back."""
        pictures, self.pictures = self.pictures, []
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
        self.messages.append(message)
        try:
            yield from self._answer()
        finally:
            if self.messages[-1] is message:
                self.messages.pop()

    def again(self) -> Generator[Piece, None, None]:
        """Another answer in the place of the last. Where nothing comes the last one stays."""
        before = self.messages.pop()
        try:
            yield from self._answer()
        finally:
            if not self.messages or self.messages[-1]["role"] != "assistant":
                self.messages.append(before)

    def _answer(self) -> Generator[Piece, None, None]:
        told = self.told = Told()
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {
            **({} if self.model is None else {"model": self.model}),
            "messages": [*system, *self.messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.settings,
        }
        try:
            for event in Stream(partial(self._transport.events, PATH, body)):
                told.usage = event.get("usage") or told.usage
                for choice in event.get("choices") or ():
                    told.finish_reason = choice.get("finish_reason") or told.finish_reason
                    yield from self._pieces(choice.get("delta") or {})
        except Unreachable:
            if told.finish_reason is None:  # some servers leave out the mark behind the last event
                raise
        finally:
            if told.text or told.finish_reason is not None:
                self.messages.append({"role": "assistant", "content": told.text})

    def _pieces(self, delta: dict[str, Any]) -> Generator[Piece, None, None]:
        for name in ("reasoning_content", "content"):
            if text := delta.get(name):
                told = self.told
                told.last_s = time.monotonic()
                told.first_s = told.last_s if told.first_s is None else told.first_s
                told.num_events += 1
                if name == "content":
                    told.text += text
                yield Piece(text, name == "reasoning_content")
