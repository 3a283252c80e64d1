"""Bursts of prompts on a fast device: decode rows wait for them, but never longer than the limit."""

from dataclasses import replace

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.drafters.ngram import NgramDrafter
from streamserve.engine.fake import FakeRunner, VirtualClock
from streamserve.engine.pause import BurstLimits
from streamserve.engine.plan import Plan
from streamserve.engine.policy import first_come_first_served
from streamserve.engine.request import Request
from streamserve.engine.scheduler import FEW_RIDERS, Limits, Scheduler
from streamserve.engine.speculation import Speculation
from streamserve.engine.step_costs import StepCosts
from streamserve.messages import GenerateRequest, Media, SamplingParams, Span, media_token_ids

CHUNK, BURST, PAUSE_S, RUN_S, STEP_S = 64, 32, 1.0, 0.5, 0.25


class Steps:
    """A scheduler on the fake runner, one step at a time, each of a quarter of a second."""

    def __init__(self, *, num_pages: int = 512, pause_s: float = PAUSE_S, max_running: int = 16, **bursts: float) -> None:
        self.clock = VirtualClock()
        given = BurstLimits(pause_s, run_s=RUN_S, tokens=BURST)
        limits = Limits(max_running, CHUNK, frozenset(), replace(given, **bursts))  # type: ignore[arg-type]
        self.scheduler = Scheduler(KVCache(num_pages, 4), limits, first_come_first_served, now=self.clock.now)
        self.runner = FakeRunner(vocab_size=1000, page_size=4, clock=self.clock, step_s=STEP_S)
        self.count = 0

    def add(self, num_prompt: int, num_new: int = 100, num_places: int = 0) -> None:
        """`num_places`: of a picture, with which the prompt begins."""
        self.count += 1
        prompt = tuple((self.count * 31 + i * 7) % 1000 for i in range(num_prompt))
        given = GenerateRequest(str(self.count), prompt, SamplingParams(max_new_tokens=num_new, ignore_eos=True))
        if num_places:
            key = bytes([self.count]) * 32
            places = media_token_ids(key, num_places)
            media = Media(key, (Span(0, num_places),), {}, cost=1)
            given = replace(given, token_ids=(*places, *prompt[num_places:]), media=(media,))
        self.scheduler.add(Request(given, seed=0, context_len=1000, submitted_s=self.clock.now()))

    def step(self) -> tuple[int, int]:
        """Decode rows and prompt tokens of the next step."""
        flight = self.scheduler.next_plan()
        assert flight is not None
        step = self.runner.forward(flight.plan)
        step.sample()
        self.clock.advance(STEP_S)
        assert step._result is not None
        self.scheduler.commit(flight, step._result)
        return counts(flight.plan)


def counts(plan: Plan) -> tuple[int, int]:
    admitted = {admission.slot for admission in plan.admissions}
    decode = sum(row.num_tokens == 1 and row.slot not in admitted for row in plan.rows)
    return decode, plan.num_tokens - decode


def test_a_burst_is_computed_alone_and_everybody_goes_on_together() -> None:
    steps = Steps()
    for _ in range(4):
        steps.add(CHUNK)
    assert [steps.step() for _ in range(5)] == [(0, CHUNK)] * 4 + [(4, 0)]


def test_a_pause_ends_at_its_limit_and_decode_rows_have_a_run() -> None:
    steps = Steps()
    steps.add(CHUNK)
    assert steps.step() == (0, CHUNK)
    for _ in range(8):
        steps.add(CHUNK)
    seen = [steps.step() for _ in range(12)]
    # Four steps of a quarter of a second fill the limit, two the run.
    assert seen == [(0, CHUNK)] * 4 + [(5, 0)] * 2 + [(0, CHUNK)] * 4 + [(9, 0)] * 2


def test_what_is_left_of_a_burst_rides_along() -> None:
    steps = Steps(pause_s=100.0, tokens=3 * CHUNK, ride_tokens=8)
    for _ in range(5):
        steps.add(CHUNK)
    assert [steps.step() for _ in range(3)] == [(0, CHUNK)] * 3
    # Three tokens for each answer. A prompt's last one, alone in its row, looks like an answer here.
    seen = [steps.step() for _ in range(14)]
    assert seen == [(3, 9)] * 7 + [(4, 8)] + [(4, 12)] * 4 + [(4, 8)] + [(5, 0)]


def test_prompts_that_have_nobody_to_ride_with_go_in_steps_of_their_own() -> None:
    steps = Steps(tokens=1000, step_tokens=32, ride_tokens=8)
    for _ in range(3):
        steps.add(32)
    assert steps.step() == (0, 32), "the first need not wait for the last"
    assert [steps.step() for _ in range(4)] == [(1, 8)] * 4
    other = Steps(tokens=1000, step_tokens=32)
    other.add(100)
    assert other.step() == (0, CHUNK), "one that fills a step gets a whole one"


def test_what_rides_along_is_limited() -> None:
    steps = Steps(ride_tokens=8, tokens=100)
    steps.add(10)
    steps.step()
    steps.add(30)
    assert [steps.step() for _ in range(5)] == [(1, 8), (1, 8), (1, 8), (1, 6), (2, 0)]


def test_pictures_make_no_burst_and_ride_in_smaller_pieces() -> None:
    steps = Steps(ride_tokens=16, media_tokens=8, tokens=20)
    steps.add(10)
    steps.step()
    steps.add(30, num_places=20)
    assert [steps.step() for _ in range(5)] == [(1, 7), (1, 8), (1, 8), (1, 7), (2, 0)]  # the first one's encoding counts as well
    steps.add(30)
    assert steps.step() == (0, 30)


def test_nothing_is_guessed_while_pictures_ride() -> None:
    steps = Steps(media_tokens=8)
    steps.scheduler._speculation = Speculation(NgramDrafter(4), StepCosts(0.0))
    steps.add(10)
    steps.step()
    assert steps.scheduler._room_for_guesses() > 0
    steps.add(30, num_places=20)
    assert steps.scheduler._room_for_guesses() == 0
    while steps.step()[1]:
        pass
    assert steps.scheduler._room_for_guesses() > 0


def test_many_answers_do_without_guesses_while_prompts_ride_along() -> None:
    for num_answers in (FEW_RIDERS - 1, FEW_RIDERS):
        steps = Steps(max_running=32, ride_tokens=8, tokens=1000)
        steps.scheduler._speculation = Speculation(NgramDrafter(4), StepCosts(0.0))
        for _ in range(num_answers):
            steps.add(3)
        while steps.step()[1]:
            pass
        assert steps.scheduler._room_for_guesses() > 0
        steps.add(60)
        steps.step()
        assert (steps.scheduler._room_for_guesses() > 0) is (num_answers < FEW_RIDERS), "the prompt's row is one of them"


def test_small_prompts_gather_before_many_answers_wait_for_them() -> None:
    steps = Steps(gather_rows=2, gather_s=0.3)
    steps.add(10)
    assert steps.step() == (0, 10)
    steps.add(5)
    assert steps.step() == (1, 5)  # one answer is not many
    steps.add(5)
    assert steps.step() == (2, 0)
    steps.add(7)
    assert steps.step() == (2, 0)
    assert steps.step() == (2, 12)
    steps.add(5)
    steps.add(BURST)  # no need to gather
    assert steps.step() == (0, BURST + 5)


def test_small_prompts_ride_along_after_a_cut() -> None:
    steps = Steps()
    steps.add(CHUNK)
    steps.step()
    for _ in range(4):
        steps.add(CHUNK)
    for _ in range(4):
        steps.step()
    steps.add(CHUNK)
    assert steps.step() == (5, 0)  # cut: the last one is a burst of its own
    steps.scheduler.abort("6")
    steps.add(BURST - 1)
    assert steps.step() == (5, BURST - 1)


def test_small_prompts_ride_along() -> None:
    steps = Steps()
    steps.add(10)
    steps.step()
    steps.add(BURST - 1)
    assert steps.step() == (1, BURST - 1)


def test_without_a_limit_prompts_never_stop_decode_rows() -> None:
    steps = Steps(pause_s=0.0)
    steps.add(CHUNK)
    steps.step()
    steps.add(CHUNK)
    assert steps.step() == (1, CHUNK - 1)


def test_cached_prompts_are_no_burst() -> None:
    steps = Steps()
    steps.add(60, num_new=1)
    steps.step()
    steps.add(10)
    steps.step()
    for _ in range(2):  # a repeat of the first prompt: one token each is left to compute
        steps.count = 0
        steps.add(60, num_new=50)
        decode, prompt = steps.step()
        assert decode >= 1 and prompt == 1
        steps.scheduler.abort("1")


def test_a_burst_that_has_no_pages_does_not_hold_decode_rows_up() -> None:
    steps = Steps(num_pages=24)
    steps.add(40)
    steps.step()
    steps.add(90, num_new=1)  # does not fit beside the first
    assert steps.step() == (1, 0)
