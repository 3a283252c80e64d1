"""Log-probabilities of a prompt from a place on, behind what the cache holds, on a real network: those of computing all of it."""

import asyncio
import os
from collections.abc import Iterator, Sequence
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.client import collect
from streamserve.engine.core import Engine, EngineOptions
from streamserve.engine.drafters.ngram import NgramDrafter
from streamserve.engine.policy import first_come_first_served
from streamserve.engine.runner import ModelRunner
from streamserve.engine.scheduler import Limits, Scheduler
from streamserve.engine.speculation import Speculation
from streamserve.engine.step_costs import StepCosts
from streamserve.messages import Delta, GenerateRequest, SamplingParams
from tests.engine.test_drafted_rows import NUM_PAGES, PAGE_SIZE, V, exact_network, running_on

EXAMPLES = int(os.environ.get("STREAMSERVE_EXAMPLES", "40"))
CONTEXT_LEN, MAX_RUNNING = 90, 3


@pytest.fixture(scope="module")
def runner() -> Iterator[ModelRunner]:
    yield from running_on(*exact_network())


def ask_all(runner: ModelRunner, requests: Sequence[GenerateRequest], *, chunk: int, pages: int, drafts: bool) -> list[Delta]:
    """Some before the others, then all at once."""
    speculation = Speculation(NgramDrafter(3), StepCosts.free()) if drafts else None
    scheduler = Scheduler(
        KVCache(pages, PAGE_SIZE),
        Limits(MAX_RUNNING, chunk, frozenset()),
        first_come_first_served,
        speculation=speculation,
    )
    engine = Engine(scheduler, runner, EngineOptions(CONTEXT_LEN, V, frozenset(), seed=0))

    async def run() -> list[Delta]:
        task = asyncio.create_task(engine.run())
        early = [await collect(await engine.submit(request)) for request in requests[:2]]
        boxes = [await engine.submit(request) for request in requests[2:]]
        found = [*early, *[await collect(box) for box in boxes]]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return found

    return asyncio.run(run())


@settings(max_examples=EXAMPLES // 4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), chunk=st.integers(3, 50), pages=st.integers(8, 30), drafts=st.booleans())
def test_they_are_those_of_computing_the_whole_prompt(
    runner: ModelRunner, seed: int, chunk: int, pages: int, drafts: bool
) -> None:
    assert pages <= NUM_PAGES
    rng = Random(seed)
    stem = [rng.randrange(V) for _ in range(5)] * 12
    requests: list[GenerateRequest] = []
    for index in range(7):
        prompt = (*stem[: rng.randrange(1, 60)], *(rng.randrange(V) for _ in range(rng.randrange(4))))
        start = rng.randrange(len(prompt) + 1)
        sampling = SamplingParams(
            max_new_tokens=rng.randrange(1, CONTEXT_LEN - len(prompt)),
            temperature=0.0,
            ignore_eos=True,
            prompt_logprobs=1,
            prompt_logprobs_start=start,
        )
        requests.append(GenerateRequest(str(index), prompt, sampling))
    for request, answer in zip(requests, ask_all(runner, requests, chunk=chunk, pages=pages, drafts=drafts), strict=True):
        given = request.sampling
        alone = GenerateRequest("alone", request.token_ids, SamplingParams(max_new_tokens=1, temperature=0.0, prompt_logprobs=1))
        (whole,) = ask_all(runner, [alone], chunk=100, pages=30, drafts=False)
        first = max(given.prompt_logprobs_start, 1)
        assert answer.prompt_logprobs is not None and whole.prompt_logprobs is not None
        assert answer.prompt_logprobs[:first] == (None,) * first
        assert len(answer.prompt_logprobs) == len(request.token_ids)
        for one, other in zip(answer.prompt_logprobs[first:], whole.prompt_logprobs[first:], strict=True):
            assert one is not None and other is not None and one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert one.top[0][1] == pytest.approx(other.top[0][1], abs=1e-5)
        assert answer.token_ids[0] == whole.token_ids[0]
