"""Register tiles of quantised matrix products: a few rows of activations times 16 channels of packed weights.

Layouts (numba_pack.py makes them). A matrix is [blocks of 16 channels][groups of 32 inputs][2 halves of 8 channels], so that a
tile reads one stream:

    4 bit, 160 bytes per half and group   4 x 32 bytes: channel c, inputs 4j..4j+3 in the low nibbles and 16 inputs later in
                                          the high ones, at byte 32j + 4c; then 8 x f16 scale d, 8 x f16 offset m: d * q + m
    8 bit, 272 bytes per half and group   16 x 16 bytes: channel c, inputs 2j and 2j+1 at byte 16j + 2c; then 8 x f16 scale d
    rows, 72 bytes per group              for 4-bit weights 32 x int8 high and 32 x int8 low parts of 128 * high + low, for 8-bit
                                          ones 32 x int16; then f32 scale s and, for 4 bit, f32 s * sum of the integers

Numerics: products within a group are exact integers; groups are added in float32, in order, by fused multiply-adds. A row
therefore gets the same bits in every tile, whatever rows stand beside it. 4 bit: |sum of 8 products| <= 8 * 15 * 127 fits the
int16 that pmaddubsw leaves, for the high parts as for the low ones. 8 bit: 32 * 128 * 32767 fits int32. Two parts cost twice
the instructions of int8 activations; one row, whose weights come from memory, does not notice. Knows no threads and no network.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator"

from typing import Any

from numba import types

from streamserve.kernels.impl.numba_ir import F16, F32, I8, I16, I32, Emit, Value, native, vec, vector_code

BLOCK = 16  # channels
LOW_BITS = 7  # of the low part of an activation
Q4_BYTES, Q8_BYTES = 160, 272  # of weights: half a block, one group
AHEAD_BYTES = 1280  # one row, weights from memory: 5.1 ms for 66 MB, 6.1 ms without (EPYC of the Zen 3 kind, one thread)
ROW_BYTES, ROW_SCALE_AT = 72, 64  # of activations: one row, one group


def _part_dots(e: Emit, weights: list[Value], rows: list[Value]) -> list[list[Value]]:
    """Integer dot products of one group of 4-bit weights and int8 parts, int32 per channel: [half][part]."""
    b = e.builder

    def add_products(sums: list[Value], unpacked: list[Value], at: Value, later: int) -> None:
        for r, row in enumerate(rows):
            x = b.bitcast(e.splat(e.load(I32, e.add(row, at), later, align=4)), vec(I8, 32))
            for n, w in enumerate(unpacked):
                i = n * len(rows) + r
                sums[i] = b.add(sums[i], e.call("llvm.x86.avx2.pmadd.ub.sw", vec(I16, 16), w, x))

    def quads(j: Value, sums: list[Value]) -> list[Value]:
        packed = [e.load(vec(I8, 32), e.add(w, e.mul(j, 32)), align=32) for w in weights]
        nibble = e.all(I8, 15, 32)
        add_products(sums, [b.and_(p, nibble) for p in packed], e.mul(j, 4), 0)
        moved = [b.bitcast(b.lshr(b.bitcast(p, vec(I16, 16)), e.all(I16, 4, 16)), vec(I8, 32)) for p in packed]
        add_products(sums, [b.and_(p, nibble) for p in moved], e.mul(j, 4), 16)
        return sums

    sums = e.loop(4, quads, [e.all(I16, 0, 16)] * (len(weights) * len(rows)))
    whole = [e.call("llvm.x86.avx2.pmadd.wd", vec(I32), s, e.all(I16, 1, 16)) for s in sums]
    return [whole[n * len(rows) : (n + 1) * len(rows)] for n in range(len(weights))]


def _q8_dots(e: Emit, weights: list[Value], rows: list[Value]) -> list[list[Value]]:
    b = e.builder

    def pair(j: Value, sums: list[Value]) -> list[Value]:
        wide = [b.sext(e.load(vec(I8, 16), e.add(w, e.mul(j, 16)), align=16), vec(I16, 16)) for w in weights]
        for r, row in enumerate(rows):
            x = b.bitcast(e.splat(e.load(I32, e.add(row, e.mul(j, 4)), align=4)), vec(I16, 16))
            for n, w in enumerate(wide):
                i = n * len(rows) + r
                sums[i] = b.add(sums[i], e.call("llvm.x86.avx2.pmadd.wd", vec(I32), w, x))
        return sums

    sums = e.loop(16, pair, [e.all(I32, 0)] * (len(weights) * len(rows)))
    return [sums[n * len(rows) : (n + 1) * len(rows)] for n in range(len(weights))]


def _q4_dots(e: Emit, weights: list[Value], rows: list[Value]) -> list[list[Value]]:
    """Integer dot products of one group, int32 per channel: [half][row]. High and low parts apart, then put together."""
    parts = [part for row in rows for part in (row, e.add(row, 32))]
    return [
        [e.builder.add(e.builder.shl(high, e.all(I32, LOW_BITS)), low) for high, low in zip(half[::2], half[1::2], strict=True)]
        for half in _part_dots(e, weights, parts)
    ]


def _make_tile(bits: int, num_rows: int) -> Any:
    """An intrinsic for one block of weights and `num_rows` rows:
    tile(weights, groups, rows, bytes from row to row, out, bytes from row to row of out, adds). `adds` 1 adds to `out`.

    Two halves by four rows of 8 bits, or by the four parts of two rows: what lies between loads and sums stays in 16 registers.
    """
    dots, half_bytes, scale_at = (_q4_dots, Q4_BYTES, 128) if bits == 4 else (_q8_dots, Q8_BYTES, 256)

    @vector_code(*[types.int64] * 7)
    def tile(
        e: Emit, weights: Value, groups: Value, rows: Value, row_stride: Value, out: Value, out_stride: Value, adds: Value
    ) -> None:
        b = e.builder
        rows_at = [e.add(rows, e.mul(row_stride, r)) for r in range(num_rows)]

        def group(g: Value, total: list[Value]) -> list[Value]:
            first = e.add(weights, e.mul(g, 2 * half_bytes))
            w_at = [first, e.add(first, half_bytes)]
            for line in range(0, 2 * half_bytes, 64):
                e.prefetch(first, AHEAD_BYTES + line)
            x_at = [e.add(at, e.mul(g, ROW_BYTES)) for at in rows_at]
            result = []
            for n, (w, sums) in enumerate(zip(w_at, dots(e, w_at, x_at), strict=True)):
                scale = b.fpext(e.load(vec(F16), w, scale_at, align=16), vec(F32))
                offset = b.fpext(e.load(vec(F16), w, scale_at + 16, align=16), vec(F32)) if bits == 4 else None
                for x, dot, before in zip(x_at, sums, total[n * num_rows : (n + 1) * num_rows], strict=True):
                    scales = b.fmul(scale, e.splat(e.load(F32, x, ROW_SCALE_AT, align=4)))
                    after = e.fma(scales, b.sitofp(dot, vec(F32)), before)
                    if offset is not None:
                        after = e.fma(offset, e.splat(e.load(F32, x, ROW_SCALE_AT + 4, align=4)), after)
                    result.append(after)
            return result

        total = e.loop(groups, group, [e.all(F32, 0.0)] * (2 * num_rows))
        is_add = e.splat(b.icmp_signed("!=", adds, e.i64(0)))
        for i, sums in enumerate(total):
            at, later = e.add(out, e.mul(out_stride, i % num_rows)), i // num_rows * 32
            before = b.select(is_add, e.load(vec(F32), at, later), e.all(F32, 0.0))
            e.store(b.fadd(before, sums), at, later)

    return tile


_q4x1, _q4x2 = (_make_tile(4, num_rows) for num_rows in (1, 2))  # two parts a row: four rows would not fit 16 registers
_q8x1, _q8x2, _q8x4 = (_make_tile(8, num_rows) for num_rows in (1, 2, 4))


@native
def block_bytes(bits: int, groups: int) -> int:
    """Of one block of weights."""
    return 2 * groups * (Q4_BYTES if bits == 4 else Q8_BYTES)


@native
def block_product(
    bits: int, weights: int, groups: int, rows: int, row_bytes: int, num_rows: int, out: int, out_bytes: int, adds: int
) -> None:
    """All rows times one block of 16 channels. Addresses and strides are in bytes."""
    r = 0
    if bits == 4:
        while r + 2 <= num_rows:
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
