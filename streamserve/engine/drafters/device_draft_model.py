"""A smaller model of the same vocabulary as the drafter of a GPU's runner: what draft_model.py is on a CPU.

Owns the drafter's buffers and graphs, and from where on each slot has tokens that it has not read. Behind a step it first reads,
in one pass, what is certain of prompts (and of answers that it did not follow while nobody wanted guesses); then, for all rows
that want guesses together, the last tokens of each, as many as a step may bring, and guess after guess in passes of one token.
Where rows end only the device knows (kernels/impl/triton_guesses.py). What a row may have brought is read anew, guessed right or
not: tokens before the newest one make such a pass hardly longer.

Guesses are chosen as the sampler will choose tokens: the best at temperature 0, else with the random numbers of the token's
place and the answer's top-k, top-p and min-p. Keys and values lie in a pool of its own, under the page numbers of the target's;
those of guesses go behind a row's last page into pages that are nobody else's in the step, and are not kept.

Shape letters: T tokens of a pass, R rows, W tokens of a row's first pass, K guesses, V vocabulary, E hidden size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamserve.cache.pool import DevicePool
from streamserve.engine.device_state import MAX_PROMPTS, TURNS, DeviceState, StepSize
from streamserve.engine.drafters.device_drafter import Guesses
from streamserve.engine.drafters.page_memory import PageMemory
from streamserve.engine.plan import Admission, Plan, Row
from streamserve.kernels.devices.device import Device, Replay
from streamserve.kernels.impl.triton_guesses import AskedRows, GuessKernels, Pass
from streamserve.kernels.impl.triton_sampling import Drafted, SamplingKernels
from streamserve.kernels.ops import DeviceNetwork, PromptRow, StepInputs

MAX_ROWS = 64  # rows of a step that get guesses; in larger batches these seldom pay
MAX_CATCH_UP = 1024  # tokens of an answer that are read in one step: more would hold up everybody else
READ_SIZES = (64, 128, 256, 512, 1024)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of captured passes
_ALIGN = 4  # words: views keep the 16-byte alignment that kernels were compiled for

Array = np.ndarray[Any, np.dtype[np.int32]]


def num_own_pages(num_slots: int, max_drafts: int, page_size: int) -> int:
    """Pages that the drafter has for guesses, behind the target's pages in its pool."""
    return min(num_slots, MAX_ROWS) * _pages_ahead(max_drafts, page_size)


def max_guessed_tokens(num_slots: int, max_drafts: int) -> int:
    """Most decode rows of a pass, as attention sees them."""
    return min(num_slots, MAX_ROWS) * _window(max_drafts)


def _pages_ahead(max_drafts: int, page_size: int) -> int:
    """That guesses behind a row's last page may need."""
    return -(-max_drafts // page_size)


def _window(max_drafts: int) -> int:
    """Tokens of a row that a step may bring: a known one, guesses and one more."""
    return max_drafts + 2


class DeviceDraftModel:
    """Implements DeviceDrafter. `vocab_size`: tokens that the network knows; others, which no tokenizer gives, are read as
    token 0. `num_target_tokens`: those of the target; no others are guessed. `pool`: the target's pages, then num_own_pages().
    `state`: of the target. `read_sizes`: tokens of passes over prompts that are captured, if any are (`use_graphs`)."""

    def __init__(
        self,
        device: Device,
        network: DeviceNetwork,
        pool: DevicePool,
        state: DeviceState,
        *,
        vocab_size: int,
        num_target_tokens: int,
        max_len: int,
        max_drafts: int,
        max_step_tokens: int,
        read_sizes: Sequence[int] = READ_SIZES,
        use_graphs: bool = True,
    ) -> None:
        self._device, self._network, self._pool, self._state = device, network, pool, state
        self._vocab_size, self._num_guessable = vocab_size, min(vocab_size, num_target_tokens)
        self._max_drafts, self._max_read = max_drafts, max_step_tokens
        self._num_own = _pages_ahead(max_drafts, pool.page_size)
        self._window = _window(max_drafts)
        self._max_rows = min(state.num_slots, MAX_ROWS)
        self._row_sizes = [rows for rows in _ROWS if rows < self._max_rows] + [self._max_rows]
        self._read_sizes = sorted(size for size in read_sizes if size <= max_step_tokens)
        self._use_graphs = use_graphs
        self._unread: dict[int, int] = {}  # by slot: its first token that was not read; none: all before its next row were
        self._guessed: dict[int, int] = {}  # by slot, after guesses: from here on all before its next row will have been read
        self._prompt_lens: dict[int, int] = {}
        self._admitted: dict[int, Admission] = {}  # by slot, until its first row: an encoder may be waited for before that
        self._memory = PageMemory(pool.num_pages, pool.page_size)
        where = device.torch_device
        self._kernels = GuessKernels(state.num_slots, max_len, window=self._window, vocab_size=vocab_size, device=where)
        self._sampling = SamplingKernels(vocab_size, self._max_rows, where, pdl=device.supports_pdl)
        # What the host says in a step: rows that want guesses, 4 words each; then positions, slots and starts of what is read.
        self._read_at = 4 * _up(self._max_rows)
        words = self._read_at + 2 * _up(max_step_tokens) + _up(max(state.num_slots, MAX_PROMPTS) + 1)
        self._ints = torch.zeros(words, dtype=torch.int32, device=where)
        self._turns = [device.pinned((words,), torch.int32) for _ in range(TURNS)]
        self._arrays = [turn.numpy() for turn in self._turns]
        guesses = (max_drafts, self._max_rows)
        self._back = [device.pinned(guesses, torch.int32) for _ in range(TURNS)]
        self._turn = 0
        integers = partial(torch.zeros, dtype=torch.int32, device=where)
        self._read_tokens_T = integers(_up(max_step_tokens))
        self._pass = Pass(*(integers(self._max_rows * self._window) for _ in Pass._fields))
        self._newest_R = integers(self._max_rows)
        self._guesses_KR = integers(guesses)
        self._offsets_KR = torch.arange(max_drafts, dtype=torch.int32, device=where).unsqueeze(1).expand(guesses).contiguous()
        self._every_T = torch.arange(self._max_rows * self._window, dtype=torch.int32, device=where)
        self._table_RP = integers((self._max_rows, state.page_table_SP.shape[1] + self._num_own))
        self._logits_RV = torch.zeros((self._max_rows, vocab_size), dtype=torch.float32, device=where)
        self._guessing: dict[int, Replay[None]] = {}  # by rows
        self._reading: dict[int, Replay[None]] = {}  # by tokens

    def warm_up_long(self, max_len: int, max_chunk: int) -> None:
        """See DeviceDrafter."""
        self._network.warm_up(self._pool.k, self._pool.v, max_len, max_chunk)

    def warm_up(self) -> None:
        """See DeviceDrafter."""
        for num_rows in {min(rows, self._max_rows) for rows in (1, 2, 4, 8, 16, self._max_rows)}:
            self._clear()
            self._guess(num_rows)

    def capture(self, progress: Callable[[int, int], None]) -> None:
        """See DeviceDrafter. The largest first: the smaller ones reuse its memory."""
        if not self._use_graphs:
            return
        num_graphs = len(self._read_sizes) + len(self._row_sizes)
        for size in reversed(self._read_sizes):
            inputs = self._read_inputs(size, StepSize(0, size).prompts)
            self._clear()
            inputs.slots_T.fill_(-1)
            self._reading[size] = self._device.capture(partial(self._read, inputs), is_warm=bool(self._reading))
            progress(len(self._reading), num_graphs)
        for num_rows in reversed(self._row_sizes):
            self._clear()
            self._guessing[num_rows] = self._device.capture(partial(self._guess, num_rows), is_warm=bool(self._guessing))
            progress(len(self._reading) + len(self._guessing), num_graphs)

    def _clear(self) -> None:
        """What the last plan left in the buffer would be taken for slots and positions."""
        self._ints.zero_()
        self._ints[: _up(self._max_rows)].fill_(-1)

    def follow(self, plan: Plan, inputs: StepInputs, unwanted: frozenset[int]) -> Guesses | None:
        """See DeviceDrafter."""
        for copy in plan.copies:
            self._memory.copied(copy.src, copy.dst)
        if plan.copies:
            pairs = torch.tensor([(copy.src, copy.dst) for copy in plan.copies], dtype=torch.int32)
            staged = self._device.pinned(tuple(pairs.shape), torch.int32).copy_(pairs)
            self._pool.copy_pages(*staged.to(self._device.torch_device, non_blocking=True).unbind(1))
        self._kernels.note(inputs.tokens_T, inputs.positions_T, inputs.slots_T)
        spans, asking = self._share_out(plan, unwanted)
        if not spans and not asking:
            return None
        turn, array = self._turn, self._arrays[self._turn]
        self._turn = (turn + 1) % TURNS
        num_rows = self._write_asked(plan, asking, array)
        size, prompts, end = self._write_spans(spans, array)
        self._ints[:end].copy_(self._turns[turn][:end], non_blocking=True)
        if spans and size is not None:
            self._reading[size].replay()
        elif spans:
            self._read(self._read_inputs(sum(span.num_tokens for span in spans), prompts))
        if not asking:
            return None
        if num_rows in self._guessing:
            self._guessing[num_rows].replay()
        else:
            self._guess(num_rows)
        back = self._back[turn]
        back.copy_(self._guesses_KR, non_blocking=True)
        return Guesses(back, {row: line for line, (row, _) in enumerate(asking)})

    def _share_out(self, plan: Plan, unwanted: frozenset[int]) -> tuple[list[PromptRow], list[tuple[int, int]]]:
        """What is read before guesses are made, and which rows get some: each row, and the first position that it reads."""
        spans: list[PromptRow] = []
        asking: list[tuple[int, int]] = []
        room = self._max_read
        self._admitted |= {admission.slot: admission for admission in plan.admissions}
        for i, row in enumerate(plan.rows):
            pages = self._state.pages_of(row.slot)
            if (admission := self._admitted.pop(row.slot, None)) is not None:
                start = self._open(admission, row, pages)
            else:
                self._memory.fresh(row.new_pages)
                if row.slot in self._guessed:
                    self._memory.has_read(pages, self._guessed.pop(row.slot), row.start)
                start = self._unread.pop(row.slot, row.start)
            num_known = row.num_tokens - row.num_drafts
            wants = row.num_wanted > 0 and row.samples and i not in unwanted and len(asking) < self._max_rows
            if not wants and num_known == 1:  # an answer that nobody wants guesses for is not followed
                self._unread[row.slot] = start
                continue
            end = row.start + num_known - wants  # a last known token is read with those behind it
            count = min(end - start, room, max(row.num_tokens, MAX_CATCH_UP))
            if count > 0:
                self._memory.has_read(pages, start, start + count)
                spans.append(PromptRow(row.slot, self._max_read - room, count, start))
                room -= count
            if start + count < end:
                self._unread[row.slot] = start + count
            elif wants:
                self._guessed[row.slot] = end
                asking.append((i, end))
        return spans, asking

    def _open(self, admission: Admission, row: Row, pages: Sequence[int]) -> int:
        """A request's first row in a slot. Returns from where on it is to be read: what came out of the tree and was
        never read, is now."""
        slot = admission.slot
        self._prompt_lens[slot] = admission.num_prompt
        self._unread.pop(slot, None)
        self._guessed.pop(slot, None)
        start = self._memory.opened(pages, row.start)
        if start < row.start:
            tokens = torch.tensor(admission.history[start : row.start], dtype=torch.int32)
            staged = self._device.pinned(tuple(tokens.shape), torch.int32).copy_(tokens)
            self._kernels.put(slot, start, staged.to(self._device.torch_device, non_blocking=True))
        return start

    def _write_asked(self, plan: Plan, asking: Sequence[tuple[int, int]], array: Array) -> int:
        """Rows that want guesses, and surplus ones up to a captured number, which is returned."""
        if not asking:
            return 0
        num_rows = next(rows for rows in self._row_sizes if rows >= len(asking))
        asked_4R = array[: self._read_at].reshape(4, -1)
        asked_4R[0, :num_rows] = -1
        for line, (i, begin) in enumerate(asking):
            slot = plan.rows[i].slot
            asked_4R[:, line] = slot, self._prompt_lens[slot], begin, len(self._state.pages_of(slot))
        return num_rows

    def _write_spans(self, spans: Sequence[PromptRow], array: Array) -> tuple[int | None, tuple[PromptRow, ...], int]:
        """What is read: the captured size that fits, if any does, the rows, and where in the buffer they end."""
        prompts = tuple(spans)
        if not spans:
            return None, prompts, self._read_at
        num_read = spans[-1].first + spans[-1].num_tokens
        size = None
        if len(spans) <= MAX_PROMPTS and self._network.may_capture(prompts):
            size = next((size for size in self._read_sizes if size >= num_read and size in self._reading), None)
        num_tokens, num_rows = (num_read, len(spans)) if size is None else (size, MAX_PROMPTS)
        positions_at, slots_at, starts_at = self._places(num_tokens)
        end = starts_at + num_rows + 1
        array[positions_at : positions_at + num_tokens] = 0
        array[slots_at : slots_at + num_tokens] = -1
        array[starts_at:end] = num_read
        for i, (slot, first, count, start) in enumerate((s.slot, s.first, s.num_tokens, s.start) for s in spans):
            array[positions_at + first : positions_at + first + count] = np.arange(start, start + count, dtype=np.int32)
            array[slots_at + first : slots_at + first + count] = slot
            array[starts_at + i] = first
        return size, prompts, end

    def _places(self, num_tokens: int) -> tuple[int, int, int]:
        """Where in the buffer positions, slots and starts of a reading pass are."""
        step = _up(num_tokens)
        return self._read_at, self._read_at + step, self._read_at + 2 * step

    def _read(self, inputs: StepInputs) -> None:
        """Keys and values of certain tokens."""
        self._kernels.read(inputs.tokens_T, inputs.positions_T, inputs.slots_T)
        self._network.forward(inputs)

    def _read_inputs(self, num_tokens: int, prompts: tuple[PromptRow, ...]) -> StepInputs:
        positions_at, slots_at, starts_at = self._places(num_tokens)
        nothing = self._every_T[:0]
        return StepInputs(
            num_decode=0,
            prompts=prompts,
            tokens_T=self._read_tokens_T[:num_tokens],
            positions_T=self._ints[positions_at : positions_at + num_tokens],
            slots_T=self._ints[slots_at : slots_at + num_tokens],
            prompt_starts=self._ints[starts_at : starts_at + len(prompts) + 1],
            page_table_SP=self._state.page_table_SP,
            logit_rows_R=nothing,
            logit_slots_R=nothing,
            k=self._pool.k,
            v=self._pool.v,
        )

    def _guess(self, num_rows: int) -> None:
        """Guesses behind the newest tokens of so many rows."""
        rows = AskedRows(*self._ints[: self._read_at].view(4, -1)[:, :num_rows].unbind(0))
        state, kernels = self._state, self._kernels
        newest_R, table_RP = self._newest_R[:num_rows], self._table_RP[:num_rows]
        first = Pass(*(part[: num_rows * self._window] for part in self._pass))
        further = Pass(*(part[:num_rows] for part in self._pass))
        kernels.last_tokens(rows, state.params_SP, state.last_token_S, newest_R, first)
        first_own = self._pool.num_pages - self._max_rows * self._num_own
        kernels.own_pages(rows, state.page_table_SP, table_RP, first_own=first_own, num_own=self._num_own)
        hidden_TE = self._network.forward(self._guess_inputs(first, table_RP, is_drafted=True))
        hidden_RE = hidden_TE.view(num_rows, self._window, -1)[:, -1].contiguous()
        self._choose(hidden_RE, rows, 0)
        for ahead in range(1, self._max_drafts):
            kernels.next_tokens(rows, newest_R, self._guesses_KR[ahead - 1], ahead, further)
            self._choose(self._network.forward(self._guess_inputs(further, table_RP)), rows, ahead)

    def _choose(self, hidden_RE: Tensor, rows: AskedRows, ahead: int) -> None:
        """The guess of each row that many places behind its newest token's next place."""
        num_rows, params_SP = len(hidden_RE), self._state.params_SP
        logits_RV, guesses_R = self._logits_RV[:num_rows], self._guesses_KR[ahead, :num_rows]
        self._network.logits(hidden_RE, logits_RV)
        if self._num_guessable < self._vocab_size:
            logits_RV[:, self._num_guessable :] = float("-inf")
        thresholds_R = self._sampling.thresholds(logits_RV, rows.slots_R, params_SP)
        drafted = Drafted(self._offsets_KR[ahead, :num_rows], guesses_R)
        self._sampling.choose(logits_RV, rows.slots_R, params_SP, guesses_R, None, thresholds_R, drafted)

    def _guess_inputs(self, read: Pass, table_RP: Tensor, *, is_drafted: bool = False) -> StepInputs:
        num_tokens = len(read.tokens_T)
        return StepInputs(
            num_decode=num_tokens,
            prompts=(),
            tokens_T=read.tokens_T,
            positions_T=read.positions_T,
            slots_T=read.lines_T,
            prompt_starts=self._every_T[:1],
            page_table_SP=table_RP,
            logit_rows_R=self._every_T[:num_tokens],
            logit_slots_R=read.lines_T,
            k=self._pool.k,
            v=self._pool.v,
            is_drafted=is_drafted,
        )


def _up(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN
