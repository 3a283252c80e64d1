"""Register tiles of quantised matrix products: a few rows of activations times 8 channels of packed weights.

Layouts (numba_pack.py makes them; G groups of 32 inputs, 8 channels to a block):

    4 bit, 160 bytes per block and group   4 x 32 bytes: channel c, inputs 4j..4j+3 in the low nibbles and 16 inputs later in
                                           the high ones, at byte 32j + 4c; then 8 x f16 scale d, 8 x f16 offset m: d * q + m
    8 bit, 272 bytes per block and group   16 x 16 bytes: channel c, inputs 2j and 2j+1 at byte 16j + 2c; then 8 x f16 scale d
    rows, 40 or 72 bytes per group         32 x int8 (for 4-bit weights) or 32 x int16 (for 8-bit ones), then f32 scale s and
                                           f32 s * sum of the integers; int16 pads to 72

Numerics: products within a group are exact integers; groups are added in float32, in order, by fused multiply-adds. A row
therefore gets the same bits in every tile, whatever rows stand beside it. 4 bit: |sum of 8 products| <= 8 * 15 * 127 fits the
int16 that pmaddubsw leaves. 8 bit: 32 * 128 * 32767 fits int32. Knows no threads and no network.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator"

from typing import Any

from numba import types

from streamserve.kernels.impl.numba_ir import F16, F32, I8, I16, I32, Emit, Value, native, vec, vector_code

Q4_BYTES, Q8_BYTES = 160, 272  # of weights: 8 channels, one group
Q4_ROW_BYTES, Q8_ROW_BYTES = 40, 72  # of activations: one row, one group


def _q4_dots(e: Emit, weights: Value, rows: list[Value]) -> list[Value]:
    """Integer dot products of one group, int32 per channel, one vector per row."""
    b = e.builder
    sums: list[Any] = [None] * len(rows)
    nibble = e.all(I8, 15, 32)
    for j in range(4):
        packed = e.load(vec(I8, 32), weights, 32 * j, align=32)
        low = b.and_(packed, nibble)
        high = b.and_(b.bitcast(b.lshr(b.bitcast(packed, vec(I16, 16)), e.all(I16, 4, 16)), vec(I8, 32)), nibble)
        for unpacked, quad in ((low, j), (high, j + 4)):
            for r, row in enumerate(rows):
                x = b.bitcast(e.splat(e.load(I32, row, 4 * quad, align=4)), vec(I8, 32))
                product = e.call("llvm.x86.avx2.pmadd.ub.sw", vec(I16, 16), unpacked, x)
                sums[r] = product if sums[r] is None else b.add(sums[r], product)
    return [e.call("llvm.x86.avx2.pmadd.wd", vec(I32), s, e.all(I16, 1, 16)) for s in sums]


def _q8_dots(e: Emit, weights: Value, rows: list[Value]) -> list[Value]:
    b = e.builder
    sums: list[Any] = [None] * len(rows)
    for j in range(16):
        wide = b.sext(e.load(vec(I8, 16), weights, 16 * j, align=16), vec(I16, 16))
        for r, row in enumerate(rows):
            x = b.bitcast(e.splat(e.load(I32, row, 4 * j, align=4)), vec(I16, 16))
            product = e.call("llvm.x86.avx2.pmadd.wd", vec(I32), wide, x)
            sums[r] = product if sums[r] is None else b.add(sums[r], product)
    return sums


def _make_tile(bits: int, num_rows: int) -> Any:
    """An intrinsic for one block of weights and `num_rows` rows:
    tile(weights, groups, rows, bytes from row to row, out, bytes from row to row of out, adds). `adds` 1 adds to `out`."""
    dots, block_bytes, row_bytes, s_at = (
        (_q4_dots, Q4_BYTES, Q4_ROW_BYTES, 32) if bits == 4 else (_q8_dots, Q8_BYTES, Q8_ROW_BYTES, 64)
    )
    scale_at = 128 if bits == 4 else 256

    @vector_code(*[types.int64] * 7)
    def tile(
        e: Emit, weights: Value, groups: Value, rows: Value, row_stride: Value, out: Value, out_stride: Value, adds: Value
    ) -> None:
        b = e.builder
        rows_at = [e.add(rows, e.mul(row_stride, r)) for r in range(num_rows)]

        def group(g: Value, total: list[Value]) -> list[Value]:
            w = e.add(weights, e.mul(g, block_bytes))
            x_at = [e.add(at, e.mul(g, row_bytes)) for at in rows_at]
            sums = dots(e, w, x_at)
            scale = b.fpext(e.load(vec(F16), w, scale_at, align=16), vec(F32))
            total = [
                e.fma(b.fmul(scale, e.splat(e.load(F32, x, s_at, align=4))), b.sitofp(dot, vec(F32)), before)
                for x, dot, before in zip(x_at, sums, total, strict=True)
            ]
            if bits == 8:
                return total
            offset = b.fpext(e.load(vec(F16), w, scale_at + 16, align=16), vec(F32))
            return [
                e.fma(offset, e.splat(e.load(F32, x, s_at + 4, align=4)), before) for x, before in zip(x_at, total, strict=True)
            ]

        total = e.loop(groups, group, [e.all(F32, 0.0)] * num_rows)
        is_add = e.splat(b.icmp_signed("!=", adds, e.i64(0)))
        for r, sums in enumerate(total):
            at = e.add(out, e.mul(out_stride, r))
            before = b.select(is_add, e.load(vec(F32), at), e.all(F32, 0.0))
            e.store(b.fadd(before, sums), at)

    return tile


_q4x1, _q4x2, _q4x4 = (_make_tile(4, num_rows) for num_rows in (1, 2, 4))
_q8x1, _q8x2, _q8x4 = (_make_tile(8, num_rows) for num_rows in (1, 2, 4))


@native
def block_product(
    bits: int, weights: int, groups: int, rows: int, row_bytes: int, num_rows: int, out: int, out_bytes: int, adds: int
) -> None:
    """All rows times one block of 8 channels. Addresses and strides are in bytes."""
    r = 0
    if bits == 4:
        while r + 4 <= num_rows:
            _q4x4(weights, groups, rows + r * row_bytes, row_bytes, out + r * out_bytes, out_bytes, adds)
            r += 4
        if r + 2 <= num_rows:
            _q4x2(weights, groups, rows + r * row_bytes, row_bytes, out + r * out_bytes, out_bytes, adds)
            r += 2
        if r < num_rows:
            _q4x1(weights, groups, rows + r * row_bytes, row_bytes, out + r * out_bytes, out_bytes, adds)
    else:
        while r + 4 <= num_rows:
            _q8x4(weights, groups, rows + r * row_bytes, row_bytes, out + r * out_bytes, out_bytes, adds)
            r += 4
        if r + 2 <= num_rows:
            _q8x2(weights, groups, rows + r * row_bytes, row_bytes, out + r * out_bytes, out_bytes, adds)
            r += 2
        if r < num_rows:
            _q8x1(weights, groups, rows + r * row_bytes, row_bytes, out + r * out_bytes, out_bytes, adds)
