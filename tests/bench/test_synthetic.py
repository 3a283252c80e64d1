"""Acceptance by chance: how often guesses are taken, which ones, and a whole run on the fake engine."""

import asyncio
from contextlib import suppress

import pytest

pytest.importorskip("triton")

import torch

from bench.server import FAKE, config_of
from bench.synthetic import SURE, Bench, Judge, Odds, RandomDrafter, decisions, tokens_per_step
from streamserve.build import build
from streamserve.engine.device_sampler import DeviceSampler, DraftedRows
from streamserve.engine.plan import Admission
from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.devices.host import Host
from streamserve.kernels.impl.triton_sampling import Drafted
from streamserve.messages import SamplingParams

V, SLOTS = 301, 4


def test_the_formula_is_the_sum_of_its_chances() -> None:
    for p in (0.0, 0.3, 0.8, 1.0):
        for k in (1, 4, 6):
            assert tokens_per_step(p, k) == pytest.approx(sum(p**n for n in range(k + 1)))


@pytest.mark.parametrize("p", [0.0, 0.3, 0.8, 1.0])
def test_guesses_are_right_as_often_as_the_odds_say(p: float) -> None:
    odds = Odds(p)
    drawn = [odds.draw(4) for _ in range(300)]
    for n in range(1, 5):
        assert sum(one >= n for one in drawn) / len(drawn) == pytest.approx(p**n, abs=0.01)


def test_a_guess_is_compared_with_the_row_before_the_one_that_it_feeds() -> None:
    nothing = float("-inf")
    rows, values = decisions([0, 1, 2, 0, 0, 1], Odds(1.0))
    assert (rows, values) == ([0, 1, 4], [SURE, SURE, SURE])
    rows, values = decisions([0, 0, 1, 2, 3], Odds(0.0))
    assert (rows, values) == ([1, 2, 3], [nothing] * 3)
    assert decisions([0, 0, 0], Odds(1.0)) == ([], [])


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_all_guesses_are_taken_or_none(p: float) -> None:
    device = CUDA.find() or Host()
    where = device.torch_device
    params_SP = torch.full((SLOTS, 8), 0, dtype=torch.int32, device=where)
    last_token_S = torch.full((SLOTS,), -9, dtype=torch.int32, device=where)
    sampler = DeviceSampler(
        device, vocab_size=V, eos_token_ids=frozenset({0}), max_rows=16, params_SP=params_SP, last_token_S=last_token_S
    )
    for slot in (1, 2):
        words = sampler.admit(Admission(slot, SamplingParams(temperature=0.0), (1, 2), 2, 5))
        params_SP[slot] = torch.tensor(words, dtype=torch.int32)
    logits_RV = torch.randn(5, V, generator=torch.Generator().manual_seed(1)).to(where)
    best = logits_RV.argmax(1).tolist()
    slots, offsets, fed = [2, 1, 1, 1, 1], [0, 0, 1, 2, 3], [7, 8, 21, 22, 23]
    assert not {21, 22, 23} & set(best)
    as_ints = {name: torch.tensor(values, dtype=torch.int32, device=where) for name, values in (("o", offsets), ("f", fed))}
    drafted = DraftedRows(offsets, Drafted(as_ints["o"], as_ints["f"]))
    tokens_R = torch.full((5,), -9, dtype=torch.int32, device=where)
    Judge(Odds(p)).decide(logits_RV, drafted)
    sampler.sample(logits_RV, torch.tensor(slots, dtype=torch.int32, device=where), slots, tokens_R, drafted=drafted)
    device.synchronize()
    assert tokens_R.tolist() == (best if p == 0.0 else [best[0], 21, 22, 23, best[4]])
    assert last_token_S[1].item() == (best[1] if p == 0.0 else best[4])
    assert last_token_S[2].item() == best[0]


@pytest.mark.anyio
async def test_runs_with_and_without_guesses_bring_whole_answers() -> None:
    drafter, odds = RandomDrafter(range(1, 250), 4), Odds()
    built = build(config_of(FAKE, ["--fake-step-ms", "0.1"]), drafter=drafter)
    engine = asyncio.create_task(built.engine.run())
    try:
        bench = Bench(built, drafter, odds, range(1, 250))
        bench.plain()
        assert (await bench.run(2, 20)).num_drafted == 0
        bench.fixed(0.5, 3)
        run = await bench.run(1, 20)
        # 19 tokens behind the first, nearly all of them alone: made-up answers match no random guess, or seldom.
        assert 30 <= run.num_drafted <= 57 and 1.0 <= run.tokens_per_row < 1.5
        bench.auto(0.5, 2)
        assert (await bench.run(3, 20)).tokens_per_row >= 1.0
    finally:
        engine.cancel()
        with suppress(asyncio.CancelledError):
            await engine
        built.close()
