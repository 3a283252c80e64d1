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

import numpy as np
import torch
from torch import Tensor

from streamserve.cache.pool import DevicePool
from streamserve.engine.device_state import MAX_PROMPTS, DeviceState, Loaded, StepSize
from streamserve.engine.drafters.device_drafter import Guesses
from streamserve.engine.drafters.device_passes import MAX_ROWS, Array, Asked, DevicePasses, up
from streamserve.engine.drafters.page_memory import PageMemory
from streamserve.engine.plan import Admission, Plan, Row
from streamserve.kernels.devices.device import Device, Replay
from streamserve.kernels.impl.triton_guesses import AskedRows, Pass
from streamserve.kernels.ops import DeviceNetwork, PromptRow, StepInputs

MAX_CATCH_UP = 1024  # tokens of an answer that are read in one step: more would hold up everybody else
READ_SIZES = (64, 128, 256, 512, 1024)


def max_guessed_tokens(num_slots: int, max_drafts: int) -> int:
    """Most decode rows of a pass, as attention sees them."""
    return min(num_slots, MAX_ROWS) * _window(max_drafts)


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
        self._network, self._pool, self._state = network, pool, state
        self._vocab_size, self._num_guessable = vocab_size, min(vocab_size, num_target_tokens)
        self._max_drafts, self._max_read = max_drafts, max_step_tokens
        self._window = _window(max_drafts)
        self._read_sizes = sorted(size for size in read_sizes if size <= max_step_tokens)
        self._use_graphs = use_graphs
        self._device = device
        self._unread: dict[int, int] = {}  # by slot: its first token that was not read; none: all before its next row were
        self._guessed: dict[int, int] = {}  # by slot, after guesses: from here on all before its next row will have been read
        self._prompt_lens: dict[int, int] = {}
        self._admitted: dict[int, Admission] = {}  # by slot, until its first row: an encoder may be waited for before that
        self._memory = PageMemory(pool.num_pages, pool.page_size)
        # What the host says beside the rows that want guesses: positions, slots and starts of what is read.
        self._passes = DevicePasses(
            *(device, pool, state),
            vocab_size=vocab_size,
            num_choices=vocab_size,
            max_len=max_len,
            max_drafts=max_drafts,
            window=self._window,
            num_words=2 * up(max_step_tokens) + up(max(state.num_slots, MAX_PROMPTS) + 1),
        )
        self._kernels, self._ints = self._passes.kernels, self._passes.ints
        self._max_rows = self._passes.max_rows
        integers = partial(torch.zeros, dtype=torch.int32, device=device.torch_device)
        self._read_tokens_T = integers(up(max_step_tokens))
        self._pass = Pass(*(integers(self._max_rows * self._window) for _ in Pass._fields))
        self._nothing = integers(0)
        self._reading: dict[int, Replay[None]] = {}  # by tokens

    def warm_up_long(self, max_len: int, max_chunk: int) -> None:
        """See DeviceDrafter."""
        self._network.warm_up(self._pool.k, self._pool.v, max_len, max_chunk)

    def warm_up(self) -> None:
        """See DeviceDrafter."""
        self._passes.warm_up(self._guess)

    def capture(self, sizes: Sequence[StepSize], progress: Callable[[int, int], None]) -> None:
        """See DeviceDrafter. The largest first: the smaller ones reuse its memory."""
        if not self._use_graphs:
            return
        num_graphs = len(self._read_sizes) + len(self._passes.row_sizes)
        for size in reversed(self._read_sizes):
            inputs = self._read_inputs(size, StepSize(0, size).prompts)
            self._passes.clear()
            inputs.slots_T.fill_(-1)
            self._reading[size] = self._device.capture(partial(self._read, inputs), is_warm=bool(self._reading))
            progress(len(self._reading), num_graphs)
        self._passes.capture(self._guess, lambda count: progress(len(self._reading) + count, num_graphs))

    def follow(self, plan: Plan, loaded: Loaded, unwanted: frozenset[int]) -> Guesses | None:
        """See DeviceDrafter."""
        for copy in plan.copies:
            self._memory.copied(copy.src, copy.dst)
        self._passes.copy_pages(plan)
        self._kernels.note(loaded.inputs.tokens_T, loaded.inputs.positions_T, loaded.inputs.slots_T)
        spans, asking = self._share_out(plan, unwanted)
        if not spans and not asking:
            return None
        array = self._passes.begin()
        num_rows = self._passes.ask(asking, array)
        size, prompts, end = self._write_spans(spans, array)
        self._passes.say(end)
        if spans and size is not None:
            self._reading[size].replay()
        elif spans:
            self._read(self._read_inputs(sum(span.num_tokens for span in spans), prompts))
        return self._passes.guess(self._guess, asking, num_rows) if asking else None

    def _share_out(self, plan: Plan, unwanted: frozenset[int]) -> tuple[list[PromptRow], list[Asked]]:
        """What is read before guesses are made, and which rows get some."""
        spans: list[PromptRow] = []
        asking: list[Asked] = []
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
                asking.append(Asked(i, row.slot, self._prompt_lens[row.slot], end, len(pages)))
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
            self._kernels.put(slot, start, self._passes.send(tokens))
        return start

    def _write_spans(self, spans: Sequence[PromptRow], array: Array) -> tuple[int | None, tuple[PromptRow, ...], int]:
        """What is read: the captured size that fits, if any does, the rows, and where in the buffer they end."""
        prompts = tuple(spans)
        if not spans:
            return None, prompts, self._passes.words_at
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
        step = up(num_tokens)
        return self._passes.words_at, self._passes.words_at + step, self._passes.words_at + 2 * step

    def _read(self, inputs: StepInputs) -> None:
        """Keys and values of certain tokens."""
        self._kernels.read(inputs.tokens_T, inputs.positions_T, inputs.slots_T)
        self._network.forward(inputs)

    def _read_inputs(self, num_tokens: int, prompts: tuple[PromptRow, ...]) -> StepInputs:
        positions_at, slots_at, starts_at = self._places(num_tokens)
        return StepInputs(
            num_decode=0,
            prompts=prompts,
            tokens_T=self._read_tokens_T[:num_tokens],
            positions_T=self._ints[positions_at : positions_at + num_tokens],
            slots_T=self._ints[slots_at : slots_at + num_tokens],
            prompt_starts=self._ints[starts_at : starts_at + len(prompts) + 1],
            page_table_SP=self._state.page_table_SP,
            logit_rows_R=self._nothing,
            logit_slots_R=self._nothing,
            k=self._pool.k,
            v=self._pool.v,
        )

    def _guess(self, num_rows: int) -> None:
        """Guesses behind the newest tokens of so many rows."""
        passes, state = self._passes, self._state
        rows, newest_R = passes.rows(num_rows), passes.newest_R[:num_rows]
        first = Pass(*(part[: num_rows * self._window] for part in self._pass))
        self._kernels.last_tokens(rows, state.params_SP, state.last_token_S, newest_R, first)
        table_RP = passes.table(rows)
        hidden_TE = self._network.forward(passes.inputs(first, table_RP, is_drafted=True))
        self._choose(hidden_TE.view(num_rows, self._window, -1)[:, -1].contiguous(), rows, 0)
        for ahead in range(1, self._max_drafts):
            further = passes.next_tokens(rows, ahead - 1, ahead)
            self._choose(self._network.forward(passes.inputs(further, table_RP)), rows, ahead)

    def _choose(self, hidden_RE: Tensor, rows: AskedRows, guess: int) -> None:
        """Guess number `guess` of each row."""
        logits_RV = self._passes.logits(len(hidden_RE))
        self._network.logits(hidden_RE, logits_RV)
        if self._num_guessable < self._vocab_size:
            logits_RV[:, self._num_guessable :] = float("-inf")
        self._passes.choose(rows, guess)
