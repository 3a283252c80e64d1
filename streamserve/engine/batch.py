"""Plan to tensors. Owns the device-side tables of the slots: page tables, known tokens, last sampled token. Whose embeddings take
the places of tokens the runner's Embeddings know."""

import numpy as np
import torch

from streamserve.cache.pool import KVPool
from streamserve.engine.embeddings import Embeddings
from streamserve.engine.plan import Plan, Row
from streamserve.kernels.ops import Batch


class SlotTables:
    """Page table and tokens of every slot, updated by plans in the order in which they run."""

    def __init__(self, num_slots: int, max_len: int, pool: KVPool) -> None:
        pages = -(-max_len // pool.page_size)
        self._pool = pool
        self._page_table_SP = np.zeros((num_slots, pages), dtype=np.int32)
        self._num_pages_S = np.zeros(num_slots, dtype=np.int64)
        self._num_prompt_S = np.zeros(num_slots, dtype=np.int64)
        self._tokens_SL = np.zeros((num_slots, max_len + 1), dtype=np.int64)

    def build(self, plan: Plan, embeddings: Embeddings) -> Batch:
        """Apply the plan's admissions, appends and new pages; return its rows as one batch. `embeddings` know the plan."""
        for admission in plan.admissions:
            self._num_pages_S[admission.slot] = 0
            self._num_prompt_S[admission.slot] = admission.num_prompt
            self._tokens_SL[admission.slot, : len(admission.history)] = admission.history
        for append in plan.appends:
            end = self._num_prompt_S[append.slot] + append.num_generated
            self._tokens_SL[append.slot, end - len(append.token_ids) : end] = append.token_ids
        slots = np.fromiter((row.slot for row in plan.rows), np.int64, len(plan.rows))
        for row in plan.rows:
            self._append_pages(row)
            if row.num_drafts:
                self._write_drafts(row)
        starts = np.fromiter((row.start for row in plan.rows), np.int64, len(plan.rows))
        counts = np.fromiter((row.num_tokens for row in plan.rows), np.int64, len(plan.rows))
        ends = np.cumsum(counts)
        offsets_T = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        positions_T = np.repeat(starts, counts) + offsets_T
        token_ids_T = self._tokens_SL[np.repeat(slots, counts), positions_T]
        max_pages = int(self._num_pages_S[slots].max())
        embedded = embeddings.of(plan, (ends - counts).tolist())
        if embedded is not None:
            token_ids_T[embedded.tokens_M.numpy()] = 0  # whatever is there in the vocabulary, nobody looks at it
        return Batch(
            token_ids_T=torch.from_numpy(token_ids_T),
            positions_T=torch.from_numpy(positions_T),
            row_start=[0, *ends.tolist()],
            kv_len=(starts + counts).tolist(),
            page_table_BP=torch.from_numpy(self._page_table_SP[slots, :max_pages]),
            logit_rows_R=torch.from_numpy(_logit_rows(plan, ends)),
            pool=self._pool,
            embedded=embedded,
            rope_3T=embeddings.rope(plan),
        )

    def took(self, slot: int, position: int, token_id: int) -> None:
        """A token was sampled; it belongs at `position` of the slot."""
        self._tokens_SL[slot, position] = token_id

    def tokens(self, slot: int, start: int, end: int) -> list[int]:
        """Known tokens of a slot."""
        ids: list[int] = self._tokens_SL[slot, start:end].tolist()
        return ids

    def _append_pages(self, row: Row) -> None:
        if row.new_pages:
            count = int(self._num_pages_S[row.slot])
            self._page_table_SP[row.slot, count : count + len(row.new_pages)] = row.new_pages
            self._num_pages_S[row.slot] = count + len(row.new_pages)

    def _write_drafts(self, row: Row) -> None:
        """Guesses count as the slot's tokens for this step; what is sampled takes their places, and what lies behind it is never
        looked at."""
        assert row.token_ids is not None and row.num_tokens == 1 + row.num_drafts
        self._tokens_SL[row.slot, row.start + 1 : row.start + row.num_tokens] = row.token_ids[1:]


def _logit_rows(plan: Plan, ends: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Positions of the batch whose logits are wanted: all of a row that asks for them, else its last and, of a drafted row, those
    of all its guesses, if it samples."""
    wanted: list[int] = []
    for row, end in zip(plan.rows, ends.tolist(), strict=True):
        if row.wants_all_logits:
            wanted.extend(range(end - row.num_tokens, end))
        elif row.samples:
            wanted.extend(range(end - 1 - row.num_drafts, end))
    return np.array(wanted, dtype=np.int64)
