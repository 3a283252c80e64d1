"""Attention of prompt tokens: chunks of several requests at once, causal, over whatever of each request is cached.

Keys and values, the chunk's own included, are read from pages: triton_rope.py has written them. A program owns some queries of
one head. The queries of all chunks lie in one tensor, so a program finds its chunk by a search; the bound that makes a grid
without counting tiles per chunk is that of vLLM's unified attention kernel, the online softmax FlashAttention's. What a query
gets does not depend, bit for bit, on how its prompt was cut into chunks.

A long chunk can go to a library instead: torch's own cuDNN or flash attention for the chunk, once more for the cached tokens
before it, gathered into one piece, and the results merged by their log-sum-exp. Knows nothing of decode rows.

Shape letters: see kernels/ops.py; M queries of a program, X = H * D, J = (H + 2K) * D.
"""

from collections.abc import Callable
from dataclasses import replace
from math import log2
from typing import Any, Literal

import structlog
import torch
import triton
import triton.language as tl
from torch import Tensor

from streamserve.kernels.ops import NetworkShape, PromptRow, StepInputs

_LOG2_E = log2(2.718281828459045)
_LONG = 8192  # tokens of a chunk for a library; libraries plan per shape, so no other length goes there
_MAX_WHOLE = 4  # times as many tokens: the longest first chunk that goes there in one call
_MAX_BLOCKS = 3  # of as many cached tokens in one call: all that lies before the last chunk of 32,768 tokens

# (q [1, H, N, D], k [1, K, N, D], v, is_causal) -> output [N, H, D], natural log-sum-exp of the scaled scores [H, N] float32
Library = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


@triton.jit
def _absorb(q, k_ND, v_ND, is_seen, m, total, acc, SCALE: tl.constexpr, MASKED: tl.constexpr, MAY_BE_BLIND: tl.constexpr):
    """One tile of keys into the online softmax, base 2. MAY_BE_BLIND: a query may have seen no key yet after this one."""
    scores = tl.dot(q, tl.trans(k_ND), input_precision="ieee")
    if MASKED:
        scores = tl.where(is_seen, scores, float("-inf"))
    new_m = tl.maximum(m, tl.max(scores, 1) * SCALE)
    zero = new_m
    if MAY_BE_BLIND:
        zero = tl.where(new_m == float("-inf"), 0.0, new_m)
    weights = tl.exp2(scores * SCALE - zero[:, None])
    shrink = tl.exp2(m - zero)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v_ND.dtype), v_ND, acc * shrink[:, None], input_precision="ieee")
    return new_m, total, acc


@triton.jit(
    do_not_specialize=["num_rows", "layer", "num_pages", "table_width", "long_len"],
    do_not_specialize_on_alignment=["positions_T", "slots_T", "page_table", "prompt_starts"],
)
def _prompt_attention(
    qkv,  # [T, J], q normed and turned
    out,  # [T, X]
    k_pages,  # [L, pages, K, S, D]
    v_pages,
    positions_T,
    slots_T,
    page_table,  # [slots, table_width]
    prompt_starts,  # [num_rows + 1]
    num_rows,
    layer,
    num_pages,
    table_width,
    long_len,  # chunks of a multiple of this length, at a multiple of it, are not for this kernel; 0: all are
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The query heads of one key/value head run side by side, and all queries of it before the next: its keys stay in L2.
    # Last queries first: they see the most keys.
    kv_head = tl.program_id(2)
    head = kv_head * (H // K) + tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)

    # Tiles of row r begin at (tokens before it) // BLOCK_M + r: room for all of them, and at most one tile too many.
    first_token = tl.load(prompt_starts)
    row = 0
    end_row = num_rows
    while end_row - row > 1:
        middle = (row + end_row) // 2
        is_before = (tl.load(prompt_starts + middle) - first_token) // BLOCK_M + middle <= tile
        row = tl.where(is_before, middle, row)
        end_row = tl.where(is_before, end_row, middle)
    first = tl.load(prompt_starts + row)
    num = tl.load(prompt_starts + row + 1) - first
    begin = (tile - (first - first_token) // BLOCK_M - row) * BLOCK_M
    if begin >= num:
        return
    start = tl.load(positions_T + first)
    slot = tl.load(slots_T + first)
    if long_len > 0:
        if (num % tl.maximum(long_len, 1) == 0) & (start % tl.maximum(long_len, 1) == 0):
            return

    d = tl.arange(0, D)
    i = begin + tl.arange(0, BLOCK_M)
    is_query = i < num
    position_M = start + i
    token_M = (first + i).to(tl.int64)
    q = tl.load(qkv + token_M[:, None] * ((H + 2 * K) * D) + head * D + d[None, :], mask=is_query[:, None], other=0.0)
    pages = page_table + slot.to(tl.int64) * table_width
    layer_at = layer.to(tl.int64) * num_pages * (K * S * D) + kv_head * (S * D)
    k_head = k_pages + layer_at
    v_head = v_pages + layer_at

    # Keys 0 .. end - 1, of which every query sees those of tiles before full_tile, but for a window.
    end = start + tl.minimum(begin + BLOCK_M, num)
    first_tile = 0
    if WINDOW > 0:
        first_tile = tl.maximum(start + begin - (WINDOW - 1), 0) // BLOCK_N
    full_tile = first_tile if WINDOW > 0 else (start + begin + 1) // BLOCK_N
    end_tile = tl.cdiv(end, BLOCK_N)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    # What depends on the page alone is added last, and lines of a page lie in every tile alike: an address is then one
    # multiplication and addition, and keys and values share it but for where they begin. Page numbers are loaded one tile
    # ahead: what a tile's loads wait for is then already there when they are issued.
    n = tl.arange(0, BLOCK_N)
    in_page_ND = (n % S * D)[:, None] + d[None, :]
    k_ND_at = k_head + in_page_ND
    v_ND_at = v_head + in_page_ND
    pages_N_at = pages + n // S
    page_N = tl.load(pages_N_at + first_tile * BLOCK_N // S, mask=first_tile * BLOCK_N + n < end, other=0)
    for at in range(first_tile, full_tile):
        next_at = (at + 1) * BLOCK_N
        next_page_N = tl.load(pages_N_at + next_at // S, mask=next_at + n < end, other=0)
        page_at_N1 = (page_N.to(tl.int64) * (K * S * D))[:, None]
        if S > BLOCK_N:
            page_at_N1 += at * BLOCK_N % S * D
        k_ND = tl.load(k_ND_at + page_at_N1)
        v_ND = tl.load(v_ND_at + page_at_N1)
        m, total, acc = _absorb(q, k_ND, v_ND, is_query[:, None], m, total, acc, SCALE, False, False)
        page_N = next_page_N
    for at in range(full_tile, end_tile):
        next_at = (at + 1) * BLOCK_N
        next_page_N = tl.load(pages_N_at + next_at // S, mask=next_at + n < end, other=0)
        page_at_N1 = (page_N.to(tl.int64) * (K * S * D))[:, None]
        if S > BLOCK_N:
            page_at_N1 += at * BLOCK_N % S * D
        at_N = at * BLOCK_N + n
        is_key_N1 = (at_N < end)[:, None]  # beyond lies what nobody has written
        k_ND = tl.load(k_ND_at + page_at_N1, mask=is_key_N1, other=0.0)
        v_ND = tl.load(v_ND_at + page_at_N1, mask=is_key_N1, other=0.0)
        is_seen = at_N[None, :] <= position_M[:, None]
        if WINDOW > 0:
            is_seen = is_seen & (at_N[None, :] > position_M[:, None] - WINDOW)
        m, total, acc = _absorb(q, k_ND, v_ND, is_seen, m, total, acc, SCALE, True, WINDOW > 0)
        page_N = next_page_N

    at = out + token_M[:, None] * (H * D) + head * D + d[None, :]
    if WINDOW > 0:  # lines past the chunk's end may have seen nothing
        total = tl.where(is_query, total, 1.0)
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_query[:, None])


@triton.jit(do_not_specialize=["layer", "num_pages", "num_tokens"], do_not_specialize_on_alignment=["pages_P"])
def _gather(
    k_pages, v_pages, pages_P, k_KND, v_KND, layer, num_pages, num_tokens, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr
):
    """One page of one head: [S, D] is contiguous there and here."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    i = tl.arange(0, S * D)
    page = tl.load(pages_P + index).to(tl.int64)
    source = ((layer.to(tl.int64) * num_pages + page) * K + head) * (S * D) + i
    target = head.to(tl.int64) * num_tokens * D + index * (S * D) + i
    k = tl.load(k_pages + source)
    v = tl.load(v_pages + source)  # ahead of the stores: a load never moves across one
    tl.store(k_KND + target, k)
    tl.store(v_KND + target, v)


@triton.jit(do_not_specialize=["num_tokens"])
def _merge_two(
    a_NHD,
    b_NHD,
    out_NHD,
    a_lse_HN,
    b_lse_HN,
    out_lse_HN,
    num_tokens,
    a_stride_n,
    a_stride_h,
    b_stride_n,
    b_stride_h,
    a_lse_stride_h,
    a_lse_stride_n,
    b_lse_stride_h,
    b_lse_stride_n,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention over two sets of keys from attention over each. `out` [N, H, D] and its log-sum-exp [H, N] are contiguous,
    and may be `a`'s own."""
    head = tl.program_id(0)  # heads of a token lie side by side: programs in flight read whole pages of memory
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    is_here = n < num_tokens
    n_N1 = n.to(tl.int64)[:, None]
    a_lse = tl.load(a_lse_HN + head * a_lse_stride_h + n * a_lse_stride_n, mask=is_here, other=0.0)
    b_lse = tl.load(b_lse_HN + head * b_lse_stride_h + n * b_lse_stride_n, mask=is_here, other=0.0)
    a = tl.load(a_NHD + n_N1 * a_stride_n + head * a_stride_h + d[None, :], mask=is_here[:, None], other=0.0).to(tl.float32)
    b = tl.load(b_NHD + n_N1 * b_stride_n + head * b_stride_h + d[None, :], mask=is_here[:, None], other=0.0).to(tl.float32)
    top = tl.maximum(a_lse, b_lse)
    a_weight = tl.exp(a_lse - top)
    b_weight = tl.exp(b_lse - top)
    total = a_weight + b_weight
    merged = a * (a_weight / total)[:, None] + b * (b_weight / total)[:, None]
    tl.store(out_NHD + (n_N1 * H + head) * D + d[None, :], merged.to(out_NHD.dtype.element_ty), mask=is_here[:, None])
    tl.store(out_lse_HN + head * num_tokens + n, top + tl.log(total), mask=is_here)


def merge(a_NHD: Tensor, a_lse_HN: Tensor, b_NHD: Tensor, b_lse_HN: Tensor, out_NHD: Tensor, out_lse_HN: Tensor) -> None:
    """Attention over two sets of keys, from attention over each and its natural log-sum-exp. The result may replace `a`."""
    num, heads, dim = out_NHD.shape
    assert out_NHD.is_contiguous() and out_lse_HN.is_contiguous() and a_NHD.stride(2) == b_NHD.stride(2) == 1
    block = 16
    kernel: Any = _merge_two
    kernel[(heads, -(-num // block))](
        a_NHD,
        b_NHD,
        out_NHD,
        a_lse_HN,
        b_lse_HN,
        out_lse_HN,
        num,
        a_NHD.stride(0),
        a_NHD.stride(1),
        b_NHD.stride(0),
        b_NHD.stride(1),
        a_lse_HN.stride(0),
        a_lse_HN.stride(1),
        b_lse_HN.stride(0),
        b_lse_HN.stride(1),
        H=heads,
        D=dim,
        BLOCK_N=block,
        num_warps=4,
    )


class PromptAttention:
    """Prompt rows of one network.

    `long_prompts`: who attends for chunks of `long_len` tokens, or a multiple, that begin at a multiple of it: a library of
    torch's ("cudnn", "flash"), a function like one, or this file's kernel ("triton"). A library is tried on the first such chunk,
    which waits for the device; where it is missing, fails or is wrong, the kernel takes over, and the log says so once. With
    `deterministic` or a sliding window it is always the kernel. `block_m`, `num_warps`, `num_stages`: for measuring."""

    def __init__(
        self,
        shape: NetworkShape,
        *,
        device: torch.device | str,
        deterministic: bool = False,
        long_prompts: Literal["cudnn", "flash", "triton"] | Library = "cudnn",
        long_len: int = _LONG,
        block_m: int | None = None,
        block_n: int | None = None,
        num_warps: int | None = None,
        num_stages: int | None = None,
    ) -> None:
        self._heads, self._kv_heads, self._dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        assert self._heads % self._kv_heads == 0 and self._dim & (self._dim - 1) == 0 and self._dim >= 16
        self._scale = self._dim**-0.5
        self._window = shape.sliding_window or 0
        self._device = torch.device(device)
        has_libraries = self._device.type == "cuda" and not torch.version.hip
        self._library: Library | str | None = long_prompts
        if long_prompts == "triton" or deterministic or self._window or not (has_libraries or callable(long_prompts)):
            self._library = None
        self._long_len = long_len
        is_gpu = self._device.type == "cuda"
        self._num_sms = torch.cuda.get_device_properties(self._device).multi_processor_count if is_gpu else 1
        self._is_deterministic = deterministic
        self._block_m, self._block_n = block_m, block_n or (32 if self._dim > 128 else 64)
        self._num_warps, self._num_stages = num_warps, num_stages

    @property
    def long_len(self) -> int | None:
        """Tokens of which chunks for a library are multiples; None: there is none."""
        return None if self._library is None else self._long_len

    def is_long(self, row: PromptRow) -> bool:
        """Whether a library may attend for this row: what is launched then depends on the host, so no graph can hold it."""
        if self._library is None or not row.num_tokens:
            return False
        return row.num_tokens % self._long_len == row.start % self._long_len == 0

    def attend(self, qkv_TJ: Tensor, inputs: StepInputs, layer: int, out_TX: Tensor) -> Tensor:
        """Attend for the tokens of prompt rows: into their lines of `out_TX`, which is returned. A step that is one chunk may
        return a library's own memory instead, alike in shape, and leave `out_TX` as it was. `qkv_TJ` and the pages as
        write_prompt left them: q and k normed and turned, K and V of the chunks in their pages."""
        assert inputs.prompts and qkv_TJ.is_contiguous() and out_TX.is_contiguous()
        num_long = 0
        if self._library is not None:
            for row in inputs.prompts:
                if self.is_long(row):
                    library = self._find_library(qkv_TJ.dtype)
                    if library is None:
                        break
                    num_long += 1
                    for chunk in self._chunks(row):
                        whole_NX = self._attend_long(library, chunk, qkv_TJ, inputs, layer, out_TX)
                        if whole_NX is not None:
                            return whole_NX
        if num_long < len(inputs.prompts):
            self._attend_paged(qkv_TJ, inputs, layer, out_TX, self._long_len if num_long else 0)
        return out_TX

    def _chunks(self, row: PromptRow) -> list[PromptRow]:
        """The row as chunks that the library has plans for: one whole if it is a first one and not too long."""
        size = self._long_len
        if row.start == 0 and row.num_tokens <= _MAX_WHOLE * size:
            return [row]
        return [
            replace(row, first=row.first + at, num_tokens=size, start=row.start + at) for at in range(0, row.num_tokens, size)
        ]

    def warm(self, k: Tensor, v: Tensor, dtype: torch.dtype, max_len: int, max_chunk: int) -> None:
        """Compile every kernel and build every plan that prompts of up to `max_len` tokens, in chunks of up to `max_chunk`, may
        ask for, on zeros; page 0 of the pool is read, nothing is written. Waits for the device."""
        chunks = [(0, 1), (0, 128 * -(-2 * self._num_sms // self._heads) + 1)]  # for this file's kernel
        max_blocks = max_len // self._long_len - 1
        max_whole = min(max_len, max_chunk) // self._long_len
        if max_blocks >= 0 and max_whole and self._find_library(dtype, max_blocks, max_whole) is not None:
            chunks += [(0, whole * self._long_len) for whole in range(2, min(max_whole, _MAX_WHOLE) + 1)]
            # Up to as many blocks as one call takes, a call more, two more: all there is to merge.
            some = (*range(_MAX_BLOCKS + 1), _MAX_BLOCKS + 1, 2 * _MAX_BLOCKS + 1)
            chunks += [(blocks * self._long_len, self._long_len) for blocks in some if blocks <= max_blocks]
        options: Any = {"dtype": torch.int32, "device": self._device}
        for start, num in chunks:
            inputs = StepInputs(
                num_decode=0,
                prompts=(PromptRow(slot=0, first=0, num_tokens=num, start=start),),
                tokens_T=torch.zeros(num, **options),
                positions_T=torch.arange(start, start + num, **options),
                slots_T=torch.zeros(num, **options),
                prompt_starts=torch.tensor([0, num], **options),
                page_table_SP=torch.zeros((1, -(-(start + num) // k.shape[3])), **options),
                logit_rows_R=torch.zeros(0, **options),
                logit_slots_R=torch.zeros(0, **options),
                k=k,
                v=v,
            )
            qkv_TJ = torch.zeros((num, (self._heads + 2 * self._kv_heads) * self._dim), dtype=dtype, device=self._device)
            self.attend(qkv_TJ, inputs, 0, qkv_TJ.new_empty((num, self._heads * self._dim)))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _attend_paged(self, qkv_TJ: Tensor, inputs: StepInputs, layer: int, out_TX: Tensor, long_len: int) -> None:
        """All rows but those that `_prompt_attention` leaves to others."""
        rows = inputs.prompts
        block_m = self._block_m or self._fitting_block(rows, qkv_TJ.dtype)
        num_tokens = rows[-1].first + rows[-1].num_tokens - rows[0].first
        is_big = self._dim > 128 or qkv_TJ.element_size() > 2
        kernel: Any = _prompt_attention
        kernel[(self._heads // self._kv_heads, num_tokens // block_m + len(rows), self._kv_heads)](
            qkv_TJ,
            out_TX,
            inputs.k,
            inputs.v,
            inputs.positions_T,
            inputs.slots_T,
            inputs.page_table_SP,
            inputs.prompt_starts,
            len(rows),
            layer,
            inputs.k.shape[1],
            inputs.page_table_SP.shape[1],
            long_len,
            H=self._heads,
            K=self._kv_heads,
            D=self._dim,
            S=inputs.k.shape[3],
            SCALE=self._scale * _LOG2_E,
            WINDOW=self._window,
            BLOCK_M=block_m,
            BLOCK_N=self._block_n,
            num_warps=self._num_warps or (8 if block_m >= 128 or self._dim > 128 else 4),
            num_stages=self._num_stages or (2 if torch.version.hip or is_big else 3),
        )

    def _fitting_block(self, rows: tuple[PromptRow, ...], dtype: torch.dtype) -> int:
        """Queries per program: 128 if that still gives every SM two programs, else 64; one of both, always, where the choice
        must not depend on the other rows."""
        if self._is_deterministic or self._dim > 128 or dtype == torch.float32:
            return 64
        tiles = sum(-(-row.num_tokens // 128) for row in rows)
        return 128 if tiles * self._heads >= 2 * self._num_sms else 64

    def _attend_long(
        self, library: Library, row: PromptRow, qkv_TJ: Tensor, inputs: StepInputs, layer: int, out_TX: Tensor
    ) -> Tensor | None:
        """One chunk: causal over itself, then over what lies before it, as much at a time as _MAX_BLOCKS allows. Into `out_TX`,
        or returned where that is the whole of it and spares a copy."""
        num, dim = row.num_tokens, self._dim
        tokens = slice(row.first, row.first + num)
        sizes = [self._heads, self._kv_heads, self._kv_heads]
        q_1HND, k_1KND, v_1KND = (
            x_NHD.transpose(0, 1).unsqueeze(0) for x_NHD in qkv_TJ[tokens].unflatten(1, (-1, dim)).split(sizes, dim=1)
        )
        own, own_lse = library(q_1HND, k_1KND, v_1KND, True)
        out_NHD = out_TX[tokens].view(num, self._heads, dim)
        if row.start == 0:
            if num == len(out_TX) and own.is_contiguous():
                return own.view(out_TX.shape)
            out_NHD.copy_(own)
            return None
        lse = own_lse.new_empty((self._heads, num))
        before: tuple[Tensor, Tensor] | None = None
        total: Tensor | None = None  # of three parts or more: in float32, so that it is rounded once
        for at in range(0, row.start, _MAX_BLOCKS * num):
            k_KND = qkv_TJ.new_empty((self._kv_heads, min(row.start - at, _MAX_BLOCKS * num), dim))
            v_KND = torch.empty_like(k_KND)
            self._gather(inputs, layer, row.slot, at, k_KND, v_KND)
            part = library(q_1HND, k_KND.unsqueeze(0), v_KND.unsqueeze(0), False)
            if before is None:
                before = part
                continue
            if total is None:
                total = own.new_empty(own.shape, dtype=torch.float32)
            merge(*before, *part, total, lse)
            before = total, lse
        assert before is not None
        merge(*before, own, own_lse, out_NHD, lse)
        return None

    def _gather(self, inputs: StepInputs, layer: int, slot: int, start: int, k_KND: Tensor, v_KND: Tensor) -> None:
        """Tokens from `start` on, out of their pages."""
        kv_heads, num, dim = k_KND.shape
        size = inputs.k.shape[3]
        assert start % size == 0 and num % size == 0
        pages_P = inputs.page_table_SP[slot, start // size : (start + num) // size]
        kernel: Any = _gather
        kernel[(num // size, kv_heads)](
            inputs.k, inputs.v, pages_P, k_KND, v_KND, layer, inputs.k.shape[1], num, K=kv_heads, S=size, D=dim, num_warps=4
        )

    def _find_library(self, dtype: torch.dtype, max_blocks: int = _MAX_BLOCKS, max_whole: int = 1) -> Library | None:
        """The library, tried out, at first with up to `max_blocks` before a chunk and first chunks of up to `max_whole`; None
        when it cannot be used."""
        if not isinstance(self._library, str):
            return self._library
        name, num = self._library, self._long_len
        shapes = [(num, blocks * num) for blocks in range(min(max_blocks, _MAX_BLOCKS) + 1)]
        shapes += [(whole * num, 0) for whole in range(2, min(max_whole, _MAX_WHOLE) + 1)]
        self._library, reason = _tried(name, self._heads, self._kv_heads, shapes, self._dim, dtype, self._device)
        if self._library is None:
            structlog.get_logger(__name__).warning("long_prompts_without_library", library=name, reason=reason)
        return self._library


def _tried(
    name: str,
    heads: int,
    kv_heads: int,
    shapes: list[tuple[int, int]],
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Library | None, str]:
    """The library as a function, if it computes the shapes that it will be asked for (which builds its plans), or why not:
    so many queries over their own keys (0) or over so many that lie before them. Some versions take fewer key heads than
    query heads, some need them repeated."""
    reason = ""
    for group in dict.fromkeys((1, heads // kv_heads)):
        library = _library(name, group, dim**-0.5)
        try:
            error = max(_error(library, heads, kv_heads, num, keys, dim, dtype, device) for num, keys in shapes)
        except Exception as failure:  # whatever a library does not like is a reason to do without it
            reason = f"{type(failure).__name__}: {failure}"
            continue
        if error < 0.02:
            return library, ""
        reason = f"wrong by {error:.3f} of the largest value"
    return None, reason


def _library(name: str, repeat: int, scale: float) -> Library:
    aten = torch.ops.aten

    def attend(q_1HND: Tensor, k_1KND: Tensor, v_1KND: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        if repeat > 1:
            k_1KND, v_1KND = k_1KND.repeat_interleave(repeat, dim=1), v_1KND.repeat_interleave(repeat, dim=1)
        if name == "cudnn":
            found = aten._scaled_dot_product_cudnn_attention(
                q_1HND, k_1KND, v_1KND, None, True, 0.0, is_causal, False, scale=scale
            )
        else:
            found = aten._scaled_dot_product_flash_attention(q_1HND, k_1KND, v_1KND, 0.0, is_causal, False, scale=scale)
        out_HND, lse = found[0][0], found[1][0]
        return out_HND.transpose(0, 1), lse[..., 0] if lse.dim() == 3 else lse

    return attend


def _error(
    library: Library,
    heads: int,
    kv_heads: int,
    num: int,
    before: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Largest error for a few queries of random input, outputs relative to the largest one; operands lie as in serving. Waits
    for the device."""
    generator = torch.Generator(device).manual_seed(0)
    options: Any = {"generator": generator, "device": device, "dtype": torch.float32}
    qkv = torch.randn((num, heads + 2 * kv_heads, dim), **options).to(dtype)
    q_NHD, k_NKD, v_NKD = qkv.split([heads, kv_heads, kv_heads], dim=1)
    if before:
        k_NKD, v_NKD = (torch.randn((kv_heads, before, dim), **options).to(dtype).transpose(0, 1) for _ in range(2))
    q_1HND, k_1KND, v_1KND = (x.transpose(0, 1).unsqueeze(0) for x in (q_NHD, k_NKD, v_NKD))
    out_NHD, lse_HN = library(q_1HND, k_1KND, v_1KND, not before)
    worst = 0.0
    for i in (0, num // 3, num - 1):
        end = before or i + 1
        q_KGD = q_NHD[i].float().unflatten(0, (kv_heads, -1))
        scores = torch.einsum("kgd,nkd->kgn", q_KGD, k_NKD[:end].float()) * dim**-0.5
        expected = torch.einsum("kgn,nkd->kgd", scores.softmax(-1), v_NKD[:end].float()).flatten(0, 1)
        error = (out_NHD[i].float() - expected).abs().max() / expected.abs().max()
        lse_error = (lse_HN[:, i] - scores.logsumexp(-1).flatten()).abs().max()
        worst = max(worst, float(torch.maximum(error, lse_error).nan_to_num(nan=float("inf"))))
    return worst
