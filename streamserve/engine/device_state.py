"""What a GPU remembers between steps, and how a plan reaches it: one buffer of integers per step, one copy, one kernel.

Owns the page table, the last sampled tokens and the sampling parameters of every slot in device memory, and the layout of
the buffer. Nothing here waits for the device: buffers in host memory take turns, and no more steps are under way than turns.

The buffer of a step with T tokens (rounded up to 4), R rows of logits and P prompt rows, in 32-bit words:

    tokens T | positions T | slots T | logit rows R | slots of the logit rows R | prompt starts P + 1 | page-table entries |
    sampling parameters | page copies: sources, targets
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamserve.cache.pool import DevicePool
from streamserve.engine.plan import Plan, Row
from streamserve.kernels.devices.device import Device
from streamserve.kernels.impl.triton_inputs import PARAMS, apply
from streamserve.kernels.ops import PromptRow, StepInputs

TURNS = 4  # steps whose buffers may be in use at once; the engine keeps two under way
_ALIGN = 4  # words: views into the buffer keep the 16-byte alignment that kernels were compiled for


@dataclass(frozen=True, slots=True)
class Loaded:
    """A plan on the device. `sampling` lists the plan's rows that sample, in the order of `slots_R`; behind them `slots_R`
    may hold surplus rows (-1). `graph_size` is the number of decode rows of the graph to replay, 0 for none."""

    inputs: StepInputs
    slots_R: Tensor
    sampling: list[int]
    slots: list[int]
    graph_size: int
    logit_tokens: dict[int, int]  # plan row that wants all logits -> its first token in T


class DeviceState:
    """Page table, last tokens and sampling parameters of all slots."""

    def __init__(
        self, device: Device, pool: DevicePool, *, num_slots: int, max_len: int, max_step_tokens: int, graph_sizes: Sequence[int]
    ) -> None:
        self._pool = pool
        self._graph_sizes = sorted(graph_sizes)
        pages = -(-max_len // pool.page_size) + 1
        tokens = _up(max_step_tokens + num_slots)
        # A step that admits every slot with all its pages is the largest.
        words = 3 * tokens + 3 * _up(num_slots) + _ALIGN + 3 * (num_slots * 2 + num_slots * pages)
        words += num_slots * (PARAMS + 1) + 2 * num_slots + 8 * _ALIGN
        where = device.torch_device
        self.page_table_SP = torch.zeros((num_slots, pages), dtype=torch.int32, device=where)
        self.last_token_S = torch.zeros(num_slots, dtype=torch.int32, device=where)
        self.params_SP = torch.zeros((num_slots, PARAMS), dtype=torch.int32, device=where)
        self._ints = torch.zeros(words, dtype=torch.int32, device=where)
        self._turns = [device.pinned((words,), torch.int32) for _ in range(TURNS)]
        self._arrays = [turn.numpy() for turn in self._turns]
        self._turn = 0
        self._num_pages = [0] * num_slots
        self.num_slots = num_slots

    def num_pages(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self._pool.page_size)

    def surplus_inputs(self, size: int) -> StepInputs:
        """The inputs of a captured step of `size` decode rows, filled with surplus rows: what the last plan left in the
        buffer would be taken for slots and positions."""
        inputs = self._inputs(size, (), size, size, 0)
        self._ints.zero_()
        inputs.slots_T.fill_(-1)
        return inputs

    def load(self, plan: Plan, params: Sequence[tuple[int, Sequence[int]]]) -> Loaded:
        """Bring the plan's integers to the device, in stream order. `params`: slot and sampling words of each admission."""
        for admission in plan.admissions:
            self._num_pages[admission.slot] = 0
        decode: list[int] = []
        prompts: list[int] = []
        for i, row in enumerate(plan.rows):
            is_plain = row.num_tokens == 1 and row.samples and not row.wants_all_logits
            (decode if is_plain else prompts).append(i)
        rows = plan.rows
        graph_size = 0 if prompts else self._graph_size(len(decode))
        num_decode = graph_size or len(decode)
        num_tokens = num_decode + sum(rows[i].num_tokens for i in prompts)
        sampling = decode + [i for i in prompts if rows[i].samples]
        num_logits = graph_size or len(sampling)
        ints, array = self._turns[self._turn], self._arrays[self._turn]
        self._turn = (self._turn + 1) % TURNS
        # tokens, positions, slots
        step, real = _up(num_tokens), len(decode)
        tokens, positions, slots = (array[k * step : k * step + num_tokens] for k in range(3))
        tokens[:real] = [-1 if rows[i].token_ids is None else rows[i].token_ids[0] for i in decode]  # type: ignore[index]
        positions[:real] = [rows[i].start for i in decode]
        slots[:real] = [rows[i].slot for i in decode]
        tokens[real:num_decode] = positions[real:num_decode] = 0
        slots[real:num_decode] = -1
        described, at, logit_tokens = [], num_decode, {}
        for i in prompts:
            row = rows[i]
            end = at + row.num_tokens
            tokens[at:end] = row.token_ids
            positions[at:end] = np.arange(row.start, row.start + row.num_tokens, dtype=np.int32)
            slots[at:end] = row.slot
            described.append(PromptRow(row.slot, at, row.num_tokens, row.start))
            if row.wants_all_logits:
                logit_tokens[i] = at
            at = end
        # which tokens yield logits, and for whom
        at, wide = 3 * step, _up(num_logits)
        array[at : at + num_decode] = np.arange(num_decode, dtype=np.int32)
        last = [prompt.first + prompt.num_tokens - 1 for prompt, i in zip(described, prompts, strict=True) if rows[i].samples]
        array[at + num_decode : at + num_logits] = last
        at += wide
        array[at : at + num_decode] = slots[:num_decode]
        array[at + num_decode : at + num_logits] = [rows[i].slot for i in sampling[real:]]
        slots_at = at
        at += wide
        starts_at = at
        if described:
            array[at : at + len(described) + 1] = [*(p.first for p in described), num_tokens]
            at = _up(at + len(described) + 1)
        # page table and parameters
        pages_at = at
        entries = self._new_pages(rows)
        array[at : at + len(entries)] = entries
        at += len(entries)
        params_at = at
        for slot, words in params:
            array[at] = slot
            array[at + 1 : at + 1 + PARAMS] = words
            at += PARAMS + 1
        copies_at, num_copies = at, len(plan.copies)
        if num_copies:
            array[at : at + num_copies] = [copy.src for copy in plan.copies]
            array[at + num_copies : at + 2 * num_copies] = [copy.dst for copy in plan.copies]
            at += 2 * num_copies
        self._ints[:at].copy_(ints[:at], non_blocking=True)
        apply(
            self._ints,
            self.last_token_S,
            self.page_table_SP,
            self.params_SP,
            num_tokens=num_tokens,
            slots_at=2 * step,
            pages_at=pages_at,
            num_pages=len(entries) // 3,
            params_at=params_at,
            num_params=len(params),
        )
        if num_copies:
            copies = self._ints[copies_at : copies_at + 2 * num_copies]
            self._pool.copy_pages(copies[:num_copies], copies[num_copies:])
        return Loaded(
            self._inputs(num_tokens, tuple(described), num_decode, num_logits, starts_at),
            self._ints[slots_at : slots_at + num_logits],
            sampling,
            [rows[i].slot for i in sampling],
            graph_size,
            logit_tokens,
        )

    def _inputs(
        self, num_tokens: int, prompts: tuple[PromptRow, ...], num_decode: int, num_logits: int, starts_at: int
    ) -> StepInputs:
        ints, step = self._ints, _up(num_tokens)
        return StepInputs(
            num_decode=num_decode,
            prompts=prompts,
            tokens_T=ints[:num_tokens],
            positions_T=ints[step : step + num_tokens],
            slots_T=ints[2 * step : 2 * step + num_tokens],
            prompt_starts=ints[starts_at : starts_at + len(prompts) + 1],
            page_table_SP=self.page_table_SP,
            logit_rows_R=ints[3 * step : 3 * step + num_logits],
            k=self._pool.k,
            v=self._pool.v,
        )

    def _graph_size(self, num_rows: int) -> int:
        """The smallest captured size that holds so many rows; 0 when none does."""
        at = bisect_left(self._graph_sizes, num_rows)
        return self._graph_sizes[at] if at < len(self._graph_sizes) else 0

    def _new_pages(self, rows: Sequence[Row]) -> list[int]:
        """Entries of the page table that the plan adds: slot, index, page, one after another."""
        entries: list[int] = []
        counts: Any = self._num_pages
        for row in rows:
            if row.new_pages:
                slot = row.slot
                count = counts[slot]
                for page in row.new_pages:
                    entries += (slot, count, page)
                    count += 1
                counts[slot] = count
        return entries


def _up(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN
