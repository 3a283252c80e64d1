"""OpenAI's chat and text completions: bodies to runs, and runs to answers over HTTP.

Owns what the fields of both bodies mean. Knows nothing of WebSocket, whose frames carry the same bodies and chunks.
"""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import orjson

from streamserve.api.answer import Reading
from streamserve.api.chunks import ChatShape, Shape, TextShape, Wishes
from streamserve.api.fields import WARNED_CHAT, WARNED_COMPLETION, warnings_of
from streamserve.api.forms import Forms, constraint_of, template_variables, whitespace_warnings
from streamserve.api.pictures import ANYBODY, Caller
from streamserve.api.prompts import INLINE_CHARS, MIXED
from streamserve.api.schema import (
    MAX_CHOICES_PER_PROMPT,
    ChatRequest,
    CompletionRequest,
    ControlRequest,
    PartName,
    Sampled,
    TokenizeRequest,
    check_range,
    client_id_of,
    convert,
    load_object,
    messages_of,
    prediction_of,
    show,
    stop_patterns_of,
    stops_of,
    unread_in,
)
from streamserve.api.service import SAMPLING_FIELDS, Service
from streamserve.api.sse import Events
from streamserve.api.stream import Call, Piece, Prompt, Run, collect, new_id
from streamserve.api.wire import WARNING, Exchange, Headers, header_text, leaving_noticed, unforeseen
from streamserve.errors import InvalidRequest, NotFound, SlowReader, StreamServeError, error_body
from streamserve.media.family import Prepared as PreparedPicture
from streamserve.messages import MAX_LOGPROBS, Guidance, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
MAX_CHOICES = 1024
MAX_TOKENS = 10_000_000
MAX_PRIORITY = 1_000_000
END_REASONING = "end_reasoning"
DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked chat: its run, not yet started. `warnings`: what of the request has no effect here, for the client to read."""

    run: Run
    top_logprobs: int | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """Where a chat comes from. `names`: what its parts with pictures are called there. `known`: pictures that were loaded for the
    same request already."""

    caller: Caller = ANYBODY
    names: Mapping[str, PartName] = field(default_factory=dict)
    known: dict[str, PreparedPicture] | None = None


NO_SOURCE = Source()


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: its run, not yet started, and the shape of its answer."""

    run: Run
    shape: Shape
    wants_stream: bool
    is_resumable: bool = False
    warnings: tuple[str, ...] = ()


class Completions:
    """Both completion routes, and their bodies for whoever carries them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.forms = Forms(service.text, service.config)

    # ---- bodies to jobs ------------------------------------------------------------------------------------------

    async def chat_job(self, given: dict[str, Any], caller: Caller = ANYBODY, *, is_socket: bool = False) -> Job:
        """A chat body, checked. Raises RequestError naming the field at fault."""
        request = convert(given, ChatRequest)
        prepared = await self.prepare_chat(request, is_socket=is_socket, source=Source(caller))
        reading = prepared.run.call.reading
        wishes = replace(
            wishes_of(request, prepared.top_logprobs),
            has_thoughts=reading is not None and reading.has_thoughts,
            has_calls=reading is not None and reading.parser is not None,
            is_legacy=request.functions is not None,
        )
        warnings = (*prepared.warnings, *unread_in(given["messages"], given.get("prediction")))
        return self._job(ChatShape, prepared.run, wishes, request, warnings)

    async def prepare_chat(
        self,
        request: ChatRequest,
        *,
        kind: str = "chatcmpl",
        is_socket: bool = False,
        must_fit: bool = True,
        source: Source = NO_SOURCE,
    ) -> Prepared:
        """A chat in whatever dialect it came, checked and tokenised; `kind` begins its id. For how to run it see api/answer.py.
        `must_fit` False: its tokens are only to be counted, so that there may be more than the context holds.

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
        if None not in (request.max_tokens, request.max_completion_tokens) and request.max_tokens != max_tokens:
            raise InvalidRequest(
                f"max_tokens is {request.max_tokens}, but max_completion_tokens, which means the same, is {max_tokens}; give one",
                param="max_tokens",
            )
        top_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        sampling = self._sampling(request, max_tokens, logprobs=top_logprobs, prompt_logprobs=request.prompt_logprobs)
        chat = messages_of(
            request.messages,
            takes=self._service.takes,
            names=source.names,
        )
        if chat.pictures and request.prompt_logprobs is not None:
            raise InvalidRequest(
                f"prompt_logprobs is {request.prompt_logprobs}, but the messages have a picture or sound, whose places have no "
                f"log-probabilities; leave it out",
                param="prompt_logprobs",
            )
        form = await self.forms.of_chat(request)
        options = chat_options(request, form.shown_tools)
        pictures = await self._service.prepared(chat.pictures, source.caller, source.known)
        prompt = await self._service.prompts.of_chat(chat.messages, options, pictures)
        if must_fit:
            self._service.prompts.check_room(prompt, max_tokens or 1, "messages", length_name)
        fitted = self.forms.fit(form, prompt.token_ids)
        prediction = await self._prediction(request)
        call = self._call(kind, request, (prompt,), sampling, fitted.guidance, fitted.reading, prediction=prediction)
        warnings = (
            *warnings_of(WARNED_CHAT, request),
            *chat.warnings,
            *self.forms.warnings_of(request),
            *fitted.warnings,
            *_stream_warnings(request),
            *self._prediction_warnings(request),
        )
        return Prepared(self._service.run(call), top_logprobs, warnings)

    async def completion_job(self, given: dict[str, Any], *, is_socket: bool = False) -> Job:
        """A text completion body, checked. Raises RequestError naming the field at fault."""
        request = convert(given, CompletionRequest)
        self._check_common(request, is_socket)
        num_each = self._num_each(request, is_socket)
        check_range("logprobs", request.logprobs, 0, MAX_LOGPROBS)
        check_range("max_tokens", request.max_tokens, 0 if request.echo else 1, MAX_TOKENS)
        guidance = await self.forms.of_completion(request)
        prompts = await self._prompts(request)
        if len(prompts) * num_each > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n {num_each} make {len(prompts) * num_each} choices; "
                f"at most {MAX_CHOICES} are allowed",
                param="n" if request.n > 1 else "best_of" if num_each > 1 else "prompt",
            )
        max_tokens = self._completion_len(request, prompts)
        ranks = num_each > request.n
        sampling = self._sampling(
            request,
            max_tokens or 1,
            logprobs=0 if ranks and request.logprobs is None else request.logprobs,
            prompt_logprobs=_most(request.prompt_logprobs, request.logprobs if request.echo else None),
        )
        call = self._call("cmpl", request, prompts, sampling, guidance, n=num_each, drops_output=request.max_tokens == 0)
        wishes = wishes_of(request, request.logprobs)
        if ranks:
            wishes = replace(wishes, best=request.n)
        warnings = (
            *warnings_of(WARNED_COMPLETION, request),
            *whitespace_warnings(request, constraint_of(request)),
            *_stream_warnings(request),
        )
        return self._job(TextShape, self._service.run(call), wishes, request, warnings)

    def _num_each(self, request: CompletionRequest, is_socket: bool) -> int:
        """How many choices are generated for each prompt."""
        best_of = request.best_of
        check_range("best_of", best_of, 1, MAX_CHOICES_PER_PROMPT)
        if best_of is None or best_of == request.n:
            return request.n
        if best_of < request.n:
            raise InvalidRequest(f"best_of is {best_of}; allowed is {request.n} (n) or more", param="best_of")
        if request.stream or is_socket:
            raise InvalidRequest(
                f"best_of is {best_of}; in a stream, where choices are shown before they are compared, only n ({request.n}) is "
                f"allowed",
                param="best_of",
            )
        return best_of

    def _check_common(self, request: Sampled, is_socket: bool) -> None:
        self._service.check_model(request.model)
        check_range("n", request.n, 1, MAX_CHOICES_PER_PROMPT)
        check_range("prompt_logprobs", request.prompt_logprobs, 0, MAX_LOGPROBS)
        check_range("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if request.stream_options is not None and not request.stream and not is_socket:
            raise InvalidRequest("stream_options is given but stream is not true", param="stream_options")
        if request.return_progress and not request.stream and not is_socket:
            raise InvalidRequest("return_progress is given but stream is not true", param="return_progress")

    def _sampling(
        self, request: Sampled, max_tokens: int | None, *, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        check_range("min_tokens", request.min_tokens, 0, MAX_TOKENS if max_tokens is None else max_tokens)
        given = {name: value for name in (*SAMPLING_FIELDS, "seed") if (value := getattr(request, name)) is not None}
        defaults = self._service.defaults
        return SamplingParams(
            max_new_tokens=max_tokens,
            min_new_tokens=request.min_tokens or 0,
            logit_bias=self._service.prompts.logit_bias(request.logit_bias or {}, "logit_bias"),
            stop_token_ids=frozenset(self._service.prompts.check_ids(request.stop_token_ids or [], "stop_token_ids")),
            ignore_eos=request.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **{**defaults, **given},
        )

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
        prompt = Prompt(token_ids, echo if wants_echo else None)
        prompts.check_room(prompt, 1, param, "max_tokens")
        return prompt

    async def _prediction(self, request: ChatRequest) -> tuple[int, ...]:
        if request.prediction is None:
            return ()
        return await self._service.prompts.of_prediction(prediction_of(request.prediction), "prediction.content")

    def _prediction_warnings(self, request: ChatRequest) -> tuple[str, ...]:
        if request.prediction is None or self._service.client.facts().uses_predictions:
            return ()
        return ("prediction has no effect: with this --speculative nothing is guessed from texts",)

    def _completion_len(self, request: CompletionRequest, prompts: tuple[Prompt, ...]) -> int:
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        if request.max_tokens is None:
            return min(DEFAULT_COMPLETION_TOKENS, self._service.client.facts().context_len - len(longest.token_ids))
        self._service.prompts.check_room(longest, request.max_tokens, "prompt", "max_tokens")
        return request.max_tokens

    def _call(
        self,
        kind: str,
        request: Sampled,
        prompts: tuple[Prompt, ...],
        sampling: SamplingParams,
        guidance: Guidance | None,
        reading: Reading | None = None,
        *,
        n: int | None = None,
        drops_output: bool = False,
        prediction: tuple[int, ...] = (),
    ) -> Call:
        if len(request.cache_salt) > 256:
            raise InvalidRequest(
                f"cache_salt has {len(request.cache_salt)} characters; at most 256 are allowed", param="cache_salt"
            )
        return Call(
            id=new_id(kind),
            prompts=prompts,
            sampling=sampling,
            n=request.n if n is None else n,
            stops=stops_of(request.stop),
            stop_patterns=stop_patterns_of(request.stop_regex),
            keeps_stop=request.no_stop_trim,
            skips_special=request.skip_special_tokens,
            drops_output=drops_output,
            salt=request.cache_salt,
            is_chat=isinstance(request, ChatRequest),
            client_id=client_id_of(request),
            reading=reading,
            guidance=guidance,
            priority=request.priority,
            deadline_s=request.timeout,
            wants_progress=request.return_progress,
            prediction=prediction,
            wants_marks=request.return_draft_marks,
        )

    def _job(
        self,
        kind: type[ChatShape] | type[TextShape],
        run: Run,
        wishes: Wishes,
        request: Sampled,
        warnings: tuple[str, ...],
    ) -> Job:
        shape = kind(run, self._service.model_name, wishes, self._service.text.tokenizer)
        return Job(run, shape, request.stream, request.resumable, warnings)

    # ---- routes --------------------------------------------------------------------------------------------------

    async def chat(self, exchange: Exchange) -> None:
        """POST /v1/chat/completions: an assistant's answer to a conversation."""
        given = load_object(await exchange.body(self._service.max_body_bytes))
        await self._answer(exchange, await self.chat_job(given, self._service.caller(exchange)))

    async def completion(self, exchange: Exchange) -> None:
        """POST /v1/completions: how a text, or its tokens, go on."""
        await self._answer(exchange, await self.completion_job(load_object(await exchange.body(self._service.max_body_bytes))))

    async def control(self, exchange: Exchange) -> None:
        """POST /v1/chat/completions/control: end the reasoning of a live chat, so that its answer begins."""
        request = convert(load_object(await exchange.body(self._service.max_body_bytes)), ControlRequest)
        if request.action != END_REASONING:
            raise InvalidRequest(f'action is {show(request.action)}; allowed is "{END_REASONING}"', param="action")
        runs = self._service.named(request.id)
        if not runs:
            raise NotFound(f"no live request is called {show(request.id)}", param="id")
        await exchange.answer_json({"id": request.id, "action": request.action, "ended": sum(run.end_thought() for run in runs)})

    async def _answer(self, exchange: Exchange, job: Job) -> None:
        run, streams, headers = job.run, self._service.streams, warning_headers(job.warnings)
        if job.wants_stream:
            await streams.answer(exchange, (run,), partial(self.write, job), headers, is_resumable=job.is_resumable)
            return
        streams.check_whole(exchange, job.is_resumable)
        with self._service.live(run):
            async with leaving_noticed(exchange, run.abort):
                await run.start()
                pieces = await collect(run)
                body = await self._service.spelt_out(lambda: orjson.dumps(job.shape.whole(pieces)), pieces)
                await exchange.answer(200, body, headers=[(b"x-request-id", run.call.id.encode()), *headers])

    async def write(self, job: Job, stream: Events) -> None:
        """The answer as events, errors in mid-stream included."""
        is_one = len(job.run.choices) == 1
        last: list[bytes] = []  # of the only choice: what follows goes out with them

        def emit(piece: Piece) -> Awaitable[None] | None:
            chunks = job.shape.chunks(piece)
            if is_one and piece.finish_reason is not None:
                last.extend(chunks)
                return None
            return stream.events(*chunks) if chunks else None

        async def emit_scored(piece: Piece) -> None:
            chunks = await self._service.spelt_out(lambda: job.shape.chunks(piece), (piece,))
            if chunks and (waits_for := stream.events(*chunks)) is not None:
                await waits_for

        opening = job.shape.opening()
        waits_for = stream.events(*opening) if opening else None
        if waits_for is not None:
            await waits_for
        try:
            await job.run.deliver(emit if job.run.call.sampling.prompt_logprobs is None else emit_scored)
        except SlowReader:
            raise
        except Exception as failure:  # the status is sent: what remains is an event that says so
            error = failure if isinstance(failure, StreamServeError) else unforeseen(failure, id=job.run.call.id)
            job.run.outcome = error.code
            await stream.end(*last, orjson.dumps({"error": error_body(error)["error"]}), DONE)
        else:
            await stream.end(*last, *job.shape.closing(), DONE)


def wishes_of(request: Sampled, top_logprobs: int | None) -> Wishes:
    """What the answer shows."""
    options = request.stream_options
    return Wishes(
        usage=bool(options and options.include_usage),
        running_usage=bool(options and options.continuous_usage_stats),
        token_ids=request.return_token_ids,
        top_logprobs=top_logprobs,
        prompt_logprobs=request.prompt_logprobs,
        marks=request.return_draft_marks,
        timings=request.return_timings,
    )


def chat_options(request: ChatRequest | TokenizeRequest, tools: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """How the template is to end, its tools, and its own variables."""
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
        "kwargs": template_variables(request) or None,
        "tools": tools or None,
        "allow_control_tokens": request.allow_control_tokens,
    }


def warning_headers(warnings: Sequence[str]) -> Headers:
    """What of a request has no effect, for its client to read."""
    return [(WARNING, header_text("; ".join(warnings)))] if warnings else []


def _stream_warnings(request: Sampled) -> tuple[str, ...]:
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        return ("stream_options.include_obfuscation has no effect: events are as long as their text",)
    return ()


def _most(*given: int | None) -> int | None:
    return max((value for value in given if value is not None), default=None)
