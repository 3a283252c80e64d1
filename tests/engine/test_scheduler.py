"""The scheduler without an engine: its books agree with its requests after every plan and every step, and few plans look anything
up."""

from random import Random

import pytest

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.drafters.ngram import NgramDrafter
from streamserve.engine.flight import Flight
from streamserve.engine.pause import BurstLimits
from streamserve.engine.plan import Row, RowResult, StepResult
from streamserve.engine.policy import POLICIES
from streamserve.engine.request import Request, State
from streamserve.engine.scheduler import Limits, Scheduler
from streamserve.engine.speculation import Speculation
from streamserve.engine.step_costs import StepCosts
from streamserve.messages import GenerateRequest, Media, SamplingParams, Span, media_token_ids

BURSTS = BurstLimits(max_pause_s=0.05, tokens=24, step_tokens=32, ride_tokens=8, media_tokens=8)


class Steps:
    """Plans and steps, one of these under way while the next one is planned; a token depends on its place."""

    def __init__(
        self, *, num_pages: int, page_size: int = 4, max_running: int = 4, bursts: BurstLimits, guesses: bool = False
    ) -> None:
        self.now_s = 0.0
        self.cache = KVCache(num_pages, page_size, now=lambda: self.now_s)
        limits = Limits(max_running, 32, frozenset({2}), bursts, encodes_beside=True)
        speculation = Speculation(NgramDrafter(4), StepCosts.free()) if guesses else None
        self.scheduler = Scheduler(self.cache, limits, POLICIES["fcfs"], speculation=speculation, now=lambda: self.now_s)
        self.context_len = (num_pages - 1) * page_size
        self.flying: Flight | None = None

    def add(self, name: str, token_ids: tuple[int, ...], num_new: int, media: tuple[Media, ...] = ()) -> Request:
        given = GenerateRequest(name, token_ids, SamplingParams(max_new_tokens=num_new), media=media)
        request = Request(given, seed=0, context_len=self.context_len, submitted_s=self.now_s)
        self.scheduler.add(request)
        return request

    def step(self) -> Flight | None:
        """Plan a step, then take in the one before it."""
        flight, landed = self.scheduler.next_plan(), self.flying
        self.flying = flight
        self.check(flight)
        if landed is not None:
            self.scheduler.commit(landed, StepResult([self._result(row) for row in landed.plan.rows]))
            self.check()
        return flight

    @staticmethod
    def _result(row: Row) -> RowResult:
        tokens: list[int] = []
        for place in range(row.num_drafts + 1 if row.samples else 0):
            tokens.append(3 + (row.start + row.num_tokens - row.num_drafts + place) % 5)
            if place < row.num_drafts and row.token_ids is not None and row.token_ids[1 + place] != tokens[-1]:
                break
        return RowResult(tuple(tokens))

    def check(self, flight: Flight | None = None) -> None:
        scheduler = self.scheduler
        running = scheduler.first_live(scheduler.num_running)
        assert all(request.state is State.RUNNING for request in running)
        assert list(scheduler._in_prompt) == [request for request in running if request.planned < request.num_prompt]
        assert scheduler._num_with_media == sum(bool(request.given.media) for request in scheduler.live())
        assert {id(seat.request) for seat in scheduler._computing if seat.request} >= {id(r) for r in running if r.is_in_prompt}
        for request in running:
            assert request.seat is not None and request.seat.request is request
            assert request.lease is not None and (request.planned <= request.room <= request.lease.room or not request.room)
        if flight is not None:
            assert flight.num_tokens == sum(row.num_tokens for row in flight.plan.rows)
            assert [seat.request.slot for seat in flight.seats if seat.request] == [row.slot for row in flight.plan.rows]


def _media(name: str, start: int) -> Media:
    return Media(name.encode(), (Span(start, start + 5),), {}, cost=6)


@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize("bursts", [BurstLimits(), BURSTS])
def test_what_is_counted_agrees_with_the_requests_after_every_plan_and_step(bursts: BurstLimits, guesses: bool) -> None:
    num_preemptions = num_finished = 0
    for seed in range(12):
        rng = Random(seed)
        steps = Steps(num_pages=rng.choice([20, 30, 100]), bursts=bursts, guesses=guesses)
        stem = tuple(rng.randrange(3, 9) for _ in range(60))
        for number in range(200):
            steps.now_s += rng.choice([0.001, 0.02])
            if rng.random() < 0.3 and number < 150:
                words = stem[: rng.randrange(1, 40)] + tuple(rng.randrange(3, 9) for _ in range(rng.randrange(4)))
                media = (_media(str(rng.randrange(3)), len(words)),) if rng.random() < 0.3 else ()
                prompt = words + tuple(token for one in media for token in media_token_ids(one.key, 5))
                steps.add(f"r{number}", (*prompt, 5), min(rng.randrange(1, 40), steps.context_len - len(prompt) - 1), media)
            if rng.random() < 0.1:
                steps.scheduler.abort(f"r{rng.randrange(number + 1)}")
            steps.step()
        steps.cache.check()
        num_preemptions += steps.scheduler.num_preemptions
        num_finished += steps.scheduler.num_finished
    assert num_preemptions > 20 and num_finished > 300


def test_prompts_that_found_no_pages_are_looked_up_again_when_there_are_more(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(num_pages=30, bursts=BURSTS)
    first = steps.add("first", tuple(range(3, 83)), 36)
    for _ in range(3):
        steps.step()
    waiting = [steps.add(f"w{i}", tuple(range(100 * i, 100 * i + 50)), 10) for i in range(1, 6)]
    steps.step()
    found: list[int] = []
    match_len = steps.cache.match_len

    def counted(salt: str, token_ids: tuple[int, ...], limit: int) -> int:
        found.append(limit)
        return match_len(salt, token_ids, limit)

    monkeypatch.setattr(steps.cache, "match_len", counted)
    for _ in range(20):
        flight = steps.step()
        assert flight is not None and [row.slot for row in flight.plan.rows] == [first.slot]
    assert not found
    steps.scheduler.abort("first")
    steps.step()
    assert found and waiting[0].state is State.RUNNING


def test_a_result_for_a_stay_that_has_ended_is_nobodys_even_if_its_request_runs_again() -> None:
    steps = Steps(num_pages=30, bursts=BurstLimits())
    request = steps.add("a", tuple(range(3, 20)), 20)
    for _ in range(4):
        steps.step()
    known, late = list(request.tokens), steps.flying
    assert late is not None
    steps.scheduler._preempt(request)
    again = steps.scheduler.next_plan()
    assert again is not None and request.state is State.RUNNING
    steps.scheduler.commit(late, StepResult([RowResult((99,)) for _ in late.plan.rows]))
    assert request.tokens == known and request.computed <= len(known)


def test_packed_tokens_grow_with_the_tokens() -> None:
    steps = Steps(num_pages=30, bursts=BurstLimits())
    request = steps.add("a", tuple(range(3, 20)), 20)
    assert list(request.packed) == request.tokens and request.packed is request.packed
    for _ in range(4):
        steps.step()
    assert len(request.tokens) > 17 and list(request.packed) == request.tokens
