"""What every drafter of a GPU's runner needs: rows that want guesses, passes of a token each over them, the choice of a guess.

Owns which rows of a step get guesses, what the host says of them, the pages behind a row's last one, where keys and values of
guesses go, the recordings that make guesses, and these on their way to the host. Knows no network. What passes.py is on a CPU.

Guesses are chosen as the sampler will choose tokens: the best at temperature 0, else with the random numbers of the token's
place and the answer's top-k, top-p and min-p.

Shape letters: T tokens of a pass, R rows, K guesses, V tokens that may be guessed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamserve.cache.pool import DevicePool
from streamserve.engine.device_state import TURNS, DeviceState
from streamserve.engine.drafters.device_drafter import Guesses
from streamserve.engine.plan import Plan
from streamserve.kernels.devices.device import Device, Replay
from streamserve.kernels.impl.triton_guesses import AskedRows, GuessKernels, Pass
from streamserve.kernels.impl.triton_sampling import Drafted, SamplingKernels
from streamserve.kernels.ops import StepInputs

MAX_ROWS = 64  # rows of a step that get guesses; in larger batches these seldom pay
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of captured passes
_ALIGN = 4  # words: views keep the 16-byte alignment that kernels were compiled for

Array = np.ndarray[Any, np.dtype[np.int32]]


def num_own_pages(num_slots: int, max_drafts: int, page_size: int) -> int:
    """Pages that a drafter has for guesses, behind the target's pages in its pool."""
    return min(num_slots, MAX_ROWS) * _pages_ahead(max_drafts, page_size)


def _pages_ahead(max_drafts: int, page_size: int) -> int:
    """That guesses behind a row's last page may need."""
    return -(-max_drafts // page_size)


class Asked(NamedTuple):
    """A row that wants guesses, as AskedRows has it; `row` is its index in the plan."""

    row: int
    slot: int
    prompt_len: int
    from_position: int
    num_pages: int


class DevicePasses:
    """Of one drafter. `pool`: the target's pages, then num_own_pages(). `state`: of the target. `vocab_size`: tokens that the
    network reads; others are read as token 0. `num_choices`: V. `window`: tokens of a row's first pass. `num_words`: what the
    host says in a step beside the rows that want guesses."""

    def __init__(
        self,
        device: Device,
        pool: DevicePool,
        state: DeviceState,
        *,
        vocab_size: int,
        num_choices: int,
        max_len: int,
        max_drafts: int,
        window: int,
        num_words: int,
    ) -> None:
        self._device, self._pool, self._state = device, pool, state
        self.max_drafts = max_drafts
        self.max_rows = min(state.num_slots, MAX_ROWS)
        self.row_sizes = [rows for rows in _ROWS if rows < self.max_rows] + [self.max_rows]
        self._num_own = _pages_ahead(max_drafts, pool.page_size)
        where = device.torch_device
        self.kernels = GuessKernels(state.num_slots, max_len, window=window, vocab_size=vocab_size, device=where)
        self._sampling = SamplingKernels(num_choices, self.max_rows, where, pdl=device.supports_pdl)
        self.words_at = 4 * up(self.max_rows)
        self.ints = torch.zeros(self.words_at + num_words, dtype=torch.int32, device=where)
        self._turns = [device.pinned((len(self.ints),), torch.int32) for _ in range(TURNS)]
        self._arrays: list[Array] = [turn.numpy() for turn in self._turns]
        guesses = (max_drafts, self.max_rows)
        self._back = [device.pinned(guesses, torch.int32) for _ in range(TURNS)]
        self._turn = 0
        integers = partial(torch.zeros, dtype=torch.int32, device=where)
        self.newest_R = integers(self.max_rows)
        self._further = Pass(*(integers(self.max_rows) for _ in Pass._fields))
        self._guesses_KR = integers(guesses)
        self._offsets_KR = torch.arange(max_drafts, dtype=torch.int32, device=where).unsqueeze(1).expand(guesses).contiguous()
        self._every_T = torch.arange(self.max_rows * window, dtype=torch.int32, device=where)
        self._table_RP = integers((self.max_rows, state.page_table_SP.shape[1] + self._num_own))
        self._logits_RV = torch.zeros((self.max_rows, num_choices), dtype=torch.float32, device=where)
        self._guessing: dict[int, Replay[None]] = {}  # by rows

    def copy_pages(self, plan: Plan) -> None:
        """The plan's page copies."""
        if plan.copies:
            pairs = torch.tensor([(copy.src, copy.dst) for copy in plan.copies], dtype=torch.int32)
            self._pool.copy_pages(*self.send(pairs).unbind(1))

    def send(self, values: Tensor) -> Tensor:
        """A few numbers to the device, out of order."""
        staged = self._device.pinned(tuple(values.shape), values.dtype).copy_(values)
        return staged.to(self._device.torch_device, non_blocking=True)

    def clear(self) -> None:
        """What the last plan left in the buffer would be taken for slots and positions."""
        self.ints.zero_()
        self.ints[: self.words_at].fill_(-1)

    def begin(self) -> Array:
        """What the host is to say in a step: `ask` writes the first `words_at` words."""
        self._turn = (self._turn + 1) % TURNS
        return self._arrays[self._turn]

    def say(self, end: int) -> None:
        """The first so many words of `begin`'s array to the device."""
        self.ints[:end].copy_(self._turns[self._turn][:end], non_blocking=True)

    def ask(self, asking: Sequence[Asked], array: Array) -> int:
        """Rows that want guesses, and surplus ones up to a captured number, which is returned."""
        if not asking:
            return 0
        num_rows = next(rows for rows in self.row_sizes if rows >= len(asking))
        asked_4R = array[: self.words_at].reshape(4, -1)
        asked_4R[0, :num_rows] = -1
        for line, asked in enumerate(asking):
            asked_4R[:, line] = asked[1:]
        return num_rows

    def rows(self, num_rows: int) -> AskedRows:
        """What `ask` wrote, on the device."""
        return AskedRows(*self.ints[: self.words_at].view(4, -1)[:, :num_rows].unbind(0))

    def table(self, rows: AskedRows) -> Tensor:
        """Their page table, with pages for guesses behind the last one of each."""
        table_RP = self._table_RP[: len(rows.slots_R)]
        first_own = self._pool.num_pages - self.max_rows * self._num_own
        self.kernels.own_pages(rows, self._state.page_table_SP, table_RP, first_own=first_own, num_own=self._num_own)
        return table_RP

    def further(self, num_rows: int) -> Pass:
        """Room for a token of each row."""
        return Pass(*(part[:num_rows] for part in self._further))

    def next_tokens(self, rows: AskedRows, guess: int, ahead: int) -> Pass:
        """Guess number `guess` of each row, to be read `ahead` places behind its newest token."""
        num_rows = len(rows.slots_R)
        further = self.further(num_rows)
        self.kernels.next_tokens(rows, self.newest_R[:num_rows], self._guesses_KR[guess, :num_rows], ahead, further)
        return further

    def inputs(self, read: Pass, table_RP: Tensor, *, is_drafted: bool = False) -> StepInputs:
        """A pass over rows that stand in `table_RP`."""
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

    def logits(self, num_rows: int) -> Tensor:
        """Where a pass leaves its logits."""
        return self._logits_RV[:num_rows]

    def choose(self, rows: AskedRows, guess: int, token_ids_V: Tensor | None = None) -> None:
        """Guess number `guess` of each row, from what stands in `logits`. `token_ids_V` (int32): the tokens that are meant, where
        a network has others."""
        num_rows, params_SP = len(rows.slots_R), self._state.params_SP
        logits_RV, guesses_R = self.logits(num_rows), self._guesses_KR[guess, :num_rows]
        thresholds_R = self._sampling.thresholds(logits_RV, rows.slots_R, params_SP)
        drafted = Drafted(self._offsets_KR[guess, :num_rows], guesses_R)
        if token_ids_V is not None:
            guesses_R.zero_()  # of surplus rows; each of the others is written
        self._sampling.choose(logits_RV, rows.slots_R, params_SP, guesses_R, None, thresholds_R, drafted)
        if token_ids_V is not None:
            guesses_R.copy_(token_ids_V.index_select(0, guesses_R))

    def warm_up(self, guess: Callable[[int], None]) -> None:
        """`guess`: what makes guesses of so many rows; once in every way it has."""
        for num_rows in {min(rows, self.max_rows) for rows in (1, 2, 4, 8, 16, self.max_rows)}:
            self.clear()
            guess(num_rows)

    def capture(self, guess: Callable[[int], None], progress: Callable[[int], None]) -> None:
        """Record that for every number of rows, the largest first. `progress` is told how many are."""
        for num_rows in reversed(self.row_sizes):
            self.clear()
            self._guessing[num_rows] = self._device.capture(partial(guess, num_rows), is_warm=bool(self._guessing))
            progress(len(self._guessing))

    def guess(self, guess: Callable[[int], None], asking: Sequence[Asked], num_rows: int) -> Guesses:
        """Make guesses of these rows, replayed if they were recorded, and send them to the host."""
        if num_rows in self._guessing:
            self._guessing[num_rows].replay()
        else:
            guess(num_rows)
        back = self._back[self._turn]
        back.copy_(self._guesses_KR, non_blocking=True)
        return Guesses(back, {asked.row: line for line, asked in enumerate(asking)})


def up(count: int) -> int:
    """So many words and what keeps the next ones aligned."""
    return -(-count // _ALIGN) * _ALIGN
