"""What a network that guesses on a GPU reads: the last tokens of each answer, which only the device knows.

Owns the kernels between a step's tokens and the drafter's passes. The texts are the caller's [slots, positions]: a step's tokens
are written down where they stand, the host says from where on a row is to be read, and the device finds the row's end, since how
many guesses were right is known there alone. No network is known here.

Shape letters: T tokens of a pass, R rows, W tokens that the first pass reads of a row, S slots, P pages of a row, L positions.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamserve.kernels.impl.triton_sampling import NUM_WORDS

_WORDS = tl.constexpr(NUM_WORDS)
_NUM_GENERATED = tl.constexpr(6)  # as in triton_sampling.py: tokens of the answer, the newest among them
_BLOCK = 256
_TABLE_BLOCK = 1024


class AskedRows(NamedTuple):
    """Rows for which guesses are made, all int32 [R]: their slots, -1 of a surplus row; the length of each prompt; the first
    position that may be read, or, where one token is read, the position minus the line in the step of any of the row's tokens
    there; and how many pages the row has."""

    slots_R: Tensor
    prompt_lens_R: Tensor
    from_R: Tensor
    num_pages_R: Tensor


class Pass(NamedTuple):
    """What a pass reads, int32 [T]. `lines_T`: the row of each token, -1 of one that is not read."""

    tokens_T: Tensor
    positions_T: Tensor
    lines_T: Tensor


@triton.jit(do_not_specialize=["num_tokens", "max_len"], do_not_specialize_on_alignment=["tokens_T", "positions_T", "slots_T"])
def _note(tokens_T, positions_T, slots_T, texts_SL, num_tokens, max_len, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_T + i, mask=i < num_tokens, other=-1)
    position = tl.load(positions_T + i, mask=i < num_tokens, other=0)
    token = tl.load(tokens_T + i, mask=i < num_tokens, other=0)
    tl.store(texts_SL + slot.to(tl.int64) * max_len + position, token, mask=(slot >= 0) & (position < max_len))


@triton.jit(do_not_specialize=["num_tokens", "max_len"], do_not_specialize_on_alignment=["tokens_T", "positions_T", "slots_T"])
def _read(tokens_T, positions_T, slots_T, texts_SL, num_tokens, max_len, V: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_T + i, mask=i < num_tokens, other=-1)
    position = tl.load(positions_T + i, mask=i < num_tokens, other=0)
    token = tl.load(texts_SL + slot.to(tl.int64) * max_len + position, mask=(slot >= 0) & (position < max_len), other=0)
    tl.store(tokens_T + i, tl.where(token < V, token, 0), mask=i < num_tokens)


@triton.jit(do_not_specialize=["max_len"], do_not_specialize_on_alignment=["slots_R", "prompt_lens_R", "from_R"])
def _last_tokens(
    slots_R,
    prompt_lens_R,
    from_R,
    params_SP,
    last_token_S,
    texts_SL,
    newest_R,
    tokens_T,
    positions_T,
    lines_T,
    max_len,
    W: tl.constexpr,
    W_UP: tl.constexpr,
    V: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0)
    slot = tl.load(slots_R + row)
    w = tl.arange(0, W_UP)
    if slot >= 0:
        newest = tl.load(prompt_lens_R + row) + tl.load(params_SP + slot * _WORDS + _NUM_GENERATED) - 1
        newest = tl.minimum(newest, max_len - 1)
        last = tl.load(last_token_S + slot)
        text = texts_SL + slot.to(tl.int64) * max_len
        tl.store(text + newest, last)
        tl.store(newest_R + row, newest)
        position = newest - (W - 1) + w
        is_read = (position >= tl.load(from_R + row)) & (position >= 0) & (w < W)
        token = tl.where(w == W - 1, last, tl.load(text + position, mask=is_read & (w < W - 1), other=0))
        token = tl.where(is_read & (token < V), token, 0)
        position = tl.where(is_read, position, 0)
        line = tl.where(is_read, row, -1)
    else:
        token, position, line = w * 0, w * 0, w * 0 - 1
    at = row * W + w
    tl.store(tokens_T + at, token, mask=w < W)
    tl.store(positions_T + at, position, mask=w < W)
    tl.store(lines_T + at, line, mask=w < W)


@triton.jit(
    do_not_specialize=["num_rows", "num_shown"],
    do_not_specialize_on_alignment=["slots_R", "prompt_lens_R", "from_R", "params_SP", "last_token_S"],
)
def _newest_pairs(
    slots_R,
    prompt_lens_R,
    from_R,
    params_SP,
    last_token_S,
    newest_R,
    shown_R,
    tokens_R,
    positions_R,
    lines_R,
    num_rows,
    num_shown,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_R + r, mask=r < num_rows, other=-1)
    is_read = slot >= 0
    num_generated = tl.load(params_SP + slot.to(tl.int64) * _WORDS + _NUM_GENERATED, mask=is_read, other=0)
    newest = tl.load(prompt_lens_R + r, mask=is_read, other=0) + num_generated - 1
    before = newest - 1
    token = tl.load(last_token_S + slot, mask=is_read, other=0)
    shown = before - tl.load(from_R + r, mask=is_read, other=0)
    tl.store(newest_R + r, newest, mask=is_read)
    tl.store(shown_R + r, tl.where(is_read, tl.minimum(tl.maximum(shown, 0), num_shown - 1), 0), mask=r < num_rows)
    tl.store(tokens_R + r, tl.where(is_read & (token < V), token, 0), mask=r < num_rows)
    tl.store(positions_R + r, tl.where(is_read, before, 0), mask=r < num_rows)
    tl.store(lines_R + r, tl.where(is_read, r, -1), mask=r < num_rows)


@triton.jit(
    do_not_specialize=["width", "own_width", "num_own", "first_own"],
    do_not_specialize_on_alignment=["slots_R", "num_pages_R", "page_table"],
)
def _own_pages(slots_R, num_pages_R, page_table, out_RP, width, own_width, num_own, first_own, BLOCK: tl.constexpr):
    """One program per row and block: the row's pages, and behind the last the `num_own` that are the row's alone."""
    row = tl.program_id(0)
    slot = tl.load(slots_R + row)
    if slot >= 0:
        p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        num_pages = tl.load(num_pages_R + row)
        behind = p - num_pages
        page = tl.load(page_table + slot.to(tl.int64) * width + p, mask=(p < width) & (behind < 0), other=0)
        own = first_own + row * num_own + tl.minimum(behind, num_own - 1)
        tl.store(out_RP + row.to(tl.int64) * own_width + p, tl.where(behind < 0, page, own), mask=p < own_width)


@triton.jit(do_not_specialize=["num_rows", "ahead", "max_len"], do_not_specialize_on_alignment=["slots_R", "guesses_R"])
def _next_tokens(
    slots_R,
    newest_R,
    guesses_R,
    tokens_T,
    positions_T,
    lines_T,
    num_rows,
    ahead,
    max_len,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_R + r, mask=r < num_rows, other=-1)
    position = tl.load(newest_R + r, mask=slot >= 0, other=0) + ahead
    token = tl.load(guesses_R + r, mask=slot >= 0, other=0)
    is_read = (slot >= 0) & (position < max_len)
    tl.store(tokens_T + r, tl.where(is_read & (token < V), token, 0), mask=r < num_rows)
    tl.store(positions_T + r, tl.where(is_read, position, 0), mask=r < num_rows)
    tl.store(lines_T + r, tl.where(is_read, r, -1), mask=r < num_rows)


class GuessKernels:
    """Launches over the texts of all slots. `window`: W. `vocab_size`: tokens that the network knows; others are read as 0."""

    def __init__(self, num_slots: int, max_len: int, *, window: int, vocab_size: int, device: torch.device) -> None:
        self._texts_SL = torch.zeros((num_slots, max_len), dtype=torch.int32, device=device)
        self._max_len = max_len
        self._window = window
        self._vocab_size = vocab_size

    def note(self, tokens_T: Tensor, positions_T: Tensor, slots_T: Tensor) -> None:
        """Write down a step's tokens."""
        kernel: Any = _note
        num_tokens = len(tokens_T)
        grid = (triton.cdiv(num_tokens, _BLOCK),)
        kernel[grid](tokens_T, positions_T, slots_T, self._texts_SL, num_tokens, self._max_len, BLOCK=_BLOCK, num_warps=4)

    def put(self, slot: int, at: int, tokens_T: Tensor) -> None:
        """Write down tokens of a slot, from position `at` on."""
        self._texts_SL[slot, at : at + len(tokens_T)] = tokens_T

    def read(self, tokens_T: Tensor, positions_T: Tensor, slots_T: Tensor) -> None:
        """Fill `tokens_T` with what stands at these positions."""
        kernel: Any = _read
        num_tokens = len(tokens_T)
        sizes = {"V": self._vocab_size, "BLOCK": _BLOCK}
        kernel[(triton.cdiv(num_tokens, _BLOCK),)](
            tokens_T, positions_T, slots_T, self._texts_SL, num_tokens, self._max_len, **sizes, num_warps=4
        )

    def last_tokens(self, rows: AskedRows, params_SP: Tensor, last_token_S: Tensor, newest_R: Tensor, out: Pass) -> None:
        """The last `window` tokens of each row, up to its newest, whose position is put into `newest_R`."""
        kernel: Any = _last_tokens
        kernel[(len(rows.slots_R),)](
            *(
                rows.slots_R,
                rows.prompt_lens_R,
                rows.from_R,
                params_SP,
                last_token_S,
                self._texts_SL,
                newest_R,
                *out,
                self._max_len,
            ),
            W=self._window,
            W_UP=triton.next_power_of_2(self._window),
            V=self._vocab_size,
            num_warps=1,
        )

    def newest_pairs(
        self,
        rows: AskedRows,
        params_SP: Tensor,
        last_token_S: Tensor,
        newest_R: Tensor,
        shown_R: Tensor,
        out: Pass,
        *,
        num_shown: int,
    ) -> None:
        """Each row's newest token, whose position is put into `newest_R`, at the position before it; which line of the step that
        was, of `num_shown` there may be, is put into `shown_R`."""
        kernel: Any = _newest_pairs
        num_rows = len(rows.slots_R)
        kernel[(triton.cdiv(num_rows, _BLOCK),)](
            *(rows.slots_R, rows.prompt_lens_R, rows.from_R, params_SP, last_token_S, newest_R, shown_R, *out),
            *(num_rows, num_shown),
            V=self._vocab_size,
            BLOCK=_BLOCK,
            num_warps=1,
        )

    def own_pages(self, rows: AskedRows, page_table_SP: Tensor, out_RP: Tensor, *, first_own: int, num_own: int) -> None:
        """A page table of these rows, in which the pages of their slots are followed by `num_own` of the row's own. Those lie
        one row behind the other from `first_own` on."""
        kernel: Any = _own_pages
        width = out_RP.shape[1]
        kernel[(len(rows.slots_R), triton.cdiv(width, _TABLE_BLOCK))](
            *(rows.slots_R, rows.num_pages_R, page_table_SP, out_RP, page_table_SP.shape[1], width, num_own, first_own),
            BLOCK=_TABLE_BLOCK,
            num_warps=4,
        )

    def next_tokens(self, rows: AskedRows, newest_R: Tensor, guesses_R: Tensor, ahead: int, out: Pass) -> None:
        """Each row's newest guess, `ahead` places behind its newest token."""
        kernel: Any = _next_tokens
        num_rows = len(rows.slots_R)
        kernel[(triton.cdiv(num_rows, _BLOCK),)](
            *(rows.slots_R, newest_R, guesses_R, *out, num_rows, ahead, self._max_len),
            V=self._vocab_size,
            BLOCK=_BLOCK,
            num_warps=1,
        )
