"""The embedding model beside the LLM, as routes use it: texts, pairs and token ids to checked inputs, and inputs to rows.

Owns where an encoder's texts are tokenised, and what is too long. Knows no message formats.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from anyio import CapacityLimiter, to_thread
from msgspec import Meta
from numpy.typing import NDArray

from streamserve.api.schema import check_range, show
from streamserve.engine.client import EncoderClient
from streamserve.errors import ContextOverflow, InvalidRequest
from streamserve.messages import EncoderFacts, EncoderInput
from streamserve.text.encoder_text import EncoderText

INLINE_CHARS = 2000  # see prompts.INLINE_CHARS
TO_THE_LIMIT = -1  # truncate_prompt_tokens: as many as the model takes

Rows = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cut:
    """What becomes of texts that are too long: None, they are refused; else they are cut to so many tokens."""

    max_len: int | None = None


class EncoderModel:
    """One encoder under its name."""

    def __init__(self, name: str, client: EncoderClient, text: EncoderText) -> None:
        self.name = name
        self._client = client
        self._text = text
        self._limiter = CapacityLimiter(max(1, (os.cpu_count() or 2) // 2))
        self._ids_type = tuple[Annotated[int, Meta(ge=0, lt=client.facts.vocab_size)], ...]

    @property
    def facts(self) -> EncoderFacts:
        """What it gives, and its limits."""
        return self._client.facts

    @property
    def routes(self) -> str:
        """Where it answers, for people."""
        return "/v1/classify, /v1/score and /v1/rerank" if self.facts.labels else "/v1/embeddings, /v1/score and /v1/rerank"

    async def encode(self, inputs: Sequence[EncoderInput]) -> Rows:
        """One row per input; see EncoderClient."""
        return await self._client.encode(inputs)

    def cut_of(self, truncate: bool, truncate_prompt_tokens: int | None) -> Cut:
        """`truncate` (TEI's field) cuts to what the model takes, `truncate_prompt_tokens` (vLLM's) to so many tokens."""
        most = self.facts.max_len
        if truncate_prompt_tokens is None:
            return Cut(most if truncate else None)
        if truncate_prompt_tokens == TO_THE_LIMIT:
            return Cut(most)
        check_range("truncate_prompt_tokens", truncate_prompt_tokens, 1, most)
        return Cut(truncate_prompt_tokens)

    def prompt_of(self, name: str | None) -> str:
        """What stands before each text: the named prompt of the model's folder, or its default one."""
        if name is None:
            return self._text.default_prompt
        if name not in self._text.prompts:
            known = ", ".join(self._text.prompts) or "none: leave it out"
            raise InvalidRequest(f"prompt_name is {show(name)}; this model's prompts are {known}", param="prompt_name")
        return self._text.prompts[name]

    def prompt_for(self, role: str) -> str:
        """What stands before a "query" or a "document", as sentence-transformers has it."""
        names = ("query",) if role == "query" else ("document", "passage", "corpus")
        return next((self._text.prompts[name] for name in names if name in self._text.prompts), self._text.default_prompt)

    async def of_texts(self, texts: Sequence[str], where: Sequence[str], cut: Cut, prompt: str = "") -> list[EncoderInput]:
        """Inputs of texts. `where` names each of them in errors."""
        for text, name in zip(texts, where, strict=True):
            _check_text(text, name)
        given = [prompt + text for text in texts] if prompt else texts
        ids = await self._tokenise(lambda: self._text.encode(given, max_len=cut.max_len), sum(map(len, given)))
        return [self._checked(EncoderInput(tuple(found)), name) for found, name in zip(ids, where, strict=True)]

    async def of_pairs(self, pairs: Sequence[tuple[str, str]], where: Sequence[str], cut: Cut) -> list[EncoderInput]:
        """Inputs of pairs of texts, for a model that looks at both. `where` names each of them in errors."""
        for pair, name in zip(pairs, where, strict=True):
            for text in pair:
                _check_text(text, name)
        num_chars = sum(len(first) + len(second) for first, second in pairs)
        found = await self._tokenise(lambda: self._text.encode_pairs(pairs, max_len=cut.max_len), num_chars)
        return [self._checked(EncoderInput(tuple(ids), second), name) for (ids, second), name in zip(found, where, strict=True)]

    def of_ids(self, token_ids: Sequence[Any], where: str, cut: Cut) -> EncoderInput:
        """An input of given ids, which are taken as they are: no tokens are put around them."""
        try:
            ids: tuple[int, ...] = msgspec.convert(token_ids, self._ids_type)
        except msgspec.ValidationError:
            vocab_size = self.facts.vocab_size
            index = next(i for i, token in enumerate(token_ids) if not isinstance(token, int) or not 0 <= token < vocab_size)
            raise InvalidRequest(
                f"{where}[{index}] is {show(token_ids[index])}; token ids of {self.name!r} are 0 to {vocab_size - 1}. Ids of "
                f"another tokenizer mean nothing to it: send texts",
                param=f"{where}[{index}]",
            ) from None
        return self._checked(EncoderInput(ids[: cut.max_len]), where)

    async def _tokenise(self, encode: Callable[[], T], num_chars: int) -> T:
        if num_chars <= INLINE_CHARS:
            return encode()
        return await to_thread.run_sync(encode, limiter=self._limiter)

    def _checked(self, given: EncoderInput, where: str) -> EncoderInput:
        length, most = len(given.token_ids), self.facts.max_len
        if length == 0:
            raise InvalidRequest(f"{where} has no tokens; at least 1 is needed", param=where)
        if length > most:
            raise ContextOverflow(
                f'{where} has {length} tokens, but {self.name!r} takes {most}; shorten it, or send "truncate": true', param=where
            )
        if max(given.token_ids) >= self.facts.vocab_size:
            raise InvalidRequest(
                f"{where} has the token {max(given.token_ids)}, but {self.name!r} knows {self.facts.vocab_size} tokens only, "
                "fewer than its tokenizer does",
                param=where,
            )
        return given


def _check_text(text: str, where: str) -> None:
    if not text:
        raise InvalidRequest(f"{where} is an empty string; text is needed", param=where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{where} is not valid Unicode: {error.reason} at character {error.start}", param=where) from None
