"""SGLang's native /generate: a text or its tokens in, text, tokens and a `meta_info` out; one prompt or many.

Owns what the fields of its body mean and how its answers look. Every prompt of a batch is a run of its own, since each may bring
sampling parameters of its own. Streams carry the text so far in every event, as SGLang's do, or with `incremental` what is new.
Ends of streams: `[DONE]`. Knows nothing of chats: a prompt is taken as it is.
"""

from collections.abc import Awaitable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

import orjson
from anyio import create_task_group

from streamserve.api.forms import Forms
from streamserve.api.generate_schema import (
    UNWANTED,
    NativeRequest,
    NativeSampling,
    constraint_of,
    each,
    images_of,
    rids_of,
    samplings_of,
    without,
)
from streamserve.api.openai import MAX_PRIORITY
from streamserve.api.pictures import Caller
from streamserve.api.prompts import INLINE_CHARS, MIXED
from streamserve.api.schema import check_range, convert, load_object, no_pictures, show, stop_patterns_of, stops_of
from streamserve.api.service import Service
from streamserve.api.sse import Events
from streamserve.api.stream import Call, Choice, Piece, Prompt, Run, collect, new_id
from streamserve.api.wire import Exchange, leaving_noticed, one_error, unforeseen
from streamserve.errors import InvalidRequest, SlowReader, StreamServeError, error_body
from streamserve.media.family import Prepared
from streamserve.messages import MAX_LOGPROBS, FinishReason, Guidance, SamplingParams, TokenLogprobs

MAX_PROMPTS = 1024
DEFAULT_NEW_TOKENS = 128  # SGLang's
LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say
DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class LogprobWishes:
    """Which log-probabilities an answer shows. `start` -1: none of the prompt's; else from that prompt token on."""

    start: int
    num_top: int
    with_text: bool


@dataclass(slots=True)
class Gained:
    """What one choice has so far, or gained with one piece. Log-probabilities as they are shown: an event of a stream repeats all
    of them, so they are not to be spelt out anew each time."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    tops: list[Any] = field(default_factory=list)


class NativeShape:
    """The answers of one prompt's run. `first` is the place of its first choice in the whole answer."""

    def __init__(self, service: Service, run: Run, request: NativeRequest, logprobs: LogprobWishes | None, first: int) -> None:
        self._tokenizer = service.text.tokenizer
        self._run = run
        self._request = request
        self._logprobs = logprobs
        self._first = first
        self._started_s = monotonic()
        self._so_far = [Gained() for _ in run.choices]
        self._prompt_lists: dict[str, Any] = {}
        self._text_of: dict[int, str] = {}

    def event(self, piece: Piece, *, has_index: bool) -> bytes:
        """An event of the stream."""
        return orjson.dumps(self._answer(piece, Gained() if self._request.incremental else self._so_far[piece.index], has_index))

    def whole(self, piece: Piece, *, has_index: bool) -> dict[str, Any]:
        """A whole choice."""
        return self._answer(piece, Gained(), has_index)

    def _answer(self, piece: Piece, gained: Gained, has_index: bool) -> dict[str, Any]:
        """The piece is added to what was `gained`, and all of that is shown."""
        choice = self._run.choices[piece.index]
        gained.texts.append(piece.text)
        gained.token_ids += piece.token_ids
        meta: dict[str, Any] = {
            "id": self._run.call.client_id or self._run.call.id,
            "finish_reason": finish_json(piece, choice),
            "prompt_tokens": len(choice.prompt.token_ids),
            "completion_tokens": choice.num_tokens,
            "cached_tokens": choice.num_cached or 0,
            "cached_tokens_details": {"device": choice.num_cached or 0, "host": 0},
            "reasoning_tokens": choice.num_thought,
            **({"image_tokens": choice.prompt.num_media_tokens} if choice.prompt.media else {}),
            "weight_version": "default",
        }
        if piece.finish_reason is not None:
            meta["e2e_latency"] = round(monotonic() - self._started_s, 6)
            meta |= _speculation(choice)
        if self._logprobs is not None:
            meta |= self._logprob_lists(piece, gained, choice, self._logprobs)
        answer: dict[str, Any] = {"text": "".join(gained.texts), "output_ids": gained.token_ids, "meta_info": meta}
        if self._request.return_prompt_token_ids:
            answer["prompt_token_ids"] = choice.prompt.token_ids
        if has_index:
            answer["index"] = self._first + piece.index
        return answer

    def _logprob_lists(self, piece: Piece, gained: Gained, choice: Choice, wishes: LogprobWishes) -> dict[str, Any]:
        gained.logprobs += [self._entry(entry, wishes) for entry in piece.logprobs]
        lists: dict[str, Any] = {"output_token_logprobs": gained.logprobs}
        if wishes.num_top:
            gained.tops += [self._top(entry, wishes) for entry in piece.logprobs]
            lists["output_top_logprobs"] = gained.tops
        if wishes.start < 0 or (piece.prompt is None and self._request.incremental):
            return {**lists, "input_token_logprobs": []}
        if not self._prompt_lists and piece.prompt_logprobs is not None:  # they are the same for every choice
            self._prompt_lists = self._of_prompt(choice.prompt.token_ids, piece.prompt_logprobs, wishes)
        return {**lists, **self._prompt_lists}

    def _of_prompt(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], wishes: LogprobWishes
    ) -> dict[str, orjson.Fragment]:
        """As JSON already: every event of a stream repeats them. A prompt's first token follows nothing: it has none."""
        shown = list(zip(ids, logprobs, strict=True))[wishes.start :]
        lists: dict[str, list[Any]] = {
            "input_token_logprobs": [
                [None, token, self._text(token, wishes)] if entry is None else self._entry(entry, wishes)
                for token, entry in shown
            ]
        }
        if wishes.num_top:
            lists["input_top_logprobs"] = [None if entry is None else self._top(entry, wishes) for _, entry in shown]
        return {name: orjson.Fragment(orjson.dumps(entries)) for name, entries in lists.items()}

    def _entry(self, entry: TokenLogprobs, wishes: LogprobWishes) -> list[Any]:
        return [max(entry.logprob, LOWEST), entry.token_id, self._text(entry.token_id, wishes)]

    def _top(self, entry: TokenLogprobs, wishes: LogprobWishes) -> list[list[Any]]:
        return [[max(logprob, LOWEST), token, self._text(token, wishes)] for token, logprob in entry.top[: wishes.num_top]]

    def _text(self, token: int, wishes: LogprobWishes) -> str | None:
        if not wishes.with_text:
            return None
        text = self._text_of.get(token)
        if text is None:
            text = self._text_of[token] = self._tokenizer.decode([token], skip_special_tokens=False)
        return text


def _speculation(choice: Choice) -> dict[str, Any]:
    """What guesses came to, under SGLang's names, older ones included; nothing where none was made. The length: tokens that a
    step brought, those left out that a grammar forced and that came without one."""
    num_drafted, num_accepted = choice.num_drafted, choice.num_accepted
    if not num_drafted:
        return {}
    num_sampled = choice.num_tokens - choice.num_jumped
    num_steps = max(1, num_sampled - num_accepted)
    return {
        "spec_accept_rate": num_accepted / num_drafted,
        "spec_accept_length": num_sampled / num_steps,
        "spec_verify_ct": num_steps,
        "spec_num_correct_drafts": num_accepted,
        "spec_num_proposed_drafts": num_drafted,
        "spec_accepted_drafts": num_accepted,
        "spec_proposed_drafts": num_drafted,
    }


def finish_json(piece: Piece, choice: Choice) -> dict[str, Any] | None:
    """Why a choice ended, as SGLang says it."""
    match piece.finish_reason:
        case None:
            return None
        case FinishReason.STOP:
            return {"type": "stop", "matched": piece.matched_stop}
        case FinishReason.LENGTH:
            return {"type": "length", "length": choice.num_tokens}
        case other:
            return {"type": other, "message": "the request was aborted"}


@dataclass(frozen=True, slots=True)
class Batch:
    """A checked body: one run with its shape per prompt. `is_list`: the answer is a list, for several prompts or choices."""

    runs: list[Run]
    shapes: list[NativeShape]
    is_list: bool
    wants_stream: bool
    is_resumable: bool


class Generate:
    """The route /generate."""

    def __init__(self, service: Service, forms: Forms) -> None:
        self._service = service
        self._forms = forms

    async def create(self, exchange: Exchange) -> None:
        """POST /generate: complete prompts, in SGLang's native form."""
        given = load_object(await exchange.body(self._service.max_body_bytes))
        batch = await self.batch(given, self._service.caller(exchange))

        if batch.wants_stream:
            produce = partial(self._stream, batch)
            await self._service.streams.answer(exchange, batch.runs, produce, is_resumable=batch.is_resumable)
            return
        self._service.streams.check_whole(exchange, batch.is_resumable)

        def abort() -> None:
            for run in batch.runs:
                run.abort()

        with ExitStack() as live:
            for run in batch.runs:
                live.enter_context(self._service.live(run))
            async with leaving_noticed(exchange, abort):
                for run in batch.runs:
                    await run.start()
                headers = [(b"x-request-id", batch.runs[0].call.id.encode())]
                await exchange.answer(200, await self._whole(batch), headers=headers)

    async def _stream(self, batch: Batch, stream: Events) -> None:
        try:
            with one_error():
                async with create_task_group() as tasks:
                    for run, shape in zip(batch.runs, batch.shapes, strict=True):
                        tasks.start_soon(self._deliver, stream, run, shape, batch.is_list)
        except SlowReader:
            raise
        except Exception as failure:  # the status is sent: what remains is an event that says so
            error = failure if isinstance(failure, StreamServeError) else unforeseen(failure, id=batch.runs[0].call.id)
            for run in batch.runs:
                run.outcome = error.code
            body = {**error_body(error)["error"], "retryable": error.status in (429, 503, 504)}
            await stream.end(orjson.dumps({"error": body}), DONE)
        else:
            await stream.end(DONE)

    async def _deliver(self, stream: Events, run: Run, shape: NativeShape, is_list: bool) -> None:
        def emit(piece: Piece) -> Awaitable[None] | None:
            return stream.events(shape.event(piece, has_index=is_list))

        async def emit_scored(piece: Piece) -> None:
            event = await self._service.spelt_out(lambda: shape.event(piece, has_index=is_list), (piece,))
            if (waits_for := stream.events(event)) is not None:
                await waits_for

        await run.deliver(emit if run.call.sampling.prompt_logprobs is None else emit_scored)

    async def _whole(self, batch: Batch) -> bytes:
        """The plain answer: an object, or a list of them."""
        answers: list[list[bytes]] = [[] for _ in batch.runs]

        async def gather(index: int) -> None:
            shape, pieces = batch.shapes[index], await collect(batch.runs[index])

            def write() -> list[bytes]:
                return [orjson.dumps(shape.whole(piece, has_index=batch.is_list)) for piece in pieces]

            answers[index] = await self._service.spelt_out(write, pieces)

        with one_error():
            async with create_task_group() as tasks:
                for index in range(len(batch.runs)):
                    tasks.start_soon(gather, index)
        flat = b",".join([answer for some in answers for answer in some])
        return b"[%b]" % flat if batch.is_list else flat

    # ---- bodies ----------------------------------------------------------------------------------------------------

    async def batch(self, given: Mapping[str, Any], caller: Caller) -> Batch:
        """A body, checked. Raises RequestError naming the field at fault."""
        request = convert(without(given, UNWANTED), NativeRequest)
        self._service.check_model(request.model)
        check_range("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
        for name in ("cache_salt", "extra_key"):
            if len(getattr(request, name)) > 256:
                raise InvalidRequest(f"{name} has over 256 characters; at most 256 are allowed", param=name)
        prompts, is_batch = await self._prompts(request, caller)
        samplings = samplings_of({} if request.sampling_params is None else request.sampling_params, len(prompts), is_batch)
        is_list = is_batch or samplings[0][0].n > 1
        num_choices = sum(sampling.n for sampling, _ in samplings)
        if num_choices > MAX_PROMPTS:
            raise InvalidRequest(
                f"sampling_params.n makes {num_choices} choices; at most {MAX_PROMPTS} are allowed", param="sampling_params.n"
            )
        num = len(prompts)
        wants = each("return_logprob", request.return_logprob, num, is_batch)
        starts = each("logprob_start_len", request.logprob_start_len, num, is_batch)
        tops = each("top_logprobs_num", request.top_logprobs_num, num, is_batch)
        rids = rids_of(request.rid, num, is_batch)
        runs: list[Run] = []
        shapes: list[NativeShape] = []
        first = 0
        for index, (prompt, (sampling, where)) in enumerate(zip(prompts, samplings, strict=True)):
            wishes = None
            if wants[index]:
                check_range("top_logprobs_num", tops[index], 0, MAX_LOGPROBS)
                check_range("logprob_start_len", starts[index], -1, len(prompt.token_ids))
                behind = max((span.end for media in prompt.media for span in media.spans), default=0)
                if 0 <= starts[index] < behind:
                    raise InvalidRequest(
                        f"logprob_start_len is {starts[index]}, but the prompt shows a picture, whose places have no "
                        f"log-probabilities; allowed are -1 and {behind} on",
                        param="logprob_start_len",
                    )
                wishes = LogprobWishes(starts[index], tops[index], request.return_text_in_logprobs)
            guidance = await self._forms.guidance(constraint_of(sampling, where))
            name = ("text" if request.text is not None else "input_ids") + (f"[{index}]" if is_batch else "")
            run = self._service.run(self._call(request, name, prompt, sampling, wishes, guidance, rids[index], where))
            runs.append(run)
            shapes.append(NativeShape(self._service, run, request, wishes, first))
            first += sampling.n
        return Batch(runs, shapes, is_list, request.stream, request.resumable)

    async def _prompts(self, request: NativeRequest, caller: Caller) -> tuple[list[Prompt], bool]:
        """Each prompt, and whether they came as a list."""
        prompts, adds = self._service.prompts, request.add_special_tokens
        if (request.text is None) == (request.input_ids is None):
            raise InvalidRequest("give either text or input_ids", param="text")
        if request.image_data:
            return await self._pictured(request, caller)
        if request.image_marker is not None:
            raise InvalidRequest("image_marker is given without image_data, which it marks the places of", param="image_marker")
        if isinstance(request.text, str):
            return [Prompt(await prompts.of_text(request.text, "text", add_special_tokens=adds))], False
        ids = request.input_ids
        if ids is not None and ids and isinstance(ids[0], int):
            return [Prompt(prompts.check_ids(ids, "input_ids"))], False  # type: ignore[arg-type]
        name, entries = ("input_ids", ids) if ids is not None else ("text", request.text)
        assert entries is not None
        _check_count(name, entries)
        is_long = sum(len(entry) for entry in entries if isinstance(entry, str)) > INLINE_CHARS
        found: list[Prompt] = []
        for index, entry in enumerate(entries):
            if isinstance(entry, str):
                token_ids = await prompts.of_text(entry, f"text[{index}]", add_special_tokens=adds, is_long=is_long)
                found.append(Prompt(token_ids))
            elif isinstance(entry, list):
                found.append(Prompt(prompts.check_ids(entry, f"input_ids[{index}]")))
            else:
                raise InvalidRequest(MIXED.format("input_ids"), param="input_ids")
        return found, True

    async def _pictured(self, request: NativeRequest, caller: Caller) -> tuple[list[Prompt], bool]:
        """Prompts with pictures, all of which are loaded together."""
        if not self._service.takes_pictures:
            raise no_pictures("image_data is given", "image_data")
        if (marker := request.image_marker) == "":
            raise InvalidRequest("image_marker is empty; it needs at least 1 character", param="image_marker")
        if request.text is None:
            raise InvalidRequest("image_data needs text, in which it has its place; input_ids is given", param="image_data")
        is_batch = not isinstance(request.text, str)
        texts = [request.text] if isinstance(request.text, str) else request.text
        _check_count("text", texts)
        shown = images_of(request.image_data, len(texts), is_batch)
        known: dict[str, Prepared] = {}
        await self._service.prepared([picture for pictures in shown for picture in pictures], caller, known)
        prompts, adds, found = self._service.prompts, request.add_special_tokens, list[Prompt]()
        for index, (text, pictures) in enumerate(zip(texts, shown, strict=True)):
            name = f"text[{index}]" if is_batch else "text"
            prepared = [known[picture.source] for picture in pictures]
            if prepared:
                if marker is not None and marker not in text:
                    raise InvalidRequest(f"image_marker is {show(marker)}, which {name} does not have", param="image_marker")
                found.append(await prompts.of_pictured_text(text, name, prepared, marker=marker, add_special_tokens=adds))
            else:
                found.append(Prompt(await prompts.of_text(text, name, add_special_tokens=adds)))
        return found, is_batch

    def _call(
        self,
        request: NativeRequest,
        prompt_name: str,
        prompt: Prompt,
        sampling: NativeSampling,
        wishes: LogprobWishes | None,
        guidance: Guidance | None,
        rid: str | None,
        where: str,
    ) -> Call:
        context_len = self._service.client.facts().context_len
        wanted = sampling.max_new_tokens
        max_new = min(DEFAULT_NEW_TOKENS, max(1, context_len - len(prompt.token_ids))) if wanted is None else wanted
        self._service.prompts.check_room(prompt, max_new, prompt_name, f"{where}.max_new_tokens")
        check_range(f"{where}.min_new_tokens", sampling.min_new_tokens, 0, max_new)
        try:
            params = SamplingParams(
                max_new_tokens=max_new or 1,  # 0: only the prompt is looked at, which takes a step that samples
                min_new_tokens=sampling.min_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                frequency_penalty=sampling.frequency_penalty,
                presence_penalty=sampling.presence_penalty,
                repetition_penalty=sampling.repetition_penalty,
                logit_bias=self._service.prompts.logit_bias(sampling.logit_bias or {}, f"{where}.logit_bias"),
                seed=sampling.sampling_seed,
                stop_token_ids=frozenset(
                    self._service.prompts.check_ids(sampling.stop_token_ids or [], f"{where}.stop_token_ids")
                ),
                ignore_eos=sampling.ignore_eos,
                logprobs=None if wishes is None else wishes.num_top,
                prompt_logprobs=wishes.num_top if wishes is not None and wishes.start >= 0 else None,
                prompt_logprobs_start=0 if wishes is None else max(wishes.start, 0),
            )
        except InvalidRequest as error:
            if error.param is None or error.param.startswith(where):
                raise
            name = "sampling_seed" if error.param == "seed" else error.param
            raise InvalidRequest(f"{where}.{error}".replace(".seed ", ".sampling_seed ", 1), param=f"{where}.{name}") from None
        return Call(
            id=new_id("gen"),
            prompts=(prompt,),
            sampling=params,
            n=sampling.n,
            stops=stops_of(sampling.stop, f"{where}.stop"),
            stop_patterns=stop_patterns_of(sampling.stop_regex, f"{where}.stop_regex"),
            keeps_stop=sampling.no_stop_trim,
            skips_special=sampling.skip_special_tokens,
            drops_output=max_new == 0,
            scores_stop=True,  # as SGLang does: one log-probability for each of output_ids
            salt="\n".join(filter(None, (request.cache_salt, request.extra_key))),
            client_id=rid,
            guidance=guidance,
            priority=request.priority,
            deadline_s=request.timeout,
        )


def _check_count(name: str, entries: Sequence[Any]) -> None:
    if not entries or len(entries) > MAX_PROMPTS:
        raise InvalidRequest(f"{name} has {len(entries)} entries; allowed is 1 to {MAX_PROMPTS}", param=name)
