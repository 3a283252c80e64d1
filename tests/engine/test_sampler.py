"""Sampling against exact probabilities, and each stage against its definition."""

import numpy as np
import pytest
import torch

from streamserve.engine.plan import Admission, Append
from streamserve.engine.sampler import Sampler, draw, uniform
from streamserve.engine.stages import default_stages
from streamserve.messages import SamplingParams

V = 2000


def logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 4


def allowed(logits_V: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """The distribution that the definitions of the parameters give, worked out the slow way."""
    probs = torch.softmax(logits_V.double() / params.temperature, -1).tolist()
    ranked = sorted(enumerate(probs), key=lambda pair: -pair[1])
    if params.top_k:
        ranked = ranked[: params.top_k]
    ranked = [(token, p) for token, p in ranked if p >= params.min_p * ranked[0][1]]
    mass, kept, total = 0.0, [], sum(p for _, p in ranked)
    for token, p in ranked:
        if mass >= params.top_p * total:
            break
        kept.append((token, p))
        mass += p
    total = sum(p for _, p in kept)
    return {token: p / total for token, p in kept}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.4),
        SamplingParams(temperature=2.0, top_k=7),
        SamplingParams(temperature=1.0, top_p=0.7),
        SamplingParams(temperature=6.0, top_p=0.95),  # the kept set is longer than the short list
        SamplingParams(temperature=1.0, min_p=0.1),
        SamplingParams(temperature=1.5, top_k=40, top_p=0.8, min_p=0.02),
    ],
)
def test_draws_follow_the_distribution_that_the_parameters_define(params: SamplingParams) -> None:
    row = logits(1)[0]
    exact = allowed(row, params)
    count = 4000
    # Evenly spread numbers instead of random ones: every token's share is then right to within one draw.
    drawn = [draw(row, params, (i + 0.5) / count) for i in range(count)]
    assert set(drawn) <= set(exact)
    for token, p in exact.items():
        assert abs(drawn.count(token) - p * count) <= 1 + 1e-6, (token, p)


def test_uniform_numbers_are_spread_and_differ_by_seed_and_place() -> None:
    numbers = [uniform(seed, index) for seed in range(-50, 50) for index in range(100)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= u < 1 for u in numbers)
    for tenth in range(10):
        share = sum(tenth / 10 <= u < (tenth + 1) / 10 for u in numbers) / len(numbers)
        assert 0.09 < share < 0.11


def sampler_with(*params: SamplingParams, history: tuple[int, ...] = (1, 2, 3), num_prompt: int = 3, seed: int = 5) -> Sampler:
    sampler = Sampler(V, default_stages(frozenset({0})))
    for slot, given in enumerate(params):
        sampler.admit(Admission(slot, given, history, num_prompt, seed))
    return sampler


def test_a_seed_gives_the_same_tokens_whatever_the_company() -> None:
    seeded = SamplingParams(temperature=1.0, top_p=0.9)
    steps = [logits(10 + i, rows=3) for i in range(8)]
    alone = sampler_with(seeded)
    one = [alone.sample(step[:1].clone(), [0])[0][0] for step in steps]
    company = sampler_with(seeded, SamplingParams(temperature=0.0), SamplingParams(temperature=1.3, frequency_penalty=1.0))
    many = [company.sample(step.clone(), [0, 1, 2])[0][0] for step in steps]
    other = sampler_with(seeded, seed=6)
    different = [other.sample(step[:1].clone(), [0])[0][0] for step in steps]
    assert one == many
    assert one != different


def test_a_preempted_request_goes_on_where_it_was() -> None:
    seeded = SamplingParams(temperature=1.0, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3)
    steps = [logits(30 + i) for i in range(6)]
    straight = sampler_with(seeded)
    tokens = [straight.sample(step.clone(), [0])[0][0] for step in steps]
    resumed = sampler_with(seeded, history=(1, 2, 3, *tokens[:3]))
    assert [resumed.sample(step.clone(), [0])[0][0] for step in steps[3:]] == tokens[3:]


def test_penalties_do_what_their_papers_say() -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    row = logits(3)
    history = (4, 5, 9, 9)  # prompt 4 5, answer 9 9
    expected = row[0].clone()
    for token in (4, 5, 9):
        expected[token] = expected[token] / 2 if expected[token] > 0 else expected[token] * 2
    expected[9] -= 0.5 * 2 + 0.25
    edited = row.clone()
    sampler_with(params, history=history, num_prompt=2).sample(edited, [0])
    torch.testing.assert_close(edited[0], expected)


def test_bias_and_min_tokens_decide_what_may_come() -> None:
    row = logits(4)
    best = int(row.argmax())
    biased = sampler_with(SamplingParams(temperature=0.0, logit_bias=((77, 100.0),)))
    assert biased.sample(row.clone(), [0])[0] == [77]
    ends = Sampler(V, default_stages(frozenset({best})))
    params = SamplingParams(temperature=0.0, min_new_tokens=2)
    ends.admit(Admission(0, params, (1,), 1, 5))
    tokens = [ends.sample(row.clone(), [0])[0][0] for _ in range(3)]
    assert tokens[0] != best and tokens[1] != best and tokens[2] == best


def test_logprobs_are_the_models_own() -> None:
    row = logits(8)
    exact = torch.log_softmax(row[0], -1)
    params = SamplingParams(temperature=0.3, logit_bias=((3, 100.0),), logprobs=4)
    tokens, entries = sampler_with(params).sample(row.clone(), [0])
    (entry,) = entries[0]
    assert tokens == [3] == [entry.token_id]
    assert entry.logprob == pytest.approx(float(exact[3]), abs=1e-5)
    best = torch.topk(exact, 4)
    assert [token for token, _ in entry.top] == best.indices.tolist()
    assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert entry.asked == ()


def test_tokens_that_are_asked_for_have_the_models_own_logprobs_in_that_order() -> None:
    row = logits(8)
    exact = torch.log_softmax(row[0], -1)
    params = SamplingParams(temperature=0.0, logit_bias=((3, 100.0),), logprobs=0, logprob_token_ids=(9, 3, 0))
    _, entries = sampler_with(params).sample(row.clone(), [0])
    (entry,) = entries[0]
    assert [token for token, _ in entry.asked] == [9, 3, 0]
    assert [p for _, p in entry.asked] == pytest.approx(exact[[9, 3, 0]].tolist(), abs=1e-5)


def test_a_mask_leaves_nothing_else_in_its_row_and_changes_no_other() -> None:
    few = [7, 31, 32, 1999]
    words_W = np.zeros(-(-V // 32), dtype=np.int32)
    for token in few:
        words_W.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
    params = [
        SamplingParams(temperature=0.0, logprobs=1),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, top_k=2000, repetition_penalty=1.5, logit_bias=((5, 100.0),)),
    ]
    rows = logits(3, rows=3)
    free, entries = sampler_with(*params).sample(rows.clone(), [0, 1, 2])
    masked = [sampler_with(*params, seed=seed).sample(rows.clone(), [0, 1, 2], {0: words_W, 2: words_W}) for seed in range(30)]
    best = max(few, key=lambda token: float(rows[0, token]))
    assert {tokens[0] for tokens, _ in masked} == {best} and best != free[0]
    assert {tokens[1] for tokens, _ in masked} == {free[1]}
    assert {tokens[2] for tokens, _ in masked} <= set(few)
    assert masked[0][1][0][0].top == entries[0][0].top  # the model's own probabilities, before the mask
    assert masked[0][1][0][0].token_id == best


def test_tokens_that_were_appended_count_like_sampled_ones() -> None:
    params = SamplingParams(temperature=1.0, repetition_penalty=1.4, frequency_penalty=0.5, min_new_tokens=4)
    steps = [logits(20 + i) for i in range(6)]
    sampled, appended = sampler_with(params), sampler_with(params)
    tokens = [sampled.sample(step.clone(), [0])[0][0] for step in steps]
    first = appended.sample(steps[0].clone(), [0])[0][0]
    appended.append(Append(0, tuple(tokens[1:4]), 4))
    assert [first, *tokens[1:4], *(appended.sample(step.clone(), [0])[0][0] for step in steps[4:])] == tokens
