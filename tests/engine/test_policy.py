"""The order of the waiting queue, and forgetting the cache."""

import asyncio

import pytest

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.client import collect
from streamserve.engine.policy import HighestPriorityFirst
from streamserve.engine.request import Request
from streamserve.messages import GenerateRequest, SamplingParams
from tests.engine.memory import expected_tokens
from tests.engine.test_engine import Bench, running

pytestmark = pytest.mark.anyio


def waiting(*given: tuple[str, int, float]) -> list[Request]:
    return [
        Request(GenerateRequest(name, (1,), priority=priority), seed=0, context_len=8, submitted_s=submitted_s)
        for name, priority, submitted_s in given
    ]


def order(policy: HighestPriorityFirst, requests: list[Request]) -> str:
    return "".join(request.id for request in policy(requests, KVCache(4, 4)))


def test_higher_priority_comes_first_and_equals_in_order_of_arrival() -> None:
    policy = HighestPriorityFirst(now=lambda: 10.0)
    assert order(policy, waiting(("a", 0, 1), ("b", 5, 2), ("c", -3, 3), ("d", 5, 4), ("e", 0, 5))) == "bdaec"
    assert order(policy, waiting(("a", 0, 1), ("b", 0, 2))) == "ab"


def test_who_has_waited_long_enough_is_overtaken_by_nobody() -> None:
    policy = HighestPriorityFirst(max_wait_s=5.0, now=lambda: 10.0)
    assert order(policy, waiting(("a", -9, 1), ("b", 99, 6), ("c", 0, 4), ("d", 100, 7))) == "acdb"


async def test_a_queue_by_priority_is_run_in_that_order() -> None:
    bench = Bench(policy="priority", max_running=1)
    done: list[str] = []

    async def ask(name: str, priority: int) -> None:
        params = SamplingParams(max_new_tokens=3)
        await collect(await bench.engine.submit(GenerateRequest(name, (1, 2, len(done) + 3), params, priority=priority)))
        done.append(name)

    async with running(bench), asyncio.TaskGroup() as tasks:
        for name, priority in [("first", 0), ("low", -1), ("high", 7), ("plain", 0), ("also high", 7)]:
            tasks.create_task(ask(name, priority))
    # All five are queued before the first plan.
    assert done == ["high", "also high", "first", "plain", "low"]


async def test_the_cache_is_forgotten_only_while_nothing_runs_and_answers_stay_exact() -> None:
    bench = Bench()
    prompt = list(range(1, 20))
    async with running(bench):
        box = await bench.engine.submit(GenerateRequest("r", tuple(prompt), SamplingParams(max_new_tokens=50)))
        await box.get()
        assert not bench.engine.flush_cache()
        while (await box.get()).finish_reason is None:
            pass
        assert bench.cache.num_free_pages < bench.cache.num_pages
        assert bench.engine.flush_cache()  # a step with a row of the finished request may still be under way
        assert bench.cache.num_free_pages == bench.cache.num_pages
        bench.cache.check()
        again = await bench.ask("again", prompt, 30)
        assert again.num_cached_tokens == 0
        assert list(again.token_ids) == expected_tokens(bench.runner, prompt, 30)
