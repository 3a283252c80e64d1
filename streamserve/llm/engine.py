"""`Engine`: a model in this process, called as SGLang's offline engine is, and a back end of programs.

Owns which route answers which method. Every call goes through the application (host.py), so fields, checks, answers and errors
are the server's. Sync methods may be called anywhere, in a running event loop too; their async_ counterparts on any loop.
"""

import asyncio
import sys
from base64 import b64decode
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamserve import log
from streamserve.errors import InvalidRequest, StartError
from streamserve.lang import loops
from streamserve.lang.endpoint import Native
from streamserve.lang.streams import Stream
from streamserve.lang.tokenizer import ServerTokenizer
from streamserve.llm.batches import all_of, bar
from streamserve.llm.host import Host, InProcess
from streamserve.llm.prompts import chat_bodies, generate_bodies, generate_body, listed, with_pictures
from streamserve.llm.sampling import Sampling
from streamserve.llm.settings import config_of, in_python
from streamserve.startup import StartUp

GENERATE, CHAT = "/generate", "/v1/chat/completions"
TEXTS_AT_ONCE = 256  # of one call of an embedding model's routes

T = TypeVar("T")
Chat = Sequence[Mapping[str, Any]]


class Engine:
    """A model loaded into this process; without a path the default one. Blocks while it loads. Raises StartError.

    `settings` are the server's (`streamserve serve --help-all`) by their Python names: context_length=4096, device="cpu",
    embedding_model=..., ...; SGLang's names, and vLLM's common ones, are understood. log_level="info" shows the start.

    Lists are answered as one batch, in order; `progress` shows a bar (None: on a terminal). The first request of a batch that
    fails ends it with its error, unless `return_exceptions` is true: then the error stands in the answer's place.
    """

    def __init__(self, model_path: str | None = None, **settings: Any) -> None:
        log.as_library("warning")
        config = config_of({"model_path": model_path, **settings})
        level = config.server.log_level
        log.as_library(level)
        try:
            self._host = Host(config, StartUp(config, sys.stderr) if level in ("debug", "info") else None)
        except StartError as error:
            raise type(error)(in_python(str(error))) from error
        self.transport = InProcess(self._host)
        self.endpoint = Native(self.transport)  # the engine as a back end of programs

    # ---- texts ---------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Iterable[str] | None = None,
        sampling_params: Sampling | Sequence[Sampling] | None = None,
        *,
        stream: bool = False,
        progress: bool | None = None,
        return_exceptions: bool = False,
        **fields: Any,
    ) -> Any:
        """Complete one prompt or many: a dictionary {text, output_ids, meta_info}, a list of them for a list or for n > 1, or
        with `stream` an iterator of dictionaries with the text so far.

        `fields` are those of POST /generate: input_ids, image_data, return_logprob, logprob_start_len, top_logprobs_num, rid,
        priority, cache_salt, timeout, ...; for a list of prompts they may be lists too.
        """
        if stream:
            return iter(self._generate_stream(prompt, sampling_params, fields))
        return _flat(self._answered(generate_bodies(prompt, sampling_params, fields), GENERATE, progress, return_exceptions))

    async def async_generate(
        self,
        prompt: str | Iterable[str] | None = None,
        sampling_params: Sampling | Sequence[Sampling] | None = None,
        *,
        stream: bool = False,
        progress: bool | None = False,
        return_exceptions: bool = False,
        **fields: Any,
    ) -> Any:
        """`generate` for coroutines; with `stream` what is awaited is an async iterator."""
        if stream:
            return aiter(self._generate_stream(prompt, sampling_params, fields))
        bodies = generate_bodies(prompt, sampling_params, fields)
        return _flat(await self._async_answered(bodies, GENERATE, progress, return_exceptions))

    def chat(
        self,
        messages: Chat | Sequence[Chat],
        sampling_params: Sampling | Sequence[Sampling] | None = None,
        *,
        stream: bool = False,
        progress: bool | None = None,
        return_exceptions: bool = False,
        **fields: Any,
    ) -> Any:
        """Answer a conversation, or a list of them: chat completions in OpenAI's shape, as dictionaries; with `stream` an
        iterator of its chunks. `fields` are those of POST /v1/chat/completions: tools, response_format, max_tokens, ..."""
        if stream:
            return iter(self._chat_stream(messages, sampling_params, fields))
        return self._answered(chat_bodies(messages, sampling_params, fields), CHAT, progress, return_exceptions)

    async def async_chat(
        self,
        messages: Chat | Sequence[Chat],
        sampling_params: Sampling | Sequence[Sampling] | None = None,
        *,
        stream: bool = False,
        progress: bool | None = False,
        return_exceptions: bool = False,
        **fields: Any,
    ) -> Any:
        """`chat` for coroutines; with `stream` what is awaited is an async iterator."""
        if stream:
            return aiter(self._chat_stream(messages, sampling_params, fields))
        return await self._async_answered(chat_bodies(messages, sampling_params, fields), CHAT, progress, return_exceptions)

    def stream(self, prompt: str | Chat, sampling_params: Sampling | None = None, **fields: Any) -> Stream[str]:
        """The answer to a prompt, or to a conversation, piece by piece, for `for` and for `async for`."""
        if isinstance(prompt, str):
            body = generate_body(prompt, sampling_params, fields) | {"stream": True, "incremental": True}
            _one_choice(body["sampling_params"])
            return Stream(partial(self._texts, GENERATE, body, lambda event: event["text"]))
        body = _one_chat(chat_bodies(prompt, sampling_params, fields))
        _one_choice(body)
        return Stream(partial(self._texts, CHAT, body, _content_of))

    def _generate_stream(self, prompt: Any, sampling_params: Any, fields: Mapping[str, Any]) -> Stream[dict[str, Any]]:
        return Stream(partial(self._events, GENERATE, generate_body(prompt, sampling_params, fields) | {"stream": True}))

    def _chat_stream(self, messages: Any, sampling_params: Any, fields: Mapping[str, Any]) -> Stream[dict[str, Any]]:
        return Stream(partial(self._events, CHAT, _one_chat(chat_bodies(messages, sampling_params, fields))))

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[Any, None]:
        async with aclosing(self.transport.events(path, await with_pictures(body))) as events:
            async for event in events:
                yield event

    async def _texts(self, path: str, body: dict[str, Any], text_of: Callable[[Any], str]) -> AsyncGenerator[str, None]:
        async with aclosing(self._events(path, body)) as events:
            async for event in events:
                if text := text_of(event):
                    yield text

    # ---- vectors and scores ----------------------------------------------------------------------------------------------

    def encode(self, prompt: str | Sequence[str], **fields: Any) -> Any:
        """{embedding, meta_info} of a text, or a list of them, by the embedding model."""
        return loops.run(self.async_encode(prompt, **fields))

    async def async_encode(self, prompt: str | Sequence[str], **fields: Any) -> Any:
        """`encode` for coroutines."""
        if isinstance(prompt, str):
            return await self.async_call("POST", "/encode", {**fields, "text": prompt})
        bodies = [{**fields, "text": part} for part in _parts(prompt)]
        return [answer for part in await loops.arun(self._all("/encode", bodies)) for answer in part]

    def embed(self, texts: str | Sequence[str], **fields: Any) -> NDArray[np.float32]:
        """Vectors of the embedding model: an array [D] of a text, [N, D] of a list."""
        return loops.run(self.async_embed(texts, **fields))

    async def async_embed(self, texts: str | Sequence[str], **fields: Any) -> NDArray[np.float32]:
        """`embed` for coroutines."""
        given = [texts] if isinstance(texts, str) else texts
        bodies = [{**fields, "input": part, "encoding_format": "base64"} for part in _parts(given)]
        found = [entry for answer in await loops.arun(self._all("/v1/embeddings", bodies)) for entry in answer["data"]]
        rows = np.stack([np.frombuffer(b64decode(entry["embedding"]), "<f4") for entry in found])
        return rows[0] if isinstance(texts, str) else rows

    def score(
        self,
        query: str | Sequence[int],
        items: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        label_token_ids: Sequence[int],
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> list[list[float]]:
        """How likely each label token is behind query and item: for each item a list, in the order of the labels."""
        return loops.run(self.async_score(query, items, label_token_ids, apply_softmax, item_first))

    async def async_score(
        self,
        query: str | Sequence[int],
        items: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        label_token_ids: Sequence[int],
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> list[list[float]]:
        """`score` for coroutines."""
        asked = {"query": query, "label_token_ids": label_token_ids, "apply_softmax": apply_softmax, "item_first": item_first}
        is_one = isinstance(items, str) or (len(items) > 0 and isinstance(items[0], int))
        given: Sequence[Any] = [items] if is_one else items
        answers = await loops.arun(self._all("/v1/score", [{**asked, "items": part} for part in _parts(given)]))
        return [row for answer in answers for row in answer["scores"]]

    def rerank(
        self, query: str | Sequence[Sequence[str]], documents: Sequence[str] | None = None, top_n: int | None = None
    ) -> list[dict[str, Any]]:
        """Documents in the order in which they answer the query: {index, relevance_score, document}, best first. Without
        documents pairs [query, document], SGLang's way: {index, embedding} for each, in their order; its score is `embedding`."""
        return loops.run(self.async_rerank(query, documents, top_n))

    async def async_rerank(
        self, query: str | Sequence[Sequence[str]], documents: Sequence[str] | None = None, top_n: int | None = None
    ) -> list[dict[str, Any]]:
        """`rerank` for coroutines."""
        if documents is None:
            pairs: list[Any] = [listed(pair) or () for pair in listed(query) or [query]]
            if top_n is not None or any(len(pair) != 2 for pair in pairs):
                raise InvalidRequest("give a query and documents, or a list of pairs [query, document] alone", param="documents")
            scores = await loops.arun(self._scores([pair[0] for pair in pairs], [pair[1] for pair in pairs]))
            return [{"index": index, "embedding": score} for index, score in enumerate(scores)]
        bodies = [{"query": query, "documents": part, "top_n": top_n} for part in _parts(documents)]
        answers = await loops.arun(self._all("/v1/rerank", bodies))
        found: list[dict[str, Any]] = [
            {**entry, "index": entry["index"] + at * TEXTS_AT_ONCE}
            for at, answer in enumerate(answers)
            for entry in answer["results"]
        ]
        return sorted(found, key=lambda entry: -entry["relevance_score"])[:top_n]

    async def _scores(self, first: Sequence[Any], second: Sequence[Any]) -> list[float]:
        """How well texts fit, one with many or pair by pair."""
        if len(first) == len(second):
            first = first[:1] if all(text == first[0] for text in first) else first  # computed once
        elif len(first) != 1:  # the server says what it thinks of that
            return [entry["score"] for entry in (await self._ask("/v1/score", {"text_1": first, "text_2": second}))["data"]]
        seconds = _parts(second)
        firsts = [first] * len(seconds) if len(first) == 1 else _parts(first)
        bodies = [{"text_1": one, "text_2": other} for one, other in zip(firsts, seconds, strict=True)]
        return [entry["score"] for answer in await self._all("/v1/score", bodies) for entry in answer["data"]]

    # ---- the engine --------------------------------------------------------------------------------------------------------

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Any route of the server, by its method and path, with a body and an answer as JSON has them."""
        return loops.run(self.transport.call(method, path, body))

    async def async_call(self, method: str, path: str, body: Any = None) -> Any:
        """`call` for coroutines."""
        return await loops.arun(self.transport.call(method, path, body))

    def get_tokenizer(self) -> ServerTokenizer:
        """The model's tokenizer, as far as scripts use transformers'."""
        return self.endpoint.get_tokenizer()

    def flush_cache(self, timeout: float = 0.0) -> None:
        """Forget all cached prefixes that are not pinned. While requests run that is refused, or waited for (seconds)."""
        self.call("POST", f"/flush_cache?timeout={timeout:g}")

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """End the requests whose `rid` begins so, or all."""
        self.call("POST", "/abort_request", {"abort_all": True} if abort_all else {"rid": rid})

    def get_server_info(self) -> dict[str, Any]:
        """The settings, what was decided where one was open, and the engine's state."""
        info: dict[str, Any] = self.call("GET", "/server_info")
        return info

    def get_model_info(self) -> dict[str, Any]:
        """What the model is and takes."""
        info: dict[str, Any] = self.call("GET", "/model_info")
        return info

    def shutdown(self) -> None:
        """End all requests and threads, and free the memory. A second call does nothing."""
        self._host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await asyncio.to_thread(self.shutdown)

    # ---- batches -----------------------------------------------------------------------------------------------------------

    def _answered(self, bodies: Any, path: str, progress: bool | None, keeps_errors: bool) -> Any:
        if not isinstance(bodies, list):
            return loops.run(self._ask(path, bodies))
        with bar(len(bodies), progress) as done:
            return loops.run(self._all(path, bodies, keeps_errors, done))

    async def _async_answered(self, bodies: Any, path: str, progress: bool | None, keeps_errors: bool) -> Any:
        if not isinstance(bodies, list):
            return await loops.arun(self._ask(path, bodies))
        with bar(len(bodies), progress) as done:
            return await loops.arun(self._all(path, bodies, keeps_errors, done))

    async def _ask(self, path: str, body: dict[str, Any]) -> Any:
        return await self.transport.call("POST", path, await with_pictures(body))

    async def _all(
        self, path: str, bodies: Sequence[Any], keeps_errors: bool = False, done: Callable[[], object] | None = None
    ) -> list[Any]:
        calls = [partial(self._ask, path, body) for body in bodies]
        return await all_of(calls, self._host.max_in_flight, keeps_errors=keeps_errors, done=done)


def _flat(answers: Any) -> Any:
    """Where a prompt of a list has several choices, they follow each other, as the server has it."""
    if not isinstance(answers, list):
        return answers
    return [entry for answer in answers for entry in (answer if isinstance(answer, list) else [answer])]


def _parts(entries: Sequence[T]) -> list[list[T]]:
    """One part where there is nothing: the server says what it thinks of that."""
    given = list(entries)
    return [given[at : at + TEXTS_AT_ONCE] for at in range(0, max(1, len(given)), TEXTS_AT_ONCE)]


def _content_of(event: Any) -> str:
    choices = event.get("choices")
    return (choices[0]["delta"].get("content") or "") if choices else ""


def _one_chat(bodies: Any) -> dict[str, Any]:
    if isinstance(bodies, list):
        raise InvalidRequest(f"messages are {len(bodies)} conversations; a stream is of one", param="messages")
    return {**bodies, "stream": True}


def _one_choice(params: Mapping[str, Any]) -> None:
    if params.get("n", 1) != 1:
        raise InvalidRequest(f"n is {params['n']}; a stream of text is one answer: use generate(..., stream=True)", param="n")
