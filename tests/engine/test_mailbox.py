"""The mailbox: nothing is lost or reordered, waiting ends when it should, and a reader that is away costs one delta."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from streamserve.engine.client import MAX_PENDING, Mailbox, collect
from streamserve.messages import Delta, FinishReason, TokenLogprobs

pytestmark = pytest.mark.anyio


def deltas(count: int) -> list[Delta]:
    made = [Delta((token,), (TokenLogprobs(token, -1.0),), num_cached_tokens=7) for token in range(count - 1)]
    return [*made, Delta((count - 1,), (TokenLogprobs(count - 1, -1.0),), None, 7, FinishReason.STOP, count - 1)]


def assert_whole(whole: Delta, count: int) -> None:
    assert whole.token_ids == tuple(range(count))
    assert [entry.token_id for entry in whole.logprobs] == list(range(count))
    assert (whole.num_cached_tokens, whole.finish_reason, whole.matched_stop) == (7, FinishReason.STOP, count - 1)


@pytest.mark.parametrize("count", [1, 2, MAX_PENDING, 5 * MAX_PENDING + 1])
async def test_what_nobody_took_comes_as_one_delta(count: int) -> None:
    mailbox = Mailbox("a")
    for delta in deltas(count):
        mailbox.put_nowait(delta)
    assert_whole(await mailbox.get(), count)


def random_delta(rng: random.Random, *, is_bare: bool) -> Delta:
    ids = tuple(rng.choices(range(50), k=rng.randrange(4)))
    names = ("num_cached_tokens", "num_jumped", "num_thought", "num_computed", "num_drafted")
    counts: dict[str, Any] = {name: rng.randrange(9) for name in names}
    if is_bare:
        return Delta(ids, **counts)
    return Delta(
        ids,
        tuple(TokenLogprobs(id, -1.0) for id in ids) if rng.random() < 0.5 else (),
        rng.choice([None, (), (None, TokenLogprobs(1, -2.0))]),
        finish_reason=rng.choice([None, FinishReason.LENGTH]),
        matched_stop=rng.choice([None, 7]),
        error=rng.choice([None, "no"]),
        is_grammar_error=rng.random() < 0.5,
        num_accepted=rng.randrange(9),
        accepted=tuple(rng.random() < 0.5 for _ in ids) if rng.random() < 0.5 else (),
        queued_s=rng.choice([0.0, 0.5]),
        jumped=tuple(rng.random() < 0.5 for _ in ids) if rng.random() < 0.5 else (),
        **counts,
    )


def test_merging_loses_nothing_and_takes_the_rest_from_the_last() -> None:
    rng = random.Random(4)
    for number in range(600):
        parts = [random_delta(rng, is_bare=number % 3 == 0 or rng.random() < 0.6) for _ in range(rng.randrange(1, 6))]
        before = [replace(part) for part in parts]
        whole = Delta.merged(parts)
        assert parts == before
        assert whole.token_ids == sum([part.token_ids for part in parts], ())
        assert whole.logprobs == sum([part.logprobs for part in parts], ())
        assert whole.queued_s == max(part.queued_s for part in parts)
        given = [part.prompt_logprobs for part in parts if part.prompt_logprobs is not None]
        assert whole.prompt_logprobs == (given[0] if given else None)
        for name in ("accepted", "jumped"):
            marks = [getattr(part, name) or (False,) * len(part.token_ids) for part in parts]
            assert getattr(whole, name) == (sum(marks, ()) if any(getattr(part, name) for part in parts) else ())
        joined = {"token_ids", "logprobs", "queued_s", "prompt_logprobs", "accepted", "jumped"}
        for name in set(Delta.__struct_fields__) - joined:
            assert getattr(whole, name) == getattr(parts[-1], name), name


async def test_prompt_logprobs_survive_merging() -> None:
    mailbox = Mailbox("a")
    mailbox.put_nowait(Delta((1,), prompt_logprobs=(None, TokenLogprobs(4, -0.5))))
    mailbox.put_nowait(Delta((2,)))
    assert (await mailbox.get()).prompt_logprobs == (None, TokenLogprobs(4, -0.5))


@pytest.mark.parametrize("sizes", [(1,), (3, 1, 2)])
async def test_a_waiting_reader_gets_everything_in_order(sizes: Sequence[int]) -> None:
    mailbox, count = Mailbox("a"), 40
    reading = asyncio.create_task(collect(mailbox))
    left = iter(deltas(count))
    sent = 0
    while sent < count:
        for _ in range(sizes[sent % len(sizes)]):
            if (delta := next(left, None)) is not None:
                mailbox.put_nowait(delta)
                sent += 1
        await asyncio.sleep(0)
    assert_whole(await reading, count)


async def test_a_rest_ends_with_time_or_with_the_last_delta_and_with_nothing_else() -> None:
    mailbox = Mailbox("a")
    mailbox.rest(60.0)
    reading = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    mailbox.put_nowait(Delta((1,)))
    await asyncio.sleep(0.02)
    assert not reading.done()
    mailbox.put_nowait(Delta((2,), finish_reason=FinishReason.LENGTH))
    async with asyncio.timeout(10):
        assert (await reading).token_ids == (1, 2)

        mailbox = Mailbox("b")
        mailbox.rest(0.001)
        mailbox.put_nowait(Delta((1,)))
        assert (await mailbox.get()).token_ids == (1,)
        mailbox.rest(0.001)
        await asyncio.sleep(0.01)
        reading = asyncio.create_task(mailbox.get())  # rested, and nothing is here yet
        await asyncio.sleep(0)
        mailbox.put_nowait(Delta((2,)))
        assert (await reading).token_ids == (2,)

        mailbox.put_nowait(Delta((3,), finish_reason=FinishReason.LENGTH))
        mailbox.rest(60.0)  # the end is here already
        assert (await mailbox.get()).token_ids == (3,)


async def test_a_reader_that_was_cancelled_leaves_the_mailbox_usable() -> None:
    mailbox = Mailbox("a")
    for rest_s in (0.0, 0.01):
        if rest_s:
            mailbox.rest(rest_s)
        reading = asyncio.create_task(mailbox.get())
        await asyncio.sleep(0)
        reading.cancel()
        mailbox.put_nowait(Delta((1,)))  # to a reader that is gone, but has not run since
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert (await mailbox.get()).token_ids == (1,)
