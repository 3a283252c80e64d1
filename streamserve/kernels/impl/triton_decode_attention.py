"""Attention of rows with one new token each: q/k norm, RoPE, the new token's K and V into its page, softmax over all pages.

One launch does all of it. A program owns one key/value head of one row, or one part (split) of that row's tokens, so that few
long rows still fill the card; all query heads of the head are the rows of one product. The parts of a row are merged by
whichever of its programs arrives last, in fixed order: the same input gives the same bits. How far a row reaches is read from
device memory, so that one captured graph serves every length. Splitting over KV and the merge are those of Flash-Decoding (Dao
et al., 2023), the online softmax is FlashAttention's. Knows nothing of prompts; triton_prompt_attention.py does those.

Rows whose first pages are the same may be attended as a group, in a kernel of its own: a tile of the shared prefix is read
once for all of them, in the lines of the product that one row's query heads leave empty. Reading a shared prefix once is the
idea of Hydragen (Juravsky et al., 2024) and of FlashInfer's cascade; here prefix and own tokens are one list of tiles, so that
there is no second launch and one merge. Who forms a group is decided elsewhere (engine/prefix_groups.py).

Where rows follow one another in a request (guesses behind a known token), a launch before it writes K and V of all of them, and
attention finds them in the pages.

Shape letters: see kernels/ops.py; X = H * D, J = (H + 2K) * D, M lines of a product, R rows of a group.
"""

from math import log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamserve.kernels.ops import NetworkShape, StepInputs

LOG2_E = log2(2.718281828459045)
# Tokens of a tile, warps and tiles under way where rows are in groups. On one H200, 32 pairs that share 2,048 tokens of 2,208
# take 89 us so, 112 without groups; 64 rows that share 1,024 of 1,184 take 35 and 54; 64 rows of 640 alone take 54 and 47.
_GROUP_TILE, _GROUP_TILE_HIP = (64, 4, 3), (64, 4, 2)
MAX_SPLITS = 64  # of a row or a group
_FIXED_SPLITS = 8  # with deterministic: parts of a row, whatever the number of rows
_FIXED_SPLIT_LEN = 256  # and their least length in tokens


@triton.jit
def load_turned(
    heads,
    row_M,
    is_row_M,
    weight_D,
    cos_sin,
    line_M,
    D: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
):
    """Heads [M, D] after norm and RoPE, in their own dtype. `cos_sin`: the table's line for all of them, or, with `line_M`, the
    table.

    Every element also loads its partner, half a head away: cheaper than joining halves, which goes through shared memory."""
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, D)
    partner = (d + HALF) % D
    raw = tl.load(heads + row_M[:, None] * D + d[None, :], mask=is_row_M[:, None], other=0.0)
    x = raw.to(tl.float32)
    y = tl.load(heads + row_M[:, None] * D + partner[None, :], mask=is_row_M[:, None], other=0.0).to(tl.float32)
    if NORM:  # rounded where transformers rounds: before and after the weight
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
        x = (x * scale).to(raw.dtype).to(tl.float32) * tl.load(weight_D + d).to(tl.float32)[None, :]
        y = (y * scale).to(raw.dtype).to(tl.float32) * tl.load(weight_D + partner).to(tl.float32)[None, :]
        x = x.to(raw.dtype).to(tl.float32)
        y = y.to(raw.dtype).to(tl.float32)
    if line_M is None:
        cos = tl.load(cos_sin + d % HALF)
        sin = tl.load(cos_sin + HALF + d % HALF)
        sin = tl.where(d < HALF, -sin, sin)
        return (x * cos[None, :] + y * sin[None, :]).to(raw.dtype)
    else:
        angles = cos_sin + line_M.to(tl.int64)[:, None] * D + (d % HALF)[None, :]
        cos = tl.load(angles, mask=is_row_M[:, None], other=0.0)
        sin = tl.load(angles + HALF, mask=is_row_M[:, None], other=0.0)
        return (x * cos + y * tl.where((d < HALF)[None, :], -sin, sin)).to(raw.dtype)


@triton.jit
def see(q, k_DN, v_ND, is_seen_MN, m, total, acc, SCALE: tl.constexpr):
    """Maximum, sum and weighted values after one more tile. A line that has seen nothing yet must not be at -inf."""
    scores = tl.where(is_seen_MN, tl.dot(q, k_DN, input_precision="ieee"), float("-inf"))
    new_m = tl.maximum(m, tl.max(scores, 1) * SCALE)
    weights = tl.exp2(scores * SCALE - new_m[:, None])
    shrink = tl.exp2(m - new_m)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v_ND.dtype), v_ND, acc * shrink[:, None], input_precision="ieee")
    return new_m, total, acc


@triton.jit
def _load_new(
    line, head, k_norm_D, angles, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr
):
    """A row's new token: K [1, D] after norm and RoPE, V [D]."""
    one = tl.arange(0, 1)
    k_new = load_turned(line + (H + head) * D, one, one < 1, k_norm_D, angles, None, D, NORM, EPS)
    return k_new, tl.load(line + (H + K + head) * D + tl.arange(0, D))


@triton.jit
def _store_new(k_head, v_head, pages, position, k_new, v_new, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr):
    """Into its place in its page."""
    d = tl.arange(0, D)
    page = tl.load(pages + position // S).to(tl.int64)
    at = page * (K * S * D) + (position % S) * D
    tl.store(k_head + at + tl.arange(0, 1)[:, None] * D + d[None, :], k_new)
    tl.store(v_head + at + d, v_new)


@triton.jit(
    do_not_specialize=["layer", "num_pages", "table_width"],
    do_not_specialize_on_alignment=["positions_T", "slots_T", "page_table"],
)
def _write_decode(
    qkv,
    k_pages,
    v_pages,
    positions_T,
    slots_T,
    page_table,
    cos_sin,
    k_norm_D,
    layer,
    num_pages,
    table_width,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One key/value head of one row: what _decode_attention would write, and nothing else; in as many warps, to the same bits."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots_T + row)
    if slot >= 0:
        position = tl.load(positions_T + row)
        line = qkv + row.to(tl.int64) * ((H + 2 * K) * D)
        angles = cos_sin + (row if BY_TOKEN else position).to(tl.int64) * D
        k_new, v_new = _load_new(line, head, k_norm_D, angles, H, K, D, NORM, EPS)
        layer_at = layer.to(tl.int64) * num_pages * (K * S * D) + head * (S * D)
        pages = page_table + slot.to(tl.int64) * table_width
        _store_new(k_pages + layer_at, v_pages + layer_at, pages, position, k_new, v_new, K, D, S)


@triton.jit(
    do_not_specialize=["layer", "num_pages", "table_width"],
    do_not_specialize_on_alignment=["positions_T", "slots_T", "page_table"],
)
def _decode_attention(
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
    part_acc,  # [T, K, splits, G, D] float32
    part_sum,  # [T, K, splits, 2, G] float32: maximum, sum
    arrivals,  # [T, K] int32, all 0 before and after
    layer,
    num_pages,
    table_width,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    G_DOT: tl.constexpr,  # G padded to what a product takes
    G_MERGE: tl.constexpr,  # G padded to a power of two
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    MIN_TILES: tl.constexpr,  # of a split
    MAX_SPLITS: tl.constexpr,  # of any launch, a power of two
    BLOCK_N: tl.constexpr,
    IS_WRITTEN: tl.constexpr,  # the new tokens are in their pages
    BY_TOKEN: tl.constexpr,  # cos_sin has a line for each token of the step, not for each position
    PDL: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    if PDL:  # also before an early return: the next kernel relies on this one having waited
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slots_T + row)
    position = tl.load(positions_T + row)
    if slot < 0:
        return

    # Tokens start .. position - 1 are in pages, in tiles first_tile .. end_tile - 1. The new one need not be.
    start = 0
    if WINDOW > 0:
        start = tl.maximum(position - (WINDOW - 1), 0)
    first_tile = start // BLOCK_N
    end_tile = tl.where(start < position, tl.cdiv(position, BLOCK_N), first_tile)
    num_tiles = end_tile - first_tile
    split_tiles = tl.maximum(tl.cdiv(num_tiles, tl.num_programs(2)), MIN_TILES)
    num_splits = tl.maximum(tl.cdiv(num_tiles, split_tiles), 1)
    if split >= num_splits:
        return
    tile = first_tile + split * split_tiles
    end_tile = tl.minimum(tile + split_tiles, end_tile)

    # Page numbers are loaded one tile ahead: what a tile's loads wait for is then already there when they are issued.
    n = tl.arange(0, BLOCK_N)
    pages = page_table + slot.to(tl.int64) * table_width
    first_N = tile * BLOCK_N + n
    page_N = tl.load(pages + first_N // S, mask=first_N < position, other=0)

    d = tl.arange(0, D)
    g = tl.arange(0, G_DOT)
    line = qkv + row.to(tl.int64) * ((H + 2 * K) * D)
    angles = cos_sin + (row if BY_TOKEN else position).to(tl.int64) * D
    q = load_turned(line + head * (G * D), g, g < G, q_norm_D, angles, None, D, NORM, EPS)
    layer_at = layer.to(tl.int64) * num_pages * (K * S * D) + head * (S * D)
    k_head = k_pages + layer_at
    v_head = v_pages + layer_at

    m = tl.full([G_DOT], float("-inf"), tl.float32)
    total = tl.zeros([G_DOT], tl.float32)
    acc = tl.zeros([G_DOT, D], tl.float32)
    if split == num_splits - 1:  # the new token: into its page, and into the sums without going through it
        k_new, v_new = _load_new(line, head, k_norm_D, angles, H, K, D, NORM, EPS)
        if not IS_WRITTEN:
            _store_new(k_head, v_head, pages, position, k_new, v_new, K, D, S)
        m = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * SCALE
        total += 1.0
        acc += v_new.to(tl.float32)[None, :]

    # Every tile is masked: it costs arithmetic, of which there is plenty, and keeps the last, partial tile in the pipeline.
    for at in range(tile, end_tile):
        at_N = at * BLOCK_N + n
        next_N = at_N + BLOCK_N
        next_page_N = tl.load(pages + next_N // S, mask=next_N < position, other=0)
        is_seen_N = (at_N >= start) & (at_N < position)
        in_pages_N = page_N.to(tl.int64) * (K * S * D) + (at_N % S) * D
        k_DN = tl.load(k_head + in_pages_N[None, :] + d[:, None], mask=is_seen_N[None, :], other=0.0)
        v_ND = tl.load(v_head + in_pages_N[:, None] + d[None, :], mask=is_seen_N[:, None], other=0.0)
        m, total, acc = see(q, k_DN, v_ND, is_seen_N[None, :], m, total, acc, SCALE)
        page_N = next_page_N

    out_row = out + row.to(tl.int64) * (H * D) + head * (G * D)
    if num_splits == 1:
        tl.store(out_row + g[:, None] * D + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=(g < G)[:, None])
    else:
        task = row * K + head
        part = task * tl.num_programs(2) + split
        tl.store(part_acc + part * (G * D) + g[:, None] * D + d[None, :], acc, mask=(g < G)[:, None])
        tl.store(part_sum + part * (2 * G) + g, m, mask=g < G)
        tl.store(part_sum + part * (2 * G) + G + g, total, mask=g < G)
        # All threads' stores come before the one thread's release, and its acquire before all threads' loads.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + task, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if arrived == num_splits - 1:
            tl.store(arrivals + task, 0)
            h = tl.arange(0, G_MERGE)
            merged = merge(part_acc, part_sum, task * tl.num_programs(2), num_splits, h < G, G, G_MERGE, D, MAX_SPLITS, 4)
            tl.store(out_row + h[:, None] * D + d[None, :], merged.to(out.dtype.element_ty), mask=(h < G)[:, None])


@triton.jit
def merge(
    part_acc,
    part_sum,
    first,
    num_splits,
    is_line_M,
    LINES: tl.constexpr,
    M: tl.constexpr,  # LINES padded to a power of two
    D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    FEW: tl.constexpr,  # parts loaded at once
):
    """Parts first .. first + num_splits - 1, of LINES lines each, into one [M, D], in this order. `.cg` reads past the SM's own
    cache."""
    d = tl.arange(0, D)
    g = tl.arange(0, M)
    s = tl.arange(0, MAX_SPLITS)
    is_part_SM = (s < num_splits)[:, None] & is_line_M[None, :]
    sums = part_sum + (first + s)[:, None] * (2 * LINES) + g[None, :]
    m_SM = tl.load(sums, mask=is_part_SM, other=float("-inf"), cache_modifier=".cg")
    total_SM = tl.load(sums + LINES, mask=is_part_SM, other=0.0, cache_modifier=".cg")
    m = tl.max(tl.where(is_line_M[None, :], m_SM, 0.0), 0)
    total = tl.sum(tl.where(is_part_SM, tl.exp2(m_SM - m[None, :]), 0.0) * total_SM, 0)
    acc = tl.zeros([M, D], tl.float32)
    for at in range(0, num_splits, FEW):
        f = at + tl.arange(0, FEW)
        is_here_FM = (f < num_splits)[:, None] & is_line_M[None, :]
        m_FM = tl.load(
            part_sum + (first + f)[:, None] * (2 * LINES) + g[None, :],
            mask=is_here_FM,
            other=float("-inf"),
            cache_modifier=".cg",
        )
        acc_FMD = tl.load(
            part_acc + (first + f)[:, None, None] * (LINES * D) + g[None, :, None] * D + d[None, None, :],
            mask=is_here_FM[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        acc += tl.sum(acc_FMD * tl.exp2(m_FM - m[None, :])[:, :, None], 0)
    total = tl.where(is_line_M, total, 1.0)
    return acc / total[:, None]


@triton.jit
def _find_tile(tile, shared, slot, slot_R, position_R, before_R, own_R, BLOCK_N: tl.constexpr):
    """Tile `tile` of a group's list: its first token, the end of the tokens it is part of, and the slot they belong to.
    `slot`: whose pages hold the prefix. Behind the list: no token."""
    own = tile - shared // BLOCK_N
    is_here_R = (own >= before_R) & (own < before_R + own_R)
    first = (tile - tl.sum(tl.where(is_here_R, before_R, 0), 0)) * BLOCK_N
    end = tl.where(own < 0, shared, tl.sum(tl.where(is_here_R, position_R, 0), 0))
    return first, end, tl.where(own < 0, slot, tl.sum(tl.where(is_here_R, slot_R, 0), 0))


@triton.jit(
    do_not_specialize=["layer", "num_pages", "table_width"],
    do_not_specialize_on_alignment=["positions_T", "slots_T", "page_table", "parts"],
)
def _grouped_decode_attention(
    qkv,  # [T, J]
    out,  # [T, X]
    k_pages,  # [L, pages, K, S, D]
    v_pages,
    positions_T,
    slots_T,
    page_table,  # [slots, table_width]
    parts,  # [P, R + 3]: see StepInputs
    cos_sin,  # [positions, D], or [T, D], float32: D / 2 cosines, then D / 2 sines
    q_norm_D,
    k_norm_D,
    part_acc,  # [K, P, R * G, D] float32
    part_sum,  # [K, P, 2, R * G] float32: maximum, sum
    arrivals,  # [K, P] int32, all 0 before and after
    layer,
    num_pages,
    table_width,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,  # lines of the product: R * G padded to a power of two
    R: tl.constexpr,
    R_PAD: tl.constexpr,  # R padded to a power of two
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    MAX_SPLITS: tl.constexpr,  # of any group, a power of two
    BLOCK_N: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One part of one group, one key/value head. The tokens of a group are a list of tiles: those of the shared prefix, then
    each member's own; the part is a stretch of it. Line r * G + i of the product is query head i of member r."""
    LINES: tl.constexpr = R * G
    NOTHING: tl.constexpr = -1.0e30  # maximum of a line that has seen no token: below any score, and differences stay finite
    head = tl.program_id(0)
    part = tl.program_id(1)
    if PDL:  # also before an early return: the next kernel relies on this one having waited
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    work = parts + part * (R + 3)
    leader = tl.load(work)
    shared = tl.load(work + R)
    split = tl.load(work + R + 1)
    max_splits = tl.load(work + R + 2)
    if leader < 0:
        return
    leader_slot = tl.load(slots_T + leader)

    # Tokens shared .. position - 1 of a member are in its own pages, in own_R tiles; before_R other own tiles come first.
    r = tl.arange(0, R_PAD)
    row_R = tl.load(work + r, mask=r < R, other=-1)
    slot_R = tl.load(slots_T + row_R, mask=row_R >= 0, other=0)
    position_R = tl.load(positions_T + row_R, mask=row_R >= 0, other=0)
    own_R = tl.cdiv(tl.maximum(position_R - shared, 0), BLOCK_N)
    before_R = tl.cumsum(own_R, 0) - own_R
    num_tiles = shared // BLOCK_N + tl.sum(own_R, 0)
    split_tiles = tl.maximum(tl.cdiv(num_tiles, max_splits), 1)
    num_splits = tl.maximum(tl.cdiv(num_tiles, split_tiles), 1)
    if split >= num_splits:
        return
    tile = split * split_tiles
    end_tile = tl.minimum(tile + split_tiles, num_tiles)

    # Page numbers are loaded one tile ahead: what a tile's loads wait for is then already there when they are issued.
    n = tl.arange(0, BLOCK_N)
    first, end, slot = _find_tile(tile, shared, leader_slot, slot_R, position_R, before_R, own_R, BLOCK_N)
    first_N = first + n
    page_N = tl.load(page_table + slot.to(tl.int64) * table_width + first_N // S, mask=first_N < end, other=0)

    d = tl.arange(0, D)
    g = tl.arange(0, M)
    row_M = tl.load(work + g // G, mask=g < LINES, other=-1)
    is_line_M = row_M >= 0
    slot_M = tl.load(slots_T + row_M, mask=is_line_M, other=-1)
    position_M = tl.load(positions_T + row_M, mask=is_line_M, other=0)
    heads_M = row_M.to(tl.int64) * (H + 2 * K)
    turn_M = row_M if BY_TOKEN else position_M
    q = load_turned(qkv, heads_M + head * G + g % G, is_line_M, q_norm_D, cos_sin, turn_M, D, NORM, EPS)
    layer_at = layer.to(tl.int64) * num_pages * (K * S * D) + head * (S * D)
    k_head = k_pages + layer_at
    v_head = v_pages + layer_at

    m = tl.full([M], NOTHING, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    if split == num_splits - 1:  # every member's new token: into its page, and into the sums of its lines
        k_new = load_turned(qkv, heads_M + H + head, is_line_M, k_norm_D, cos_sin, turn_M, D, NORM, EPS)
        v_at = (heads_M + H + K + head)[:, None] * D + d[None, :]
        v_new = tl.load(qkv + v_at, mask=is_line_M[:, None], other=0.0)
        pages_M = page_table + slot_M.to(tl.int64) * table_width
        page_M = tl.load(pages_M + position_M // S, mask=is_line_M, other=0).to(tl.int64)
        at_MD = (page_M * (K * S * D) + (position_M % S) * D)[:, None] + d[None, :]
        is_writer_M = is_line_M & (g % G == 0)
        tl.store(k_head + at_MD, k_new, mask=is_writer_M[:, None])
        tl.store(v_head + at_MD, v_new, mask=is_writer_M[:, None])
        m = tl.where(is_line_M, tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * SCALE, NOTHING)
        total = tl.where(is_line_M, 1.0, 0.0)
        acc += v_new.to(tl.float32)

    for at in range(tile, end_tile):
        next_first, next_end, next_slot = _find_tile(at + 1, shared, leader_slot, slot_R, position_R, before_R, own_R, BLOCK_N)
        next_N = next_first + n
        next_page_N = tl.load(page_table + next_slot.to(tl.int64) * table_width + next_N // S, mask=next_N < next_end, other=0)
        at_N = first + n
        is_seen_N = at_N < end
        in_pages_N = page_N.to(tl.int64) * (K * S * D) + (at_N % S) * D
        k_DN = tl.load(k_head + in_pages_N[None, :] + d[:, None], mask=is_seen_N[None, :], other=0.0)
        v_ND = tl.load(v_head + in_pages_N[:, None] + d[None, :], mask=is_seen_N[:, None], other=0.0)
        is_seen_MN = ((slot_M == slot) | (at < shared // BLOCK_N))[:, None] & is_seen_N[None, :]
        m, total, acc = see(q, k_DN, v_ND, is_seen_MN, m, total, acc, SCALE)
        first, end, slot, page_N = next_first, next_end, next_slot, next_page_N

    out_MD = out + (row_M.to(tl.int64) * H + head * G + g % G)[:, None] * D + d[None, :]
    if num_splits == 1:
        total = tl.where(is_line_M, total, 1.0)
        tl.store(out_MD, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_line_M[:, None])
    else:
        own_part = head * tl.num_programs(1) + part
        first_part = own_part - split
        tl.store(part_acc + own_part * (LINES * D) + g[:, None] * D + d[None, :], acc, mask=is_line_M[:, None])
        tl.store(part_sum + own_part * (2 * LINES) + g, m, mask=is_line_M)
        tl.store(part_sum + own_part * (2 * LINES) + LINES + g, total, mask=is_line_M)
        # All threads' stores come before the one thread's release, and its acquire before all threads' loads.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + first_part, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if arrived == num_splits - 1:
            tl.store(arrivals + first_part, 0)
            merged = merge(part_acc, part_sum, first_part, num_splits, is_line_M, LINES, M, D, MAX_SPLITS, 2)
            tl.store(out_MD, merged.to(out.dtype.element_ty), mask=is_line_M[:, None])


class DecodeAttention:
    """Decode rows of one network. Owns what the programs of a launch hand to each other: launches must follow one another.

    `max_rows`: most decode rows of a step. `deterministic`: how a row is split depends on its own length alone, so that its
    result does not depend, bit for bit, on the rows beside it; groups are not used then, nor with a sliding window. The last
    arguments are for measuring.

    Whoever forms groups asks for `rows_per_group`, `tile_len`, `programs` and `num_parts`. What is no number in a member's own
    V reaches all lines of its group (0 * nan), as it would reach whoever shares the prefix if it stood there."""

    def __init__(
        self,
        shape: NetworkShape,
        *,
        max_rows: int,
        num_sms: int,
        device: torch.device | str,
        deterministic: bool = False,
        block_n: int | None = None,
        num_warps: int | None = None,
        num_stages: int | None = None,
        group_stages: int | None = None,
        group_programs: int = 2,
    ) -> None:
        self._heads, self._kv_heads, self._dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        assert self._heads % self._kv_heads == 0 and self._dim & (self._dim - 1) == 0 and self._dim >= 16
        self._window = shape.sliding_window or 0
        self._max_rows = max_rows
        self._num_sms = num_sms
        self._is_deterministic = deterministic
        tile = self._fitting_tile()
        self._block_n, self._num_warps, self._num_stages = block_n or tile[0], num_warps or tile[1], num_stages or tile[2]
        self._min_tiles = max(_FIXED_SPLIT_LEN // self._block_n, 1) if deterministic else 1
        group_tile = _GROUP_TILE_HIP if torch.version.hip or self._dim > 128 else _GROUP_TILE
        self._group_block_n, self._group_num_warps = block_n or group_tile[0], num_warps or group_tile[1]
        self._group_stages = group_stages or group_tile[2]
        group = self._heads // self._kv_heads
        self._lines = max(triton.next_power_of_2(group), 16)
        self.rows_per_group = 1 if deterministic or self._window else self._lines // group  # 1: groups are not used
        self.tile_len = self._group_block_n  # a shared prefix is a multiple of it
        self.programs = -(-group_programs * num_sms // self._kv_heads)  # that fill the card, for each key/value head
        tasks = [rows * self._kv_heads * splits for rows in range(1, max_rows + 1) if (splits := self.max_splits(rows)) > 1]
        lines, arrivals = max(tasks, default=1) * group, max_rows * self._kv_heads
        if self.rows_per_group > 1:
            arrivals = self.num_parts(max_rows) * self._kv_heads
            lines = max(lines, arrivals * self.rows_per_group * group)
        self._part_acc = torch.empty(lines * self._dim, dtype=torch.float32, device=device)
        self._part_sum = torch.empty(lines * 2, dtype=torch.float32, device=device)
        self._arrivals = torch.zeros(arrivals, dtype=torch.int32, device=device)

    def num_parts(self, rows: int) -> int:
        """Lines of StepInputs.parts_PR in a step of so many decode rows: enough for a group per row, and the splits that fill
        the card."""
        return rows + self.programs

    def _fitting_tile(self) -> tuple[int, int, int]:
        """Tokens of a tile, warps, and tiles under way at once. Measured on one H200 at 64 rows of 640 tokens, us: with 4 query
        heads per key/value head 46.7 with (64, 4, 2), 47.9 with (32, 2, 4), 52.8 with (64, 4, 4); with 2 heads and their norm
        61.3, 49.1 and 54.6."""
        if torch.version.hip or self._dim > 128:
            return 64, 4, 2
        if self._heads // self._kv_heads >= 4:
            return 64, 4, 2
        return (32, 2, 4) if self._dim == 128 else (64, 4, 4)

    def max_splits(self, rows: int) -> int:
        """Programs that share a key/value head of a row, if the row is long: two per SM over all of them."""
        if self._is_deterministic:
            return _FIXED_SPLITS
        return min(max(-(-2 * self._num_sms // (rows * self._kv_heads)), 1), MAX_SPLITS)

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
        """Attend for tokens 0 .. num_decode - 1: into their lines of `out_TX`; K and V of each into its page, in a drafted
        step before any of them attends. `qkv_TJ` as the product left it: no norm, no RoPE. `cos_sin`: see
        triton_rope.write_prompt. Rows with slot -1 read and write nothing."""
        rows = inputs.num_decode
        assert 0 < rows <= self._max_rows and qkv_TJ.is_contiguous() and out_TX.is_contiguous()
        assert (q_norm_D is None) == (k_norm_D is None)
        group, parts = self._heads // self._kv_heads, inputs.parts_PR
        args = (inputs.positions_T, inputs.slots_T, inputs.page_table_SP)
        where = (layer, inputs.k.shape[1], inputs.page_table_SP.shape[1])
        scratch = (self._part_acc, self._part_sum, self._arrivals, *where)
        written: dict[str, Any] = {
            "H": self._heads,
            "K": self._kv_heads,
            "D": self._dim,
            "S": inputs.k.shape[3],
            "EPS": eps,
            "NORM": q_norm_D is not None,
            "BY_TOKEN": inputs.rope_3T is not None,
            "PDL": pdl,
            **({"launch_pdl": True} if pdl else {}),
        }
        model = {**written, "G": group, "SCALE": self._dim**-0.5 * LOG2_E, "MAX_SPLITS": MAX_SPLITS}
        kernel: Any
        if inputs.is_drafted:
            assert parts is None
            kernel = _write_decode[(self._kv_heads, rows)]
            pages = (inputs.k, inputs.v, *args, cos_sin, k_norm_D, *where)
            kernel(qkv_TJ, *pages, num_warps=self._num_warps, num_stages=self._num_stages, **written)
        if parts is None:
            kernel = _decode_attention[(self._kv_heads, rows, self.max_splits(rows))]
            kernel(
                *(qkv_TJ, out_TX, inputs.k, inputs.v, *args, cos_sin, q_norm_D, k_norm_D, *scratch),
                G_DOT=self._lines,
                G_MERGE=triton.next_power_of_2(group),
                WINDOW=self._window,
                MIN_TILES=self._min_tiles,
                BLOCK_N=self._block_n,
                IS_WRITTEN=inputs.is_drafted,
                num_warps=self._num_warps,
                num_stages=self._num_stages,
                **model,
            )
        else:
            assert self.rows_per_group > 1 and parts.is_contiguous()
            assert parts.shape[1] == self.rows_per_group + 3 and len(parts) <= self.num_parts(self._max_rows)
            kernel = _grouped_decode_attention[(self._kv_heads, len(parts))]
            kernel(
                *(qkv_TJ, out_TX, inputs.k, inputs.v, *args, parts, cos_sin, q_norm_D, k_norm_D, *scratch),
                M=self._lines,
                R=self.rows_per_group,
                R_PAD=triton.next_power_of_2(self.rows_per_group),
                BLOCK_N=self._group_block_n,
                num_warps=self._group_num_warps,
                num_stages=self._group_stages,
                **model,
            )
