"""Logits to tokens: stages, temperature, top-k, top-p, min-p, one random number per token, log-probabilities; which guesses were
right.

Owns the sampling state of every slot. Runs where the logits are, in the step's own thread.

The random number of a token is a hash of (seed, index of the token in the answer), so a seed gives the same text
whatever else runs in the batch, and after a preemption too. Sampling is by inverse distribution function over the
tokens in a fixed order: one number per token, and each row is worked on by itself. Guesses change nothing of that: a place
behind right guesses is sampled as it would be in a step of its own.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from streamserve.engine.plan import Admission, Append, Masks
from streamserve.engine.stages import SlotState, Stage
from streamserve.messages import SamplingParams, TokenLogprobs

_MASK = (1 << 64) - 1
# Rows with top_k or top_p look at this many best tokens first; a whole sort of 49,152 logits takes 3 ms.
_SHORT_LIST = 512


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from the request's seed and the token's place: splitmix64 (Steele, Lea, Flood 2014)."""
    value = (seed * 0xD1342543DE82EF95 + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((value ^ (value >> 31)) >> 11) / (1 << 53)


class Sampler:
    """Sampling state of all slots, and the choice of tokens."""

    def __init__(self, vocab_size: int, stages: Sequence[Stage]) -> None:
        self._vocab_size = vocab_size
        self._stages = stages
        self._slots: dict[int, SlotState] = {}

    def admit(self, admission: Admission) -> None:
        """A request enters a slot."""
        self._slots[admission.slot] = SlotState(
            admission.sampling, admission.seed, admission.history, admission.num_prompt, self._vocab_size
        )

    def append(self, append: Append) -> None:
        """Tokens that were not sampled join a slot's answer."""
        state = self._slots[append.slot]
        for token_id in append.token_ids:
            state.took(token_id)
        assert state.num_generated == append.num_generated

    def sample(
        self, logits_RV: Tensor, slots: Sequence[int], masks: Mapping[int, Masks] | None = None
    ) -> tuple[list[int], list[tuple[TokenLogprobs, ...]]]:
        """One token per row, and its log-probabilities where asked for. Edits `logits_RV`. `masks`: bits per token, by row.

        Log-probabilities are those of the model itself, before penalties, masks and temperature.
        """
        states = [self._slots[slot] for slot in slots]
        logprobs_at = [i for i, state in enumerate(states) if state.sampling.logprobs is not None]
        logprobs_LV = torch.log_softmax(logits_RV[logprobs_at], dim=-1) if logprobs_at else None
        for stage in self._stages:
            for i, state in enumerate(states):
                if stage.wanted_by(state):
                    stage.apply(logits_RV[i], state)
        for i, words_W in (masks or {}).items():
            apply_mask(logits_RV[i], words_W)
        tokens = logits_RV.numpy().argmax(axis=-1).tolist()  # torch's takes 70 us for 49,152 logits, numpy's 5
        for i, state in enumerate(states):
            if not state.sampling.is_greedy:
                tokens[i] = draw(logits_RV[i], state.sampling, uniform(state.seed, state.num_generated))
            state.took(tokens[i])
        logprobs: list[tuple[TokenLogprobs, ...]] = [()] * len(states)
        if logprobs_LV is not None:
            for logprobs_V, i in zip(logprobs_LV, logprobs_at, strict=True):
                sampling = states[i].sampling
                logprobs[i] = (token_logprobs(logprobs_V, tokens[i], sampling.logprobs or 0, sampling.logprob_token_ids),)
        return tokens, logprobs

    def verify(
        self, logits_DV: Tensor, slot: int, guesses: Sequence[int], masks: Sequence[Masks | None] | None = None
    ) -> tuple[list[int], list[TokenLogprobs]]:
        """Tokens of a drafted row (engine/plan.py, Row), and their log-probabilities where asked for. Edits `logits_DV`, which
        has one line more than there are guesses; `masks` has as many.

        Place after place, up to the first whose token is not the guess: so nothing in the slot has to be taken back.
        """
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for place in range(len(guesses) + 1):
            words_W = None if masks is None else masks[place]
            chosen, entries = self.sample(logits_DV[place : place + 1], [slot], None if words_W is None else {0: words_W})
            tokens += chosen
            logprobs += entries[0]
            if place < len(guesses) and chosen[0] != guesses[place]:
                break
        return tokens, logprobs

    def prompt_logprobs(self, logits_TV: Tensor, slot: int, following: Sequence[int]) -> tuple[TokenLogprobs, ...]:
        """Log-probability of each following prompt token, given the logits one position before it."""
        num_top = self._slots[slot].sampling.prompt_logprobs or 0
        logprobs_TV = torch.log_softmax(logits_TV[: len(following)], dim=-1)
        return tuple(token_logprobs(row_V, token, num_top) for row_V, token in zip(logprobs_TV, following, strict=True))


def apply_mask(logits_V: Tensor, words_W: Masks) -> None:
    """Leave only tokens whose bit is set."""
    bits_V = np.unpackbits(words_W.view(np.uint8), bitorder="little")[: len(logits_V)]
    logits_V.masked_fill_(torch.from_numpy(bits_V).logical_not(), float("-inf"))


def token_logprobs(logprobs_V: Tensor, token_id: int, num_top: int, asked: Sequence[int] = ()) -> TokenLogprobs:
    """The entry of one token."""
    values, ids = torch.topk(logprobs_V, num_top)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    others = tuple(zip(asked, logprobs_V[list(asked)].tolist(), strict=True)) if asked else ()
    return TokenLogprobs(token_id, float(logprobs_V[token_id]), top, others)


def draw(logits_V: Tensor, sampling: SamplingParams, u: float) -> int:
    """Sample one row: temperature, then min-p, top-k and top-p on the distribution that it gives (vLLM's order).

    `u` in [0, 1) picks the token. Raises nothing: at least the best token always remains.
    """
    probs_V = torch.softmax(logits_V.double() / sampling.temperature, dim=-1)
    if sampling.top_k == 0 and sampling.top_p == 1.0 and sampling.min_p == 0.0:
        return _pick(probs_V, u)
    num_best = min(len(probs_V), max(sampling.top_k, _SHORT_LIST))
    probs_K, ids_K = torch.topk(probs_V, num_best)
    if num_best < len(probs_V) and _reaches_beyond(probs_K, sampling):
        probs_K, ids_K = torch.sort(probs_V, descending=True)
    if sampling.top_k:
        probs_K = probs_K[: sampling.top_k]
    if sampling.min_p:
        probs_K = probs_K[probs_K >= sampling.min_p * probs_K[0]]
    if sampling.top_p < 1.0:
        # The smallest set whose mass reaches top_p: a token stays while the mass before it is below top_p.
        before_K = torch.cumsum(probs_K, 0) - probs_K
        probs_K = probs_K[before_K < sampling.top_p * probs_K.sum()]
    return int(ids_K[_pick(probs_K, u)])


def _reaches_beyond(probs_K: Tensor, sampling: SamplingParams) -> bool:
    """Whether tokens outside the short list could still belong to the set sampled from."""
    if sampling.top_k:
        return False
    if sampling.min_p and float(probs_K[-1]) < sampling.min_p * float(probs_K[0]):
        return False
    return sampling.top_p >= 1.0 or float(probs_K.sum()) < sampling.top_p


def _pick(probs_K: Tensor, u: float) -> int:
    cumulative_K = torch.cumsum(probs_K, 0)
    target = u * cumulative_K[-1]
    return min(int(torch.searchsorted(cumulative_K, target, right=True)), len(probs_K) - 1)
