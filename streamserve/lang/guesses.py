"""Guessing ahead where every call is paid for: one long answer serves several nodes of a program (SGLang's API speculation).

Owns the rest of the last guess, per program. Knows no API: it asks through a function. Nobody counts the tokens of an answer that
is cut out of a guess, so `max_tokens` of a node bounds what is asked for, not what is taken from a guess.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from streamserve.errors import CallFailed
from streamserve.lang.backend import Piece, Prompt, Sampling

Ask = Callable[[Prompt, Sampling], Awaitable[Piece]]
CHARS_PER_TOKEN = 3  # fewer than most texts have
MAX_TRIES = 3  # of a turn whose answer does not go as the program does
# What makes an answer's form or its account its own: it is asked for by itself.
_OWN = ("regex", "json_schema", "dtype", "stop_regex", "return_logprob", "min_tokens", "ignore_eos", "stop_token_ids")


class CompletionGuesses:
    """For APIs that go on with a text. See backend.Guesses."""

    whole_turns = False

    def __init__(self, ask: Ask, num_tokens: int) -> None:
        self._ask = ask
        self._num_tokens = num_tokens
        self._guess = ""
        self._made_as: Sampling | None = None

    def wrote(self, text: str) -> None:
        """See Guesses."""
        self._guess = self._guess[len(text) :] if self._guess.startswith(text) else ""

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Piece:
        """See Guesses."""
        made_as = replace(sampling, stop=(), max_tokens=None)
        if not _can_be_guessed(sampling):
            self._guess = ""
            return await self._ask(prompt, sampling)
        if self._guess and made_as == self._made_as and (end := _first_stop(self._guess, sampling.stop)) is not None:
            return self._take(end, Piece(self._guess))
        long = replace(sampling, stop=(), max_tokens=max(self._num_tokens, sampling.max_tokens or 0))
        made = await self._ask(prompt, long)
        self._guess, self._made_as = made.text, made_as
        end = _first_stop(made.text, sampling.stop)
        if end is not None:
            return self._take(end, made)
        if (made.meta.get("finish_reason") or {}).get("type") == "stop" or long.max_tokens == sampling.max_tokens:
            return self._take(len(made.text), made)
        self._guess = ""
        return await self._ask(prompt, sampling)  # the answer may be longer than what is guessed ahead

    def _take(self, end: int, made: Piece) -> Piece:
        text, self._guess = self._guess[:end], self._guess[end:]
        return Piece(text, made.meta)

    async def turn(self, prompt: Prompt, parts: Sequence[str | Sampling]) -> list[Piece]:
        """See Guesses: there are no turns here."""
        raise NotImplementedError


class TurnGuesses:
    """For APIs that answer whole turns: a turn is asked for once, and taken apart as the program would have written it."""

    whole_turns = True

    def __init__(self, ask: Ask, num_tokens: int, *, takes_regex: bool = False) -> None:
        self._ask = ask
        self._num_tokens = num_tokens
        self._takes_regex = takes_regex

    def wrote(self, text: str) -> None:
        """See Guesses: what is written outside assistants' turns says nothing of a guess."""

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Piece:
        """See Guesses."""
        return await self._ask(prompt, sampling)

    async def turn(self, prompt: Prompt, parts: Sequence[str | Sampling]) -> list[Piece]:
        """See Guesses."""
        nodes = [part for part in parts if isinstance(part, Sampling)]
        if len(parts) == 1 and nodes:
            return [await self._ask(prompt, nodes[0])]
        asked = max((node.max_tokens or 0 for node in nodes), default=0)
        sampling = replace(nodes[0], stop=(), max_tokens=max(self._num_tokens, asked))
        if self._takes_regex and _can_be_guessed(replace(nodes[0], stop=("x",))):
            sampling = replace(sampling, regex=pattern(parts, CHARS_PER_TOKEN * self._num_tokens // len(nodes)))
        text = ""
        for _ in range(MAX_TRIES):
            made = await self._ask(prompt, sampling)
            text = made.text
            values = taken_apart(text, parts)
            if values is not None:
                return [Piece(value, made.meta if place == 0 else {}) for place, value in enumerate(values)]
        raise CallFailed(f"the model's turn does not go as the program's does, in {MAX_TRIES} tries; the last was {text[:300]!r}")


def taken_apart(text: str, parts: Sequence[str | Sampling]) -> list[str] | None:
    """The answers in a turn, one per Sampling; None where the turn does not go as the parts do. Spaces at its edges do not count,
    and words of the program's at its end may be missing: the model has ended its turn before them."""
    text, at, values = text.strip(), 0, list[str]()
    for place, part in enumerate(parts):
        if isinstance(part, str):
            wanted = part.lstrip() if at == 0 else part
            if text.startswith(wanted, at):
                at += len(wanted)
            elif at == len(text) and not any(isinstance(later, Sampling) for later in parts[place:]):
                break
            elif text.startswith(wanted.rstrip(), at):
                at += len(wanted.rstrip())
            else:
                return None
            continue
        following = next((later for later in parts[place + 1 : place + 2] if isinstance(later, str) and later), None)
        if part.stop:
            end = _first_stop(text[at:], part.stop)
        else:
            found = -1 if following is None else text.find(following, at)
            end = None if found < 0 else found - at
        if end is None:
            if any(isinstance(later, Sampling) for later in parts[place + 1 :]):
                return None
            end = len(text) - at
        values.append(text[at : at + end])
        at += end
    return values


def pattern(parts: Sequence[str | Sampling], max_chars: int) -> str | None:
    """A regular expression of a whole turn, where the ends of its answers are single characters; else None. No answer is longer
    than `max_chars`, so that all of them have room in the guess."""
    found: list[str] = []
    for place, part in enumerate(parts):
        is_last = place == len(parts) - 1
        if isinstance(part, str):
            found.append(_escaped(part, r"\.^$*+?{}[]|()"))
        elif part.stop and all(len(stop) == 1 for stop in part.stop):
            stops = _escaped("".join(part.stop), r"\^-[]")
            found.append(f"[^{stops}]{{1,{max_chars}}}")
        elif not part.stop and is_last:
            found.append(r"(.|\n)+")
        else:
            return None
    return "".join(found)


def _escaped(text: str, special: str) -> str:
    """As in any dialect of regular expressions: Python's own escapes more than others know."""
    named = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}
    return "".join([named.get(letter) or (f"\\{letter}" if letter in special else letter) for letter in text])


def _can_be_guessed(sampling: Sampling) -> bool:
    is_plain = not any(getattr(sampling, name) for name in _OWN)
    return is_plain and bool(sampling.stop) and sampling.n in (None, 1)


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return min(found, default=None)
