"""What a GPU remembers between steps, and how a plan reaches it: one buffer of integers per step, one copy, one kernel.

Owns the page table, the last sampled tokens and the sampling parameters of every slot in device memory, and the layout of
the buffer. Nothing here waits for the device: buffers in host memory take turns, and no more steps are under way than turns.

The buffer of a step with T tokens (rounded up to 4), R rows of logits and P prompt rows, in 32-bit words:

    tokens T | positions T | slots T | logit rows R | slots of the logit rows R | prompt starts P + 1 | page-table entries |
    sampling parameters | page copies: sources, targets

A captured step finds all but the last three where it found them at its capture, so T, R and P follow from its size; what the
plan does not fill are surplus tokens and rows (slot -1) and prompts of no tokens.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from streamserve.cache.pool import DevicePool
from streamserve.engine.plan import Plan, Row
from streamserve.kernels.devices.device import Device
from streamserve.kernels.impl.triton_inputs import PARAMS, apply
from streamserve.kernels.ops import PromptRow, StepInputs

TURNS = 4  # steps whose buffers may be in use at once; the engine keeps two under way
MAX_PROMPTS = 16  # prompt rows of a captured step
_ALIGN = 4  # words: views into the buffer keep the 16-byte alignment that kernels were compiled for


class StepSize(NamedTuple):
    """What a captured step holds at most: decode rows, and tokens of up to MAX_PROMPTS prompt rows. No prompt tokens: it
    takes decode rows alone."""

    num_decode: int
    num_prompt: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_decode + self.num_prompt

    @property
    def num_logits(self) -> int:
        return self.num_decode + (MAX_PROMPTS if self.num_prompt else 0)

    @property
    def prompts(self) -> tuple[PromptRow, ...]:
        """Prompt rows that take as much room as any it may hold."""
        if not self.num_prompt:
            return ()
        empty = PromptRow(slot=-1, first=self.num_decode, num_tokens=0, start=0)
        return (*[empty] * (MAX_PROMPTS - 1), PromptRow(slot=-1, first=self.num_decode, num_tokens=self.num_prompt, start=1))


class Sizes:
    """The captured sizes, and which of them fits a step."""

    def __init__(self, sizes: Sequence[StepSize]) -> None:
        self._decode_rows = sorted(size.num_decode for size in sizes if not size.num_prompt)
        self._mixed_rows = sorted({size.num_decode for size in sizes if size.num_prompt})
        self._prompt_tokens = {
            rows: sorted(size.num_prompt for size in sizes if size.num_prompt and size.num_decode == rows)
            for rows in self._mixed_rows
        }

    def fitting(self, num_decode: int, prompt_lens: Sequence[int]) -> StepSize | None:
        """The smallest for so many decode rows and these prompt rows; None where none is large enough."""
        if not prompt_lens:
            rows = _at_least(self._decode_rows, num_decode)
            return None if rows is None else StepSize(rows)
        rows = _at_least(self._mixed_rows, num_decode)
        if rows is None or len(prompt_lens) > MAX_PROMPTS:
            return None
        tokens = _at_least(self._prompt_tokens[rows], sum(prompt_lens))
        return None if tokens is None else StepSize(rows, tokens)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A plan on the device. `sampling` lists the plan's rows that sample, in the order of the inputs' logit rows, behind which
    there may be surplus ones. `size` says which captured step to replay, None: none fits."""

    inputs: StepInputs
    sampling: list[int]
    slots: list[int]
    size: StepSize | None
    logit_tokens: dict[int, int]  # plan row that wants all logits -> its first token in T


class DeviceState:
    """Page table, last tokens and sampling parameters of all slots."""

    def __init__(
        self,
        device: Device,
        pool: DevicePool,
        *,
        num_slots: int,
        max_len: int,
        max_step_tokens: int,
        sizes: Sequence[StepSize],
        may_capture: Callable[[tuple[PromptRow, ...]], bool],
    ) -> None:
        """`sizes`: of steps that may be captured. `may_capture`: whether a captured step may do these prompt rows."""
        self._pool = pool
        self._captured = Sizes(())
        self._may_capture = may_capture
        self.max_logits = num_slots + MAX_PROMPTS  # rows, surplus ones included
        pages = -(-max_len // pool.page_size) + 1
        tokens = _up(max(max_step_tokens + num_slots, *(size.num_tokens for size in sizes), 0))
        # A step that admits every slot with all its pages is the largest.
        words = 3 * tokens + 3 * _up(self.max_logits) + _ALIGN + 3 * (num_slots * 2 + num_slots * pages)
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

    def captured(self, sizes: Sequence[StepSize]) -> None:
        """From now on, steps that fit one of these are to be replayed."""
        self._captured = Sizes(sizes)

    def surplus_inputs(self, size: StepSize) -> StepInputs:
        """The inputs of a captured step, filled with surplus rows: what the last plan left in the buffer would be taken for
        slots and positions."""
        inputs = self._inputs(size.num_tokens, size.prompts, size.num_decode, size.num_logits)
        self._ints.zero_()
        inputs.slots_T.fill_(-1)
        inputs.logit_slots_R.fill_(-1)
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
        described, logit_tokens = self._describe(rows, prompts, len(decode))
        size = None if logit_tokens else self._fitting(len(decode), described)
        if size is not None and size.num_decode != len(decode):
            described, _ = self._describe(rows, prompts, size.num_decode)
        real, end = len(decode), sum(prompt.num_tokens for prompt in described)
        num_decode = real if size is None else size.num_decode
        end += num_decode  # of the last real token
        sampling = decode + [i for i in prompts if rows[i].samples]
        if size is None:
            num_tokens, num_logits, num_prompts = end, len(sampling), len(described)
        else:
            num_tokens, num_logits, num_prompts = size.num_tokens, size.num_logits, len(size.prompts)
        ints, array = self._turns[self._turn], self._arrays[self._turn]
        self._turn = (self._turn + 1) % TURNS
        # tokens, positions, slots
        step = _up(num_tokens)
        tokens, positions, slots = (array[k * step : k * step + num_tokens] for k in range(3))
        tokens[:real] = [-1 if rows[i].token_ids is None else rows[i].token_ids[0] for i in decode]  # type: ignore[index]
        positions[:real] = [rows[i].start for i in decode]
        slots[:real] = [rows[i].slot for i in decode]
        for first, last in ((real, num_decode), (end, num_tokens)):
            tokens[first:last] = positions[first:last] = 0
            slots[first:last] = -1
        for i, prompt in zip(prompts, described, strict=True):
            place = slice(prompt.first, prompt.first + prompt.num_tokens)
            tokens[place] = rows[i].token_ids
            positions[place] = np.arange(prompt.start, prompt.start + prompt.num_tokens, dtype=np.int32)
            slots[place] = prompt.slot
        # which tokens yield logits, and for whom
        at, wide = 3 * step, _up(num_logits)
        array[at : at + num_logits] = 0
        array[at : at + real] = np.arange(real, dtype=np.int32)
        ends = [p.first + p.num_tokens - 1 for p, i in zip(described, prompts, strict=True) if rows[i].samples]
        array[at + real : at + len(sampling)] = ends
        slots_at = at + wide
        array[slots_at : slots_at + num_logits] = -1
        array[slots_at : slots_at + len(sampling)] = [rows[i].slot for i in sampling]
        at = slots_at + wide
        if num_prompts:
            array[at : at + num_prompts + 1] = end
            array[at : at + len(described)] = [prompt.first for prompt in described]
            at = _up(at + num_prompts + 1)
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
        inputs = self._inputs(num_tokens, described, num_decode, num_logits)
        return Loaded(
            inputs,
            sampling,
            [rows[i].slot for i in sampling],
            size,
            logit_tokens,
        )

    @staticmethod
    def _describe(rows: Sequence[Row], prompts: Sequence[int], first: int) -> tuple[tuple[PromptRow, ...], dict[int, int]]:
        """The prompt rows, laid out from token `first` on, and the first tokens of those that want all logits."""
        described, logit_tokens = [], {}
        for i in prompts:
            row = rows[i]
            described.append(PromptRow(row.slot, first, row.num_tokens, row.start))
            if row.wants_all_logits:
                logit_tokens[i] = first
            first += row.num_tokens
        return tuple(described), logit_tokens

    def _fitting(self, num_decode: int, prompts: tuple[PromptRow, ...]) -> StepSize | None:
        if prompts and not self._may_capture(prompts):
            return None
        return self._captured.fitting(num_decode, [prompt.num_tokens for prompt in prompts])

    def _inputs(self, num_tokens: int, prompts: tuple[PromptRow, ...], num_decode: int, num_logits: int) -> StepInputs:
        ints, step = self._ints, _up(num_tokens)
        slots_at = 3 * step + _up(num_logits)
        starts_at = slots_at + _up(num_logits)
        return StepInputs(
            num_decode=num_decode,
            prompts=prompts,
            tokens_T=ints[:num_tokens],
            positions_T=ints[step : step + num_tokens],
            slots_T=ints[2 * step : 2 * step + num_tokens],
            prompt_starts=ints[starts_at : starts_at + len(prompts) + 1],
            page_table_SP=self.page_table_SP,
            logit_rows_R=ints[3 * step : 3 * step + num_logits],
            logit_slots_R=ints[slots_at : slots_at + num_logits],
            k=self._pool.k,
            v=self._pool.v,
        )

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


def _at_least(ascending: Sequence[int], wanted: int) -> int | None:
    at = bisect_left(ascending, wanted)
    return ascending[at] if at < len(ascending) else None


def _up(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN
