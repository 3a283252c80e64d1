"""What a GPU remembers between steps, and how a plan reaches it: one buffer of integers per step, one copy, one kernel.

Owns the page table, the last sampled tokens and the sampling parameters of every slot in device memory, and the layout of
the buffer. Nothing here waits for the device: buffers in host memory take turns, and no more steps are under way than turns.

The buffer of a step with T tokens (rounded up to 4), R rows of logits and P prompt rows, in 32-bit words:

    tokens T | positions T | slots T | for M-RoPE three rope positions a token: 3 T | logit rows R | slots of the logit rows R |
    prompt starts P + 1 | parts of attention's work on decode rows (engine/prefix_groups.py) | in a drafted step R: how many
    guesses a logit row stands behind | page-table entries | sampling parameters | page copies: sources, targets

Places of media have token MEDIA_BASE here; their embeddings are copied to the lines of these tokens in a buffer beside it.

A drafted row of a known token and k guesses is laid out as 1 + k decode rows of its slot, one behind the other.

A captured step finds all but the last three where it found them at its capture, so T, R and P follow from its size; what the
plan does not fill are surplus tokens and rows (slot -1), prompts of no tokens, and parts of no rows.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamserve.cache.pool import DevicePool
from streamserve.engine.device_embeddings import DeviceEmbeddings, Piece
from streamserve.engine.device_sampler import DraftedRows
from streamserve.engine.plan import Plan, Row
from streamserve.engine.prefix_groups import PrefixGroup, fill_parts, find_groups
from streamserve.kernels.devices.device import Device, Replay
from streamserve.kernels.impl.triton_inputs import PARAMS, apply
from streamserve.kernels.impl.triton_sampling import Drafted
from streamserve.kernels.ops import Grouping, PromptRow, Shown, StepInputs
from streamserve.messages import MEDIA_BASE

TURNS = 4  # steps whose buffers may be in use at once; the engine keeps two under way
MAX_PROMPTS = 16  # prompt rows of a captured step
GROUPED_ROWS = 8  # fewer decode rows are not looked through for common prefixes
MAX_DRAFTED_TOKENS = 256  # tokens of decode rows in a step with guesses, unless there are more slots
_INTAKE_PAGES = 256  # new pages that the recorded intake of a step has room for,
_INTAKE_PARAMS = 16  # and slots with new sampling parameters
_INTAKE_WORDS = 3 * _INTAKE_PAGES + _INTAKE_PARAMS * (PARAMS + 1)
_STAGED = 2  # buffers of recorded intakes: a step is loaded when all but the last one are done
_ALIGN = 4  # words: views into the buffer keep the 16-byte alignment that kernels were compiled for


Array = np.ndarray[Any, np.dtype[np.int32]]


def max_decode_rows(num_slots: int, max_drafts: int) -> int:
    """Most decode rows of a step as attention sees them: a guess has one of its own. `max_drafts`: guesses behind a token."""
    return max(num_slots, min(num_slots * (1 + max_drafts), MAX_DRAFTED_TOKENS))


class StepSize(NamedTuple):
    """What a captured step holds at most: decode rows, and tokens of up to MAX_PROMPTS prompt rows. No prompt tokens: it
    takes decode rows alone. `is_grouped`: decode rows that share a prefix are in groups. `is_drafted`: decode rows may be
    guesses; there are no groups then."""

    num_decode: int
    num_prompt: int = 0
    is_grouped: bool = False
    is_drafted: bool = False

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
        empty = PromptRow(slot=-1, first=self.num_decode, num_tokens=0, start=1)
        return (*[empty] * (MAX_PROMPTS - 1), PromptRow(slot=-1, first=self.num_decode, num_tokens=self.num_prompt, start=1))


class Sizes:
    """The captured sizes, and which of them fits a step."""

    def __init__(self, sizes: Sequence[StepSize]) -> None:
        # grouped?, drafted?, prompts? -> decode rows -> prompt tokens
        self._tokens: dict[tuple[bool, bool, bool], dict[int, list[int]]] = {}
        for size in sorted(sizes):
            rows = self._tokens.setdefault((size.is_grouped, size.is_drafted, size.num_prompt > 0), {})
            rows.setdefault(size.num_decode, []).append(size.num_prompt)
        self._rows = {kind: list(rows) for kind, rows in self._tokens.items()}

    def fitting(
        self, num_decode: int, prompt_lens: Sequence[int], *, is_grouped: bool = False, is_drafted: bool = False
    ) -> StepSize | None:
        """The smallest for so many decode rows and these prompt rows; None where none is large enough."""
        kind = is_grouped, is_drafted, len(prompt_lens) > 0
        rows = _at_least(self._rows.get(kind, ()), num_decode)
        if rows is None or len(prompt_lens) > MAX_PROMPTS:
            return None
        tokens = _at_least(self._tokens[kind][rows], sum(prompt_lens))
        return None if tokens is None else StepSize(rows, tokens, is_grouped, is_drafted)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A plan on the device. `sampling` lists the plan's rows that sample, in the order of the inputs' logit rows, behind which
    there may be surplus ones; `slots` has the slots of those logit rows, of which a row with guesses has 1 + num_drafts. `size`
    says which captured step to replay, None: none fits. `drafted`: the guesses, if there are any."""

    inputs: StepInputs
    sampling: list[int]
    slots: list[int]
    size: StepSize | None
    logit_tokens: dict[int, int]  # plan row that wants all logits -> its first token in T
    drafted: DraftedRows | None = None


class _Rows(NamedTuple):
    """The decode rows of a plan as attention sees them. `offsets`: how many guesses each stands behind; None in a step without
    guesses."""

    tokens: list[int]  # -1: known to the device alone
    positions: list[int]
    slots: list[int]
    offsets: list[int] | None = None


def _plain(rows: Sequence[Row]) -> _Rows:
    """Of rows without guesses."""
    tokens = [-1 if row.token_ids is None else row.token_ids[0] for row in rows]
    return _Rows(tokens, [row.start for row in rows], [row.slot for row in rows])


def _laid_out(rows: Sequence[Row]) -> _Rows:
    """Of rows with guesses among them."""
    tokens: list[int] = []
    for row in rows:
        assert row.num_tokens == 1 + row.num_drafts and not row.wants_all_logits
        tokens += (-1,) if row.token_ids is None else row.token_ids
    places = [(row, offset) for row in rows for offset in range(row.num_tokens)]
    positions = [row.start + offset for row, offset in places]
    return _Rows(tokens, positions, [row.slot for row, _ in places], [offset for _, offset in places])


class Layout:
    """Where in the buffer a step has what, in words. `grouping`: how its decode rows are grouped; None: they are not."""

    def __init__(
        self,
        num_tokens: int,
        num_decode: int,
        num_logits: int,
        num_prompts: int,
        grouping: Grouping | None,
        *,
        is_drafted: bool = False,
        has_rotary: bool = False,
    ) -> None:
        self.is_drafted, self.has_rotary = is_drafted, has_rotary
        self.num_tokens, self.num_decode, self.num_logits, self.num_prompts = num_tokens, num_decode, num_logits, num_prompts
        self.num_parts = num_decode + grouping.programs if grouping is not None else 0
        self.part_width = grouping.rows + 3 if grouping is not None else 0
        self.step = step = _up(num_tokens)
        self.positions_at, self.slots_at, self.rope_at = step, 2 * step, 3 * step
        self.logit_rows_at = (6 if has_rotary else 3) * step
        self.logit_slots_at = self.logit_rows_at + _up(num_logits)
        self.starts_at = self.logit_slots_at + _up(num_logits)
        self.parts_at = self.starts_at + (_up(num_prompts + 1) if num_prompts else 0)
        self.offsets_at = _up(self.parts_at + self.num_parts * self.part_width)
        self.end = self.offsets_at + (_up(num_logits) if is_drafted else 0)


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
        grouping: Grouping | None,
        may_capture: Callable[[tuple[PromptRow, ...]], bool],
        max_drafts: int = 0,
        media: DeviceEmbeddings | None = None,
    ) -> None:
        """`sizes`: of steps that may be captured. `may_capture`: whether a captured step may do these prompt rows. `max_drafts`:
        most guesses of a row. `media`: of a model that takes some; it knows of a plan before `load` does."""
        self._pool = pool
        self._media = media or DeviceEmbeddings(device, None, num_slots=num_slots)
        self._captured = Sizes(())
        self._may_capture = may_capture
        self._grouping = grouping
        self.max_decode_rows = max_decode_rows(num_slots, max_drafts)
        self.max_logits = self.max_decode_rows + MAX_PROMPTS  # rows, surplus ones included
        pages = -(-max_len // pool.page_size) + 1
        # A step that admits every slot with all its pages is the largest.
        tokens = max(max_step_tokens + self.max_decode_rows, *(size.num_tokens for size in sizes), 0)
        most = (tokens, self.max_decode_rows, self.max_logits, self.max_logits, grouping)
        words = Layout(*most, is_drafted=True, has_rotary=self._media.has_rotary).end
        words += max(3 * (num_slots * 2 + num_slots * pages) + num_slots * (PARAMS + 1) + 2 * num_slots, _INTAKE_WORDS)
        where = device.torch_device
        self.page_table_SP = torch.zeros((num_slots, pages), dtype=torch.int32, device=where)
        self.last_token_S = torch.zeros(num_slots, dtype=torch.int32, device=where)
        self.params_SP = torch.zeros((num_slots, PARAMS), dtype=torch.int32, device=where)
        self.sampled_R = torch.zeros(self.max_logits, dtype=torch.int32, device=where)  # by the last step, in its logit rows
        self.media_TX = self._media.buffer(tokens)
        self._max_tokens = tokens
        self._shown: Shown | None = None
        self._ints = torch.zeros(words, dtype=torch.int32, device=where)
        self._turns = [device.pinned((words,), torch.int32) for _ in range(TURNS)]
        self._arrays = [turn.numpy() for turn in self._turns]
        self._turn = 0
        self._pages: list[list[int]] = [[] for _ in range(num_slots)]
        self._fixed: dict[StepSize, tuple[Layout, StepInputs]] = {}  # of captured sizes without prompts
        self._device = device
        self._intakes: dict[StepSize, list[Replay[None]]] = {}  # one for each buffer that they take in
        self._staged = [device.pinned((words,), torch.int32).fill_(-1) for _ in range(_STAGED)]
        self._staged_arrays: list[Array] = [staged.numpy() for staged in self._staged]
        self._staged_turn = 0
        self._parts = _Parts(grouping, pool.page_size) if grouping is not None else None
        self.num_slots = num_slots

    def num_pages(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self._pool.page_size)

    def pages_of(self, slot: int) -> Sequence[int]:
        """That the slot was given so far."""
        return self._pages[slot]

    def show(self, layers: tuple[int, ...], hidden_size: int, dtype: torch.dtype) -> Tensor:
        """From now on steps leave the stream before these layers in what is returned: see Shown. Before any step."""
        where = self._device.torch_device
        self._shown = Shown(layers, torch.zeros((self._max_tokens, len(layers) * hidden_size), dtype=dtype, device=where))
        return self._shown.streams_TX

    def captured(self, sizes: Sequence[StepSize]) -> None:
        """From now on, steps that fit one of these are to be replayed."""
        self._captured = Sizes(sizes)

    def capture_intakes(self, sizes: Sequence[StepSize]) -> None:
        """Record how the integers of captured steps reach the device: launching a recording takes a fraction of the time."""
        is_warm = False
        for size in sizes:
            layout = self._layout(size)
            takes = [partial(self._take_in, layout, staged) for staged in self._staged]
            self._intakes[size] = [self._device.capture(take, is_warm=is_warm) for take in takes]
            is_warm = True

    def _take_in(self, layout: Layout, staged: Tensor) -> None:
        end = layout.end + _INTAKE_WORDS
        self._ints[:end].copy_(staged[:end], non_blocking=True)
        apply(
            self._ints,
            self.last_token_S,
            self.page_table_SP,
            self.params_SP,
            num_tokens=layout.num_tokens,
            slots_at=layout.slots_at,
            pages_at=layout.end,
            num_pages=_INTAKE_PAGES,
            params_at=layout.end + 3 * _INTAKE_PAGES,
            num_params=_INTAKE_PARAMS,
        )

    def surplus_inputs(self, size: StepSize) -> StepInputs:
        """The inputs of a captured step, filled with surplus rows: what the last plan left in the buffer would be taken for
        slots and positions."""
        inputs = self._inputs(self._layout(size), size.prompts)
        self._ints.zero_()
        inputs.slots_T.fill_(-1)
        inputs.logit_slots_R.fill_(-1)
        if inputs.parts_PR is not None:
            inputs.parts_PR.fill_(-1)
        return inputs

    def drafted(self, size: StepSize, inputs: StepInputs) -> DraftedRows | None:
        """The guesses of a captured step's inputs, none of them known to the host."""
        return DraftedRows([], Drafted(self._offsets(self._layout(size)), inputs.tokens_T)) if size.is_drafted else None

    def load(self, plan: Plan, params: Sequence[tuple[int, Sequence[int]]]) -> Loaded:
        """Bring the plan's integers to the device, in stream order. `params`: slot and sampling words of each admission."""
        for admission in plan.admissions:
            self._pages[admission.slot].clear()
        if plan.admissions and self._parts is not None:
            self._parts.forget()
        rows = plan.rows
        entries = self._new_pages(rows)
        decode: list[int] = []
        prompts: list[int] = []
        is_drafted = False
        for i, row in enumerate(rows):
            is_decode = row.num_tokens == 1 and row.samples and not row.wants_all_logits
            if row.num_drafts:
                is_decode = is_drafted = True
            (decode if is_decode else prompts).append(i)
        answers = [rows[i] for i in decode]
        laid_out = _laid_out(answers) if is_drafted else _plain(answers)
        num_decode = len(laid_out.tokens)
        assert num_decode <= self.max_decode_rows
        described, logit_tokens = self._describe(rows, prompts, num_decode)
        is_grouped = self._parts is not None and not is_drafted and self._parts.find(answers, self._pages)
        pieces = self._media.pieces(rows)
        size = None if logit_tokens else self._fitting(num_decode, described, is_grouped=is_grouped, is_drafted=is_drafted)
        prompts_sampling = [i for i in prompts if rows[i].samples]
        slots = laid_out.slots + [rows[i].slot for i in prompts_sampling]
        if size is None:
            num_tokens = num_decode + sum(prompt.num_tokens for prompt in described)
            grouping = self._grouping if is_grouped else None
            counts = (num_tokens, num_decode, len(slots), len(described), grouping)
            layout = Layout(*counts, is_drafted=is_drafted, has_rotary=self._media.has_rotary)
        else:
            layout = self._fixed[size][0] if size in self._fixed else self._layout(size)
            if size.num_decode != num_decode:
                described, _ = self._describe(rows, prompts, size.num_decode)
        is_small = len(entries) <= 3 * _INTAKE_PAGES and len(params) <= _INTAKE_PARAMS and not plan.copies
        intakes = self._intakes.get(size) if size is not None and is_small else None
        if intakes is None:
            ints, array = self._turns[self._turn], self._arrays[self._turn]
            self._turn = (self._turn + 1) % TURNS
        else:
            intake, array = intakes[self._staged_turn], self._staged_arrays[self._staged_turn]
            self._staged_turn = (self._staged_turn + 1) % _STAGED
        self._write_tokens(array, layout, laid_out, rows, prompts, described)
        if layout.has_rotary:
            self._write_rope(array, layout, laid_out, described)
        if pieces:
            self._write_media(array, pieces, rows, decode, prompts, described)
        self._write_logit_rows(array, layout, num_decode, slots, rows, prompts, described)
        offsets = self._write_offsets(array, layout, laid_out, slots)
        if layout.num_parts:
            assert self._parts is not None
            parts_PR = array[layout.parts_at : layout.parts_at + layout.num_parts * layout.part_width]
            self._parts.write(parts_PR.reshape(layout.num_parts, layout.part_width))
        at = layout.end
        array[at : at + len(entries)] = entries
        at += len(entries)
        if intakes is not None:
            params_at = layout.end + 3 * _INTAKE_PAGES
            array[at : layout.end + _INTAKE_WORDS] = -1
        else:
            params_at = at
        at = params_at
        for slot, words in params:
            array[at] = slot
            array[at + 1 : at + 1 + PARAMS] = words
            at += PARAMS + 1
        if intakes is not None:
            intake.replay()
            return self._loaded(layout, described, size, decode + prompts_sampling, slots, logit_tokens, offsets)
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
            num_tokens=layout.num_tokens,
            slots_at=layout.slots_at,
            pages_at=layout.end,
            num_pages=len(entries) // 3,
            params_at=params_at,
            num_params=len(params),
        )
        if num_copies:
            copies = self._ints[copies_at : copies_at + 2 * num_copies]
            self._pool.copy_pages(copies[:num_copies], copies[num_copies:])
        return self._loaded(layout, described, size, decode + prompts_sampling, slots, logit_tokens, offsets)

    def _loaded(
        self,
        layout: Layout,
        described: tuple[PromptRow, ...],
        size: StepSize | None,
        sampling: list[int],
        slots: list[int],
        logit_tokens: dict[int, int],
        offsets: list[int] | None,
    ) -> Loaded:
        inputs = self._fixed[size][1] if size in self._fixed else self._inputs(layout, described)
        if size is not None and not size.num_prompt:
            self._fixed[size] = layout, inputs  # a dozen views are a good part of the time that a step takes to launch
        drafted = None if offsets is None else DraftedRows(offsets, Drafted(self._offsets(layout), inputs.tokens_T))
        return Loaded(inputs, sampling, slots, size, logit_tokens, drafted)

    @staticmethod
    def _write_tokens(
        array: Array,
        layout: Layout,
        laid_out: _Rows,
        rows: Sequence[Row],
        prompts: Sequence[int],
        described: Sequence[PromptRow],
    ) -> None:
        """Tokens, positions and slots, and where prompts begin."""
        num_tokens, real = layout.num_tokens, len(laid_out.tokens)
        tokens, positions, slots = (array[at : at + num_tokens] for at in (0, layout.positions_at, layout.slots_at))
        tokens[:real], positions[:real], slots[:real] = laid_out.tokens, laid_out.positions, laid_out.slots
        end = layout.num_decode
        for i, prompt in zip(prompts, described, strict=True):
            end = prompt.first + prompt.num_tokens
            token_ids = rows[i].token_ids
            assert token_ids is not None
            tokens[prompt.first : end] = token_ids
            positions[prompt.first : end] = np.arange(prompt.start, prompt.start + prompt.num_tokens, dtype=np.int32)
            slots[prompt.first : end] = prompt.slot
        for first, last in ((real, layout.num_decode), (end, num_tokens)):
            tokens[first:last] = positions[first:last] = 0
            slots[first:last] = -1
        if layout.num_prompts:
            starts = array[layout.starts_at : layout.starts_at + layout.num_prompts + 1]
            starts[:] = end
            starts[: len(described)] = [prompt.first for prompt in described]

    def _write_rope(self, array: Array, layout: Layout, laid_out: _Rows, described: Sequence[PromptRow]) -> None:
        """Rope positions, three a token."""
        rope_3T = array[layout.rope_at : layout.rope_at + 3 * layout.step].reshape(3, layout.step)
        real, end = len(laid_out.tokens), layout.num_decode
        self._media.write_rope(rope_3T[:, :real], laid_out.slots, laid_out.positions)
        rope_3T[:, real:end] = 0
        for prompt in described:
            end = prompt.first + prompt.num_tokens
            self._media.write_prompt_rope(rope_3T[:, prompt.first : end], prompt.slot, prompt.start)
        rope_3T[:, end:] = 0

    def _write_media(
        self,
        array: Array,
        pieces: Sequence[Piece],
        rows: Sequence[Row],
        decode: Sequence[int],
        prompts: Sequence[int],
        described: Sequence[PromptRow],
    ) -> None:
        """Mark the places of media, and bring their embeddings."""
        assert self.media_TX is not None
        firsts = {i: prompt.first for i, prompt in zip(prompts, described, strict=True)}
        firsts |= zip(decode, accumulate((rows[i].num_tokens for i in decode), initial=0), strict=False)
        for piece in pieces:
            at = firsts[piece.row] + piece.first
            array[at : at + piece.num_tokens] = MEDIA_BASE
            self._media.fill(self.media_TX[at : at + piece.num_tokens], piece)

    @staticmethod
    def _write_logit_rows(
        array: Array,
        layout: Layout,
        real: int,
        slots: Sequence[int],
        rows: Sequence[Row],
        prompts: Sequence[int],
        described: Sequence[PromptRow],
    ) -> None:
        """Which tokens yield logits, and for whom: the first `real` rows are decode rows."""
        logit_rows = array[layout.logit_rows_at : layout.logit_rows_at + layout.num_logits]
        logit_slots = array[layout.logit_slots_at : layout.logit_slots_at + layout.num_logits]
        logit_rows[:real] = np.arange(real, dtype=np.int32)
        ends = [p.first + p.num_tokens - 1 for p, i in zip(described, prompts, strict=True) if rows[i].samples]
        logit_rows[real : len(slots)] = ends
        logit_rows[len(slots) :] = 0
        logit_slots[: len(slots)] = slots
        logit_slots[len(slots) :] = -1

    @staticmethod
    def _write_offsets(array: Array, layout: Layout, laid_out: _Rows, slots: Sequence[int]) -> list[int] | None:
        """How many guesses each logit row stands behind; nothing in a step without guesses."""
        if laid_out.offsets is None:
            return None
        real = laid_out.offsets
        offsets = array[layout.offsets_at : layout.offsets_at + layout.num_logits]
        offsets[: len(real)] = real
        offsets[len(real) :] = 0
        return real + [0] * (len(slots) - len(real))

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

    def _fitting(self, num_decode: int, prompts: tuple[PromptRow, ...], *, is_grouped: bool, is_drafted: bool) -> StepSize | None:
        """The captured step to use: groups are given up before replaying is."""
        if prompts and not self._may_capture(prompts):
            return None
        lens = [prompt.num_tokens for prompt in prompts]
        if is_drafted:
            return self._captured.fitting(num_decode, lens, is_drafted=True)
        size = self._captured.fitting(num_decode, lens, is_grouped=True) if is_grouped else None
        return size or self._captured.fitting(num_decode, lens)

    def _layout(self, size: StepSize) -> Layout:
        grouping = self._grouping if size.is_grouped else None
        num_prompts = len(size.prompts)
        counts = (size.num_tokens, size.num_decode, size.num_logits, num_prompts, grouping)
        return Layout(*counts, is_drafted=size.is_drafted, has_rotary=self._media.has_rotary)

    def _inputs(self, layout: Layout, prompts: tuple[PromptRow, ...]) -> StepInputs:
        def ints(at: int, count: int) -> Tensor:
            return self._ints[at : at + count]

        rope_3T = (
            ints(layout.rope_at, 3 * layout.step).view(3, layout.step)[:, : layout.num_tokens] if layout.has_rotary else None
        )
        parts = ints(layout.parts_at, layout.num_parts * layout.part_width)
        return StepInputs(
            num_decode=layout.num_decode,
            prompts=prompts,
            tokens_T=ints(0, layout.num_tokens),
            positions_T=ints(layout.positions_at, layout.num_tokens),
            slots_T=ints(layout.slots_at, layout.num_tokens),
            prompt_starts=ints(layout.starts_at, layout.num_prompts + 1),
            page_table_SP=self.page_table_SP,
            logit_rows_R=ints(layout.logit_rows_at, layout.num_logits),
            logit_slots_R=ints(layout.logit_slots_at, layout.num_logits),
            k=self._pool.k,
            v=self._pool.v,
            parts_PR=parts.view(layout.num_parts, layout.part_width) if layout.num_parts else None,
            is_drafted=layout.is_drafted,
            media_TX=None if self.media_TX is None else self.media_TX[: layout.num_tokens],
            rope_3T=rope_3T,
            shown=self._shown,
        )

    def _offsets(self, layout: Layout) -> Tensor:
        return self._ints[layout.offsets_at : layout.offsets_at + layout.num_logits]

    def _new_pages(self, rows: Sequence[Row]) -> list[int]:
        """Entries of the page table that the plan adds: slot, index, page, one after another."""
        entries: list[int] = []
        for row in rows:
            if row.new_pages:
                slot, pages = row.slot, self._pages[row.slot]
                for count, page in enumerate(row.new_pages, len(pages)):
                    entries += (slot, count, page)
                pages += row.new_pages
        return entries


class _Parts:
    """The parts of attention's work, worked out anew when the decode rows are others than in the step before, and now and then
    because rows grow."""

    _EVERY = 64  # steps: a split of a row then is a tile longer at most
    _WORTH = 0.25  # share of the rows' tokens that must be saved: rows in groups are read less fast

    def __init__(self, grouping: Grouping, page_size: int) -> None:
        self._grouping = grouping
        self._page_size = page_size
        self._slots: list[int] | None = None
        self._uses = 0
        self._groups: list[PrefixGroup] = []
        self._positions: list[int] = []
        self._parts_PR: Array | None = None

    def forget(self) -> None:
        """A slot has new pages."""
        self._slots = None

    def find(self, rows: Sequence[Row], pages: Sequence[Sequence[int]]) -> bool:
        """Whether these decode rows are worth grouping."""
        slots, grouping = [row.slot for row in rows], self._grouping
        if slots != self._slots or self._uses == self._EVERY:
            self._slots, self._uses, self._parts_PR = slots, 0, None
            self._positions = [row.start for row in rows]
            self._groups = []
            if len(rows) >= GROUPED_ROWS:
                pages_of = [pages[slot] for slot in slots]
                found = find_groups(
                    pages_of, self._positions, page_size=self._page_size, tile_len=grouping.tile_len, max_rows=grouping.rows
                )
                if sum(group.saved_len for group in found) >= self._WORTH * sum(self._positions):
                    self._groups = found
        self._uses += 1
        return bool(self._groups)

    def write(self, parts_PR: Array) -> None:
        """Fill `parts_PR` for the rows that were found worth it."""
        if self._parts_PR is None or len(self._parts_PR) != len(parts_PR):
            tile_len, programs = self._grouping.tile_len, self._grouping.programs
            self._parts_PR = np.empty_like(parts_PR)
            fill_parts(self._groups, self._positions, self._parts_PR, tile_len=tile_len, programs=programs)
        parts_PR[:] = self._parts_PR


def _at_least(ascending: Sequence[int], wanted: int) -> int | None:
    at = bisect_left(ascending, wanted)
    return ascending[at] if at < len(ascending) else None


def _up(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN
