"""The engine: one coroutine that plans, launches, and takes in steps. Torch-free; everything here runs on the event loop.

Owns the loop and the seam's in-process side. Decisions are the scheduler's, arithmetic is the runner's.

While the device runs step n, the loop takes in step n-1, streams its tokens and hands over step n+1:

    device   | step n-1 | step n   | step n+1 |
    loop        plan n   commit n-1  commit n
                         plan n+1    plan n+2

The loop never blocks: a runner's `forward` and `sample` only hand work over, and a step is awaited like a socket. A step whose
samples depend on tokens that are still under way (a grammar's masks do) is sampled when these were taken in; its rows are being
computed meanwhile, and where masks take long, threads fill them. While streams still have to be served, the loop looks at the
device between two slices of them (engine/client.py): the device goes first.
"""

from asyncio import CancelledError, Event, sleep
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from time import monotonic
from typing import Protocol

import structlog

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.client import Mailbox, Turns
from streamserve.engine.flight import Flight
from streamserve.engine.grammar import Asked, Grammars
from streamserve.engine.guide import Guide
from streamserve.engine.inspector import Inspector
from streamserve.engine.plan import NO_EDITS, Edits, Place, Runner, Step
from streamserve.engine.request import Request
from streamserve.engine.rotary import rotary_lead
from streamserve.engine.scheduler import Scheduler
from streamserve.errors import ContextOverflow, EngineStopped, InvalidRequest, QueueFull
from streamserve.messages import (
    MEDIA_BASE,
    CacheSummary,
    EngineFacts,
    EngineLoad,
    GenerateRequest,
    Guidance,
    SamplingParams,
    StepRecord,
)

log = structlog.get_logger(__name__)


class StepObserver(Protocol):
    """Where the engine reports what it did; metrics implement it."""

    def step_finished(self, *, seconds: float, num_rows: int, num_tokens: int, load: EngineLoad) -> None:
        """A step was taken in. `seconds` since the one before, or since it was launched on an idle engine."""
        ...

    def request_preempted(self) -> None:
        """A running request went back to the queue."""
        ...

    def tokens_jumped(self, num_tokens: int) -> None:
        """So many tokens joined answers without a step of their own."""
        ...

    def tokens_drafted(self, num_drafted: int, num_accepted: int) -> None:
        """So many guesses were computed, and so many of them became tokens."""
        ...

    def media_encoded(self, count: int) -> None:
        """So many pictures went through the encoder."""
        ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Limits at the engine's door. `seed` feeds the seeds of requests that bring none. `takes_priorities`: whether the
    scheduler's policy looks at requests' priorities; one that would have no effect is refused. `takes_media`: the runner has an
    encoder. `max_media_bytes`: of what live requests hold for it; a single one may hold more."""

    context_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    max_queued: int = 1024
    seed: int | None = None
    takes_priorities: bool = True
    takes_media: bool = False
    max_media_bytes: int = 1 << 30


class Engine:
    """EngineClient in this process. `run()` must be running for requests to make progress."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        options: EngineOptions,
        *,
        grammars: Grammars | None = None,
        observer: StepObserver | None = None,
        now: Callable[[], float] = monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._options = options
        self._grammars = grammars
        self._observer = observer
        self._now = now
        self._seeds = Random(options.seed)
        self._wake = Event()
        self._idle = Event()
        self._idle.set()
        self._turns = Turns()
        self.inspection = Inspector(scheduler, now)
        self._stopped: str | None = None  # why no request is taken any more
        self._broken = False
        self._num_preemptions = 0
        self._num_jumped = 0
        self._num_drafted = self._num_accepted = 0
        self._num_given_up = 0
        self._busy_s = 0.0
        self._cache: KVCache = scheduler.cache
        self._facts = EngineFacts(
            context_len=options.context_len,
            vocab_size=options.vocab_size,
            eos_token_ids=options.eos_token_ids,
            page_size=self._cache.page_size,
            uses_predictions=scheduler.uses_predictions,
            takes_media=options.takes_media,
            max_running=scheduler.limits.max_running,
        )

    # ---- the seam ----------------------------------------------------------------------------------------------

    async def submit(self, request: GenerateRequest) -> Mailbox:
        """See EngineClient."""
        self._check(request)
        guide, sampling = None, request.sampling
        if request.guidance is not None:
            guide, sampling = await self._guide(request, request.guidance)
            self._check(request)  # time has passed
        seed = request.sampling.seed
        live = Request(
            request,
            seed=self._seeds.getrandbits(63) if seed is None else seed,
            context_len=self._options.context_len,
            submitted_s=self._now(),
            turns=self._turns,
            guide=guide,
            sampling=sampling,
        )
        self._scheduler.add(live)
        self._idle.clear()
        self._wake.set()
        return live.mailbox

    async def check_grammar(self, grammar: str, param: str) -> None:
        """See EngineClient."""
        if self._stopped is not None:
            raise EngineStopped(self._stopped)
        if self._grammars is not None:
            await self._grammars.check(grammar, param)

    async def _guide(self, request: GenerateRequest, guidance: Guidance) -> tuple[Guide, SamplingParams]:
        """The request's guide, and how the runner is to sample it."""
        grammars, sampling, thought = self._grammars, request.sampling, guidance.thought
        if grammars is None:
            raise InvalidRequest("this engine was built without grammars and limits of thought", param=guidance.param)
        matcher, lane, begin_ids = None, 0, []
        if guidance.grammar is not None:
            matcher, lane = await grammars.matcher(guidance.grammar, guidance.param)
            if thought is not None and not thought.is_open:
                begin_ids = await grammars.encode(thought.begin)
            sampling = replace(sampling, min_new_tokens=0)  # the guide sees to it, since only it knows what else may come
        guide = Guide(
            guidance,
            matcher=matcher,
            lane=lane,
            on_failure=partial(grammars.forget, guidance.grammar or ""),
            token_bytes=grammars.token_bytes,
            begin_ids=begin_ids,
            end_ids=self._options.eos_token_ids | request.sampling.stop_token_ids,
            min_new_tokens=request.sampling.min_new_tokens,
            # Log-probabilities come with the logits of a token's own place, and those of a prompt with a row that samples.
            jumps=guidance.may_jump and sampling.logprobs is None and sampling.prompt_logprobs is None,
        )
        return guide, sampling

    def _check(self, request: GenerateRequest) -> None:
        if self._stopped is not None:
            raise EngineStopped(self._stopped)
        if self._scheduler.find(request.id) is not None:
            raise InvalidRequest(f"request id {request.id!r} is in use by a live request", param="request_id")
        if request.priority and not self._options.takes_priorities:
            raise InvalidRequest(
                f"priority is {request.priority}, but this server does not order requests by it (--schedule-policy priority)",
                param="priority",
            )
        num_prompt, context_len = len(request.token_ids), self._options.context_len
        if num_prompt == 0:
            raise InvalidRequest("the prompt has no tokens; at least 1 is needed", param="prompt")
        words = [t for t in request.token_ids if t < MEDIA_BASE] if request.media else request.token_ids
        if request.media:
            assert self._options.takes_media and len(words) + sum(m.num_tokens for m in request.media) == num_prompt
            # What follows a span is told by the span's last place, which is in one row with the others where spans are whole.
            first = request.sampling.prompt_logprobs_start - self._scheduler.limits.has_whole_spans
            if request.sampling.prompt_logprobs is not None and any(s.end > first for m in request.media for s in m.spans):
                raise InvalidRequest(
                    "log-probabilities of a prompt are wanted where it shows a picture, whose places have none; let them begin "
                    f"at {max(s.end for m in request.media for s in m.spans) + self._scheduler.limits.has_whole_spans}",
                    param="prompt_logprobs",
                )
        if words and (min(words) < 0 or max(words) >= self._options.vocab_size):
            bad = next(t for t in words if not 0 <= t < self._options.vocab_size)
            raise InvalidRequest(
                f"token id {bad} is not in the vocabulary; allowed is 0 to {self._options.vocab_size - 1}", param="prompt"
            )
        wanted = request.sampling.max_new_tokens
        if num_prompt + (wanted or 1) > context_len:
            raise ContextOverflow(
                f"the prompt has {num_prompt} tokens and {wanted or 1} more are asked for, but the context holds {context_len}; "
                f"shorten the prompt or ask for at most {max(0, context_len - num_prompt)}",
                param="max_tokens" if num_prompt < context_len else "prompt",
            )
        lead = rotary_lead(request.media)
        if num_prompt + lead + (wanted or 1) > context_len:
            raise ContextOverflow(
                f"the prompt has {num_prompt} tokens and {wanted or 1} more are asked for, and the times of its videos are "
                f"{lead} places longer than their frames, but the context holds {context_len}; send shorter videos",
                param="prompt",
            )
        bad_asked = [t for t in request.sampling.logprob_token_ids if not 0 <= t < self._options.vocab_size]
        if bad_asked:
            raise InvalidRequest(
                f"logprob_token_ids names token {bad_asked[0]}; allowed is 0 to {self._options.vocab_size - 1}",
                param="logprob_token_ids",
            )
        bad_bias = [t for t, _ in request.sampling.logit_bias if not 0 <= t < self._options.vocab_size]
        if bad_bias:
            raise InvalidRequest(
                f"logit_bias names token {bad_bias[0]}; allowed is 0 to {self._options.vocab_size - 1}", param="logit_bias"
            )
        waiting = self._scheduler.num_waiting
        retry_after_s = max(1.0, waiting * self._busy_s / max(1, self._scheduler.num_finished))
        if waiting >= self._options.max_queued:
            raise QueueFull(
                f"{waiting} requests are waiting already; at most {self._options.max_queued} may (--max-queued-requests)",
                retry_after_s=retry_after_s,
            )
        if request.media:
            held, most = self._scheduler.held, self._options.max_media_bytes
            more = held.more(request.media)
            if more and held.num_bytes and held.num_bytes + more > most:
                raise QueueFull(
                    f"requests under way hold {held.num_bytes >> 20} MiB of pictures and the like, and this one brings "
                    f"{more >> 20} MiB more; at most {most >> 20} MiB are held",
                    retry_after_s=retry_after_s,
                )

    def abort(self, request_id: str) -> bool:
        """See EngineClient."""
        return self._scheduler.abort(request_id)

    def end_thought(self, request_id: str) -> bool:
        """See EngineClient."""
        live = self._scheduler.find(request_id)
        return live is not None and live.guide is not None and live.guide.end_thought()

    def flush_cache(self) -> bool:
        """See EngineClient. A step may still be under way: its pages are given out again to later steps only."""
        if self._scheduler.live():
            return False
        self._cache.flush()
        return True

    def abort_all(self) -> None:
        """End every live request."""
        for request in self._scheduler.live():
            self._scheduler.abort(request.id)

    def facts(self) -> EngineFacts:
        """See EngineClient."""
        return replace(self._facts, is_healthy=not self._broken, is_ready=self._stopped is None, load=self.load())

    def load(self) -> EngineLoad:
        """Requests and KV tokens right now."""
        cache, page_size = self._cache, self._cache.page_size
        return EngineLoad(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            free_tokens=cache.num_free_pages * page_size,
            evictable_tokens=cache.num_evictable_pages * page_size,
            total_tokens=cache.num_pages * page_size,
        )

    @property
    def num_preemptions(self) -> int:
        """How often a running request went back to the queue."""
        return self._scheduler.num_preemptions

    def cache_summary(self, max_prefixes: int = 10) -> CacheSummary:
        """See EngineClient."""
        return self._cache.summary(max_prefixes)

    def close(self, reason: str = "the server is shutting down") -> None:
        """Take no new requests; running ones go on."""
        self._stopped = self._stopped or reason

    async def idle(self) -> None:
        """Wait until no request is live."""
        await self._idle.wait()

    # ---- the loop ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled. Any exception but a step's own is a bug of ours and ends the engine."""
        try:
            await self._run()
        except CancelledError:
            raise
        except BaseException as error:
            self._broken = True
            for request in self._scheduler.live():  # nobody takes what came so far for an answer
                self._scheduler.end_with_error(request, f"the engine has stopped: {type(error).__name__}: {error}")
            raise
        finally:
            self.close("the engine has stopped")
            self.abort_all()

    async def _run(self) -> None:
        flying: tuple[Flight, Step] | None = None
        is_alone = was_alone = True  # a step was launched while no other was under way: this one, the one that is flying
        landed: tuple[Flight, float, bool] | None = None  # yet to be reported: the device may be waiting for the next step
        last_s = self._now()
        while True:
            flight = self._scheduler.next_plan()
            if flight is None and flying is None:
                if landed is not None:
                    self._report(*landed)
                    landed = None
                self._wake.clear()
                self._idle.set()
                await self._wake.wait()
                last_s = self._now()
                continue
            is_alone = flying is None
            step = self._launch(flight) if flight is not None else None
            if landed is not None:
                self._report(*landed)
                landed = None
            if flying is not None:
                await self._land(*flying)
                now_s = self._now()
                landed, last_s = (flying[0], now_s - last_s, was_alone), now_s
            else:
                await sleep(0)
            if flight is not None and step is not None and flight.awaits_commit and not await self._sample(flight, step):
                step = None
            flying = (flight, step) if flight is not None and step is not None else None
            was_alone = is_alone

    def _launch(self, flight: Flight) -> Step | None:
        """Start a step's rows, and if nothing speaks against it choose its tokens right behind."""
        try:
            step = self._runner.forward(flight.plan)
            if not flight.awaits_commit:
                step.sample()
            return step
        except Exception as error:
            self._fail(flight, error)
            return None

    async def _sample(self, flight: Flight, step: Step) -> bool:
        """Choose the tokens of a step, now that all tokens before them are known."""
        try:
            step.sample(await self._edits(flight))
            return True
        except Exception as error:
            self._fail(flight, error)
            return False

    async def _edits(self, flight: Flight) -> Edits:
        samples = self._scheduler.samples(flight)
        if not samples.guided:
            return Edits(samples.unwanted) if samples.unwanted else NO_EDITS
        assert self._grammars is not None
        asked: list[Asked] = []
        places: list[Place] = []
        rows = flight.plan.rows
        for i, request in samples.guided:
            guide, row = request.guide, rows[i]
            assert guide is not None
            places.append(Place(i))
            if row.num_drafts and row.token_ids:
                guesses = row.token_ids[-row.num_drafts :]
                asked.append((guide, guesses))
                places.extend([Place(i, num_drafts) for num_drafts in range(1, 1 + len(guesses))])
            else:
                asked.append((guide, ()))
        masks = await self._grammars.fill(asked)
        unwanted = samples.unwanted
        for i, request in samples.guided:
            guide = request.guide
            assert guide is not None
            error = guide.check_mask()
            if error is not None:
                unwanted |= {i}
                if self._scheduler.find(request.id) is request:  # nobody has aborted it meanwhile
                    self._scheduler.end_with_error(request, error, is_grammar_error=True)
        return Edits(unwanted, tuple(places), masks)

    async def _land(self, flight: Flight, step: Step) -> None:
        await sleep(0)  # a device that is always done already must not starve the rest of the loop
        try:
            while self._turns.are_waiting and not step.is_done():  # noqa: ASYNC110
                await sleep(0)  # a slice of the streams is served
            result = await step.done()
        except Exception as error:
            self._fail(flight, error)
        else:
            self._scheduler.commit(flight, result)

    def _fail(self, flight: Flight, error: Exception) -> None:
        log.error("step_failed", step=flight.plan.step, num_rows=len(flight.plan.rows), exc_info=error)
        self._scheduler.fail(flight, f"the step failed: {type(error).__name__}: {error}")

    def _report(self, flight: Flight, seconds: float, is_alone: bool) -> None:
        """A step was taken in, so long after the one before. `is_alone`: no other was under way when it was launched."""
        self._busy_s += seconds
        self._scheduler.step_took(flight, seconds, is_alone=is_alone)
        for _ in range(self._scheduler.num_preemptions - self._num_preemptions):
            log.info("request_preempted", running=self._scheduler.num_running, waiting=self._scheduler.num_waiting)
            if self._observer is not None:
                self._observer.request_preempted()
        num_preempted = self._scheduler.num_preemptions - self._num_preemptions
        self._num_preemptions = self._scheduler.num_preemptions
        num_jumped, self._num_jumped = self._scheduler.num_jumped - self._num_jumped, self._scheduler.num_jumped
        drafted, accepted = self._scheduler.num_drafted, self._scheduler.num_accepted
        num_drafted, num_accepted = drafted - self._num_drafted, accepted - self._num_accepted
        self._num_drafted, self._num_accepted = drafted, accepted
        self._note_pins()
        plan, load = flight.plan, self.load()
        self.inspection.add(
            StepRecord(
                plan.step,
                self._now(),
                seconds * 1000,
                len(plan.rows) - flight.prompt_rows,
                flight.prompt_rows,
                flight.prompt_tokens,
                num_drafted,
                num_accepted,
                len(plan.encodes),
                num_jumped,
                num_preempted,
                load.running,
                load.waiting,
                load.total_tokens - load.free_tokens - load.evictable_tokens,
                load.evictable_tokens,
                load.free_tokens,
                *self._cache.hits,
            )
        )
        if self._observer is not None:
            if num_jumped:
                self._observer.tokens_jumped(num_jumped)
            if num_drafted:
                self._observer.tokens_drafted(num_drafted, num_accepted)
            if plan.encodes:
                self._observer.media_encoded(len(plan.encodes))
            self._observer.step_finished(seconds=seconds, num_rows=len(plan.rows), num_tokens=flight.num_tokens, load=load)

    def _note_pins(self) -> None:
        given_up, self._num_given_up = self._num_given_up, self._cache.num_pins_given_up
        if given_up != self._num_given_up:
            log.warning("pins_given_up", count=self._num_given_up - given_up, reason="a request had no room to run beside them")
