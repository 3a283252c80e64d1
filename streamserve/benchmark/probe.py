"""What a server takes: found out by small requests before the clock runs, so that any server of OpenAI's API can be measured.

Owns which fields may be left out and in which order. Knows no workload.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from streamserve.benchmark.answers import Answer, parsed
from streamserve.benchmark.client import Ask, send_all
from streamserve.benchmark.target import Target
from streamserve.benchmark.texts import WORDS, Ids, Maker, Prompt, Tokenized, Words
from streamserve.errors import StartError
from streamserve.text.tokenizer import Tokenizer

LIMIT_S = 120.0
FEW_WORDS, MANY_WORDS = 20, 120

# What a request may go without, where a server refuses it: in words, for the report.
OPTIONAL = {
    "ids": "prompts as token ids",
    "ignore_eos": "ignore_eos (answers may end early)",
    "stream_options": "stream_options (usage may be missing)",
    "max_tokens": "max_tokens (max_completion_tokens is sent instead)",
}


@dataclass(frozen=True, slots=True)
class Dialect:
    """How this server is spoken to. `without`: keys of OPTIONAL that it refuses."""

    model: str
    path: str
    is_chat: bool
    more: dict[str, Any]
    without: frozenset[str] = frozenset()

    def body(
        self, parts: Sequence[Prompt], num_output: int | None, *, ignores_eos: bool = True, messages: Any = None
    ) -> dict[str, Any]:
        """A streamed request. Parts of a text are put behind one another, in a chat as one message: not every template takes a
        system text."""
        found: dict[str, Any] = {"model": self.model, "temperature": 0.0, "stream": True}
        if self.is_chat:
            found["messages"] = messages or [{"role": "user", "content": "\n\n".join(str(part) for part in parts)}]
        elif isinstance(parts[0], str):
            found["prompt"] = "\n\n".join(str(part) for part in parts)
        else:
            found["prompt"] = [id for part in parts for id in part]
        if num_output is not None:
            found["max_completion_tokens" if "max_tokens" in self.without else "max_tokens"] = num_output
        if ignores_eos and num_output is not None and "ignore_eos" not in self.without:
            found["ignore_eos"] = True
        if "stream_options" not in self.without:
            found["stream_options"] = {"include_usage": True}
        return {**found, **self.more}


def find_model(target: Target, asked: str | None) -> str:
    """The model that was asked for, or the first that the server lists."""
    if asked is not None:
        return asked
    status, listed = target.ask("GET", "/v1/models")
    try:
        return str(listed["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise StartError(f"{target.url}/v1/models lists no model (status {status}); give --model NAME") from None


def find_dialect(target: Target, dialect: Dialect, ids: Sequence[int] | None) -> tuple[Dialect, Answer]:
    """The dialect without what the server refuses, and its answer to the smallest request. Raises StartError."""
    first_error = None
    for without in _omissions(is_chat=dialect.is_chat, has_ids=ids is not None):
        tried = Dialect(dialect.model, dialect.path, dialect.is_chat, dialect.more, without)
        has_ids = not dialect.is_chat and "ids" not in without
        prompt: Prompt = list(ids[:4]) if ids is not None and has_ids else " ".join(WORDS[-4:])
        answer = ask_one(target, tried, [prompt], 2)
        if answer.error is None:
            return tried, answer
        first_error = first_error or answer.error
        if not _is_about_a_field(answer.error):
            break
    raise StartError(f"{target.url}{dialect.path} cannot be measured: {first_error}")


def _is_about_a_field(error: str) -> bool:
    """Whether the server may have refused a field: some say so with status 500."""
    status = error.removeprefix("HTTP/1.1 ")[:3]
    return status.isdecimal() and status not in ("401", "403", "404", "405", "413", "429", "503")


def _omissions(*, is_chat: bool, has_ids: bool) -> Iterator[frozenset[str]]:
    """What may be left out, least first."""
    always = frozenset() if has_ids and not is_chat else frozenset({"ids"})
    names = [name for name in OPTIONAL if name not in always and (is_chat or name != "max_tokens")]
    for count in range(len(names) + 1):
        for names_out in combinations(names, count):
            yield always | frozenset(names_out)


def ask_one(target: Target, dialect: Dialect, parts: Sequence[Prompt], num_output: int) -> Answer:
    """One request by itself."""
    one = Ask(target.post(dialect.path, dialect.body(parts, num_output)))
    ((sent_s, reads, error),) = asyncio.run(send_all(target, [one], 1, time.perf_counter(), LIMIT_S))
    return parsed(sent_s, reads, error)


def find_ids(target: Target, model: str, tokenizer: Tokenizer | None) -> Sequence[int] | None:
    """Token ids that the model knows: all of its tokenizer, or those of common words, if the server tokenises."""
    if tokenizer is not None:
        return Tokenized(tokenizer).ids
    text = " ".join(WORDS)
    for body in ({"model": model, "prompt": text, "add_special_tokens": False}, {"prompt": text}, {"content": text}):
        status, found = target.ask("POST", "/tokenize", body)
        tokens = found.get("tokens") if status == 200 and isinstance(found, dict) else None
        if isinstance(tokens, list) and tokens and all(type(token) is int for token in tokens):
            return sorted(set(tokens))
    return None


def find_maker(target: Target, dialect: Dialect, ids: Sequence[int] | None, tokenizer: Tokenizer | None) -> Maker:
    """How prompts for this server are made."""
    text: Maker = Tokenized(tokenizer) if tokenizer is not None else _measured_words(target, dialect)
    return Ids(ids, text) if ids is not None and "ids" not in dialect.without else text


def _measured_words(target: Target, dialect: Dialect) -> Words:
    """Words, with how many tokens the server says they are."""
    few, many = (ask_one(target, dialect, [" ".join(WORDS[:count])], 1) for count in (FEW_WORDS, MANY_WORDS))
    if few.has_usage and many.num_prompt > few.num_prompt > 0:
        return Words((many.num_prompt - few.num_prompt) / (MANY_WORDS - FEW_WORDS), is_measured=True)
    return Words()
