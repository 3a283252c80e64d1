"""What every drafter of a runner needs: batches of its own passes, and the choice of a guess from logits.

Owns the pages behind a row's last one, where keys and values of guesses go, and how each slot's answer is sampled. Knows no
network.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamserve.cache.pool import KVPool, KVShape
from streamserve.engine.plan import Admission, Plan
from streamserve.engine.sampler import draw, uniform
from streamserve.kernels.ops import Batch
from streamserve.messages import SamplingParams


class Span(NamedTuple):
    """Tokens of one row of the step that a pass computes, or places of as many pairs."""

    row: int
    start: int
    token_ids: Sequence[int]


def drafter_pool(
    shape: KVShape, *, num_pages: int, page_size: int, num_slots: int, max_drafts: int, dtype: torch.dtype
) -> KVPool:
    """A drafter's memory: the target's pages, then those that Passes hands out."""
    return KVPool(shape, num_pages=num_pages + num_slots * _behind(max_drafts, page_size), page_size=page_size, dtype=dtype)


def _behind(max_drafts: int, page_size: int) -> int:
    return -(-max_drafts // page_size)


class Passes:
    """Batches over a step's rows, which `begin` tells of."""

    def __init__(self, pool: KVPool, *, num_slots: int, max_drafts: int) -> None:
        behind = _behind(max_drafts, pool.page_size)
        first = pool.num_pages - num_slots * behind
        self.pool = pool
        self._own_SP = np.arange(first, pool.num_pages, dtype=np.int32).reshape(num_slots, behind)
        self._table_BP = np.empty((0, 0), np.int32)

    def begin(self, plan: Plan, batch: Batch) -> None:
        """The step's page copies, and its page tables."""
        if plan.copies:
            self.pool.copy_pages([(copy.src, copy.dst) for copy in plan.copies])
        given_BP, behind = batch.page_table_BP.numpy(), self._own_SP.shape[1]
        self._table_BP = np.zeros((given_BP.shape[0], given_BP.shape[1] + behind), np.int32)
        self._table_BP[:, : given_BP.shape[1]] = given_BP
        for i, (row, kv_len) in enumerate(zip(plan.rows, batch.kv_len, strict=True)):
            end = -(-kv_len // self.pool.page_size)
            self._table_BP[i, end : end + behind] = self._own_SP[row.slot]

    def batch(self, spans: Sequence[Span], wanted: Sequence[int]) -> Batch:
        """A pass over `spans`; logits of the last token of those whose index is `wanted`."""
        ends = np.cumsum([len(span.token_ids) for span in spans])
        kv_len = [span.start + len(span.token_ids) for span in spans]
        width = -(-max(kv_len) // self.pool.page_size)
        positions = [at for span in spans for at in range(span.start, span.start + len(span.token_ids))]
        return Batch(
            token_ids_T=torch.tensor([token for span in spans for token in span.token_ids]),
            positions_T=torch.tensor(positions),
            row_start=[0, *ends.tolist()],
            kv_len=kv_len,
            page_table_BP=torch.from_numpy(self._table_BP[[span.row for span in spans], :width]),
            logit_rows_R=torch.tensor([int(ends[i]) - 1 for i in wanted], dtype=torch.int64),
            pool=self.pool,
        )


class _Answer(NamedTuple):
    sampling: SamplingParams
    seed: int
    num_prompt: int


class Guesser:
    """Chooses guesses as the sampler will choose tokens: the best at temperature 0, else with the random number of the token's
    place. A drafter whose distribution is close to the target's then guesses the same token, most of the time."""

    def __init__(self) -> None:
        self._answers: dict[int, _Answer] = {}

    def admit(self, admission: Admission) -> None:
        """A request enters a slot."""
        self._answers[admission.slot] = _Answer(admission.sampling, admission.seed, admission.num_prompt)

    def choose(self, logits_RV: Tensor, slots: Sequence[int], positions: Sequence[int]) -> list[int]:
        """One token per row of logits, for this position of this slot."""
        tokens: list[int] = torch.argmax(logits_RV, dim=-1).tolist()
        for i, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            answer = self._answers[slot]
            if not answer.sampling.is_greedy:
                tokens[i] = draw(logits_RV[i], answer.sampling, uniform(answer.seed, position - answer.num_prompt))
        return tokens
