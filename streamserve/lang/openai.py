"""Servers of OpenAI's interface as back ends, through its own client package (the extra "openai").

Owns how a prompt becomes one of its two kinds of calls: /completions, which goes on with a text, or /chat/completions, which
answers turns. Fields that OpenAI has nothing for go to other servers under the names that most of those share (vLLM, SGLang, this
one), and are refused at OpenAI's own address. Knows no programs.
"""

import json
import os
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from streamserve.errors import CallFailed, InvalidRequest
from streamserve.lang.backend import ChoicesMethod, Chosen, Guesses, Piece, Prompt, Sampling
from streamserve.lang.chat_api import (
    PaidApi,
    check_one_form,
    check_served,
    check_turn,
    choice_of,
    choice_schema,
    meta_of,
    pattern_of,
    typed_schema,
    value_of,
)
from streamserve.lang.choices import TokenLengthNormalized, check_choices, mean_of
from streamserve.lang.dtypes import REGEXES
from streamserve.lang.guesses import CompletionGuesses, TurnGuesses
from streamserve.lang.roles import roles_of

try:
    import openai
except ImportError as error:
    raise ImportError('sgl.OpenAI needs the package openai: pip install "streamserve[openai]"') from error

# Models of OpenAI's that go on with texts.
COMPLETION_MODELS = frozenset(("gpt-3.5-turbo-instruct", "davinci-002", "babbage-002"))
OPENAIS_OWN = ("openai.com", "azure.com")
DEFAULT_MAX_TOKENS = 128  # as everywhere in the language
NUM_TRIES = 3  # of an answer that must look like a number
PASSED_ON = ("n", "temperature", "top_p", "frequency_penalty", "presence_penalty")
# Of OpenAI's own API; at others' all of MORE besides.
SERVED = frozenset(("max_tokens", "stop", "dtype", "return_logprob", "top_logprobs_num", "return_text_in_logprobs", *PASSED_ON))
MORE = frozenset(("top_k", "min_p", "min_tokens", "stop_token_ids", "stop_regex", "ignore_eos", "regex", "json_schema"))


class OpenAI(PaidApi):
    """See backend.Backend. `client_options` are the client's: base_url, api_key, timeout, max_retries, ...

    Without `is_chat_model` the name tells: OpenAI's few completion models are known, all others are asked as chats. At another
    server than OpenAI's, an answer may stand anywhere in an assistant's turn (`continue_final_message`); at OpenAI's at its
    beginning. `token_usage` counts what was used.
    """

    def __init__(
        self,
        model_name: str,
        is_chat_model: bool | None = None,
        chat_template: str | None = None,
        is_azure: bool = False,
        **client_options: Any,
    ) -> None:
        self.is_chat_model = model_name not in COMPLETION_MODELS if is_chat_model is None else is_chat_model
        url = str(client_options.get("base_url") or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
        host = urlsplit(url).hostname or ""
        self.is_openais = is_azure or any(host == own or host.endswith(f".{own}") for own in OPENAIS_OWN)
        if not self.is_openais and not client_options.get("api_key") and not os.environ.get("OPENAI_API_KEY"):
            client_options["api_key"] = "none"  # the client wants one
        make = partial(openai.AsyncAzureOpenAI if is_azure else openai.AsyncOpenAI, **client_options)
        super().__init__(model_name, "OpenAI's", roles_of(chat_template, name=model_name), openai, make)

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Piece]:
        """See Backend."""
        if self.is_openais and not self.is_chat_model and sampling.dtype is not None:
            return [await self._typed(prompt, sampling)]
        kind, fields = self._fields(prompt, sampling)
        with self._failures():
            answer = await kind.create(**fields)
        return self._pieces(answer, sampling)

    async def _typed(self, prompt: Prompt, sampling: Sampling) -> Piece:
        """An answer of a type from an API that knows no forms: a string goes on behind its opening quote to the next one; of
        another answer what looks like the type counts, and is asked for again where nothing does."""
        if sampling.n not in (None, 1):
            raise InvalidRequest(f"n is {sampling.n}; of an answer with a dtype there is one here", param="n")
        dtype, plain = sampling.dtype or "", replace(sampling, dtype=None, stop=())
        if dtype == "str":
            piece = await self._one(replace(prompt, text=prompt.text + '"'), replace(plain, stop=('"',)))
            return Piece(f'"{piece.text}"', piece.meta)
        text = ""
        for _ in range(NUM_TRIES):
            piece = await self._one(prompt, plain)
            text = piece.text.lstrip()
            if found := re.match(REGEXES[dtype], text):
                return Piece(found[0].rstrip(), piece.meta)
        raise CallFailed(f"the answer is to be of type {dtype}, and was not in {NUM_TRIES} tries; the last was {text[:100]!r}")

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """See Backend."""
        if sampling.n not in (None, 1):
            raise InvalidRequest(f"n is {sampling.n}; of a streamed answer there is one", param="n")
        kind, fields = self._fields(prompt, sampling)
        if self.is_openais and sampling.dtype is not None:  # its end says what the answer is
            for piece in await self.generate(prompt, sampling):
                yield piece
            return
        finish, id = None, ""
        with self._failures():
            async with await kind.create(**fields, stream=True, stream_options={"include_usage": True}) as events:
                async for event in events:
                    id = event.id or id
                    for choice in event.choices[:1]:
                        finish = choice.finish_reason or finish
                        text = (choice.delta.content if self.is_chat_model else choice.text) or ""
                        if text:
                            yield Piece(text, meta_of(id, None, None, None))
                    if event.usage is not None:
                        yield Piece("", self._counted(id, finish, event.usage))

    async def choose(self, prompt: Prompt, choices: Sequence[str], temperature: float, method: ChoicesMethod) -> Chosen:
        """See Backend. A completion server is asked for the choices' log-probabilities (`echo`), which needs one call. A chat
        model says which choice it takes, within a schema that allows nothing else: there are no log-probabilities then, and
        the default method is the only one."""
        check_choices(choices, temperature)
        if method.requires_unconditional_logprobs or (self.is_chat_model and type(method) is not TokenLengthNormalized):
            allowed = f"token_length_normalized{'' if self.is_chat_model else ' or greedy_token_selection'}"
            needs = f"choices_method is {type(method).__name__}, which needs log-probabilities that this API does not give"
            raise InvalidRequest(f"{needs}; allowed is {allowed}", param="choices_method")
        return await (self._chosen_in_chat(prompt, choices) if self.is_chat_model else self._scored(prompt, choices, method))

    async def _chosen_in_chat(self, prompt: Prompt, choices: Sequence[str]) -> Chosen:
        longest = max(len(choice) for choice in choices)
        kind, fields = self._fields(prompt, Sampling(max_tokens=longest + 32, temperature=0.0))
        fields["response_format"] = _format(choice_schema(choices))
        with self._failures():
            answer = await kind.create(**fields)
        usage = self._counted(answer.id, answer.choices[0].finish_reason, answer.usage)
        return Chosen(choice_of(answer.choices[0].message.content or "", choices), usage)

    async def _scored(self, prompt: Prompt, choices: Sequence[str], method: ChoicesMethod) -> Chosen:
        _check_text(prompt)
        texts = [prompt.text + choice for choice in choices]
        with self._failures():
            answer = await self._opened().completions.create(
                model=self.model_name, prompt=texts, max_tokens=0, echo=True, logprobs=0, temperature=0
            )
        usage = self._counted(answer.id, None, answer.usage)
        inputs = []
        for choice in sorted(answer.choices, key=lambda choice: choice.index):
            shown = choice.logprobs
            if shown is None or not shown.tokens:
                raise CallFailed("the server shows no log-probabilities of a prompt (echo with logprobs), so it cannot choose")
            # A token that begins in the prompt and ends in the choice is the choice's ("token healing").
            ends = [at + len(token) for at, token in zip(shown.text_offset, shown.tokens, strict=True)]
            scored = zip(shown.token_logprobs, shown.tokens, ends, strict=True)
            inputs.append([[value, None, token] for value, token, end in scored if end > len(prompt.text)])
        chosen = method(
            choices=choices,
            normalized_prompt_logprobs=[mean_of(entries) for entries in inputs],
            input_token_logprobs=inputs,
            output_token_logprobs=[[] for _ in choices],
        )
        return Chosen(chosen.decision, {**usage, **chosen.meta})

    def guesses(self, num_tokens: int) -> Guesses:
        """See backend.Guessing."""
        if self.is_chat_model:
            return TurnGuesses(self._one, num_tokens, takes_regex=not self.is_openais)
        return CompletionGuesses(self._one, num_tokens)

    # ---- bodies ------------------------------------------------------------------------------------------------------

    def _wraps(self, sampling: Sampling) -> bool:
        """Whether an answer's type is asked for as a schema with one value in it."""
        return sampling.dtype is not None and self.is_chat_model and self.is_openais

    def _fields(self, prompt: Prompt, sampling: Sampling) -> tuple[Any, dict[str, Any]]:
        """Which of the client's calls, and its arguments."""
        served = SERVED | (MORE if not self.is_openais else {"json_schema"} if self.is_chat_model else frozenset())
        check_served(sampling, served, f"OpenAI's {'chat' if self.is_chat_model else 'completions'} API")
        check_one_form(sampling)
        stop = list(sampling.stop) or None
        fields: dict[str, Any] = {
            "model": self.model_name,
            "stop": None if self._wraps(sampling) else stop,
            "max_tokens": DEFAULT_MAX_TOKENS if sampling.max_tokens is None else sampling.max_tokens,
        }
        fields |= {name: getattr(sampling, name) for name in PASSED_ON}
        more: dict[str, Any] = {}
        if not self.is_openais:
            more = {name: getattr(sampling, name) for name in ("top_k", "min_p", "min_tokens", "ignore_eos")}
            more |= {name: list(getattr(sampling, name)) or None for name in ("stop_token_ids", "stop_regex")}
            more["regex"] = pattern_of(sampling)
        client = self._opened()
        if not self.is_chat_model:
            _check_text(prompt)
            more["json_schema"] = sampling.json_schema
            fields |= {"prompt": prompt.text, "logprobs": (sampling.top_logprobs_num or 0) if sampling.return_logprob else None}
            return client.completions, _given(fields, more)
        messages = list(prompt.messages)
        check_turn(prompt, self.model_name)
        if prompt.opened.strip():
            if self.is_openais:
                raise InvalidRequest(
                    f"an answer is asked for behind {prompt.opened[-60:]!r} in an assistant's turn; OpenAI's chat API begins "
                    f"turns only: let the turn begin with it, or give @function num_api_spec_tokens"
                )
            messages.append({"role": "assistant", "content": prompt.opened})
            more |= {"continue_final_message": True, "add_generation_prompt": False}
        if self.is_openais and "max_tokens" in fields:
            fields["max_completion_tokens"] = fields.pop("max_tokens")
        if self._wraps(sampling):
            fields["response_format"] = _format(typed_schema(sampling.dtype or ""))
        elif sampling.json_schema is not None:
            fields["response_format"] = _format(json.loads(sampling.json_schema))
        if sampling.return_logprob:
            fields |= {"logprobs": True, "top_logprobs": sampling.top_logprobs_num}
        return client.chat.completions, _given({**fields, "messages": messages}, more)

    # ---- answers -----------------------------------------------------------------------------------------------------

    def _pieces(self, answer: Any, sampling: Sampling) -> list[Piece]:
        pieces = []
        for choice in sorted(answer.choices, key=lambda choice: choice.index):
            text = (choice.message.content if self.is_chat_model else choice.text) or ""
            meta = meta_of(answer.id, choice.finish_reason, None, None)
            if answer.usage is not None:
                meta |= {
                    "prompt_tokens": answer.usage.prompt_tokens,
                    "completion_tokens": answer.usage.completion_tokens,
                }
            if sampling.return_logprob and choice.logprobs is not None:
                meta |= _logprobs(choice.logprobs, is_chat=self.is_chat_model)
            pieces.append(Piece(value_of(text, sampling.dtype or "") if self._wraps(sampling) else text, meta))
        self._counted(answer.id, None, answer.usage)
        return pieces

    def _counted(self, id: str, finish: str | None, usage: Any) -> dict[str, Any]:
        prompt_tokens, completion_tokens = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else (None, None)
        self.token_usage.add(prompt_tokens, completion_tokens)
        return meta_of(id, finish, prompt_tokens, completion_tokens)


def _given(fields: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    extra = {name: value for name, value in more.items() if value is not None}
    given = {name: value for name, value in fields.items() if value is not None}
    return {**given, "extra_body": extra} if extra else given


def _format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def _check_text(prompt: Prompt) -> None:
    if prompt.images:
        raise InvalidRequest("the program shows a picture; OpenAI's completions API takes texts only: use a chat model")
    if not prompt.text:
        raise InvalidRequest("the prompt is empty; an answer needs something to go on from")


def _logprobs(shown: Any, *, is_chat: bool) -> dict[str, Any]:
    """As SGLang shows them; token ids are not known."""
    if is_chat:
        content = shown.content or []
        tops = [[[top.logprob, None, top.token] for top in entry.top_logprobs] for entry in content]
        return {"output_token_logprobs": [[entry.logprob, None, entry.token] for entry in content], "output_top_logprobs": tops}
    entries = [[value, None, token] for value, token in zip(shown.token_logprobs or [], shown.tokens or [], strict=True)]
    tops = [[[value, None, token] for token, value in (top or {}).items()] for top in shown.top_logprobs or []]
    return {"output_token_logprobs": entries, "output_top_logprobs": tops}
