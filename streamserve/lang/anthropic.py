"""Servers of Anthropic's interface as back ends, through its own client package (the extra "anthropic").

Owns how a prompt becomes a call of /v1/messages. Turns only: an answer stands at the beginning of an assistant's turn, or behind
what the program has put there, as far as the model goes on with it. Knows no programs.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

from streamserve.errors import InvalidRequest
from streamserve.lang.backend import ChoicesMethod, Chosen, Guesses, Piece, Prompt, Sampling
from streamserve.lang.chat_api import (
    PaidApi,
    check_one_form,
    check_served,
    check_turn,
    choice_of,
    choice_schema,
    meta_of,
    typed_schema,
    value_of,
)
from streamserve.lang.choices import TokenLengthNormalized, check_choices
from streamserve.lang.guesses import TurnGuesses
from streamserve.lang.roles import roles_of
from streamserve.text.stops import StopStrings

try:
    import anthropic
except ImportError as error:
    raise ImportError('sgl.Anthropic needs the package anthropic: pip install "streamserve[anthropic]"') from error

DEFAULT_MAX_TOKENS = 128  # as everywhere in the language
SERVED = frozenset(("max_tokens", "n", "stop", "temperature", "top_p", "top_k", "json_schema", "dtype"))


class Anthropic(PaidApi):
    """See backend.Backend. `client_options` are the client's: base_url, api_key, timeout, max_retries, ... `token_usage` counts
    what was used."""

    def __init__(self, model_name: str, **client_options: Any) -> None:
        make = partial(anthropic.AsyncAnthropic, **client_options)
        super().__init__(model_name, "Anthropic's", roles_of("default", name=model_name), anthropic, make)

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Piece]:
        """See Backend. The API gives one answer a call: several are asked for side by side."""
        fields = self._fields(prompt, sampling)
        with self._failures():
            answers = await asyncio.gather(*[self._opened().messages.create(**fields) for _ in range(sampling.n or 1)])
        return [self._piece(answer, sampling) for answer in answers]

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """See Backend."""
        if sampling.n not in (None, 1):
            raise InvalidRequest(f"n is {sampling.n}; of a streamed answer there is one", param="n")
        if sampling.dtype is not None:  # its end says what the answer is
            for piece in await self.generate(prompt, sampling):
                yield piece
            return
        id, num_prompt, num_answer, finish, blank = "", 0, 0, None, _blank(sampling)
        with self._failures():
            async with await self._opened().messages.create(**self._fields(prompt, sampling), stream=True) as events:
                async for event in events:
                    match event.type:
                        case "message_start":
                            id, num_prompt = event.message.id, _prompt_tokens(event.message.usage)
                        case "content_block_delta" if event.delta.type == "text_delta":
                            text, matched = (event.delta.text, None) if blank is None else blank.push(event.delta.text)
                            if text:
                                yield Piece(text, meta_of(id, None, num_prompt, None))
                            if matched is not None:
                                finish = "stop"
                                break
                        case "message_delta":
                            finish, num_answer = event.delta.stop_reason, event.usage.output_tokens
        self.token_usage.add(num_prompt, num_answer)
        rest = "" if blank is None else blank.flush()
        yield Piece(rest, meta_of(id, finish, num_prompt, num_answer))

    async def choose(self, prompt: Prompt, choices: Sequence[str], temperature: float, method: ChoicesMethod) -> Chosen:
        """See Backend. The model says which choice it takes, within a schema that allows nothing else: the API gives no
        log-probabilities, so the default method is the only one."""
        check_choices(choices, temperature)
        if type(method) is not TokenLengthNormalized:
            needs = f"choices_method is {type(method).__name__}, which needs log-probabilities that this API does not give"
            raise InvalidRequest(f"{needs}; allowed is token_length_normalized", param="choices_method")
        fields = self._fields(prompt, Sampling(max_tokens=max(map(len, choices)) + 32, temperature=0.0))
        fields["output_config"] = _format(choice_schema(choices))
        with self._failures():
            answer = await self._opened().messages.create(**fields)
        piece = self._piece(answer, Sampling())
        return Chosen(choice_of(piece.text, choices), piece.meta)

    def guesses(self, num_tokens: int) -> Guesses:
        """See backend.Guessing."""
        return TurnGuesses(self._one, num_tokens)

    def _fields(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        check_served(sampling, SERVED, "Anthropic's API")
        check_one_form(sampling)
        check_turn(prompt, self.model_name)
        system = [message["content"] for message in prompt.messages if message["role"] == "system"]
        messages = [
            {"role": message["role"], "content": _content(message["content"])}
            for message in prompt.messages
            if message["role"] != "system"
        ]
        if prompt.opened.strip():
            messages.append({"role": "assistant", "content": prompt.opened.rstrip()})  # it refuses white space at the end
        fields: dict[str, Any] = {
            "model": self.model_name,
            "messages": messages,
            "max_tokens": DEFAULT_MAX_TOKENS if sampling.max_tokens is None else sampling.max_tokens,
        }
        if system:
            fields["system"] = "\n".join(system)
        if sampling.stop and sampling.dtype is None:
            # Stops of white space alone are refused: those are found here, see _blank.
            fields["stop_sequences"] = [stop for stop in sampling.stop if stop.strip()]
        if sampling.json_schema is not None or sampling.dtype is not None:
            schema = typed_schema(sampling.dtype) if sampling.dtype is not None else json.loads(sampling.json_schema or "")
            fields["output_config"] = _format(schema)
        names = ("temperature", "top_p", "top_k")
        more = {name: value for name in names if (value := getattr(sampling, name)) is not None}
        return {**fields, "extra_body": more} if more else fields

    def _piece(self, answer: Any, sampling: Sampling) -> Piece:
        num_prompt, num_answer = _prompt_tokens(answer.usage), answer.usage.output_tokens
        self.token_usage.add(num_prompt, num_answer)
        text = "".join(block.text for block in answer.content if block.type == "text")
        meta = meta_of(answer.id, answer.stop_reason, num_prompt, num_answer)
        if sampling.dtype is not None:
            return Piece(value_of(text, sampling.dtype), meta)
        if blank := _blank(sampling):
            text, matched = blank.push(text)
            text += blank.flush()
            if matched is not None:
                meta["finish_reason"] = {"type": "stop", "matched": matched}
        return Piece(text, meta)


def _prompt_tokens(usage: Any) -> int:
    """All of them: the API counts those that its cache held apart."""
    held = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    return int(usage.input_tokens + held)


def _blank(sampling: Sampling) -> StopStrings | None:
    """Finds the stops that are white space alone."""
    stops = [stop for stop in sampling.stop if not stop.strip()]
    return StopStrings(stops) if stops else None


def _content(content: Any) -> Any:
    """OpenAI's parts as Anthropic's blocks."""
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part["text"]} if part["type"] == "text" else _picture(part) for part in content]


def _picture(part: dict[str, Any]) -> dict[str, Any]:
    url: str = part["image_url"]["url"]
    if not url.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": url}}
    head, _, coded = url.partition(",")
    kind = head.removeprefix("data:").partition(";")[0]
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": coded}}


def _format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"format": {"type": "json_schema", "schema": schema}}
