"""Decides what the next step does, and takes in what a step brought. Torch-free; runs on the event loop; never waits.

Owns the queues, the slots and the life of every request. Knows nothing of text, tensors or devices. Only this file, and
answer.py for it, writes Request objects, so nothing needs a lock.

A plan takes every decode row first, then prompt chunks of running requests, then newly admitted ones, until the token
budget is empty: a long prompt costs running streams one chunk per step. Chunked prefill after Sarathi-Serve
(arXiv 2403.02310); a running step is planned over as in SGLang's overlap schedule: its tokens are still on the device.

On a fast device a burst of prompts is computed without the decode rows: pause.py says when. Small prompts always ride along
with the decode rows.

A request may have a guide (engine/guide.py). It is told of each token at commit and may append known tokens: these go through
one row, like a prompt's. A row that was started before its request was appended to has computed the KV of a right token, but
its sample is of a place that is taken: it is unwanted.

A row may verify guesses of what follows its token (speculation.py decides). Nothing is planned over such a step: the batch
stays together, and every answer goes on as far as it has got.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from time import monotonic

from streamserve.cache.keys import common_len
from streamserve.cache.kv_cache import KVCache, Lease
from streamserve.engine.answer import GOES_ON, End, append_forced, delivery, end_of, follow, last_words
from streamserve.engine.drafters.drafter import Drafts
from streamserve.engine.encode_planner import MAX_AHEAD, EncodePlanner
from streamserve.engine.encodings import Encodings
from streamserve.engine.flight import Draft, Flight, Samples
from streamserve.engine.held_inputs import HeldInputs
from streamserve.engine.pause import BurstLimits, Pause
from streamserve.engine.plan import Admission, Append, PageCopy, Plan, Row, RowResult, StepResult
from streamserve.engine.policy import Policy
from streamserve.engine.request import Request, Seat, State
from streamserve.engine.speculation import Offer, Speculation
from streamserve.messages import Delta, FinishReason, GenerateRequest, TokenLogprobs

FEW_ROWS = 4  # up to so many, a row whose sample would be unwanted costs more than a device that waits for the host

FEW_RIDERS = 16  # answers; more do without guesses while prompts ride along, which fill the device as it is

FEW_NEW = 16  # so many that wait are expected to enter a step; of more than that most wait for pages


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may hold. `max_step_tokens` counts prompt and decode tokens together. Chunks longer than `long_chunk` end at a
    multiple of it if they begin at one: devices have libraries for those. `max_appended_rows`: of a step, rows that go through
    tokens which were appended to their requests; more wait for the next step. `max_drafted_tokens`: in a step that has guesses
    these and rows, of which a prompt that ends has one as well. `has_whole_spans`: places of a picture look at each other in both
    directions, so a row holds a span whole, however long, or none of it. `encodes_beside`: the runner encodes media beside its
    steps, and only one that needs them waits for it: they are encoded a step before that or earlier."""

    max_running: int
    max_step_tokens: int
    eos_token_ids: frozenset[int]
    bursts: BurstLimits = field(default_factory=BurstLimits)
    long_chunk: int | None = None
    max_appended_rows: int | None = None
    max_drafted_tokens: int | None = None
    has_whole_spans: bool = False
    encodes_beside: bool = False


class Scheduler:
    """Queues and slots of one engine."""

    def __init__(
        self,
        cache: KVCache,
        limits: Limits,
        policy: Policy,
        *,
        speculation: Speculation | None = None,
        encodings: Encodings | None = None,
        now: Callable[[], float] = monotonic,
    ) -> None:
        """`speculation`: None: nobody guesses. `encodings`: for as many embeddings of media as the runner is to keep."""
        self.cache = cache
        self.limits = limits
        self._policy = policy
        self._speculation = speculation
        self._num_wanted = 0 if speculation is None else speculation.drafter.num_wanted
        self._may_guess = False  # it may pay to verify guesses in the step that is planned
        self._wants = False  # the runner's drafter is to guess what follows the answers' rows of the step that was planned last
        self._is_drafted = False  # a step with guesses is under way
        self._now = now
        self._pause = Pause(limits.bursts, now)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # in order of admission
        self._in_prompt: dict[Request, None] = {}  # those of them whose next row computes tokens of the prompt
        self._computing: list[Seat] = []  # of those whose prompt was not computed when somebody looked last
        self._num_with_media = 0  # live requests
        self._encoding = EncodePlanner(
            encodings or Encodings(), cache, has_whole_spans=limits.has_whole_spans, encodes_beside=limits.encodes_beside
        )
        self.held = HeldInputs()
        self._live: dict[str, Request] = {}
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        self._short_of_pages: int | None = None  # so many were available when a waiting request last found too few
        self._step = 0
        self.num_preemptions = 0
        self.num_finished = 0
        self.num_jumped = 0  # tokens that were appended, not sampled, and are in mailboxes
        self.num_drafted = 0  # guesses that were computed
        self.num_accepted = 0  # those that became tokens

    @property
    def uses_predictions(self) -> bool:
        """Whether anybody looks at what clients expect of answers. A drafter in the runner reads only what was computed."""
        return self._speculation is not None and self._num_wanted == 0

    @property
    def num_encoded(self) -> int:
        """Media that were encoded."""
        return self._encoding.num_encoded

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def find(self, request_id: str) -> Request | None:
        """The live request of that id."""
        return self._live.get(request_id)

    def add(self, request: Request) -> None:
        """Queue a new request. Its id must not be live."""
        assert request.id not in self._live, request.id
        sampling = request.given.sampling
        request.stop_ids = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else self.limits.eos_token_ids)
        if request.guide is not None:
            end = append_forced(request, request.guide, request.guide.begin())
            if end.finish_reason is not None:  # nothing is left to the model
                self._deliver(request, request.num_prompt, end)
                request.move(State.FINISHED)
                self.num_finished += 1
                return
        self._live[request.id] = request
        self._num_with_media += bool(request.given.media)
        self.held.hold(request.given.media)
        self._waiting.append(request)

    def live(self) -> list[Request]:
        """All requests that have not finished."""
        return list(self._live.values())

    def first_live(self, most: int) -> list[Request]:
        """So many of them: running ones first, in order of their admission, then waiting ones."""
        return list(islice(chain(self._running, self._waiting), most))

    def without_part_of_span(self, given: GenerateRequest, tokens: Sequence[int], limit: int) -> int:
        """A limit for what is taken from the tree that ends in no span which must be computed in one piece."""
        if not self.limits.has_whole_spans or not given.media:
            return limit
        matched = self.cache.match_len(given.salt, tokens, limit)
        for media in given.media:
            for span in media.spans:
                if span.start < matched < span.end:
                    return span.start
        return matched

    # ---- planning ----------------------------------------------------------------------------------------------

    def next_plan(self) -> Flight | None:
        """The next step, or None when nothing can run now. Planned rows count as under way from here on."""
        if self._is_drafted:
            return None
        speculation = self._speculation
        self._may_guess = speculation is not None and speculation.may_pay(len(self._running), self._room_for_guesses())
        if self._waits_for_guesses():
            return None
        self._wants = self._wants_guesses()
        draft = Draft()
        if self._pause.allows(self._has_tokens):
            self._draw_burst(draft)
        else:
            preemptions = self.num_preemptions
            self._draw_answers(draft, self._running, self._guesses())
            budget = self._draw_prompt_chunks(draft, self._riding_budget(draft))
            if preemptions == self.num_preemptions or not draft.rows:  # else pages are short: the victim would come straight back
                self._admit(draft, budget)
            self._pause.ends()
        if not draft.rows:
            return None
        if self._num_with_media:
            self._encoding.encode_ahead(draft, self._running, islice(self._waiting, MAX_AHEAD))
        self._step += 1
        plan = Plan(
            self._step,
            tuple(draft.admissions),
            tuple(draft.copies),
            tuple(draft.rows),
            tuple(draft.appends),
            tuple(draft.encodes),
            self._encoding.forgets(draft, self._running),
        )
        self._is_drafted = draft.num_drafts > 0
        return Flight(
            plan,
            tuple(draft.seats),
            draft.num_tokens,
            draft.is_guided,
            draft.num_drafts,
            not draft.has_chunks,
            self._wants,
            draft.prompt_rows,
            draft.prompt_tokens,
        )

    def samples(self, flight: Flight) -> Samples:
        """What to sample of a flight, now that every step before it was taken in."""
        unwanted, guided = set(), []
        for i, (row, seat) in enumerate(zip(flight.plan.rows, flight.seats, strict=True)):
            if not row.samples:
                continue
            request = seat.request
            if request is None or row.start + row.num_tokens - row.num_drafts < len(request.tokens):
                unwanted.add(i)
            elif request.guide is not None and request.guide.needs_mask:
                guided.append((i, request))
        return Samples(frozenset(unwanted), tuple(guided))

    def _riding_budget(self, draft: Draft) -> int:
        """Prompt tokens of a step that has these decode rows."""
        num_decode = len(draft.rows)
        if not num_decode:
            return self._burst_budget()
        most = max(self.limits.max_step_tokens - draft.num_tokens, self.cache.page_size)
        bursts = self.limits.bursts
        if self._pause.is_cut and self._has_tokens(bursts.tokens):
            return 0
        if num_decode >= bursts.gather_rows and not self._has_waited(bursts.gather_s):
            return 0
        if bursts.media_tokens is not None and self._has_media():
            return min(most, max(bursts.media_tokens, self.cache.page_size))
        return bursts.riding(num_decode, most)

    def _has_media(self) -> bool:
        """Whether a prompt that is being computed has media, or the next one has."""
        if not self._num_with_media:
            return False
        if any(request.given.media for request in self._in_prompt):
            return True
        return bool(self._waiting and self._free_slots and self._waiting[0].given.media)

    def _has_waited(self, seconds: float) -> bool:
        """Whether a prompt has waited so long, or has begun, or there is none to wait for."""
        if not self._waiting or self._in_prompt:
            return True
        now = self._now()
        return any(now - request.submitted_s >= seconds for request in self._waiting)

    def _has_tokens(self, least: int) -> bool:
        """Whether prompts that could run now bring so many tokens that are not in the cache. Of those that wait none could, where
        pages were too few and are no more since. Those with media do not count: the encoder is what they wait for, so a pause
        would be long and bring little."""
        tokens = sum(len(request.tokens) - request.planned for request in self._in_prompt if not request.given.media)
        is_short = self._short_of_pages is not None and self.cache.num_available_pages <= self._short_of_pages
        if tokens < least and self._free_slots and not is_short:
            for request in self._waiting:
                if request.given.media:
                    continue
                cached = self.cache.match_len(request.given.salt, request.packed, len(request.tokens) - 1)
                tokens += len(request.tokens) - cached
                if tokens >= least:
                    break
        return tokens >= least

    def _draw_burst(self, draft: Draft) -> None:
        """Prompts alone, if they fill half a step; else (pages are short, or prompts wait for each other) decode rows as well."""
        waits = self._waits_for_tokens()  # before new ones join them
        decoding = [r for r in self._running if r.can_answer and not (waits and r.planned != r.computed)]
        most = self._burst_budget()
        budget = self._draw_prompt_chunks(draft, most)
        self._admit(draft, budget)
        if draft.num_tokens >= min(self.limits.bursts.tokens, most // 2):
            self._pause.goes_on(is_felt=bool(decoding))
            return
        self._pause.ends()
        if not draft.rows:
            self._draw_answers(draft, self._running, self._guesses())
            if not draft.rows:  # the last one preempted itself: its pages are free now
                self._admit(draft, budget)
            return
        self._draw_answers(draft, decoding, preempts=False)  # the victim might be in this very draft

    def _burst_budget(self) -> int:
        """Tokens of a step of prompts alone. A prompt that fills a step by itself gets one: computed best whole."""
        most = self.limits.max_step_tokens
        prompts = [len(request.tokens) - request.planned for request in self._in_prompt]
        if max((*prompts, *(len(request.tokens) for request in self._waiting)), default=0) >= most:
            return most
        return min(most, self.limits.bursts.step_tokens or most)

    def _draw_answers(
        self,
        draft: Draft,
        requests: Sequence[Request],
        guesses: Mapping[Request, Sequence[int]] | None = None,
        *,
        preempts: bool = True,
    ) -> None:
        """A row for every answer that can have one: one token, or more where known ones were appended or others guessed."""
        spare = self.limits.max_step_tokens - draft.num_tokens - len(requests)  # tokens beyond one for each
        most, num_appended = self.limits.max_appended_rows, 0
        waits = self._waits_for_tokens()
        rows, seats, wanted = draft.rows, draft.seats, self._num_wanted if self._wants else 0
        for request in requests:  # preemption shortens the list from its end, and the iteration with it
            start, tokens = request.planned, request.tokens
            if not request.num_prompt <= start < request.end or (waits and start != request.computed):
                continue
            if guesses and request in guesses and self._draw_drafted(draft, request, guesses[request]):
                spare -= len(guesses[request])
                continue
            num_known = len(tokens) - start
            if num_known > 1:
                num_appended += 1
                num_tokens = min(num_known, 1 + max(0, spare))
                if (most is None or num_appended <= most) and self._have_pages(request, num_tokens, preempts=preempts):
                    self._draw(draft, request, num_tokens, tuple(tokens[start : start + num_tokens]))
                    spare -= num_tokens - 1
                continue
            new_pages: tuple[int, ...] = ()
            if start >= request.room:
                if not self._have_pages(request, 1, preempts=preempts):
                    continue
                new_pages = self._new_pages(request)
            if request.guide is not None:
                draft.is_guided = True
                if request.appended:
                    self._announce(draft, request)
            request.planned = start + 1
            token_ids = (tokens[start],) if num_known else None  # None: the step that yields it is under way
            rows.append(Row(request.slot, start, 1, token_ids, new_pages, True, False, 0, wanted))
            assert request.seat is not None
            seats.append(request.seat)

    def _waits_for_tokens(self) -> bool:
        """Whether rows are started only when all tokens before them are known: few rows that may all be appended to. A row
        started before its request is appended to computes one token, where a row started after it computes all."""
        running = self._running
        return len(running) <= FEW_ROWS and all(r.guide is not None and r.guide.may_append for r in running)

    # ---- guesses -----------------------------------------------------------------------------------------------

    def _waits_for_guesses(self) -> bool:
        """Whether to plan nothing until tokens under way are known, because guesses behind them will pay."""
        speculation = self._speculation
        if speculation is None or not self._may_guess or (self._num_wanted and not self._wants):
            return False
        answering = [request for request in self._running if request.can_answer]
        if all(request.planned == request.computed for request in answering):
            return False
        offers = [self._offer(request) for request in answering]
        return speculation.is_worth_waiting(offers, len(answering), self._room_for_guesses())

    def _wants_guesses(self) -> bool:
        """Whether the runner's drafter is to guess what follows the answers in this step: it takes time, verified or not."""
        speculation = self._speculation
        if speculation is None or not self._num_wanted or not self._may_guess:
            return False
        answering = [request for request in self._running if request.can_answer]
        offers = [self._offer(request) for request in answering]
        return not answering or speculation.wants_guesses(offers, len(answering), self._room_for_guesses())

    def _room_for_guesses(self) -> int:
        """Guesses that the next step may hold. Those who wait may get a slot in it, and a row with it. Where there are prompts
        they have half of the step: nobody's first token waits for guesses."""
        limits, running = self.limits, self._running
        most, num_new = limits.max_step_tokens, min(len(self._waiting), len(self._free_slots), FEW_NEW)
        if num_new or (running and running[-1] in self._in_prompt):  # whoever came last is through its prompt last
            if limits.bursts.ride_tokens is not None and len(running) > FEW_RIDERS:
                return 0
            most //= 2
        if limits.max_drafted_tokens is not None:
            most = min(most, limits.max_drafted_tokens)
        if limits.bursts.media_tokens is not None and self._has_media():
            return 0  # many such steps follow each other: each should be short
        return most - len(running) - num_new

    def _guesses(self) -> dict[Request, Sequence[int]]:
        """What to verify in this step, by request. No guess is made of what follows a token that is not known yet, or that is not
        alone."""
        speculation = self._speculation
        if speculation is None or not self._may_guess:
            return {}
        answering = [request for request in self._running if request.can_answer]
        asked = [r for r in answering if r.planned == len(r.tokens) - 1 and r.planned == r.computed and r.has_begun]
        if not asked:
            return {}
        left = self._room_for_guesses()
        chosen = speculation.choose([self._offer(request) for request in asked], len(answering), left)
        guesses: dict[Request, Sequence[int]] = {}
        for request, token_ids in zip(asked, chosen, strict=True):
            fitting = token_ids[: max(0, left)]
            if request.guide is not None and fitting:
                fitting = fitting[: request.guide.admit(fitting)]
            if fitting:
                guesses[request] = fitting
                left -= len(fitting)
        return guesses

    def _offer(self, request: Request) -> Offer:
        """An answer, for guesses. One of its next tokens comes without being guessed."""
        num_tokens = max(1, request.num_generated)
        pace = num_tokens / (num_tokens - request.num_accepted)
        expected = max(request.planned + 1, len(request.tokens))  # tokens, once all that is under way has come
        return Offer(self._drafts_of(request), request.end - expected, pace)

    def _drafts_of(self, request: Request) -> Drafts:
        """Who guesses for a request, told of all its tokens. Only those who are asked for guesses are told."""
        assert self._speculation is not None
        drafts, tokens = request.drafts, request.tokens
        if drafts is None:
            drafts = request.drafts = self._speculation.drafter.open(request.given, tokens[: request.num_prompt])
            request.num_told = request.num_prompt
        if request.num_told < len(tokens):
            drafts.grew(tokens[request.num_told :])
            request.num_told = len(tokens)
        if request.offered:
            drafts.offered(request.offered)
            request.offered = ()
        return drafts

    def _draw_drafted(self, draft: Draft, request: Request, guess: Sequence[int]) -> bool:
        """A row that verifies guesses. False when there are no pages for them: nobody is preempted for guesses."""
        start, num_tokens = request.planned, 1 + len(guess)
        if not self.cache.grow(self._lease(request), start + num_tokens):
            return False
        if request.appended:
            self._announce(draft, request)
        draft.is_guided |= request.guide is not None
        draft.num_drafts += len(guess)
        draft.num_more += len(guess)
        request.planned = start + 1
        token_ids = (request.tokens[start], *guess)
        new_pages, wanted = self._new_pages(request), self._num_wanted
        row = Row(request.slot, start, num_tokens, token_ids, new_pages, num_drafts=len(guess), num_wanted=wanted)
        draft.rows.append(row)
        draft.seats.append(self._seat(request))
        return True

    # ---- rows --------------------------------------------------------------------------------------------------

    def _have_pages(self, request: Request, num_tokens: int, *, preempts: bool) -> bool:
        """Make room for so many more tokens of a running request, preempting the youngest ones if need be and allowed."""
        lease = self._lease(request)
        while not self.cache.grow(lease, request.planned + num_tokens):
            if not preempts:
                return False
            victim = self._running[-1]
            if victim is request and request.planned > request.computed:
                return False  # let the running step land first: preempted now, its token would be lost, and so every time
            self._preempt(victim)
            if victim is request:
                return False
        return True

    @staticmethod
    def _seat(request: Request) -> Seat:
        assert request.seat is not None
        return request.seat

    @staticmethod
    def _lease(request: Request) -> Lease:
        assert request.lease is not None
        return request.lease

    def _draw_prompt_chunks(self, draft: Draft, budget: int) -> int:
        for request in list(self._in_prompt):
            if budget <= 0:
                break
            budget -= self._draw_chunk(draft, request, budget)
        return budget

    def _draw_chunk(self, draft: Draft, request: Request, budget: int) -> int:
        """A row for the next part of a prompt. Returns what it takes of the budget: its tokens, and those that encoding its media
        costs."""
        num_tokens, long = min(budget, len(request.tokens) - request.planned), self.limits.long_chunk
        if request.planned < request.first_scored:  # logits of a row's every token cost more than all else of it
            num_tokens = min(num_tokens, request.first_scored - request.planned)
        if long is not None and num_tokens > long and request.planned % long == 0:
            num_tokens -= num_tokens % long
        cost = 0
        if request.given.media:
            num_tokens, cost = self._encoding.fit(draft, request, num_tokens, budget)
            if not num_tokens:
                return cost
        draft.prompt_rows += 1
        draft.prompt_tokens += num_tokens
        self._draw(draft, request, num_tokens, tuple(request.tokens[request.planned : request.planned + num_tokens]))
        return num_tokens + cost

    # ---- rows, and who gets them -------------------------------------------------------------------------------

    def _draw(self, draft: Draft, request: Request, num_tokens: int, token_ids: tuple[int, ...] | None) -> None:
        start = request.planned
        if request.appended:
            self._announce(draft, request)
        draft.num_more += num_tokens - 1
        request.planned += num_tokens
        if request.planned >= request.num_prompt:
            self._in_prompt.pop(request, None)
        samples = request.planned >= len(request.tokens)
        draft.is_guided |= samples and request.guide is not None
        is_scored = request.given.sampling.prompt_logprobs is not None
        wants_all_logits = is_scored and request.first_scored <= start < request.num_prompt
        draft.has_chunks = True
        # An answer that begins says soon how good guesses are, and its drafter has read the prompt for it.
        new_pages, wanted = self._new_pages(request), self._num_wanted if samples and self._may_guess else 0
        row = Row(request.slot, start, num_tokens, token_ids, new_pages, samples, wants_all_logits, num_wanted=wanted)
        draft.rows.append(row)
        draft.seats.append(self._seat(request))

    @staticmethod
    def _announce(draft: Draft, request: Request) -> None:
        draft.appends.append(Append(request.slot, tuple(request.appended), request.num_generated))
        request.appended.clear()

    def _new_pages(self, request: Request) -> tuple[int, ...]:
        """Pages that the runner has not been told of; it is from here on."""
        lease, sent = self._lease(request), request.room // self.cache.page_size
        request.room = lease.room
        return tuple(lease.pages[sent:])

    def _admit(self, draft: Draft, budget: int) -> None:
        """Start waiting requests while there are slots, pages and tokens left in this step."""
        if budget <= 0 or not self._free_slots or not self._waiting:
            return  # a policy may have a long queue to put in order
        self._computing = [seat for seat in self._computing if seat.request is not None and seat.request.is_in_prompt]
        most = self.limits.max_drafted_tokens
        for request in list(self._policy(self._waiting, self.cache)):
            if budget <= 0 or not self._free_slots:
                return
            if draft.num_drafts and most is not None and draft.num_drafts + len(draft.rows) >= most:
                return
            if self._is_being_computed(request):
                continue  # another request is computing a prefix of this one; soon it can be taken from the tree
            if not self._open(request, draft):
                return  # pages are short: nobody overtakes, or a long prompt would starve
            budget -= self._draw_chunk(draft, request, budget)

    def _open(self, request: Request, draft: Draft) -> bool:
        """Give a waiting request its slot and the pages of all its known tokens."""
        num_tokens = len(request.tokens)
        limit = num_tokens - 1 if request.given.sampling.prompt_logprobs is None else request.first_scored
        salt, tokens = request.given.salt, request.packed
        limit = self.without_part_of_span(request.given, tokens, limit)
        # One page in hand for every running request keeps a new prompt from preempting them at once.
        reserve = len(self._running)
        if self.cache.pages_needed(salt, tokens, limit, num_tokens) + reserve > self.cache.num_available_pages:
            if self._running:
                self._short_of_pages = self.cache.num_available_pages
                return False
            # Alone and still too big: a found prefix holds a page more for every place where it was split inside a page.
            # Computed afresh the request always fits, unless pins hold too much: none is worth more than that anything runs.
            limit = 0
            while self.cache.pages_needed(salt, tokens, limit, num_tokens) > self.cache.num_available_pages:
                has_given_up = self.cache.give_up_pin()
                assert has_given_up, "a request fits into all pages"
        self._short_of_pages = None
        lease = self.cache.open(salt, tokens, limit)
        has_pages = lease is not None and self.cache.grow(lease, num_tokens)
        assert lease is not None and has_pages, "pages_needed() is exact"
        self._waiting.remove(request)
        self._running.append(request)
        request.move(State.RUNNING)
        request.lease = lease
        request.seat = Seat(request)
        self._computing.append(request.seat)
        if request.queued_s is None:
            request.queued_s = max(0.0, self._now() - request.submitted_s)
        request.slot = self._free_slots.pop()
        request.room = 0
        request.computed = request.planned = lease.num_cached
        if request.planned < request.num_prompt:
            self._in_prompt[request] = None
        request.appended.clear()  # the admission has them
        del request.prompt_logprobs[request.first_scored + 1 :]
        if not request.has_begun:
            request.num_cached = min(lease.num_cached, request.num_prompt)
            self.cache.note_prompt(request.num_prompt, request.num_cached)
        if lease.copy is not None:
            draft.copies.append(PageCopy(*lease.copy))
        sampling = request.sampling
        tokens_now, media = tuple(request.tokens), request.given.media
        draft.admissions.append(Admission(request.slot, sampling, tokens_now, request.num_prompt, request.seed, media))
        return True

    def _is_being_computed(self, request: Request) -> bool:
        """A running prompt shares at least a page more with this one than the tree has, and has yet to compute it.

        After SGLang's in-batch prefix check: requests that arrive together compute a common prefix once.
        """
        longest = len(request.tokens) - 1
        if request.given.sampling.prompt_logprobs is not None:
            longest = request.first_scored
        if not self.cache.reuse or not longest:
            return False
        if request.waits_for is not None:  # a queue of followers is looked through in every plan: keep it cheap
            seat, shared = request.waits_for
            if seat.request is not None and seat.request.computed < shared:
                return True
            request.waits_for = None
        matched = -1
        for seat in self._computing:
            other = seat.request
            if other is None or not other.is_in_prompt or other.given.salt != request.given.salt:
                continue
            shared = min(common_len(request.packed, other.packed, 0, len(other.tokens)), longest)
            if shared <= other.computed:
                continue
            if matched < 0:
                matched = self.cache.match_len(request.given.salt, request.packed, longest)
            if shared >= matched + self.cache.page_size or shared == longest > matched:
                request.waits_for = (seat, shared)
                return True
        return False

    # ---- results -----------------------------------------------------------------------------------------------

    def step_took(self, flight: Flight, seconds: float, *, is_alone: bool) -> None:
        """A step has landed, so long after the one before. `is_alone`: the device had waited for it. A plain step behind which
        guesses were made says nothing about plain ones."""
        speculation, is_drafted = self._speculation, flight.num_drafts > 0
        if speculation is not None and flight.is_decode and (is_drafted or not flight.wants_guesses):
            speculation.step_took(flight.num_tokens, seconds, is_drafted=is_drafted, is_alone=is_alone)

    def commit(self, flight: Flight, result: StepResult) -> None:
        """Take in a finished step: tokens to mailboxes, finished requests out, prompt pages into the tree."""
        num_accepted = self.num_accepted
        if result.failed:
            self._end_failed(result.failed)
        for row, seat, output in zip(flight.plan.rows, flight.seats, result.rows, strict=True):
            request = seat.request
            if request is None:
                continue  # it has left
            if row.num_drafts:
                self._commit_drafted(request, row, output)
                continue
            num_known = request.computed = request.computed + row.num_tokens
            if row.wants_all_logits:
                missing = request.num_prompt - len(request.prompt_logprobs)
                request.prompt_logprobs.extend(output.prompt_logprobs[:missing])
            if not row.samples:
                self._commit_chunk(request)
                continue
            tokens = request.tokens
            if num_known < len(tokens):
                continue  # its place was taken by a token that was appended meanwhile
            assert output.token_ids, "a sampling row yields a token"
            token_id = output.token_ids[0]
            request.offered = output.drafts
            is_plain = request.guide is None and request.has_begun and not request.num_drafted
            if is_plain and token_id not in request.stop_ids and num_known + 1 < request.max_len:
                tokens.append(token_id)  # as nearly always: what `_commit_token` would do
                request.mailbox.put_nowait(Delta(output.token_ids, output.logprobs, None, request.num_cached))
            else:
                self._commit_token(request, token_id, output.logprobs)
        if flight.num_drafts:
            self._is_drafted = False
            if self._speculation is not None:
                self._speculation.turned_out(self.num_accepted - num_accepted)

    def _commit_chunk(self, request: Request) -> None:
        """A part of a prompt is computed."""
        self.cache.commit(self._lease(request), request.packed[: request.computed])
        if request.given.wants_progress and not request.has_begun:
            num_computed = min(request.computed, request.num_prompt)  # forced tokens may be behind it
            request.mailbox.put_nowait(Delta(num_cached_tokens=request.num_cached, num_computed=num_computed))

    def _commit_token(self, request: Request, token_id: int, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """The next token of an answer."""
        if not request.has_begun:  # the prompt is complete: others may take it from the tree at once
            self.cache.commit(self._lease(request), request.packed)
        num_known = len(request.tokens)
        request.tokens.append(token_id)
        end = end_of(request) if request.guide is None else follow(request, request.guide, token_id)
        self._deliver(request, num_known, end, logprobs)
        if end.finish_reason is not None:
            self._finish(request)

    def _commit_drafted(self, request: Request, row: Row, output: RowResult) -> None:
        """Guesses that were right, and one more token, up to where the answer ends. What was computed of wrong ones nobody reads:
        the next row writes over it."""
        sampled = output.token_ids
        assert sampled, "a sampling row yields a token"
        request.offered = output.drafts
        end, num_taken, num_known = GOES_ON, 0, len(request.tokens)
        for token_id in sampled:
            request.tokens.append(token_id)
            num_taken += 1
            if request.guide is None:
                end = end_of(request)
            else:
                end = follow(request, request.guide, token_id, is_last=num_taken == len(sampled))
            if end.finish_reason is not None:
                break
        request.computed += num_taken  # the known token, and all but the last of these
        request.planned = request.computed
        num_guessed = min(num_taken, len(sampled) - 1)
        request.num_drafted += row.num_drafts
        request.num_accepted += num_guessed
        self.num_drafted += row.num_drafts
        self.num_accepted += num_guessed
        if request.drafts is not None:
            request.drafts.observe(row.num_drafts, len(sampled) - 1)
        self._deliver(request, num_known, end, output.logprobs[:num_taken], num_guessed)
        if end.finish_reason is not None:
            self._finish(request)

    def _deliver(
        self, request: Request, num_known: int, end: End, logprobs: tuple[TokenLogprobs, ...] = (), num_guessed: int = 0
    ) -> None:
        """What the request has gained, beyond `num_known` tokens, goes to its mailbox."""
        self.num_jumped += request.num_jumped - request.num_jumped_sent
        request.mailbox.put_nowait(delivery(request, num_known, end, logprobs, num_guessed))

    def _end_failed(self, failed: Mapping[bytes, str]) -> None:
        """End the requests whose media could not be encoded; nothing of what was computed for them is kept."""
        self._encoding.drop(failed)
        for request in list(self._running):  # whoever has the same picture may be in a step that was planned since
            for media in request.given.media:
                if media.key in failed and any(s.start < request.planned and s.end > request.computed for s in media.spans):
                    self.end_with_error(request, f"the prompt's {media.kind} could not be encoded: {failed[media.key]}")
                    break

    def fail(self, flight: Flight, message: str) -> None:
        """A step raised: the requests in it end with an error; all others go on."""
        if flight.num_drafts:
            self._is_drafted = False
        for seat in flight.seats:
            if seat.request is not None:
                self.end_with_error(seat.request, message)
        self._end_failed({encode.key: message for encode in flight.plan.encodes})

    def end_with_error(self, request: Request, message: str, *, is_grammar_error: bool = False) -> None:
        """End a live request that cannot go on."""
        self._end(request, FinishReason.ERROR, message, is_grammar_error=is_grammar_error)

    def abort(self, request_id: str) -> bool:
        """End a live request now; its pages are free for the next plan."""
        request = self._live.get(request_id)
        if request is None:
            return False
        self._end(request, FinishReason.ABORT)
        return True

    def _end(self, request: Request, reason: FinishReason, error: str | None = None, *, is_grammar_error: bool = False) -> None:
        request.mailbox.put_nowait(last_words(request, reason, error, is_grammar_error=is_grammar_error))
        self._finish(request)

    def _finish(self, request: Request) -> None:
        if request.state is State.RUNNING:
            self._leave(request)
        else:
            self._waiting.remove(request)
        if request.drafts is not None:
            self._drafts_of(request).close()  # told of the last tokens, too: others may look them up
        request.move(State.FINISHED)
        del self._live[request.id]
        self._num_with_media -= bool(request.given.media)
        self.held.release(request.given.media)
        self.num_finished += 1

    def _preempt(self, request: Request) -> None:
        """Back to the front of the queue. Its tokens stay in the tree as long as nobody needs the pages."""
        self._leave(request)
        request.move(State.QUEUED)
        self._waiting.appendleft(request)
        self.num_preemptions += 1

    def _leave(self, request: Request) -> None:
        self.cache.close(self._lease(request), request.tokens[: request.computed])
        self._seat(request).request = None
        request.lease = request.seat = None
        self._running.remove(request)
        self._in_prompt.pop(request, None)
        self._free_slots.append(request.slot)
        request.slot = -1
