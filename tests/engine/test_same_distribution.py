"""Whoever guesses, and however: what is sampled follows the model's own distribution. And rules that look alike do not.

A tiny model, which reads the last token only, answers in many slots at once; every step verifies guesses of which some are right.
What followed each pair of tokens is held to the probabilities that the definitions of the parameters give. Where a random number
is used twice, or a guess is favoured, pairs show it.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from streamserve.cache.pool import KVPool
from streamserve.engine import sampler as sampler_module
from streamserve.engine.plan import Admission, Masks, Plan, Row
from streamserve.engine.runner import ModelRunner
from streamserve.engine.sampler import Sampler, draw, uniform
from streamserve.kernels.ops import Batch
from streamserve.messages import SamplingParams, TokenLogprobs
from tests.kernels.packed import small_spec

V = 12
NUM_SLOTS = 64
NUM_GUESSES = 3
LOGITS_VV = torch.randn(V, V, generator=torch.Generator().manual_seed(5))
TOKEN_OF = {float(LOGITS_VV[token, 0]): token for token in range(V)}  # whose logits these are


class Bigrams:
    """The model. Implements kernels.ops.Network."""

    def forward(self, batch: Batch) -> Tensor:
        return LOGITS_VV[batch.token_ids_T[batch.logit_rows_R]]


def params_at(temperature: float) -> SamplingParams:
    return SamplingParams(temperature=temperature, top_k=8, top_p=0.92)


def exact_probabilities(params: SamplingParams) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Of each token behind each, by the parameters' definitions, worked out the slow way."""
    probs_VV = np.zeros((V, V))
    for before, logits in enumerate(LOGITS_VV.tolist()):
        weights = [math.exp(logit / params.temperature) for logit in logits]
        ranked = sorted(((weight / sum(weights), token) for token, weight in enumerate(weights)), reverse=True)[: params.top_k]
        total, mass = sum(p for p, _ in ranked), 0.0
        for p, token in ranked:
            if mass < params.top_p * total:
                probs_VV[before, token] = p
            mass += p
    return probs_VV / probs_VV.sum(axis=1, keepdims=True)


class Table:
    """The sampler's own `draw`, tabulated: 600,000 calls of it would take half a minute."""

    def __init__(self, params: SamplingParams) -> None:
        self._parts = [self._find(before, params) for before in range(V)]
        rng = np.random.default_rng(1)
        for before, u in zip(rng.integers(0, V, 500).tolist(), rng.random(500).tolist(), strict=True):
            assert self(LOGITS_VV[before], params, u) == draw(LOGITS_VV[before], params, u)

    @staticmethod
    def _find(before: int, params: SamplingParams) -> tuple[list[float], list[int]]:
        """Where in [0, 1) each token's numbers begin, to the last bit."""
        begins, tokens = [0.0], [draw(LOGITS_VV[before], params, 0.0)]
        last = draw(LOGITS_VV[before], params, 1 - 2**-53)
        while tokens[-1] != last:
            low, high = int(begins[-1] * 2**53), 2**53 - 1
            while high - low > 1:
                middle = (low + high) // 2
                is_same = draw(LOGITS_VV[before], params, middle / 2**53) == tokens[-1]
                low, high = (middle, high) if is_same else (low, middle)
            begins.append(high / 2**53)
            tokens.append(draw(LOGITS_VV[before], params, begins[-1]))
        return begins, tokens

    def __call__(self, logits_V: Tensor, params: SamplingParams, u: float) -> int:
        begins, tokens = self._parts[TOKEN_OF[float(logits_V[0])]]
        return tokens[bisect_right(begins, u) - 1]


def chi_square_p(sampler: Sampler, params: SamplingParams, num_samples: int) -> float:
    """How likely it is that what follows pairs of tokens, in so many sampled ones, strays from the exact probabilities so far."""
    probs_VV = exact_probabilities(params)
    counts_VVV = np.zeros((V, V, V))
    answers, num_accepted, num_drafted = sampled(sampler, params, num_samples)
    for tokens in answers:
        np.add.at(counts_VVV, (tokens[:-2], tokens[1:-1], tokens[2:]), 1)
    assert 0.2 < num_accepted / num_drafted < 0.8, "guesses are to be right now and then"
    assert counts_VVV.sum() >= num_samples
    expected_VVV = counts_VVV.sum(axis=2, keepdims=True) * probs_VV
    if counts_VVV[expected_VVV == 0].any():
        return 0.0
    statistic, freedom = 0.0, 0
    for counts_V, expected_V in zip(counts_VVV.reshape(-1, V), expected_VVV.reshape(-1, V), strict=True):
        is_large = expected_V >= 5
        cells = [*zip(counts_V[is_large], expected_V[is_large], strict=True)]
        rare = counts_V[~is_large].sum(), expected_V[~is_large].sum()
        cells += [rare] if rare[1] >= 5 else []
        statistic += sum((count - expected) ** 2 / expected for count, expected in cells)
        freedom += max(0, len(cells) - 1)
    assert freedom > 100, "too few pairs came: a model that goes round in circles proves nothing"
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def sampled(sampler: Sampler, params: SamplingParams, num_samples: int) -> tuple[list[list[int]], int, int]:
    """Answers of all slots, how many guesses were right, and how many were looked at."""
    num_each = -(-num_samples // NUM_SLOTS) + 2
    pool = KVPool(small_spec(), num_pages=1)
    runner = ModelRunner(Bigrams(), pool, sampler, num_slots=NUM_SLOTS, max_len=num_each + 2 * NUM_GUESSES + 2)
    answers: list[list[int]] = [[slot % V] for slot in range(NUM_SLOTS)]  # the prompt first
    admissions = tuple(Admission(slot, params, (slot % V,), 1, seed=1000 + slot) for slot in range(NUM_SLOTS))
    likely_VV = LOGITS_VV.argsort(dim=1, descending=True).numpy()
    rng = np.random.default_rng(2)
    num_accepted = num_drafted = step = 0
    while open_slots := [slot for slot, tokens in enumerate(answers) if len(tokens) <= num_each]:
        guesses = np.array([answers[slot][-1] for slot in open_slots])
        chains = [guesses]
        for _ in range(NUM_GUESSES):
            guesses = likely_VV[guesses, rng.choice([0, 1, 2, 7], len(guesses), p=[0.7, 0.15, 0.1, 0.05])]
            chains.append(guesses)
        rows = [
            Row(slot, len(answers[slot]) - 1, 1 + NUM_GUESSES, tuple(chain), num_drafts=NUM_GUESSES)
            for slot, chain in zip(open_slots, np.stack(chains, axis=1).tolist(), strict=True)
        ]
        step += 1
        result = runner.execute(Plan(step, admissions if step == 1 else (), (), tuple(rows)))
        for slot, output in zip(open_slots, result.rows, strict=True):
            answers[slot] += output.token_ids
            num_accepted += len(output.token_ids) - 1
            num_drafted += min(len(output.token_ids), NUM_GUESSES)
    runner.close()
    return [tokens[1:] for tokens in answers], num_accepted, num_drafted


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_verified_samples_follow_the_models_distribution(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    params = params_at(temperature)
    monkeypatch.setattr(sampler_module, "draw", Table(params))
    assert chi_square_p(Sampler(V, ()), params, 200_000) > 0.001


# ---- rules that are wrong


class WrongSampler(Sampler):
    """Goes from place to place as the right one does; `choose` says what comes there."""

    def __init__(self, params: SamplingParams) -> None:
        super().__init__(V, ())
        self.params = params
        self.probs = exact_probabilities(params)

    def verify(
        self, logits_DV: Tensor, slot: int, guesses: Sequence[int], masks: Sequence[Masks | None] | None = None
    ) -> tuple[list[int], list[TokenLogprobs]]:
        state, tokens, first = self._slots[slot], [], self._slots[slot].num_generated
        for place, logits_V in enumerate(logits_DV):
            guess = guesses[place] if place < len(guesses) else None
            tokens.append(self.choose(logits_V, guess, state.seed, first, state.num_generated))
            state.took(tokens[-1])
            if tokens[-1] != guess:
                break
        return tokens, []

    def choose(self, logits_V: Tensor, guess: int | None, seed: int, first: int, index: int) -> int:
        """`first`: the place of the row's first token in the answer; `index`: of this one."""
        raise NotImplementedError

    def at(self, logits_V: Tensor, u: float) -> int:
        return sampler_module.draw(logits_V, self.params, u)


class Likely(WrongSampler):
    """A guess is taken if it is likelier than the random number says, and else the number chooses among all tokens."""

    def choose(self, logits_V: Tensor, guess: int | None, seed: int, first: int, index: int) -> int:
        u = uniform(seed, index)
        if guess is not None and self.probs[TOKEN_OF[float(logits_V[0])], guess] > u:
            return guess
        return self.at(logits_V, u)


class SecondTry(WrongSampler):
    """A token that is not the guess is thrown away, and chosen afresh."""

    def choose(self, logits_V: Tensor, guess: int | None, seed: int, first: int, index: int) -> int:
        token = self.at(logits_V, uniform(seed, index))
        return token if guess is None or token == guess else self.at(logits_V, uniform(seed + 10**6, index))


class OneNumber(WrongSampler):
    """All places of a row share its first one's random number."""

    def choose(self, logits_V: Tensor, guess: int | None, seed: int, first: int, index: int) -> int:
        return self.at(logits_V, uniform(seed, first))


class Right(WrongSampler):
    """The rule itself, in this form."""

    def choose(self, logits_V: Tensor, guess: int | None, seed: int, first: int, index: int) -> int:
        return self.at(logits_V, uniform(seed, index))


@pytest.mark.parametrize(("rule", "is_right"), [(Likely, False), (SecondTry, False), (OneNumber, False), (Right, True)])
def test_wrong_rules_are_told_from_the_right_one(
    rule: type[WrongSampler], is_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_at(1.0)
    monkeypatch.setattr(sampler_module, "draw", Table(params))
    p = chi_square_p(rule(params), params, 20_000)
    assert p > 0.001 if is_right else p < 1e-6
