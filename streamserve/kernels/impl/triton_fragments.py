"""Products on tensor cores whose operands go from memory straight into the registers that tensor cores take them from.

Owns which thread reads what. Knows no norm, no gate and no layer.

Tensor cores take 16 weight rows and 8 rows of x, of which each thread holds a few columns. Which columns does not matter as long
as both operands agree. So a thread reads 16 bytes of one row, eight columns side by side, and calls them those that the hardware
would have given it. Nothing passes through shared memory and no warp waits for another: a warp multiplies its own columns of
every tile, and the warps' sums are added once, at the end (`num_warps` products side by side, [WARPS, W, ROWS]).

A part is 8 rows by 32 columns for each warp, one load per thread: 8 lanes' worth of rows, 4 of columns. A tile is H x C parts: H
times 8 rows, C times 32 columns per warp. Parts are loaded apart and joined, which leaves them where they are; a load of more
dimensions would be spread over threads as the compiler likes, and compilers differ. 16-bit values travel as pairs, in words of
32 bits. That no thread has to ask another is for tests/kernels/test_triton_gemv.py to see.
"""

import triton
import triton.language as tl


@triton.jit
def _part(
    base,
    chosen,
    num_rows,
    i,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    C: tl.constexpr,
    WARPS: tl.constexpr,
    KIND: tl.constexpr,
    AT: tl.constexpr,
):
    """Part AT of tile i: words [WARPS * 8, 32 columns]."""
    PACK: tl.constexpr = 32 // base.dtype.element_ty.primitive_bitwidth
    H_AT: tl.constexpr = AT // C
    IS_RAGGED: tl.constexpr = K % (WARPS * C * 32) != 0
    place = tl.arange(0, WARPS * 8)[:, None]
    g = place % 8
    k = i * (WARPS * C * 32 // PACK) + (AT % C) * (32 // PACK)
    k += g * 0 + place // 8 * (C * 32 // PACK) + tl.arange(0, 32 // PACK)[None, :]
    is_in = k < K // PACK
    words = base.to(tl.pointer_type(tl.int32), bitcast=True) if PACK == 2 else base
    if KIND == "norm":
        at = words + k  # every row of threads reads the same
    elif KIND == "rows":
        r = H_AT * 8 + g
        is_in &= r < num_rows  # what is not read costs no time
        row = tl.where(r < num_rows, r, 0)
        if chosen is not None:
            row = tl.maximum(tl.load(chosen + row), 0)
        at = words + row.to(tl.int64) * (K // PACK) + k
    else:
        STEP: tl.constexpr = 4 if KIND == "gated" else 8
        BLOCK_N: tl.constexpr = BLOCK_W * STEP // 8
        if N % BLOCK_N == 0:  # parts are a constant apart
            at = words + (weight_rows(g, N, BLOCK_W, KIND == "gated").to(tl.int64) * (K // PACK) + k)
            at += H_AT * STEP * (K // PACK)
        else:
            at = words + (weight_rows(H_AT * 8 + g, N, BLOCK_W, KIND == "gated").to(tl.int64) * (K // PACK) + k)
    # Weights are read once, rows of x by every program.
    POLICY: tl.constexpr = "evict_last" if KIND == "rows" else "" if KIND == "norm" else "evict_first"
    if KIND == "rows" or IS_RAGGED:
        return tl.load(at, mask=is_in, other=0, eviction_policy=POLICY)
    else:
        return tl.load(at, eviction_policy=POLICY)


@triton.jit
def weight_rows(i, N: tl.constexpr, BLOCK_W: tl.constexpr, GATED: tl.constexpr):
    """Row of the weight for place i of this program's tile. Gate and up rows alternate, so that the two products of one output
    end up side by side. The last program may compute the last output again and again."""
    if GATED:
        return tl.minimum(tl.program_id(0) * (BLOCK_W // 2) + i // 2, N - 1) + (i % 2) * N
    else:
        return tl.minimum(tl.program_id(0) * BLOCK_W + i, N - 1)


@triton.jit
def load_tile(
    base,
    chosen,
    num_rows,
    i,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    C: tl.constexpr,
    WARPS: tl.constexpr,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    AT: tl.constexpr = 0,
    EVERY: tl.constexpr = 1,
):
    """Parts AT, AT + EVERY, ... of PARTS = H * C, joined. KIND is "weights", "gated", "rows" of x (the first `num_rows`, or those
    that `chosen` names), or "norm", one row for all."""
    if EVERY == PARTS:
        return _part(base, chosen, num_rows, i, N, K, BLOCK_W, C, WARPS, KIND, AT)
    else:
        return tl.join(
            load_tile(base, chosen, num_rows, i, N, K, BLOCK_W, C, WARPS, KIND, PARTS, AT, EVERY * 2),
            load_tile(base, chosen, num_rows, i, N, K, BLOCK_W, C, WARPS, KIND, PARTS, AT + EVERY, EVERY * 2),
        )


@triton.jit
def as_operand(tile, H: tl.constexpr, C: tl.constexpr, WARPS: tl.constexpr, DTYPE: tl.constexpr):
    """[WARPS, H * 8, C * 32] of what load_tile gave, in the order of columns that gives each thread what it has read: of its
    eight the first four come from the first half of the 32, the others from the second."""
    if DTYPE.primitive_bitwidth == 16:
        low = (tile & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        high = (tile >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        tile = tl.reshape(tl.join(low, high), [WARPS, 8, 4, 2, 2, H, C, 2])
        tile = tl.permute(tile, [0, 5, 1, 6, 3, 2, 4, 7])
    else:
        tile = tl.reshape(tile, [WARPS, 8, 4, 2, 4, H, C])
        tile = tl.permute(tile, [0, 5, 1, 6, 3, 2, 4])
    return tl.reshape(tile, [WARPS, H * 8, C * 32])


@triton.jit
def sums_of_lanes(values, ROWS: tl.constexpr, C: tl.constexpr, WARPS: tl.constexpr):
    """[WARPS, ROWS, 4] of an operand of float32: what each thread holds of a row, added up. Takes no exchange."""
    values = tl.reshape(values, [WARPS, ROWS, C, 2, 4, 4])
    return tl.sum(tl.sum(tl.sum(values, axis=5), axis=3), axis=2)
