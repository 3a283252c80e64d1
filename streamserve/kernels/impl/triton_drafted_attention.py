"""Attention of decode rows that follow one another: a known token and the guesses behind it (kernels/ops.py, a drafted step).

What is in the pages before them is the same for all of them, so that it is read once for as many tokens as the lines of a product
hold: a program owns one key/value head of a block of consecutive tokens, or one part (split) of what they see. K and V of the
step's own tokens come from where the product left them, not from the pages, so that nobody waits for anybody's writes, and one
launch does all of it, as in triton_decode_attention.py. How many tokens of a request follow one another is read from device
memory: one captured graph serves every division of its rows.

Shape letters: see kernels/ops.py; X = H * D, J = (H + 2K) * D, R tokens of a block, M lines of a product.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamserve.kernels.impl.triton_decode_attention import LOG2_E, MAX_SPLITS, load_turned, merge, see
from streamserve.kernels.ops import NetworkShape, StepInputs

_MIN_TOKENS = 4  # of a block, even where query heads alone fill a product's least lines
_NEW = tl.constexpr(16)  # tokens of the step itself that are looked at together
_NEAR = tl.constexpr(64)  # rows before a token among which the others of its request are


@triton.jit(
    do_not_specialize=["num_rows", "layer", "num_pages", "table_width"],
    do_not_specialize_on_alignment=["positions_T", "slots_T", "page_table"],
)
def _drafted_attention(
    qkv,  # [T, J]
    out,  # [T, X]
    k_pages,  # [L, pages, K, S, D]
    v_pages,
    positions_T,
    slots_T,
    page_table,  # [slots, table_width]
    cos_sin,  # [positions, D], or [T, D], float32: D / 2 cosines, then D / 2 sines
    q_norm_D,
    k_norm_D,
    part_acc,  # [T, K, splits, R * G, D] float32
    part_sum,  # [T, K, splits, 2, R * G] float32: maximum, sum
    arrivals,  # [T, K] int32, all 0 before and after
    num_rows,
    layer,
    num_pages,
    table_width,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,  # R * G padded to a power of two
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    MAX_SPLITS: tl.constexpr,  # of any launch, a power of two
    BLOCK_N: tl.constexpr,
    BY_TOKEN: tl.constexpr,  # cos_sin has a line for each token of the step, not for each position
    PDL: tl.constexpr,
):
    """One program per key/value head, token and split; tokens that do not begin a block leave it to the one that does. Line
    r * G + i of the product is query head i of the block's token r."""
    LINES: tl.constexpr = R * G
    NOTHING: tl.constexpr = -1.0e30  # maximum of a line that has seen no token: below any score, and differences stay finite
    head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    if PDL:  # also before an early return: the next kernel relies on this one having waited
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots_T + row)
    if slot < 0:
        return
    # A slot's tokens lie side by side.
    back = 1 + tl.arange(0, _NEAR)
    offset = tl.sum((tl.load(slots_T + row - back, mask=row >= back, other=-1) == slot).to(tl.int32), 0)
    if offset % R != 0:
        return
    g = tl.arange(0, M)
    token_M = g // G
    row_M = row + token_M
    is_line_M = (g < LINES) & (tl.load(slots_T + row_M, mask=(g < LINES) & (row_M < num_rows), other=-1) == slot)
    num_new = offset + tl.sum(is_line_M.to(tl.int32), 0) // G  # tokens of the step that this block may see
    position = tl.load(positions_T + row)
    base = position - offset  # tokens before it are in pages

    num_tiles = tl.cdiv(base, BLOCK_N)
    split_tiles = tl.maximum(tl.cdiv(num_tiles, tl.num_programs(2)), 1)
    num_splits = tl.maximum(tl.cdiv(num_tiles, split_tiles), 1)
    if split >= num_splits:
        return
    tile = split * split_tiles
    end_tile = tl.minimum(tile + split_tiles, num_tiles)

    # Page numbers are loaded one tile ahead: what a tile's loads wait for is then already there when they are issued.
    n = tl.arange(0, BLOCK_N)
    pages = page_table + slot.to(tl.int64) * table_width
    first_N = tile * BLOCK_N + n
    page_N = tl.load(pages + first_N // S, mask=first_N < base, other=0)

    d = tl.arange(0, D)
    heads_M = row_M.to(tl.int64) * (H + 2 * K)
    turn = row if BY_TOKEN else position
    q = load_turned(qkv, heads_M + head * G + g % G, is_line_M, q_norm_D, cos_sin, turn + token_M, D, NORM, EPS)
    layer_at = layer.to(tl.int64) * num_pages * (K * S * D) + head * (S * D)
    k_head = k_pages + layer_at
    v_head = v_pages + layer_at

    m = tl.full([M], NOTHING, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    if split == num_splits - 1:  # the step's own tokens: into the sums, and those of the block into their pages
        for at in range(0, num_new, _NEW):
            new_N = at + tl.arange(0, _NEW)
            is_new_N = new_N < num_new
            heads_N = (row - offset + new_N).to(tl.int64) * (H + 2 * K)
            k_ND = load_turned(qkv, heads_N + H + head, is_new_N, k_norm_D, cos_sin, turn - offset + new_N, D, NORM, EPS)
            v_at = (heads_N + H + K + head)[:, None] * D + d[None, :]
            v_ND = tl.load(qkv + v_at, mask=is_new_N[:, None], other=0.0)
            is_own_N = is_new_N & (new_N >= offset)
            at_N = base + new_N
            own_page_N = tl.load(pages + at_N // S, mask=is_own_N, other=0).to(tl.int64)
            in_pages_ND = (own_page_N * (K * S * D) + (at_N % S) * D)[:, None] + d[None, :]
            tl.store(k_head + in_pages_ND, k_ND, mask=is_own_N[:, None])
            tl.store(v_head + in_pages_ND, v_ND, mask=is_own_N[:, None])
            is_seen_MN = is_line_M[:, None] & is_new_N[None, :] & (new_N[None, :] <= offset + token_M[:, None])
            m, total, acc = see(q, tl.trans(k_ND), v_ND, is_seen_MN, m, total, acc, SCALE)

    for at in range(tile, end_tile):
        at_N = at * BLOCK_N + n
        next_N = at_N + BLOCK_N
        next_page_N = tl.load(pages + next_N // S, mask=next_N < base, other=0)
        is_seen_N = at_N < base
        in_pages_N = page_N.to(tl.int64) * (K * S * D) + (at_N % S) * D
        k_DN = tl.load(k_head + in_pages_N[None, :] + d[:, None], mask=is_seen_N[None, :], other=0.0)
        v_ND = tl.load(v_head + in_pages_N[:, None] + d[None, :], mask=is_seen_N[:, None], other=0.0)
        m, total, acc = see(q, k_DN, v_ND, is_line_M[:, None] & is_seen_N[None, :], m, total, acc, SCALE)
        page_N = next_page_N

    out_MD = out + (row_M.to(tl.int64) * H + head * G + g % G)[:, None] * D + d[None, :]
    if num_splits == 1:
        total = tl.where(is_line_M, total, 1.0)
        tl.store(out_MD, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_line_M[:, None])
    else:
        task = row * K + head
        part = task * tl.num_programs(2) + split
        tl.store(part_acc + part * (LINES * D) + g[:, None] * D + d[None, :], acc, mask=is_line_M[:, None])
        tl.store(part_sum + part * (2 * LINES) + g, m, mask=is_line_M)
        tl.store(part_sum + part * (2 * LINES) + LINES + g, total, mask=is_line_M)
        # All threads' stores come before the one thread's release, and its acquire before all threads' loads.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + task, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if arrived == num_splits - 1:
            tl.store(arrivals + task, 0)
            first = task * tl.num_programs(2)
            merged = merge(part_acc, part_sum, first, num_splits, is_line_M, LINES, M, D, MAX_SPLITS, 2)
            tl.store(out_MD, merged.to(out.dtype.element_ty), mask=is_line_M[:, None])


class DraftedAttention:
    """Decode rows of one network in steps with guesses; the surface is DecodeAttention's. Owns what the programs of a launch hand
    to each other: launches must follow one another. Knows no sliding window, and its sums depend on how a request's tokens come
    together: DecodeAttention is for networks with the one and for results without the other."""

    def __init__(
        self,
        shape: NetworkShape,
        *,
        max_rows: int,
        num_sms: int,
        device: torch.device | str,
        block_n: int = 64,
        num_warps: int = 4,
        num_stages: int = 2,
    ) -> None:
        assert shape.sliding_window is None
        self._heads, self._kv_heads, self._dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        group = self._heads // self._kv_heads
        self._max_rows = max_rows
        self._num_sms = num_sms
        self._block_n, self._num_warps, self._num_stages = block_n, num_warps, num_stages
        self._tokens = max(16 // group, _MIN_TOKENS)
        self._lines = triton.next_power_of_2(self._tokens * group)
        tasks = [rows * splits for rows in range(1, max_rows + 1) if (splits := self.max_splits(rows)) > 1]
        parts = max(tasks, default=1) * self._kv_heads * self._tokens * group
        self._part_acc = torch.empty(parts * self._dim, dtype=torch.float32, device=device)
        self._part_sum = torch.empty(parts * 2, dtype=torch.float32, device=device)
        self._arrivals = torch.zeros(max_rows * self._kv_heads, dtype=torch.int32, device=device)

    def max_splits(self, rows: int) -> int:
        """Programs that share a key/value head of a block, if its request is long: two per SM over all of them, where blocks are
        half full."""
        blocks = -(-2 * rows // self._tokens)
        return min(max(-(-2 * self._num_sms // (blocks * self._kv_heads)), 1), MAX_SPLITS)

    def attend(
        self,
        qkv_TJ: Tensor,
        inputs: StepInputs,
        layer: int,
        cos_sin: Tensor,
        q_norm_D: Tensor | None,
        k_norm_D: Tensor | None,
        eps: float,
        out_TX: Tensor,
        *,
        pdl: bool = False,
    ) -> None:
        """See DecodeAttention.attend."""
        rows = inputs.num_decode
        assert 0 < rows <= self._max_rows and qkv_TJ.is_contiguous() and out_TX.is_contiguous()
        assert (q_norm_D is None) == (k_norm_D is None) and inputs.parts_PR is None
        args = (inputs.positions_T, inputs.slots_T, inputs.page_table_SP, cos_sin, q_norm_D, k_norm_D)
        scratch = (self._part_acc, self._part_sum, self._arrivals)
        kernel: Any = _drafted_attention[(self._kv_heads, rows, self.max_splits(rows))]
        kernel(
            *(qkv_TJ, out_TX, inputs.k, inputs.v, *args, *scratch),
            *(rows, layer, inputs.k.shape[1], inputs.page_table_SP.shape[1]),
            H=self._heads,
            K=self._kv_heads,
            D=self._dim,
            S=inputs.k.shape[3],
            G=self._heads // self._kv_heads,
            R=self._tokens,
            M=self._lines,
            SCALE=self._dim**-0.5 * LOG2_E,
            EPS=eps,
            NORM=q_norm_D is not None,
            MAX_SPLITS=MAX_SPLITS,
            BLOCK_N=self._block_n,
            BY_TOKEN=inputs.rope_3T is not None,
            PDL=pdl,
            num_warps=self._num_warps,
            num_stages=self._num_stages,
            **({"launch_pdl": True} if pdl else {}),
        )
