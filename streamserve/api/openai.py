"""OpenAI's chat and text completions: bodies to runs, and runs to answers over HTTP.

Owns what the fields of both bodies mean. Knows nothing of WebSocket, whose frames carry the same bodies and chunks.
"""

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import orjson

from streamserve.api.chunks import ChatShape, Shape, TextShape, Wishes
from streamserve.api.prompts import INLINE_CHARS, MIXED
from streamserve.api.schema import (
    MAX_CHOICES_PER_PROMPT,
    ChatRequest,
    CompletionRequest,
    Sampled,
    TokenizeRequest,
    check_range,
    client_id_of,
    convert,
    load_object,
    messages_of,
    show,
    stops_of,
)
from streamserve.api.service import SAMPLING_FIELDS, Service
from streamserve.api.sse import Events
from streamserve.api.stream import Call, Piece, Prompt, Run, collect, new_id
from streamserve.api.wire import Exchange, leaving_noticed, unforeseen
from streamserve.errors import InvalidRequest, SlowReader, StreamServeError, error_body
from streamserve.messages import MAX_LOGPROBS, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
MAX_CHOICES = 1024
MAX_TOKENS = 10_000_000
DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked chat: its run, not yet started. `warnings`: what of the request has no effect here, for the client to read."""

    run: Run
    top_logprobs: int | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: its run, not yet started, and the shape of its answer."""

    run: Run
    shape: Shape
    wants_stream: bool
    is_resumable: bool = False


class Completions:
    """Both completion routes, and their bodies for whoever carries them."""

    def __init__(self, service: Service) -> None:
        self._service = service

    # ---- bodies to jobs ------------------------------------------------------------------------------------------

    async def chat_job(self, given: dict[str, Any], *, is_socket: bool = False) -> Job:
        """A chat body, checked. Raises RequestError naming the field at fault."""
        request = convert(given, ChatRequest)
        prepared = await self.prepare_chat(request, is_socket=is_socket)
        return self._job(ChatShape, prepared.run, wishes_of(request, prepared.top_logprobs), request)

    async def prepare_chat(self, request: ChatRequest, *, kind: str = "chatcmpl", is_socket: bool = False) -> Prepared:
        """A chat in whatever dialect it came, checked and tokenised; `kind` begins its id. For how to run it see api/answer.py.

        Raises RequestError naming the field at fault by its name in ChatRequest.
        """
        self._check_common(request, is_socket)
        if request.top_logprobs is not None and not request.logprobs:
            raise InvalidRequest("top_logprobs is given but logprobs is not true", param="top_logprobs")
        check_range("top_logprobs", request.top_logprobs, 0, MAX_LOGPROBS)
        length_name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        check_range("max_tokens", request.max_tokens, 1, MAX_TOKENS)
        check_range("max_completion_tokens", request.max_completion_tokens, 1, MAX_TOKENS)
        top_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        sampling = self._sampling(request, max_tokens, logprobs=top_logprobs)
        prompt = await self._service.prompts.of_chat(messages_of(request.messages), chat_options(request))
        self._service.prompts.check_room(prompt, max_tokens or 1, "messages", length_name)
        call = self._call(kind, request, (Prompt(prompt),), sampling)
        return Prepared(self._service.run(call), top_logprobs)

    async def completion_job(self, given: dict[str, Any], *, is_socket: bool = False) -> Job:
        """A text completion body, checked. Raises RequestError naming the field at fault."""
        request = convert(given, CompletionRequest)
        self._check_common(request, is_socket)
        if request.best_of is not None and request.best_of != request.n:
            raise InvalidRequest(
                f"best_of is {request.best_of}; only best_of equal to n ({request.n}) is supported", param="best_of"
            )
        check_range("logprobs", request.logprobs, 0, MAX_LOGPROBS)
        check_range("max_tokens", request.max_tokens, 0 if request.echo else 1, MAX_TOKENS)
        prompts = await self._prompts(request)
        if len(prompts) * request.n > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n {request.n} make {len(prompts) * request.n} choices; "
                f"at most {MAX_CHOICES} are allowed",
                param="n" if request.n > 1 else "prompt",
            )
        max_tokens = self._completion_len(request, prompts)
        sampling = self._sampling(request, max_tokens or 1, logprobs=request.logprobs, with_prompt=request.echo)
        call = self._call("cmpl", request, prompts, sampling, drops_output=request.max_tokens == 0)
        return self._job(TextShape, self._service.run(call), wishes_of(request, request.logprobs), request)

    def _check_common(self, request: Sampled, is_socket: bool) -> None:
        self._service.check_model(request.model)
        check_range("n", request.n, 1, MAX_CHOICES_PER_PROMPT)
        if request.stream_options is not None and not request.stream and not is_socket:
            raise InvalidRequest("stream_options is given but stream is not true", param="stream_options")

    def _sampling(
        self, request: Sampled, max_tokens: int | None, *, logprobs: int | None, with_prompt: bool = False
    ) -> SamplingParams:
        check_range("min_tokens", request.min_tokens, 0, MAX_TOKENS if max_tokens is None else max_tokens)
        given = {name: getattr(request, name) for name in (*SAMPLING_FIELDS, "seed") if getattr(request, name) is not None}
        defaults = self._service.defaults
        return SamplingParams(
            max_new_tokens=max_tokens,
            min_new_tokens=request.min_tokens or 0,
            logit_bias=self._logit_bias(request.logit_bias or {}),
            stop_token_ids=frozenset(self._service.prompts.check_ids(request.stop_token_ids or [], "stop_token_ids")),
            ignore_eos=request.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=logprobs if with_prompt else None,
            **{**defaults, **given},
        )

    def _logit_bias(self, given: dict[str, float]) -> tuple[tuple[int, float], ...]:
        if not given:
            return ()
        vocab_size = self._service.client.facts().vocab_size
        for token in given:
            if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size):
                raise InvalidRequest(
                    f"logit_bias names token {show(token)}; allowed is 0 to {vocab_size - 1}", param="logit_bias"
                )
        return tuple((int(token), bias) for token, bias in given.items())

    async def _prompts(self, request: CompletionRequest) -> tuple[Prompt, ...]:
        given = request.prompt
        texts_or_ids: Sequence[str | list[int]]
        if isinstance(given, str):
            return (await self._prompt(given, "prompt", request.echo),)
        if not given:
            raise InvalidRequest("prompt is []; at least one prompt is needed", param="prompt")
        if isinstance(given[0], int):  # often tens of thousands, so they are looked at once, by check_ids
            return (await self._prompt(cast(list[int], given), "prompt", request.echo),)
        if len(given) > MAX_CHOICES:
            raise InvalidRequest(f"prompt has {len(given)} entries; at most {MAX_CHOICES} are allowed", param="prompt")
        texts_or_ids = [entry for entry in given if not isinstance(entry, int)]
        if len(set(map(type, given))) > 1:
            raise InvalidRequest(MIXED.format("prompt"), param="prompt")
        is_long = sum(len(entry) for entry in texts_or_ids) > INLINE_CHARS
        return tuple(
            [await self._prompt(entry, f"prompt[{index}]", request.echo, is_long) for index, entry in enumerate(texts_or_ids)]
        )

    async def _prompt(self, given: str | list[int], param: str, wants_echo: bool, is_long: bool = False) -> Prompt:
        prompts = self._service.prompts
        if isinstance(given, str):
            token_ids = await prompts.of_text(given, param, is_long=is_long)
            echo: str | None = given
        else:
            token_ids = prompts.check_ids(given, param)
            echo = self._service.text.tokenizer.decode(given, skip_special_tokens=False) if wants_echo else None
        prompts.check_room(token_ids, 1, param, "max_tokens")
        return Prompt(token_ids, echo if wants_echo else None)

    def _completion_len(self, request: CompletionRequest, prompts: tuple[Prompt, ...]) -> int:
        longest = max((prompt.token_ids for prompt in prompts), key=len)
        if request.max_tokens is None:
            return min(DEFAULT_COMPLETION_TOKENS, self._service.client.facts().context_len - len(longest))
        self._service.prompts.check_room(longest, request.max_tokens, "prompt", "max_tokens")
        return request.max_tokens

    def _call(
        self, kind: str, request: Sampled, prompts: tuple[Prompt, ...], sampling: SamplingParams, *, drops_output: bool = False
    ) -> Call:
        if len(request.cache_salt) > 256:
            raise InvalidRequest(
                f"cache_salt has {len(request.cache_salt)} characters; at most 256 are allowed", param="cache_salt"
            )
        return Call(
            id=new_id(kind),
            prompts=prompts,
            sampling=sampling,
            n=request.n,
            stops=stops_of(request),
            keeps_stop=request.no_stop_trim,
            skips_special=request.skip_special_tokens,
            drops_output=drops_output,
            salt=request.cache_salt,
            is_chat=isinstance(request, ChatRequest),
            client_id=client_id_of(request),
        )

    def _job(self, kind: type[ChatShape] | type[TextShape], run: Run, wishes: Wishes, request: Sampled) -> Job:
        shape = kind(run, self._service.model_name, wishes, self._service.text.tokenizer)
        return Job(run, shape, request.stream, request.resumable)

    # ---- routes --------------------------------------------------------------------------------------------------

    async def chat(self, exchange: Exchange) -> None:
        """POST /v1/chat/completions"""
        await self._answer(exchange, await self.chat_job(load_object(await exchange.body(self._service.max_body_bytes))))

    async def completion(self, exchange: Exchange) -> None:
        """POST /v1/completions"""
        await self._answer(exchange, await self.completion_job(load_object(await exchange.body(self._service.max_body_bytes))))

    async def _answer(self, exchange: Exchange, job: Job) -> None:
        run, streams = job.run, self._service.streams
        if job.wants_stream:
            await streams.answer(exchange, run, partial(self._stream, job), is_resumable=job.is_resumable)
            return
        streams.check_whole(exchange, job.is_resumable)
        with self._service.live(run):
            async with leaving_noticed(exchange, run.abort):
                await run.start()
                pieces = await collect(run)
                await exchange.answer_json(job.shape.whole(pieces), headers=[(b"x-request-id", run.call.id.encode())])

    async def _stream(self, job: Job, stream: Events) -> None:
        def emit(piece: Piece) -> Awaitable[None] | None:
            chunks = job.shape.chunks(piece)
            return stream.events(*chunks) if chunks else None

        opening = job.shape.opening()
        waits_for = stream.events(*opening) if opening else None
        if waits_for is not None:
            await waits_for
        try:
            await job.run.deliver(emit)
        except SlowReader:
            raise
        except Exception as failure:  # the status is sent: what remains is an event that says so
            error = failure if isinstance(failure, StreamServeError) else unforeseen(failure, id=job.run.call.id)
            job.run.outcome = error.code
            await stream.end(orjson.dumps({"error": error_body(error)["error"]}), DONE)
        else:
            await stream.end(*job.shape.closing(), DONE)


def wishes_of(request: Sampled, top_logprobs: int | None) -> Wishes:
    """What the answer shows."""
    options = request.stream_options
    return Wishes(
        usage=bool(options and options.include_usage),
        running_usage=bool(options and options.continuous_usage_stats),
        token_ids=request.return_token_ids,
        top_logprobs=top_logprobs,
    )


def chat_options(request: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """How the template is to end, and its own variables."""
    continues = request.continue_final_message
    if continues and request.messages and request.messages[-1].role != "assistant":
        raise InvalidRequest("continue_final_message needs an assistant's message at the end", param="continue_final_message")
    if continues and request.add_generation_prompt:
        raise InvalidRequest(
            "add_generation_prompt and continue_final_message are both true; only one can be", param="add_generation_prompt"
        )
    return {
        "add_generation_prompt": not continues if request.add_generation_prompt is None else request.add_generation_prompt,
        "continue_final_message": continues,
        "kwargs": request.chat_template_kwargs,
    }
