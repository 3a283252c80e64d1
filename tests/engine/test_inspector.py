"""Looking into an engine changes nothing; pins hold against pressure, but never against a request that has no other room."""

from dataclasses import replace

import pytest

from streamserve.engine.client import collect
from streamserve.engine.inspector import NUM_STEPS
from streamserve.errors import Conflict, NotFound
from streamserve.messages import (
    Delta,
    GenerateRequest,
    MatchEnd,
    Media,
    NodeSummary,
    PrefixMatch,
    SamplingParams,
    Span,
    media_token_ids,
)
from tests.engine.memory import expected_tokens
from tests.engine.test_engine import Bench, prompt_of, running

pytestmark = pytest.mark.anyio


def nodes_of(bench: Bench, node: int = 0) -> tuple[NodeSummary, ...]:
    return bench.engine.inspection.nodes(node, depth=16, limit=1000, num_first=4)[0]


def look_up(bench: Bench, prompt: list[int], salt: str = "", *, elsewhere: bool = True, **sampling: int) -> PrefixMatch:
    request = GenerateRequest("x", tuple(prompt), SamplingParams(**sampling), salt)  # type: ignore[arg-type]
    return bench.engine.inspection.look_up(request, looks_elsewhere=elsewhere)


async def test_a_pinned_prefix_is_found_after_a_burst_that_evicts_everything_else() -> None:
    async with running(Bench(num_pages=32)) as bench:
        pinned, other = prompt_of(40), prompt_of(40, seed=1)
        await bench.ask("a", pinned, 1)
        await bench.ask("b", other, 1)
        inspection = bench.engine.inspection
        node = next(node for node in nodes_of(bench) if node.first_token_ids == tuple(pinned[:4]))
        assert inspection.pin(node.id) == inspection.pin(node.id), "once is enough"
        assert inspection.pin(node.id).pinned_tokens == 40
        for i in range(6):
            await bench.ask(f"burst{i}", prompt_of(60, seed=10 + i), 1)
        assert look_up(bench, pinned).num_tokens == 39
        assert look_up(bench, other) == PrefixMatch(0, (), MatchEnd.EVICTED)
        assert bench.engine.flush_cache()
        assert [(kept.id, kept.is_pinned, kept.num_pins, kept.num_requests) for kept in nodes_of(bench)] == [
            (node.id, True, 1, 0)
        ]
        assert [kept.id for kept in inspection.pinned_nodes(num_first=4)] == [node.id]
        again = await bench.ask("again", pinned, 5)
        assert again.num_cached_tokens == 39
        assert list(again.token_ids) == expected_tokens(bench.runner, pinned, 5)
        assert inspection.unpin(node.id).num_pins == 0
        assert bench.engine.flush_cache() and nodes_of(bench) == ()


async def test_a_request_that_has_no_room_beside_pins_runs_and_they_are_given_up() -> None:
    async with running(Bench(num_pages=32)) as bench:
        inspection = bench.engine.inspection
        for i in range(2):
            await bench.ask(f"p{i}", prompt_of(28, seed=i), 1)
            inspection.pin(nodes_of(bench)[0].id)
        assert inspection.pinned_nodes(num_first=0)[0].is_pinned
        large = prompt_of(60, seed=5)
        answer = await bench.ask("large", large, 32)  # 92 tokens, 23 pages of 32: one pin has to go when it has grown
        assert list(answer.token_ids) == expected_tokens(bench.runner, large, 32)
        summary = bench.engine.cache_summary().pins
        assert (summary.num_pins, summary.num_given_up) == (1, 1)
        huge = prompt_of(110, seed=6)
        answer = await bench.ask("huge", huge, 10)
        assert list(answer.token_ids) == expected_tokens(bench.runner, huge, 10)
        assert bench.engine.cache_summary().pins.num_given_up == 2


async def test_pins_hold_half_of_the_memory_at_most_and_what_is_held_is_not_evicted() -> None:
    async with running(Bench(num_pages=16)) as bench:
        inspection = bench.engine.inspection
        await bench.ask("a", prompt_of(36), 1)
        (long,) = nodes_of(bench)
        with pytest.raises(Conflict, match="32, half"):
            inspection.pin(long.id)
        await bench.ask("b", prompt_of(36)[:20], 1)  # splits it
        upper = next(node for node in nodes_of(bench) if node.parent == 0)
        lower = next(node for node in nodes_of(bench, long.id))
        assert lower.parent == upper.id and lower.end == 36, "the lower half keeps the number"
        inspection.pin(upper.id)
        for held in (upper.id,):
            with pytest.raises(Conflict, match="1 pins"):
                inspection.evict(held)
        assert inspection.evict(lower.id)[0] == 1
        for gone in (lower.id, 0, 999):
            with pytest.raises(NotFound):
                inspection.evict(gone)
            with pytest.raises(NotFound):
                inspection.pin(gone)
            with pytest.raises(NotFound):
                inspection.unpin(gone)
        inspection.unpin(upper.id)
        mailbox = await bench.engine.submit(GenerateRequest("r", tuple(prompt_of(20)), SamplingParams(max_new_tokens=30)))
        await mailbox.get()
        with pytest.raises(Conflict, match="1 running"):
            inspection.evict(nodes_of(bench)[0].id)
        await collect(mailbox)


async def test_a_look_up_says_why_the_match_ends_and_uses_nothing() -> None:
    async with running(Bench(num_pages=64)) as bench:
        prompt = prompt_of(40)
        await bench.ask("a", prompt, 1)
        (node,) = nodes_of(bench)
        assert look_up(bench, prompt) == PrefixMatch(39, (node.id,), MatchEnd.COMPLETE)
        assert look_up(bench, prompt, prompt_logprobs=0) == PrefixMatch(0, (), MatchEnd.OFF)
        assert look_up(bench, [*prompt, 1, 2, 3]) == PrefixMatch(40, (node.id,), MatchEnd.NEW)
        other = [*prompt[:25], (prompt[25] + 1) % 900, 3, 4]
        assert look_up(bench, other) == PrefixMatch(25, (node.id,), MatchEnd.DIFFERS, prompt[25])
        assert look_up(bench, prompt, "salt") == PrefixMatch(0, (), MatchEnd.OTHER_SALT)
        assert look_up(bench, prompt, "salt", elsewhere=False) == PrefixMatch(0, (), MatchEnd.NEW)
        bench.engine.inspection.evict(node.id)
        assert look_up(bench, prompt) == PrefixMatch(0, (), MatchEnd.EVICTED)
        assert bench.engine.cache_summary().prompt_tokens_seen == 40
    async with running(Bench(reuse=False)) as bench:
        await bench.ask("a", prompt, 1)
        assert look_up(bench, prompt).end is MatchEnd.OFF


async def test_steps_say_what_they_were_and_old_ones_are_forgotten() -> None:
    async with running(Bench(num_pages=512)) as bench:
        inspection = bench.engine.inspection
        assert inspection.steps(0) == ((), 0)
        await bench.ask("a", prompt_of(100), 20)
        await bench.ask("other", [1, 2], 1)  # the last step of a request is reported behind it
        steps, missed = inspection.steps(0)
        assert missed == 0 and [step.step for step in steps] == sorted(step.step for step in steps)
        plans = {plan.step: plan for plan in bench.runner.plans or ()}
        for step in steps:
            rows = plans[step.step].rows
            assert step.decode_rows + step.prompt_rows == len(rows)
            assert step.prompt_tokens + step.decode_rows == sum(row.num_tokens for row in rows)
            assert step.used_tokens + step.evictable_tokens + step.free_tokens == 512 * 4
        assert sum(step.prompt_tokens for step in steps if step.prompt_rows) == 102
        assert (steps[-1].prompt_tokens_seen, steps[-1].prompt_tokens_hit) == (102, 0)
        last = steps[-1].step
        assert inspection.steps(last)[0] == () and inspection.steps(last - 1)[0] == steps[-1:]
        await bench.ask("long", prompt_of(4), NUM_STEPS + 50)
        later, missed = inspection.steps(last)
        assert len(later) == NUM_STEPS and later[0].step == last + missed + 1 and missed > 0


async def test_live_requests_are_listed_running_ones_first() -> None:
    async with running(Bench(max_running=1)) as bench:
        params = SamplingParams(max_new_tokens=40)
        boxes = [await bench.engine.submit(GenerateRequest(name, tuple(prompt_of(9)), params)) for name in "abc"]
        first = await boxes[0].get()
        listed = bench.engine.inspection.requests(10)
        assert [(one.id, one.is_running, one.num_prompt) for one in listed] == [("a", True, 9), ("b", False, 9), ("c", False, 9)]
        assert listed[0].num_generated >= 1 and listed[0].num_computed >= 9 and listed[1].num_computed == 0
        assert [one.id for one in bench.engine.inspection.requests(2)] == ["a", "b"]
        answers = [Delta.merged([first, await collect(boxes[0])]), *[await collect(box) for box in boxes[1:]]]
        assert bench.engine.inspection.requests(10) == ()
    assert 0 <= answers[0].queued_s < answers[1].queued_s < answers[2].queued_s, "how long each waited for its turn"


async def test_a_match_that_ends_inside_a_picture_is_none_where_pictures_are_computed_whole() -> None:
    bench = Bench(num_pages=64)
    bench.scheduler.limits = replace(bench.scheduler.limits, has_whole_spans=True)
    picture = media_token_ids(b"picture", 10)
    known = [*prompt_of(6), *picture[:4]]  # as after a cut by eviction
    lease = bench.cache.open("", known, 0)
    assert lease is not None and bench.cache.grow(lease, len(known))
    bench.cache.close(lease, known)
    prompt = (*prompt_of(6), *picture, 1, 2)
    media = Media(b"picture", (Span(6, 10),), {})
    request = GenerateRequest("x", prompt, media=(media,))
    found = bench.engine.inspection.look_up(request, looks_elsewhere=False)
    assert (found.num_tokens, found.end) == (6, MatchEnd.PICTURE)
    bench.scheduler.limits = replace(bench.scheduler.limits, has_whole_spans=False)
    found = bench.engine.inspection.look_up(request, looks_elsewhere=False)
    assert (found.num_tokens, found.end) == (10, MatchEnd.NEW)
