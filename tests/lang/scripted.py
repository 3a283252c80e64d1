"""A back end without a model: answers are a function of the prompt, and what was asked is written down."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from streamserve.lang.backend import ChoicesMethod, Chosen, Piece, Prompt, Sampling


def short(prompt: Prompt, sampling: Sampling) -> str:
    """An answer that tells the prompt's length: two prompts of one length apart from others are told apart."""
    return f"<{len(prompt.text)}>"


class PlainRoles:
    """Turns as plain as can be."""

    image = "[img]"

    def begin(self, before: tuple[str, ...], role: str, *, is_written: bool = False) -> str:
        return f"{len(before)}{role}:"

    def end(self, before: tuple[str, ...], role: str) -> str:
        return f";{len(before)}"


class Scripted:
    """See Backend. `answer` makes the text; it may raise. `hold`: answers wait until it is set (on the background loop)."""

    def __init__(self, answer: Callable[[Prompt, Sampling], str] = short, *, is_held: bool = False) -> None:
        self.answer = answer
        self.prompts: list[Prompt] = []
        self.samplings: list[Sampling] = []
        self.prefixes: list[str] = []
        self.num_aborted = 0
        self.most_at_once = 0
        self._at_once = 0
        self._is_held = is_held
        self._released = asyncio.Event()

    def release(self) -> None:
        from streamserve.lang.loops import background

        background().call(self._released.set)

    async def roles(self) -> PlainRoles:
        return PlainRoles()

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Piece]:
        self.prompts.append(prompt)
        self.samplings.append(sampling)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await (self._released.wait() if self._is_held else asyncio.sleep(0))
            text = self.answer(prompt, sampling)
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise
        finally:
            self._at_once -= 1
        return [Piece(text if i == 0 else f"{text}{i}", {"prompt": len(prompt.text)}) for i in range(sampling.n or 1)]

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Piece, None]:
        (whole,) = await self.generate(prompt, sampling)
        for i, letter in enumerate(whole.text):
            await asyncio.sleep(0)
            yield Piece(letter, {"completion_tokens": i + 1})

    async def choose(self, prompt: Prompt, choices: Sequence[str], temperature: float, method: ChoicesMethod) -> Chosen:
        self.prompts.append(prompt)
        return Chosen(choices[len(prompt.text) % len(choices)], {"prompt": len(prompt.text)})

    async def cache_prefix(self, prompt: Prompt) -> None:
        self.prefixes.append(prompt.text)

    async def flush_cache(self) -> None:
        self.prefixes.clear()

    async def server_info(self) -> dict[str, Any]:
        return {"version": "scripted"}

    async def model_info(self) -> dict[str, Any]:
        return {}

    async def aclose(self) -> None:
        pass
