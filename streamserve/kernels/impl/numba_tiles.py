"""Register tiles of quantised matrix products: a few rows of activations times 16 channels of packed weights.

Layouts (numba_pack.py makes them). A matrix is [blocks of 16 channels][groups of 32 inputs], so that a tile reads one stream:

    4 bit, 320 bytes per group   4 x 64 bytes: channel c, inputs 4j..4j+3 in the low nibbles and 16 inputs later in the high
                                 ones, at byte 64j + 4c; then 16 x f16 scale d, 16 x f16 offset m: d * q + m
    8 bit, 544 bytes per group   16 x 32 bytes: channel c, inputs 2j and 2j+1 at byte 32j + 2c; then 16 x f16 scale d
    rows, 72 bytes per group     for 4-bit weights 32 x int8 high and 32 x int8 low parts of 128 * high + low, for 8-bit
                                 ones 32 x int16; then f32 scale s and, for 4 bit, f32 s * sum of the integers

Numerics: products within a group are exact integers; groups are added in float32, in order, by fused multiply-adds. A row
therefore gets the same bits in every tile, whatever rows stand beside it, and on every instruction set. 4 bit with AVX2:
|sum of 8 products| <= 8 * 15 * 127 fits the int16 that pmaddubsw leaves, for the high parts as for the low ones. 8 bit:
32 * 128 * 32767 fits int32. Two parts cost twice the instructions of int8 activations; one row, whose weights come from memory,
does not notice. Knows no threads and no network.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator"

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llvmlite import binding
from numba import types

from streamserve.kernels.impl.numba_ir import F16, F32, I8, I16, I32, Emit, Value, native, vec, vector_code

BLOCK = 16  # channels
LOW_BITS = 7  # of the low part of an activation
Q4_BYTES, Q8_BYTES = 320, 544  # of weights: one block, one group
AHEAD_BYTES = 2560  # one row, weights from memory: 6.5 ms for 96 MB, 7.0 ms with half of it, 10.2 ms without (Xeon, one thread)
ROW_BYTES, ROW_SCALE_AT = 72, 64  # of activations: one row, one group


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """What tiles are made of. VNNI adds four products of bytes, or two of int16, to an int32 in one instruction."""

    name: str
    features: tuple[str, ...]  # of the processor, as LLVM calls them
    lanes: int  # int32 or float32 in a register
    has_vnni: bool
    rows: Mapping[
        int, tuple[int, ...]
    ]  # of tiles, by bits, the largest first: what lies between loads and sums stays in registers


# 16 registers: two halves of a block by four rows of 8 bits, or by the two parts of two rows.
AVX2 = InstructionSet("avx2", ("avx2",), 8, False, {4: (2, 1), 8: (4, 2, 1)})
AVX_VNNI = InstructionSet("avx_vnni", ("avxvnni",), 8, True, {4: (2, 1), 8: (4, 2, 1)})
# 32 registers, each a whole block wide. Eight rows of 8 bits would fit, and were no faster than twice four.
AVX512_VNNI = InstructionSet(
    "avx512_vnni", ("avx512vnni", "avx512vl", "avx512bw"), 16, True, {4: (8, 4, 3, 2, 1), 8: (4, 3, 2, 1)}
)


def host_instructions() -> tuple[InstructionSet, ...]:
    """Those that this processor has, the fastest first. The last is AVX2, without which there is no packed decoder."""
    found = binding.get_host_cpu_features()
    faster = (isa for isa in (AVX512_VNNI, AVX_VNNI) if all(found.get(name) for name in isa.features))
    return (*faster, AVX2)


class _Tile:
    """Emits the products of one group of a block; a register holds `lanes` of its channels."""

    def __init__(self, e: Emit, isa: InstructionSet) -> None:
        self.e, self.isa = e, isa
        self.registers = range(BLOCK // isa.lanes)
        self.zero = e.all(I32, 0, isa.lanes)

    def dots(self, bits: int, weights: Value, rows: list[Value]) -> list[list[Value]]:
        """Integer dot products, int32 per channel: [row][register]."""
        if bits == 8:
            return self._dots8(weights, rows)
        return self._dots4(weights, rows) if self.isa.has_vnni else self._dots4_avx2(weights, rows)

    def scales(self, weights: Value, offset: int) -> list[Value]:
        """float32 of the f16 that stand at an offset, one per channel."""
        b, lanes = self.e.builder, self.isa.lanes
        at = [offset + 2 * lanes * n for n in self.registers]
        return [b.fpext(self.e.load(vec(F16, lanes), weights, place, align=16), vec(F32, lanes)) for place in at]

    def _inputs(self, row: Value, at: "Value | int") -> Value:
        """Four bytes of a row for every channel: as int32, since what they are depends on who multiplies."""
        return self.e.splat(self.e.load(I32, self.e.add(row, at), align=4), self.isa.lanes)

    def _nibbles(self, weights: Value, j: "Value | int") -> tuple[list[Value], list[Value]]:
        """Four inputs of every channel, and the four that stand 16 inputs later."""
        e, b, lanes = self.e, self.e.builder, self.isa.lanes
        at = e.add(weights, e.mul(j, 4 * BLOCK))
        packed = [e.load(vec(I8, 4 * lanes), at, 4 * lanes * n, align=32) for n in self.registers]
        words, mask = vec(I16, 2 * lanes), e.all(I8, 15, 4 * lanes)
        later = [b.bitcast(b.lshr(b.bitcast(p, words), e.all(I16, 4, 2 * lanes)), p.type) for p in packed]
        return [b.and_(p, mask) for p in packed], [b.and_(p, mask) for p in later]

    def _dots4(self, weights: Value, rows: list[Value]) -> list[list[Value]]:
        """A sum for the high parts of every row and one for the low ones: short chains, as a row's 16 products would not be."""
        e, b = self.e, self.e.builder
        high, low = ([[self.zero for _ in self.registers] for _ in rows] for _ in range(2))
        for j in range(4):
            for later, unpacked in zip((0, 16), self._nibbles(weights, j), strict=True):
                for part, sums in ((0, high), (32, low)):
                    for row, total in zip(rows, sums, strict=True):
                        x = self._inputs(row, 4 * j + later + part)
                        for n, w in enumerate(unpacked):
                            total[n] = self._add_products("busd", total[n], w, x)
        moved = e.all(I32, LOW_BITS, self.isa.lanes)
        return [[b.add(b.shl(h, moved), x) for h, x in zip(*parts, strict=True)] for parts in zip(high, low, strict=True)]

    def _dots4_avx2(self, weights: Value, rows: list[Value]) -> list[list[Value]]:
        """int16 sums of high and of low parts, then put together."""
        e, b = self.e, self.e.builder
        words, bytes_, count = vec(I16, 16), vec(I8, 32), len(self.registers)

        def quads(j: Value, sums: list[Value]) -> list[Value]:
            for later, unpacked in zip((0, 16), self._nibbles(weights, j), strict=True):
                for i in range(2 * len(rows)):
                    x = b.bitcast(self._inputs(rows[i // 2], e.add(e.mul(j, 4), later + i % 2 * 32)), bytes_)
                    for n, w in enumerate(unpacked, i * count):
                        sums[n] = b.add(sums[n], e.call("llvm.x86.avx2.pmadd.ub.sw", words, w, x))
            return sums

        sums = e.loop(4, quads, [e.all(I16, 0, 16)] * (2 * len(rows) * count))
        whole = [e.call("llvm.x86.avx2.pmadd.wd", vec(I32), s, e.all(I16, 1, 16)) for s in sums]
        parts = [whole[i : i + count] for i in range(0, len(whole), count)]
        return [
            [b.add(b.shl(h, e.all(I32, LOW_BITS)), low) for h, low in zip(high, lows, strict=True)]
            for high, lows in zip(parts[::2], parts[1::2], strict=True)
        ]

    def _dots8(self, weights: Value, rows: list[Value]) -> list[list[Value]]:
        """As many sums per row as there is room for, because a chain of additions is as slow as each of them is late."""
        e, b, lanes, count = self.e, self.e.builder, self.isa.lanes, len(self.registers)
        words, sums_per_row = vec(I16, 2 * lanes), max(1, min(4, self.isa.lanes // (len(rows) * count)))

        def pairs(i: Value, sums: list[Value]) -> list[Value]:
            for c in range(sums_per_row):
                j = e.add(e.mul(i, sums_per_row), c)
                at = e.add(weights, e.mul(j, 2 * BLOCK))
                wide = [b.sext(e.load(vec(I8, 2 * lanes), at, 2 * lanes * n, align=16), words) for n in self.registers]
                for r, row in enumerate(rows):
                    x = self._inputs(row, e.mul(j, 4))
                    for n, w in enumerate(wide, (c * len(rows) + r) * count):
                        sums[n] = self._add_products("wssd", sums[n], w, x)
            return sums

        chain = len(rows) * count
        sums = e.loop(16 // sums_per_row, pairs, [self.zero] * (chain * sums_per_row))
        while len(sums) > chain:
            sums = [b.add(x, y) for x, y in zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True)]
        return [sums[i : i + count] for i in range(0, chain, count)]

    def _add_products(self, kind: str, total: Value, weights: Value, inputs: Value) -> Value:
        """`kind` busd: four unsigned bytes of weights by four signed ones; wssd: two int16 by two."""
        e, b = self.e, self.e.builder
        if self.isa.has_vnni:
            name = f"llvm.x86.avx512.vpdp{kind}.{32 * self.isa.lanes}"
            return e.call(name, total.type, total, b.bitcast(weights, total.type), inputs)
        assert kind == "wssd"
        return b.add(total, e.call("llvm.x86.avx2.pmadd.wd", total.type, weights, b.bitcast(inputs, weights.type)))


def _make_product(isa: InstructionSet, bits: int) -> Any:
    """An intrinsic for one block of weights and any number of rows; see block_product."""
    group_bytes, scale_at = (Q4_BYTES, 256) if bits == 4 else (Q8_BYTES, 512)

    def tile(
        e: Emit,
        num_rows: int,
        weights: Value,
        groups: Value,
        rows: Value,
        row_stride: Value,
        out: Value,
        out_stride: Value,
        adds: Value,
        following: Value,
    ) -> None:
        b, lanes, emit = e.builder, isa.lanes, _Tile(e, isa)
        rows_at = [e.add(rows, e.mul(row_stride, r)) for r in range(num_rows)]
        end = e.add(weights, e.mul(groups, group_bytes))

        def group(g: Value, total: list[Value]) -> list[Value]:
            w = e.add(weights, e.mul(g, group_bytes))
            ahead = e.add(w, AHEAD_BYTES)
            beyond = b.sub(ahead, end)
            ahead = b.select(b.icmp_signed(">=", beyond, e.i64(0)), b.add(following, beyond), ahead)
            for line in range(0, group_bytes, 64):
                e.prefetch(ahead, line)
            x_at = [e.add(at, e.mul(g, ROW_BYTES)) for at in rows_at]
            dots = emit.dots(bits, w, x_at)
            scales, result = emit.scales(w, scale_at), list(total)
            offsets = emit.scales(w, scale_at + 2 * BLOCK) if bits == 4 else []
            for r, x in enumerate(x_at):
                x_scale = e.splat(e.load(F32, x, ROW_SCALE_AT, align=4), lanes)
                x_sum = e.splat(e.load(F32, x, ROW_SCALE_AT + 4, align=4), lanes) if bits == 4 else None
                for n, dot in enumerate(dots[r]):
                    i = r * len(emit.registers) + n
                    result[i] = e.fma(b.fmul(scales[n], x_scale), b.sitofp(dot, vec(F32, lanes)), result[i])
                    if x_sum is not None:
                        result[i] = e.fma(offsets[n], x_sum, result[i])
            return result

        total = e.loop(groups, group, [e.all(F32, 0.0, lanes)] * (num_rows * len(emit.registers)))
        is_add = e.splat(b.icmp_signed("!=", adds, e.i64(0)), lanes)
        for i, sums in enumerate(total):
            at, later = e.add(out, e.mul(out_stride, i // len(emit.registers))), i % len(emit.registers) * lanes * 4
            before = b.select(is_add, e.load(sums.type, at, later), e.all(F32, 0.0, lanes))
            e.store(b.fadd(before, sums), at, later)

    @vector_code(*[types.int64] * 9)
    def product(
        e: Emit,
        weights: Value,
        groups: Value,
        rows: Value,
        row_stride: Value,
        num_rows: Value,
        out: Value,
        out_stride: Value,
        adds: Value,
        following: Value,
    ) -> None:
        done = e.i64(0)
        for size in isa.rows[bits]:
            times = e.builder.sdiv(e.builder.sub(num_rows, done), e.i64(size))

            def rows_of_a_tile(i: Value, _: list[Value], size: int = size, done: Value = done) -> list[Value]:
                first = e.add(done, e.mul(i, size))
                x, to = e.add(rows, e.mul(first, row_stride)), e.add(out, e.mul(first, out_stride))
                tile(e, size, weights, groups, x, row_stride, to, out_stride, adds, following)
                return []

            e.loop(times, rows_of_a_tile)
            done = e.add(done, e.mul(times, size))

    return product


def make_block_product(isa: InstructionSet) -> Any:
    """block_product for an instruction set that the processor has. All give the same bits."""
    product4, product8 = _make_product(isa, 4), _make_product(isa, 8)

    @native
    def block_product(
        bits: int,
        weights: int,
        groups: int,
        rows: int,
        row_bytes: int,
        num_rows: int,
        out: int,
        out_bytes: int,
        adds: int,
        following: int,
    ) -> None:
        """All rows times one block of 16 channels; `adds` 1 adds to `out`. Addresses and strides are in bytes.

        `following` is where this thread will probably read next: that is asked for before the block ends.
        """
        if bits == 4:
            product4(weights, groups, rows, row_bytes, num_rows, out, out_bytes, adds, following)
        else:
            product8(weights, groups, rows, row_bytes, num_rows, out, out_bytes, adds, following)

    return block_product


INSTRUCTIONS = host_instructions()[0]
block_product = make_block_product(INSTRUCTIONS)


@native
def block_bytes(bits: int, groups: int) -> int:
    """Of one block of weights."""
    return groups * (Q4_BYTES if bits == 4 else Q8_BYTES)
