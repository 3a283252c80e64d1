"""The first kernel of a step: what the host knows, written into the state that lives on the device.

Owns nothing; the state is engine/device_state.py's. The host sends one buffer of 32-bit integers per step; this kernel takes
from it the new entries of the page table and the sampling parameters of admitted requests, and puts the last sampled token
of its slot in the place of every token that only the device knows.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

PARAMS = 8  # 32-bit words of sampling state per slot
_BLOCK = 256


@triton.jit(do_not_specialize=["num_tokens", "slots_at", "pages_at", "num_pages", "params_at", "num_params", "table_width"])
def _apply(
    ints,
    last_token_S,
    page_table,
    params_SP,
    num_tokens,
    slots_at,
    pages_at,
    num_pages,
    params_at,
    num_params,
    table_width,
    PARAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Tokens come first in the buffer; -1 stands for "the token sampled last for this slot".
    is_token = i < num_tokens
    slot = tl.load(ints + slots_at + i, mask=is_token, other=-1)
    token = tl.load(ints + i, mask=is_token, other=0)
    is_unknown = is_token & (token < 0)
    known = tl.load(last_token_S + slot, mask=is_unknown & (slot >= 0), other=0)
    tl.store(ints + i, known, mask=is_unknown)
    # Page table: (slot, index, page) each; slot -1: none.
    is_page = i < num_pages
    entry = ints + pages_at + 3 * i
    line = tl.load(entry, mask=is_page, other=-1).to(tl.int64)
    is_page &= line >= 0
    column = tl.load(entry + 1, mask=is_page, other=0)
    page = tl.load(entry + 2, mask=is_page, other=0)
    tl.store(page_table + line * table_width + column, page, mask=is_page)
    # Sampling parameters: slot (-1: none), then PARAMS words each.
    is_word = i < num_params * PARAMS
    entry = ints + params_at + (i // PARAMS) * (PARAMS + 1)
    owner = tl.load(entry, mask=is_word, other=-1)
    is_word &= owner >= 0
    word = tl.load(entry + 1 + i % PARAMS, mask=is_word, other=0)
    tl.store(params_SP + owner * PARAMS + i % PARAMS, word, mask=is_word)


def apply(
    ints: Tensor,
    last_token_S: Tensor,
    page_table_SP: Tensor,
    params_SP: Tensor,
    *,
    num_tokens: int,
    slots_at: int,
    pages_at: int,
    num_pages: int,
    params_at: int,
    num_params: int,
) -> None:
    """Unpack one step's integers. Offsets (`..._at`) count int32 words from the start of `ints`."""
    items = max(num_tokens, num_pages, num_params * PARAMS)
    kernel: Any = _apply
    kernel[(triton.cdiv(items, _BLOCK),)](
        ints,
        last_token_S,
        page_table_SP,
        params_SP,
        num_tokens,
        slots_at,
        pages_at,
        num_pages,
        params_at,
        num_params,
        page_table_SP.shape[1],
        PARAMS=PARAMS,
        BLOCK=_BLOCK,
        num_warps=4,
    )
