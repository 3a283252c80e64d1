"""The engine with guesses, on the fake device: the same answers as without, whoever guesses what, in any company.

The memory runner checks that every position a row reads holds exactly its request's tokens: what was computed of a wrong guess
must be gone.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.client import collect
from streamserve.engine.core import Engine, EngineOptions
from streamserve.engine.drafters.drafter import Drafts, Guess
from streamserve.engine.drafters.runner_drafts import OfferedDrafter
from streamserve.engine.fake import FakeRunner, FakeStep, VirtualClock
from streamserve.engine.pause import BurstLimits
from streamserve.engine.plan import Plan, Step
from streamserve.engine.policy import POLICIES
from streamserve.engine.request import Request
from streamserve.engine.scheduler import Limits, Scheduler
from streamserve.engine.speculation import Offer, Speculation, _fitting
from streamserve.engine.step_costs import StepCosts
from streamserve.messages import Delta, FinishReason, GenerateRequest, SamplingParams
from streamserve.metrics import Metrics
from tests.engine import test_jump as guided
from tests.engine.memory import expected_tokens
from tests.engine.test_engine import EOS, Bench, prompt_of, running

pytestmark = pytest.mark.anyio
EXAMPLES = int(os.environ.get("STREAMSERVE_EXAMPLES", "60"))


class Oracle:
    """A drafter that is told the answers, and is wrong now and then: each guess is right with probability `accuracy`."""

    num_wanted = 0

    def __init__(self, accuracy: float = 1.0, max_drafts: int = 4, seed: int = 0, vocab_size: int = 1000) -> None:
        self.max_drafts = max_drafts
        self.accuracy = accuracy
        self.rng = Random(seed)
        self.vocab_size = vocab_size
        self.answers: dict[str, Sequence[int]] = {}
        self.opened: list[_Drafts] = []

    def open(self, request: GenerateRequest, token_ids: Sequence[int]) -> Drafts:
        assert list(token_ids) == list(request.token_ids)
        self.opened.append(_Drafts(self, self.answers[request.id]))
        return self.opened[-1]


class _Drafts:
    def __init__(self, oracle: Oracle, answer: Sequence[int]) -> None:
        self.oracle, self.answer = oracle, answer
        self.at = 0
        self.seen: list[tuple[int, int]] = []
        self.num_closed = 0

    def grew(self, token_ids: Sequence[int]) -> None:
        assert token_ids and list(token_ids) == list(self.answer[self.at : self.at + len(token_ids)])
        self.at += len(token_ids)

    def offered(self, token_ids: Sequence[int]) -> None:
        raise AssertionError("no runner's drafter was asked")

    def guess(self, most: int) -> Guess:
        assert most > 0 and not self.num_closed
        rng, coming = self.oracle.rng, self.answer[self.at : self.at + min(most, self.oracle.max_drafts)]
        right = [token if rng.random() < self.oracle.accuracy else rng.randrange(self.oracle.vocab_size) for token in coming]
        return Guess(tuple(right), self.oracle.accuracy)

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        assert 0 <= num_accepted <= num_drafted > 0
        self.seen.append((num_drafted, num_accepted))

    def close(self) -> None:
        self.num_closed += 1


class Always(Speculation):
    """Verifies whatever is guessed."""

    def __init__(self, drafter: Oracle, *, patience: float = 1.0) -> None:
        super().__init__(drafter, StepCosts(0.0))
        self._patience = patience
        self._rng = drafter.rng

    def may_pay(self, num_rows: int, room: int) -> bool:
        return True

    def choose(self, offers: Sequence[Offer], num_rows: int, room: int) -> list[Sequence[int]]:
        assert 0 < len(offers) <= num_rows
        return _fitting([one.drafts.guess(one.most).token_ids if one.most > 0 else () for one in offers], room)

    def is_worth_waiting(self, offers: Sequence[Offer], num_rows: int, room: int) -> bool:
        return self._rng.random() < self._patience


def speculating(bench: Bench, oracle: Oracle, *, patience: float | None = 1.0) -> Bench:
    """`patience` None: with the real policy, on what steps happen to take here."""
    real = Speculation(oracle, StepCosts(0.0))
    bench.scheduler._speculation = real if patience is None else Always(oracle, patience=patience)
    return bench


def drafted_rows(plans: Sequence[Plan] | None) -> list[int]:
    return [row.num_drafts for plan in plans or () for row in plan.rows if row.num_drafts]


async def test_right_guesses_make_an_answer_in_fewer_steps() -> None:
    oracle = Oracle(max_drafts=4)
    async with running(speculating(Bench(), oracle)) as bench:
        prompt = prompt_of(20)
        oracle.answers["a"] = wanted = expected_tokens(bench.runner, prompt, 21)
        answer = await bench.ask("a", prompt, 21)
    assert list(answer.token_ids) == wanted
    assert bench.runner.plans is not None and len(bench.runner.plans) == 1 + 4  # 1, then four times 4 guesses and one more
    assert (answer.num_drafted, answer.num_accepted) == (16, 16)
    assert answer.accepted == (False, *([True] * 4 + [False]) * 4)
    assert oracle.opened[0].seen == [(4, 4)] * 4 and oracle.opened[0].num_closed == 1


async def test_a_drafter_is_told_of_an_answer_to_its_end() -> None:
    oracle = Oracle(max_drafts=4)
    async with running(speculating(Bench(), oracle)) as bench:
        prompt = prompt_of(20)
        oracle.answers["a"] = expected_tokens(bench.runner, prompt, 21)
        await bench.ask("a", prompt, 21)
    assert (oracle.opened[0].at, oracle.opened[0].num_closed) == (21, 1)


async def test_wrong_guesses_change_nothing() -> None:
    oracle = Oracle(accuracy=0.0)
    async with running(speculating(Bench(), oracle)) as bench:
        prompt = prompt_of(20)
        oracle.answers["a"] = wanted = expected_tokens(bench.runner, prompt, 21)
        answer = await bench.ask("a", prompt, 21)
        again = prompt + wanted + prompt_of(3, seed=1)
        oracle.answers["b"] = expected_tokens(bench.runner, again, 2)
        next_turn = await bench.ask("b", again, 2)
    assert list(answer.token_ids) == wanted
    assert answer.num_drafted > 0 and answer.num_accepted == 0 and answer.accepted == ()
    assert next_turn.num_cached_tokens == len(prompt) + len(wanted) - 1, "the tree holds the accepted tokens"


async def test_the_observer_is_told_as_many_guesses_as_answers_are() -> None:
    oracle = Oracle(accuracy=0.6)
    bench = speculating(Bench(), oracle)
    bench.engine._observer = metrics = Metrics()
    async with running(bench):
        prompts = [prompt_of(8 + i, seed=i) for i in range(3)]
        oracle.answers = {f"r{i}": expected_tokens(bench.runner, prompt, 30) for i, prompt in enumerate(prompts)}
        answers = await asyncio.gather(*(bench.ask(f"r{i}", prompt, 30) for i, prompt in enumerate(prompts)))
    num_drafted, num_accepted = sum(one.num_drafted for one in answers), sum(one.num_accepted for one in answers)
    assert metrics.drafts == (num_drafted, num_accepted) and 0 < num_accepted < num_drafted


async def test_no_guess_is_computed_beyond_the_answers_end() -> None:
    oracle = Oracle(max_drafts=8)
    async with running(speculating(Bench(), oracle)) as bench:
        prompt = prompt_of(20)
        oracle.answers["a"] = expected_tokens(bench.runner, prompt, 50)
        answer = await bench.ask("a", prompt, 6)
        last = await bench.ask("a", prompt, 2)
    assert len(answer.token_ids) == 6 and drafted_rows(bench.runner.plans) == [4]
    assert last.num_drafted == 0, "the second of two tokens comes without a guess"


async def test_a_stop_token_among_the_guesses_ends_the_answer_there() -> None:
    oracle = Oracle(max_drafts=8)
    async with running(speculating(Bench(), oracle)) as bench:
        prompt = prompt_of(20)
        oracle.answers["a"] = wanted = expected_tokens(bench.runner, prompt, 50)
        answer = await bench.ask("a", prompt, 50, stop_token_ids=frozenset({wanted[4]}))
    assert list(answer.token_ids) == wanted[:5]
    assert (answer.finish_reason, answer.matched_stop) == (FinishReason.STOP, wanted[4])
    assert (answer.num_drafted, answer.num_accepted) == (8, 4)
    assert len(answer.accepted) == 5


async def test_nothing_is_planned_over_a_step_with_guesses() -> None:
    oracle = Oracle(accuracy=0.7)
    bench = speculating(Bench(max_running=4), oracle, patience=0.5)
    seen: list[bool] = []
    plan_next = bench.scheduler.next_plan

    def next_plan():  # type: ignore[no-untyped-def]
        was_drafted = bench.scheduler._is_drafted
        flight = plan_next()
        if was_drafted:
            assert flight is None
            seen.append(True)
        return flight

    bench.scheduler.next_plan = next_plan  # type: ignore[method-assign]
    async with running(bench):
        prompts = [prompt_of(10 + i, seed=i) for i in range(4)]
        for i, prompt in enumerate(prompts):
            oracle.answers[f"r{i}"] = expected_tokens(bench.runner, prompt, 30)
        answers = await asyncio.gather(*(bench.ask(f"r{i}", prompt, 30) for i, prompt in enumerate(prompts)))
    assert [list(answer.token_ids) for answer in answers] == [oracle.answers[f"r{i}"] for i in range(4)]
    assert seen


async def test_a_step_with_guesses_that_fails_ends_its_requests_only() -> None:
    oracle = Oracle()
    bench = speculating(Bench(), oracle)
    forward, is_broken = bench.runner.forward, True

    def failing(plan: Plan) -> Step:
        if is_broken and any(row.num_drafts for row in plan.rows):
            raise RuntimeError("the device has fallen off")
        return forward(plan)

    bench.runner.forward = failing  # type: ignore[method-assign,assignment]
    async with running(bench):
        prompt = prompt_of(10)
        oracle.answers["a"] = oracle.answers["b"] = wanted = expected_tokens(bench.runner, prompt, 10)
        failed = await bench.ask("a", prompt, 10)
        is_broken = False
        answer = await bench.ask("b", prompt, 10)
    assert failed.finish_reason is FinishReason.ERROR and "fallen off" in (failed.error or "")
    assert list(answer.token_ids) == wanted


async def test_a_step_holds_so_many_tokens_with_guesses() -> None:
    oracle = Oracle(max_drafts=8)
    bench = speculating(Bench(max_running=4, max_step_tokens=12), oracle)
    async with running(bench):
        prompts = [prompt_of(3, seed=i) for i in range(4)]
        for i, prompt in enumerate(prompts):
            oracle.answers[f"r{i}"] = expected_tokens(bench.runner, prompt, 30)
        answers = await asyncio.gather(*(bench.ask(f"r{i}", prompt, 30) for i, prompt in enumerate(prompts)))
    assert [list(answer.token_ids) for answer in answers] == [oracle.answers[f"r{i}"] for i in range(4)]
    assert all(plan.num_tokens <= 12 for plan in bench.runner.plans or ())
    assert any(sum(row.num_drafts > 0 for row in plan.rows) > 1 for plan in bench.runner.plans or ())


async def test_rows_guesses_and_prompts_together_have_room_on_the_device() -> None:
    """A device has room for the logits of so many tokens, whoever they belong to: prompts that end, too."""
    oracle = Oracle(max_drafts=8)
    bench = speculating(Bench(num_pages=512, max_running=30, max_step_tokens=256), oracle)
    bench.scheduler.limits = replace(bench.scheduler.limits, max_drafted_tokens=40)
    async with running(bench):
        prompts = [prompt_of(3, seed=i) for i in range(30)]
        for i, prompt in enumerate(prompts):
            oracle.answers[f"r{i}"] = expected_tokens(bench.runner, prompt, 30)
        first = [asyncio.create_task(bench.ask(f"r{i}", prompts[i], 30)) for i in range(2)]
        while not drafted_rows(bench.runner.plans):  # noqa: ASYNC110
            await asyncio.sleep(0)
        rest = [asyncio.create_task(bench.ask(f"r{i}", prompts[i], 30)) for i in range(2, 30)]
        answers = await asyncio.gather(*first, *rest)
    assert [list(answer.token_ids) for answer in answers] == list(oracle.answers.values())
    assert max(drafted_rows(bench.runner.plans)) == 8
    assert all(sum(row.samples + row.num_drafts for row in plan.rows) <= 40 for plan in bench.runner.plans or ())


async def test_guesses_are_made_while_many_wait_for_pages() -> None:
    oracle = Oracle(max_drafts=4)
    bench = speculating(Bench(num_pages=32, max_running=64, max_step_tokens=64), oracle)
    bench.scheduler.limits = replace(bench.scheduler.limits, max_drafted_tokens=64)
    async with running(bench):
        prompts = [prompt_of(60, seed=i) for i in range(40)]
        for i, prompt in enumerate(prompts):
            oracle.answers[f"r{i}"] = expected_tokens(bench.runner, prompt, 20)
        answers = await asyncio.gather(*(bench.ask(f"r{i}", prompt, 20) for i, prompt in enumerate(prompts)))
    assert [list(answer.token_ids) for answer in answers] == list(oracle.answers.values())
    assert all(sum(row.samples + row.num_drafts for row in plan.rows) <= 64 for plan in bench.runner.plans or ())
    assert answers[0].num_accepted >= 12, "there are slots for all, but no pages"


async def test_guesses_leave_a_prompt_half_of_every_step() -> None:
    oracle = Oracle(max_drafts=12)
    bench = speculating(Bench(num_pages=512, max_running=4, max_step_tokens=42), oracle)
    async with running(bench):
        prompts = [prompt_of(3, seed=i) for i in range(3)]
        for i, prompt in enumerate(prompts):
            oracle.answers[f"r{i}"] = expected_tokens(bench.runner, prompt, 200)
        oracle.answers["long"] = expected_tokens(bench.runner, long := prompt_of(300, seed=9), 2)
        tasks = [asyncio.create_task(bench.ask(f"r{i}", prompt, 200)) for i, prompt in enumerate(prompts)]
        while not drafted_rows(bench.runner.plans):  # noqa: ASYNC110
            await asyncio.sleep(0)
        await bench.ask("long", long, 2)
        await asyncio.gather(*tasks)
    chunks = [
        row.num_tokens for plan in bench.runner.plans or () for row in plan.rows if row.num_tokens > 3 and not row.num_drafts
    ]
    assert sum(chunks) == 300 and min(chunks[:-1]) >= 21
    assert max(sum(row.num_drafts for row in plan.rows) for plan in bench.runner.plans or ()) == 36, (
        "all, where there is no prompt"
    )


async def test_guesses_are_no_rows_that_a_prompt_waits_for() -> None:
    """Prompts wait for each other where many answers would wait for each of them; one answer with guesses is not many."""
    oracle, clock_s = Oracle(max_drafts=8), [0.0]
    bench = speculating(Bench(num_pages=128), oracle)
    bursts = BurstLimits(gather_rows=5, gather_s=1.0)
    limits = replace(bench.scheduler.limits, bursts=bursts)
    bench.scheduler = Scheduler(
        bench.cache, limits, POLICIES["fcfs"], speculation=bench.scheduler._speculation, now=lambda: clock_s[0]
    )
    prompt = prompt_of(10)
    oracle.answers["a"] = expected_tokens(bench.runner, prompt, 100)
    oracle.answers["b"] = []
    for name, given_prompt in (("a", prompt), ("b", prompt_of(10, seed=1))):
        request = GenerateRequest(name, tuple(given_prompt), SamplingParams(max_new_tokens=100))
        bench.scheduler.add(Request(request, seed=0, context_len=500, submitted_s=0.0))
        flight = bench.scheduler.next_plan()
        assert flight is not None
        if name == "a":
            step = bench.runner.forward(flight.plan)
            step.sample()
            bench.scheduler.commit(flight, await step.done())
        sizes = [(row.slot, row.num_tokens) for row in flight.plan.rows]
    assert sizes == [(0, 9), (1, 10)]


class _Jumping(VirtualClock):
    """Nobody waits: time is what the next step's end is."""

    async def sleep_until(self, time_s: float) -> None:
        await asyncio.sleep(0)
        self.advance(max(0.0, time_s - self.now()))


class _Costly(FakeRunner):
    """A step takes longer with each token, and with each guess that its drafter makes behind it."""

    def forward(self, plan: Plan) -> FakeStep:
        self._step_s = 4.0 + 0.1 * plan.num_tokens + 0.5 * max(row.num_wanted for row in plan.rows)
        return super().forward(plan)


async def test_a_network_is_asked_for_guesses_where_they_are_verified_and_elsewhere_now_and_then() -> None:
    clock = _Jumping()
    runner = _Costly(vocab_size=1000, page_size=4, clock=clock, draft_accuracy=0.05)
    plans: list[Plan] = []
    runner.plans = plans
    speculation = Speculation(OfferedDrafter(4), StepCosts(0.05))
    limits = Limits(4, 64, frozenset({EOS}))
    scheduler = Scheduler(KVCache(1000, 4), limits, POLICIES["fcfs"], speculation=speculation, now=clock.now)
    engine = Engine(scheduler, runner, EngineOptions(3000, 1000, frozenset({EOS}), seed=0), now=clock.now)
    running = asyncio.create_task(engine.run())

    async def ask(name: str, accuracy: float, num_new: int) -> float:
        """Rows that want guesses, of all."""
        plans.clear()
        runner._draft_accuracy = accuracy
        request = GenerateRequest(name, tuple(prompt_of(10)), SamplingParams(max_new_tokens=num_new, ignore_eos=True))
        answer = await collect(await engine.submit(request))
        assert list(answer.token_ids) == expected_tokens(runner, prompt_of(10), num_new)
        return sum(row.num_wanted > 0 for plan in plans for row in plan.rows) / len(plans)

    try:
        await ask("first", 0.05, 200)
        began_s = clock.now()
        assert 0.01 < await ask("bad", 0.05, 1000) < 0.1
        assert clock.now() - began_s < 1.05 * 1000 * 4.1, "as fast as without guesses, nearly"
        await ask("better", 0.95, 1000)
        began_s = clock.now()
        assert await ask("good", 0.95, 500) > 0.9
        assert clock.now() - began_s < 0.5 * 500 * 4.1, "what was bad is found to have become good"
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_who_leaves_in_the_middle_of_a_step_with_guesses_is_told_what_was_accepted() -> None:
    oracle = Oracle()
    bench = speculating(Bench(), oracle)
    async with running(bench):
        prompt = prompt_of(10)
        oracle.answers["a"] = expected_tokens(bench.runner, prompt, 100)
        mailbox = await bench.engine.submit(GenerateRequest("a", tuple(prompt), SamplingParams(max_new_tokens=100)))
        deltas = [await mailbox.get()]
        while not deltas[-1].num_accepted:
            deltas.append(await mailbox.get())
        while not bench.scheduler._is_drafted:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert bench.engine.abort("a")
        deltas.append(await collect(mailbox))
        whole = Delta.merged(deltas)
        load = bench.engine.load()
    assert whole.finish_reason is FinishReason.ABORT
    assert sum(whole.accepted) == whole.num_accepted == bench.scheduler.num_accepted > 0
    assert load.free_tokens + load.evictable_tokens == load.total_tokens


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    num_pages=st.integers(12, 40),
    page_size=st.sampled_from([1, 2, 4, 16]),
    max_running=st.integers(1, 6),
    max_step_tokens=st.integers(1, 40),
    accuracy=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    max_drafts=st.integers(1, 9),
    patience=st.sampled_from([0.0, 0.5, 1.0, None]),
    max_drafted_tokens=st.sampled_from([None, 5, 12]),
)
def test_any_mix_of_requests_guesses_and_aborts_stays_exact(
    seed: int,
    num_pages: int,
    page_size: int,
    max_running: int,
    max_step_tokens: int,
    accuracy: float,
    max_drafts: int,
    patience: float | None,
    max_drafted_tokens: int | None,
) -> None:
    """Shared prompts, scarce pages, small chunks, stops, aborts at any time; the books of guesses agree with what was sent."""

    async def run() -> None:
        bench = Bench(num_pages=num_pages, page_size=page_size, max_running=max_running, max_step_tokens=max_step_tokens)
        oracle = Oracle(accuracy, max_drafts, seed)
        speculating(bench, oracle, patience=patience)
        bench.scheduler.limits = replace(bench.scheduler.limits, max_drafted_tokens=max_drafted_tokens)
        rng = Random(seed)
        context_len = bench.engine.facts().context_len
        stem = prompt_of(context_len, seed=1)
        answers: list[Delta] = []

        async def client(index: int) -> None:
            for turn in range(3):
                id, length = f"{index}.{turn}", rng.randrange(1, max(2, context_len // 2))
                prompt = stem[:length] + prompt_of(rng.randrange(0, 3), seed=rng.randrange(3))
                num_new = rng.randrange(1, max(2, context_len - len(prompt)))
                if len(prompt) + num_new > context_len:
                    continue
                wanted = oracle.answers[id] = expected_tokens(bench.runner, prompt, num_new)
                stops = frozenset({rng.choice(wanted)}) if rng.random() < 0.3 else frozenset()
                if stops:
                    wanted = wanted[: min(wanted.index(token) for token in stops) + 1]
                task = asyncio.create_task(bench.ask(id, prompt, num_new, stop_token_ids=stops, ignore_eos=True))
                if rng.random() < 0.2:
                    for _ in range(rng.randrange(30)):
                        await asyncio.sleep(0)
                    bench.engine.abort(id)
                answer = await task
                assert list(answer.token_ids) == wanted[: len(answer.token_ids)]
                if answer.finish_reason is not FinishReason.ABORT:
                    assert len(answer.token_ids) == len(wanted)
                assert sum(answer.accepted) == answer.num_accepted <= answer.num_drafted
                assert answer.accepted == () or len(answer.accepted) == len(answer.token_ids)
                answers.append(answer)
                bench.cache.check()

        async with running(bench):
            async with asyncio.timeout(60):
                await asyncio.gather(*(client(i) for i in range(5)))
        for plan in bench.runner.plans or ():
            num_drafts = sum(row.num_drafts for row in plan.rows)
            assert not num_drafts or max_drafted_tokens is None or num_drafts + len(plan.rows) <= max_drafted_tokens
        load = bench.engine.load()
        assert (load.running, load.waiting) == (0, 0)
        assert load.free_tokens + load.evictable_tokens == load.total_tokens
        assert sum(answer.num_accepted for answer in answers) == bench.scheduler.num_accepted
        assert sum(answer.num_drafted for answer in answers) == bench.scheduler.num_drafted
        assert all(drafts.num_closed == 1 for drafts in oracle.opened)

    asyncio.run(run())


@settings(max_examples=EXAMPLES // 2, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 4]),
    max_running=st.integers(1, 6),
    max_step_tokens=st.integers(2, 40),
    accuracy=st.sampled_from([0.3, 0.9, 1.0]),
    may_jump=st.booleans(),
)
def test_guesses_under_grammars_stay_exact(
    seed: int, page_size: int, max_running: int, max_step_tokens: int, accuracy: float, may_jump: bool
) -> None:
    """With jumps and without, guided and free requests side by side."""

    async def run() -> None:
        bench = guided.Bench(num_pages=60, page_size=page_size, max_running=max_running, max_step_tokens=max_step_tokens)
        oracle = Oracle(accuracy, 5, seed, guided.VOCAB)
        bench.scheduler._speculation = Always(oracle, patience=0.7)
        rng = Random(seed)

        async def client(index: int) -> None:
            for turn in range(2):
                id, prompt = f"{index}.{turn}", prompt_of(rng.randrange(1, 20), seed=rng.randrange(5))
                prompt = [token % guided.END for token in prompt]
                grammar = rng.choice((*guided.GRAMMARS, None))
                num_new = rng.randrange(1, 40)
                if len(prompt) + num_new > bench.engine.facts().context_len:
                    continue
                wanted = oracle.answers[id] = await guided.expected(bench, prompt, grammar, num_new)
                answer = await bench.ask(id, prompt, grammar, may_jump=may_jump, max_new_tokens=num_new)
                assert list(answer.token_ids) == wanted
                assert sum(answer.accepted) == answer.num_accepted <= answer.num_drafted

        async with guided.running(bench):
            async with asyncio.timeout(60):
                await asyncio.gather(*(client(i) for i in range(4)))

    asyncio.run(run())
