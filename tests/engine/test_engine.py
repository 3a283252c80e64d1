"""The engine on the fake device: exactness under chunks, sharing, preemption, aborts and failures, in virtual time."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.client import collect
from streamserve.engine.core import Engine, EngineOptions
from streamserve.engine.drafters.runner_drafts import OfferedDrafter
from streamserve.engine.fake import FakeRunner, VirtualClock
from streamserve.engine.pause import BurstLimits
from streamserve.engine.plan import Plan, Step
from streamserve.engine.policy import POLICIES
from streamserve.engine.scheduler import Limits, Scheduler
from streamserve.engine.speculation import Speculation
from streamserve.engine.step_costs import StepCosts
from streamserve.errors import ContextOverflow, InvalidRequest, QueueFull
from streamserve.messages import Delta, FinishReason, GenerateRequest, SamplingParams
from tests.engine.memory import MemoryRunner, expected_tokens

pytestmark = pytest.mark.anyio
VOCAB = 1000
EXAMPLES = int(os.environ.get("STREAMSERVE_EXAMPLES", "60"))
EOS = 999


class Bench:
    """An engine on a MemoryRunner, with what tests look at."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        max_running: int = 8,
        max_step_tokens: int = 32,
        policy: str = "fcfs",
        max_queued: int = 1024,
        clock: VirtualClock | None = None,
        step_s: float = 0.0,
        reuse: bool = True,
        max_decode_pause_s: float = 0.0,
        burst_tokens: int = 1024,
    ) -> None:
        self.cache = KVCache(num_pages, page_size, reuse=reuse)
        self.runner = MemoryRunner(vocab_size=VOCAB, page_size=page_size, clock=clock, step_s=step_s, eos_token_id=EOS)
        self.runner.plans = []
        limits = Limits(max_running, max_step_tokens, frozenset({EOS}), BurstLimits(max_decode_pause_s, tokens=burst_tokens))
        self.scheduler = Scheduler(self.cache, limits, POLICIES[policy])
        context_len = min(4096, (num_pages - 1) * page_size)
        options = EngineOptions(context_len, VOCAB, frozenset({EOS}), max_queued=max_queued, seed=0)
        self.engine = Engine(self.scheduler, self.runner, options)

    async def ask(self, request_id: str, prompt: list[int], num_new: int, **sampling: object) -> Delta:
        params = SamplingParams(max_new_tokens=num_new, **sampling)  # type: ignore[arg-type]
        return await collect(await self.engine.submit(GenerateRequest(request_id, tuple(prompt), params)))


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Bench]:
    task = asyncio.create_task(bench.engine.run())
    try:
        yield bench
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    bench.cache.check()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(EOS) for _ in range(length)]


async def test_an_answer_is_the_models_and_ends_at_its_length() -> None:
    async with running(Bench()) as bench:
        prompt = prompt_of(50)
        answer = await bench.ask("a", prompt, 20)
    assert list(answer.token_ids) == expected_tokens(bench.runner, prompt, 20)
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.num_cached_tokens == 0


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 1000])
async def test_an_exact_repeat_reuses_all_but_one_token(length: int) -> None:
    async with running(Bench(num_pages=256, page_size=16)) as bench:
        prompt = prompt_of(length)
        first = await bench.ask("a", prompt, 5)
        again = await bench.ask("b", prompt, 5)
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens == length - 1
    assert again.token_ids == first.token_ids


async def test_a_chat_reuses_every_earlier_turn_answers_included() -> None:
    async with running(Bench(num_pages=256, page_size=16)) as bench:
        context: list[int] = []
        previous = 1
        for turn in range(6):
            context += prompt_of(37 + turn, seed=turn)
            answer = await bench.ask(f"turn{turn}", context, 21)
            assert answer.num_cached_tokens >= previous - 1
            context += answer.token_ids
            previous = len(context)


async def test_prompt_rows_are_chunked_and_never_stop_running_rows() -> None:
    async with running(Bench(num_pages=256, max_step_tokens=8)) as bench:
        short = await bench.engine.submit(GenerateRequest("short", tuple(prompt_of(4)), SamplingParams(max_new_tokens=200)))
        first = await short.get()
        await bench.ask("long", prompt_of(300, seed=1), 1)
        whole = Delta.merged([first, await collect(short)])
    assert bench.runner.plans is not None
    long_plans = [plan for plan in bench.runner.plans if any(row.num_tokens > 1 for row in plan.rows)]
    assert len(long_plans) > 300 // 8
    for plan in long_plans[1:]:
        assert any(row.num_tokens == 1 for row in plan.rows), "a decode row rides along with every chunk"
        assert plan.num_tokens <= 8
    assert len(whole.token_ids) == 200


async def test_requests_that_arrive_together_compute_a_shared_prefix_once() -> None:
    async with running(Bench(num_pages=512, max_running=16, max_step_tokens=32)) as bench:
        shared = prompt_of(100)
        prompts = [shared + prompt_of(6, seed=10 + i) for i in range(8)]
        answers = await asyncio.gather(*(bench.ask(f"r{i}", p, 4) for i, p in enumerate(prompts)))
    computed = sum(row.num_tokens for plan in bench.runner.plans or () for row in plan.rows if row.token_ids is not None)
    assert computed == 100 + 8 * 6
    assert [a.num_cached_tokens for a in answers].count(100) == 7


async def test_salts_share_nothing() -> None:
    async with running(Bench()) as bench:
        prompt = tuple(prompt_of(40))
        params = SamplingParams(max_new_tokens=2)
        await collect(await bench.engine.submit(GenerateRequest("a", prompt, params, salt="one")))
        other = await collect(await bench.engine.submit(GenerateRequest("b", prompt, params, salt="two")))
    assert other.num_cached_tokens == 0


async def test_scarce_pages_preempt_and_every_answer_stays_exact() -> None:
    async with running(Bench(num_pages=24, page_size=4, max_running=8)) as bench:
        prompts = [prompt_of(10, seed=i) for i in range(8)]
        answers = await asyncio.gather(*(bench.ask(f"r{i}", p, 40) for i, p in enumerate(prompts)))
    assert bench.scheduler.num_preemptions > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(answer.token_ids) == expected_tokens(bench.runner, prompt, 40)


async def test_abort_frees_the_pages_before_the_next_plan() -> None:
    clock = VirtualClock()
    bench = Bench(clock=clock, step_s=1.0)
    async with running(bench):
        boxes = [
            await bench.engine.submit(GenerateRequest(f"r{i}", tuple(prompt_of(9, i)), SamplingParams(max_new_tokens=30)))
            for i in range(4)
        ]
        for _ in range(5):
            await settle()
            clock.advance(1.0)
        await settle()
        before = bench.engine.load()
        num_plans = len(bench.runner.plans or ())
        for i in (1, 3):
            assert bench.engine.abort(f"r{i}")
        after = bench.engine.load()
        assert len(bench.runner.plans or ()) == num_plans
        assert (before.running, after.running) == (4, 2)
        assert after.free_tokens + after.evictable_tokens > before.free_tokens + before.evictable_tokens
        clock.advance(1.0)
        await settle()
        assert bench.runner.plans and {row.slot for row in bench.runner.plans[-1].rows} == {
            row.slot for row in bench.runner.plans[-2].rows[::2]
        }
        assert (await collect(boxes[1])).finish_reason is FinishReason.ABORT
        assert not bench.engine.abort("r1")


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_failing_step_ends_its_requests_only() -> None:
    bench = Bench()
    forward = bench.runner.forward
    bad = {"on": True}

    def sometimes(plan: Plan) -> Step:
        if bad["on"] and any(a.num_prompt == 13 for a in plan.admissions):
            raise RuntimeError("no such kernel")
        return forward(plan)

    bench.runner.forward = sometimes  # type: ignore[method-assign,assignment]
    async with running(bench):
        good = asyncio.create_task(bench.ask("good", prompt_of(5), 50))
        await settle()
        failed = await bench.ask("bad", prompt_of(13), 5)
        assert failed.finish_reason is FinishReason.ERROR
        assert failed.error and "no such kernel" in failed.error
        bad["on"] = False
        assert (await bench.ask("again", prompt_of(13), 5)).finish_reason is FinishReason.LENGTH
        await good


async def test_eos_stops_unless_ignored_or_too_early() -> None:
    bench = Bench()
    bench.runner._answer_len = 7
    async with running(bench):
        plain = await bench.ask("plain", prompt_of(5), 50)
        assert plain.token_ids[-1] == EOS and len(plain.token_ids) == 8
        assert (plain.finish_reason, plain.matched_stop) == (FinishReason.STOP, EOS)
        ignored = await bench.ask("ignored", prompt_of(5), 50, ignore_eos=True)
        assert len(ignored.token_ids) == 50
        later = await bench.ask("later", prompt_of(5), 50, min_new_tokens=20)
        assert len(later.token_ids) == 21
        stop = plain.token_ids[3]
        stopped = await bench.ask("stopped", prompt_of(5), 50, stop_token_ids=frozenset({stop}))
        assert stopped.token_ids == plain.token_ids[: plain.token_ids.index(stop) + 1]
        assert stopped.matched_stop == stop


async def test_prompt_logprobs_cover_the_whole_prompt_once() -> None:
    async with running(Bench(max_step_tokens=7)) as bench:
        await bench.ask("warm", prompt_of(30), 3)
        answer = await bench.ask("scored", prompt_of(30), 3, prompt_logprobs=1)
    assert answer.prompt_logprobs is not None
    assert answer.prompt_logprobs[0] is None
    assert [entry.token_id for entry in answer.prompt_logprobs[1:] if entry] == prompt_of(30)[1:]


@pytest.mark.parametrize("start", [0, 1, 2, 17, 29, 30])
async def test_prompt_logprobs_from_a_place_on_leave_what_stands_before_it_to_the_cache(start: int) -> None:
    async with running(Bench(max_step_tokens=7)) as bench:
        whole = await bench.ask("whole", prompt_of(30), 3, prompt_logprobs=1)
        for name in ("part", "again"):
            part = await bench.ask(name, prompt_of(30), 3, prompt_logprobs=1, prompt_logprobs_start=start)
            assert part.prompt_logprobs is not None and whole.prompt_logprobs is not None
            first = max(start, 1)
            assert part.prompt_logprobs[:first] == (None,) * first
            assert part.prompt_logprobs[first:] == whole.prompt_logprobs[first:]
            assert part.num_cached_tokens == max(start - 1, 0)
            assert part.token_ids == whole.token_ids


@settings(max_examples=EXAMPLES // 2, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    num_pages=st.integers(12, 40),
    page_size=st.sampled_from([1, 2, 4, 16]),
    max_step_tokens=st.integers(1, 40),
    policy=st.sampled_from(["fcfs", "lpm"]),
    drafts=st.booleans(),
)
def test_prompt_logprobs_from_any_place_are_those_of_their_tokens(
    seed: int, num_pages: int, page_size: int, max_step_tokens: int, policy: str, drafts: bool
) -> None:
    """Shared prefixes, odd lengths, chunks that end anywhere, scarce pages, answers in company, with and without guesses."""

    async def run() -> None:
        bench = Bench(num_pages=num_pages, page_size=page_size, max_running=4, max_step_tokens=max_step_tokens, policy=policy)
        if drafts:
            bench.runner._draft_accuracy = 0.6
            bench.scheduler._speculation = Speculation(OfferedDrafter(3), StepCosts.free())
        rng = Random(seed)
        context_len = bench.engine.facts().context_len
        stem = prompt_of(context_len)

        async def client(index: int) -> None:
            for turn in range(3):
                prompt = stem[: rng.randrange(1, max(2, context_len // 2))] + prompt_of(
                    rng.randrange(0, 5), seed=rng.randrange(3)
                )
                if (room := context_len - len(prompt)) < 1:
                    continue
                start = rng.randrange(0, len(prompt) + 1)
                answer = await bench.ask(
                    f"{index}.{turn}", prompt, rng.randrange(1, room + 1), prompt_logprobs=0, prompt_logprobs_start=start
                )
                shown = [entry and entry.token_id for entry in answer.prompt_logprobs or ()]
                first = max(start, 1)
                assert shown == [None] * first + prompt[first:]
                assert list(answer.token_ids) == expected_tokens(bench.runner, prompt, len(answer.token_ids))

        async with running(bench):
            async with asyncio.timeout(60):
                await asyncio.gather(*(client(i) for i in range(4)))

    asyncio.run(run())


async def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    bench = Bench(num_pages=8, page_size=4, max_queued=1)
    with pytest.raises(ContextOverflow, match=r"20 tokens and 9 more .* holds 28"):
        await bench.engine.submit(GenerateRequest("a", tuple(prompt_of(20)), SamplingParams(max_new_tokens=9)))
    with pytest.raises(InvalidRequest, match="1000"):
        await bench.engine.submit(GenerateRequest("a", (5, 1000)))
    with pytest.raises(InvalidRequest, match="no tokens"):
        await bench.engine.submit(GenerateRequest("a", ()))
    await bench.engine.submit(GenerateRequest("a", (5,)))
    with pytest.raises(QueueFull):
        await bench.engine.submit(GenerateRequest("b", (5,)))


async def test_requests_in_company_keep_their_numbers_of_tokens_in_a_step() -> None:
    async with running(Bench(num_pages=512, max_running=4, max_step_tokens=16)) as bench:
        await asyncio.gather(*(bench.ask(f"r{i}", prompt_of(20, i), 10) for i in range(12)))
    for plan in bench.runner.plans or ():
        assert len(plan.rows) <= 4
        assert plan.num_tokens <= 16 + 3
        assert len({row.slot for row in plan.rows}) == len(plan.rows)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    num_pages=st.integers(12, 60),
    page_size=st.sampled_from([1, 2, 4, 16]),
    max_running=st.integers(1, 6),
    max_step_tokens=st.integers(1, 40),
    policy=st.sampled_from(["fcfs", "lpm"]),
    burst_tokens=st.just(1024),
)
def test_any_mix_of_requests_and_aborts_stays_exact(
    seed: int, num_pages: int, page_size: int, max_running: int, max_step_tokens: int, policy: str, burst_tokens: int
) -> None:
    """Shared prefixes, odd lengths, scarce pages, aborts at any time: the memory runner checks every position read."""

    async def run() -> None:
        bench = Bench(
            num_pages=num_pages,
            page_size=page_size,
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            policy=policy,
            max_decode_pause_s=0.01 if burst_tokens < 1024 else 0.0,
            burst_tokens=burst_tokens,
        )
        rng = Random(seed)
        context_len = bench.engine.facts().context_len
        stems = [prompt_of(context_len, seed=s) for s in range(2)]

        async def client(index: int) -> None:
            for turn in range(3):
                length = rng.randrange(1, max(2, context_len // 2))
                prompt = rng.choice(stems)[:length] + prompt_of(rng.randrange(0, 5), seed=rng.randrange(3))
                num_new = rng.randrange(1, max(2, context_len - len(prompt)))
                if len(prompt) + num_new > context_len:
                    continue
                task = asyncio.create_task(bench.ask(f"{index}.{turn}", prompt, num_new))
                if rng.random() < 0.3:
                    for _ in range(rng.randrange(30)):
                        await asyncio.sleep(0)
                    bench.engine.abort(f"{index}.{turn}")
                answer = await task
                wanted = expected_tokens(bench.runner, prompt, len(answer.token_ids))
                assert list(answer.token_ids) == wanted
                if answer.finish_reason is not FinishReason.ABORT:
                    assert len(wanted) == num_new
                bench.cache.check()

        async with running(bench):
            async with asyncio.timeout(60):
                await asyncio.gather(*(client(i) for i in range(5)))
        load = bench.engine.load()
        assert (load.running, load.waiting) == (0, 0)
        assert load.free_tokens + load.evictable_tokens == load.total_tokens

    asyncio.run(run())


def test_the_fake_model_is_the_same_in_every_process() -> None:
    runner = FakeRunner(vocab_size=VOCAB, eos_token_id=EOS)
    assert expected_tokens(runner, [1, 2, 3], 4) == expected_tokens(FakeRunner(vocab_size=VOCAB, eos_token_id=EOS), [1, 2, 3], 4)
