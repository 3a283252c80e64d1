"""Edits of the logits before sampling, one class per stage, run in a fixed order.

Each works on the rows that ask for it and leaves all other rows alone, bit for bit, so that a row's result does not
depend on its company. Shapes: logits_RV is float32 [rows that sample, vocabulary].
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from streamserve.messages import SamplingParams


class SlotState:
    """What the stages remember of one slot: which tokens it has seen, and how often it generated each."""

    __slots__ = ("counts_V", "num_generated", "sampling", "seed", "seen_V")

    def __init__(self, sampling: SamplingParams, seed: int, history: Sequence[int], num_prompt: int, vocab_size: int) -> None:
        self.sampling = sampling
        self.seed = seed
        self.num_generated = len(history) - num_prompt
        self.seen_V: Tensor | None = None  # bool: in the prompt or the answer
        self.counts_V: Tensor | None = None  # int32: times in the answer
        if sampling.repetition_penalty != 1.0:
            self.seen_V = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen_V[torch.tensor([token for token in history if token < vocab_size], dtype=torch.int64)] = True
        if sampling.frequency_penalty or sampling.presence_penalty:
            self.counts_V = torch.zeros(vocab_size, dtype=torch.int32)
            generated = torch.tensor(history[num_prompt:], dtype=torch.int64)
            self.counts_V.index_add_(0, generated, torch.ones(len(generated), dtype=torch.int32))

    def took(self, token_id: int) -> None:
        """A token was sampled for this slot."""
        self.num_generated += 1
        if self.seen_V is not None:
            self.seen_V[token_id] = True
        if self.counts_V is not None:
            self.counts_V[token_id] += 1


class Stage(Protocol):
    """One edit of the logits."""

    def wanted_by(self, slot: SlotState) -> bool:
        """Whether this slot's row needs the stage now."""
        ...

    def apply(self, logits_V: Tensor, slot: SlotState) -> None:
        """Edit one row in place."""
        ...


class Penalties:
    """Repetition (CTRL, arXiv 1909.05858: over prompt and answer), frequency and presence (OpenAI: over the answer)."""

    def wanted_by(self, slot: SlotState) -> bool:
        return slot.seen_V is not None or slot.counts_V is not None

    def apply(self, logits_V: Tensor, slot: SlotState) -> None:
        if slot.seen_V is not None:
            penalty = slot.sampling.repetition_penalty
            penalised_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
            logits_V.copy_(torch.where(slot.seen_V, penalised_V, logits_V))
        if slot.counts_V is not None:
            logits_V -= slot.sampling.frequency_penalty * slot.counts_V
            logits_V -= slot.sampling.presence_penalty * (slot.counts_V > 0)


class LogitBias:
    """OpenAI's logit_bias: added to single tokens."""

    def wanted_by(self, slot: SlotState) -> bool:
        return bool(slot.sampling.logit_bias)

    def apply(self, logits_V: Tensor, slot: SlotState) -> None:
        ids, values = zip(*slot.sampling.logit_bias, strict=True)
        logits_V[torch.tensor(ids)] += torch.tensor(values, dtype=logits_V.dtype)


class MinTokens:
    """No end-of-sequence and no stop token before min_new_tokens."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = sorted(eos_token_ids)

    def wanted_by(self, slot: SlotState) -> bool:
        return slot.num_generated < slot.sampling.min_new_tokens

    def apply(self, logits_V: Tensor, slot: SlotState) -> None:
        eos = [] if slot.sampling.ignore_eos else self._eos
        logits_V[torch.tensor([*eos, *sorted(slot.sampling.stop_token_ids)], dtype=torch.int64)] = float("-inf")


def default_stages(eos_token_ids: frozenset[int]) -> tuple[Stage, ...]:
    """The stages in the order in which they run."""
    return (Penalties(), LogitBias(), MinTokens(eos_token_ids))
