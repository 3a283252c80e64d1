"""Row-wise vector code: norms, activation quantisation, gated activation, RoPE, softmax over one chunk of keys.

A quantised row is a run of groups of 32 (layout: numba_tiles.py). Its rounding, to 15 bits for 4-bit weights and to 16
for 8-bit ones, is far below the error that the weights' own rounding has left. Every routine works on one row
by itself, so that a row's bits do not depend on its neighbours. Knows no threads and no network.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator"

from typing import Any

from llvmlite import ir
from numba import types

from streamserve.kernels.impl.numba_ir import F16, F32, I8, I16, I32, LANES, Emit, Value, native, vec, vector_code
from streamserve.kernels.impl.numba_tiles import BLOCK, LOW_BITS, Q8_BYTES, ROW_BYTES, ROW_SCALE_AT

_GROUP_VECTORS = 32 // LANES
MASKED = -1e30  # score of a key that a query may not see


_LARGEST = {4: 127.0 * (1 << LOW_BITS) + (1 << LOW_BITS) // 2 - 1, 8: 32767.0}


def _store_group(e: Emit, values: list[Value], out: Value, bits: int) -> None:
    """Quantise 32 values to the record that `bits`-bit weights multiply with."""
    b = e.builder
    most = _LARGEST[bits]
    largest = e.abs(values[0])
    for value in values[1:]:
        largest = e.maximum(largest, e.abs(value))
    peak = e.max(largest)
    scale = b.fmul(peak, e.f32(1.0 / most))
    is_zero = b.fcmp_unordered("==", peak, e.f32(0.0))
    inverse = e.splat(b.select(is_zero, e.f32(0.0), b.fdiv(e.f32(most), peak)))
    whole = [e.call("llvm.x86.avx.cvt.ps2dq.256", vec(I32), b.fmul(value, inverse)) for value in values]  # to nearest even
    if bits == 4:  # whole = 128 * high + low, low in -64..63
        high = [b.ashr(b.add(value, e.all(I32, 1 << (LOW_BITS - 1))), e.all(I32, LOW_BITS)) for value in whole]
        low = [b.sub(value, b.shl(part, e.all(I32, LOW_BITS))) for value, part in zip(whole, high, strict=True)]
        e.store(b.trunc(e.concat(high), vec(I8, 32)), out)
        e.store(b.trunc(e.concat(low), vec(I8, 32)), e.add(out, 32))
    else:
        e.store(b.trunc(e.concat(whole), vec(I16, 32)), out)
    e.store(scale, out, ROW_SCALE_AT, align=4)
    if bits == 4:
        total = e.sum(b.add(b.add(whole[0], whole[1]), b.add(whole[2], whole[3])))
        e.store(b.fmul(scale, b.sitofp(total, F32)), out, ROW_SCALE_AT + 4, align=4)


def _load_group(e: Emit, address: Value) -> list[Value]:
    return [e.load(vec(F32), address, 32 * v) for v in range(_GROUP_VECTORS)]


def _inverse_rms(e: Emit, x: Value, vectors: Value, eps: Value) -> Value:
    """1 / sqrt(mean of squares + eps), one scalar; `vectors` counts registers."""
    b = e.builder

    def add_squares(i: Value, carried: list[Value]) -> list[Value]:
        value = e.load(vec(F32), e.add(x, e.mul(i, 32)))
        return [e.fma(value, value, carried[0])]

    (squares,) = e.loop(vectors, add_squares, [e.all(F32, 0.0)])
    count = b.sitofp(e.mul(vectors, LANES), F32)
    return b.fdiv(e.f32(1.0), e.call("llvm.sqrt.f32", F32, b.fadd(b.fdiv(e.sum(squares), count), eps)))


def _make_norm(bits: int) -> Any:
    @vector_code(types.int64, types.int64, types.int64, types.float32, types.int64)
    def norm(e: Emit, x: Value, weight: Value, groups: Value, eps: Value, out: Value) -> None:
        b = e.builder
        inverse = e.splat(_inverse_rms(e, x, e.mul(groups, _GROUP_VECTORS), eps))

        def store(g: Value, _: list[Value]) -> list[Value]:
            at = e.mul(g, 128)
            pairs = zip(_load_group(e, e.add(x, at)), _load_group(e, e.add(weight, at)), strict=True)
            values = [b.fmul(b.fmul(value, inverse), factor) for value, factor in pairs]
            _store_group(e, values, e.add(out, e.mul(g, ROW_BYTES)), bits)
            return []

        e.loop(groups, store)

    return norm


def _make_quantise(bits: int) -> Any:
    @vector_code(types.int64, types.int64, types.int64)
    def quantise(e: Emit, x: Value, groups: Value, out: Value) -> None:
        def store(g: Value, _: list[Value]) -> list[Value]:
            at = e.add(out, e.mul(g, ROW_BYTES))
            _store_group(e, _load_group(e, e.add(x, e.mul(g, 128))), at, bits)
            return []

        e.loop(groups, store)

    return quantise


def _make_gate(bits: int) -> Any:
    @vector_code(types.int64, types.int64)
    def gate(e: Emit, gate_up: Value, out: Value) -> None:
        b = e.builder
        values = []
        for gate, up in zip(_load_group(e, gate_up), _load_group(e, e.add(gate_up, 128)), strict=True):
            below = b.fadd(e.exp(b.fneg(gate)), e.all(F32, 1.0))
            values.append(b.fmul(b.fdiv(gate, below), up))
        _store_group(e, values, out, bits)

    return gate


_norm4, _norm8 = _make_norm(4), _make_norm(8)
_quantise4, _quantise8 = _make_quantise(4), _make_quantise(8)
_gate4, _gate8 = _make_gate(4), _make_gate(8)


@native
def norm_row(bits: int, x: int, weight: int, groups: int, eps: float, out: int) -> None:
    """RMS norm of a row, quantised for weights of `bits` bits."""
    if bits == 4:
        _norm4(x, weight, groups, eps, out)
    else:
        _norm8(x, weight, groups, eps, out)


@native
def quantise_row(bits: int, x: int, groups: int, out: int) -> None:
    if bits == 4:
        _quantise4(x, groups, out)
    else:
        _quantise8(x, groups, out)


@native
def gate_group(bits: int, gate_up: int, out: int) -> None:
    """silu(gate) * up for 32 gates followed by their 32 ups, quantised."""
    if bits == 4:
        _gate4(gate_up, out)
    else:
        _gate8(gate_up, out)


@vector_code(types.int64, types.int64, types.int64, types.float32)
def norm_head(e: Emit, x: Value, weight: Value, vectors: Value, eps: Value) -> None:
    """RMS norm of one head, in place."""
    b = e.builder
    inverse = e.splat(_inverse_rms(e, x, vectors, eps))

    def scale(i: Value, _: list[Value]) -> list[Value]:
        at = e.add(x, e.mul(i, 32))
        e.store(b.fmul(b.fmul(e.load(vec(F32), at), inverse), e.load(vec(F32), e.add(weight, e.mul(i, 32)))), at)
        return []

    e.loop(vectors, scale)


@vector_code(types.int64, types.int64, types.int64)
def add_to(e: Emit, x: Value, other: Value, vectors: Value) -> None:
    """x += other."""

    def add(i: Value, _: list[Value]) -> list[Value]:
        at = e.add(x, e.mul(i, 32))
        e.store(e.builder.fadd(e.load(vec(F32), at), e.load(vec(F32), e.add(other, e.mul(i, 32)))), at)
        return []

    e.loop(vectors, add)


@vector_code(types.int64, types.int64, types.int64, types.float32)
def scale_to(e: Emit, x: Value, out: Value, vectors: Value, factor: Value) -> None:
    """out = x * factor."""
    many = e.splat(factor)

    def scale(i: Value, _: list[Value]) -> list[Value]:
        e.store(e.builder.fmul(e.load(vec(F32), e.add(x, e.mul(i, 32))), many), e.add(out, e.mul(i, 32)))
        return []

    e.loop(vectors, scale)


@vector_code(types.int64, types.int64, types.int64, types.int64)
def rope_head(e: Emit, x: Value, cos: Value, sin: Value, half_vectors: Value) -> None:
    """Turn the pairs (i, i + half) of one head, in place."""
    b = e.builder

    def turn(i: Value, _: list[Value]) -> list[Value]:
        at = e.mul(i, 32)
        low_at = e.add(x, at)
        high_at = e.add(low_at, e.mul(half_vectors, 32))
        low, high = e.load(vec(F32), low_at), e.load(vec(F32), high_at)
        c, s = e.load(vec(F32), e.add(cos, at)), e.load(vec(F32), e.add(sin, at))
        e.store(e.fma(low, c, b.fneg(b.fmul(high, s))), low_at)
        e.store(e.fma(high, c, b.fmul(low, s)), high_at)
        return []

    e.loop(half_vectors, turn)


@vector_code(*[types.int64] * 5)
def softmax_chunk(e: Emit, scores: Value, visible: Value, vectors: Value, state: Value, weights: Value) -> None:
    """Scores of one query over one chunk of keys become exp(score - the chunk's largest), 0 from key `visible` on.

    `state` holds (largest score so far, sum so far) and takes in the chunk; `weights` gets (a, b): the query's output so far
    counts a, this chunk's b. A chunk of which nothing is visible changes no bit: its b is exactly 0 and a exactly 1.
    """
    b = e.builder
    lane = ir.Constant(vec(I32), list(range(LANES)))
    limit = e.splat(b.trunc(visible, I32))
    whole = b.sdiv(visible, e.i64(LANES))  # vectors without a masked key

    def largest(i: Value, carried: list[Value]) -> list[Value]:
        return [e.maximum(carried[0], e.load(vec(F32), e.add(scores, e.mul(i, 32))))]

    def mask(i: Value, carried: list[Value]) -> list[Value]:
        i = e.add(whole, i)
        at = e.add(scores, e.mul(i, 32))
        index = b.add(e.splat(b.trunc(e.mul(i, LANES), I32)), lane)
        score = b.select(b.icmp_signed("<", index, limit), e.load(vec(F32), at), e.all(F32, MASKED))
        e.store(score, at)
        return [e.maximum(carried[0], score)]

    (peaks,) = e.loop(whole, largest, [e.all(F32, MASKED)])
    (peaks,) = e.loop(b.sub(vectors, whole), mask, [peaks])
    peak = e.max(peaks)
    many = e.splat(peak)

    def exponential(i: Value, carried: list[Value]) -> list[Value]:
        at = e.add(scores, e.mul(i, 32))
        value = e.exp(b.fsub(e.load(vec(F32), at), many))
        e.store(value, at)
        return [b.fadd(carried[0], value)]

    (sums,) = e.loop(vectors, exponential, [e.all(F32, 0.0)])
    before, total = e.load(F32, state), e.load(F32, state, 4)
    after = e.maximum(before, peak)
    pair = b.insert_element(e.splat(b.fsub(before, after)), b.fsub(peak, after), ir.Constant(I32, 1))
    factors = e.exp(pair)
    old, new = (b.extract_element(factors, ir.Constant(I32, i)) for i in range(2))
    e.store(after, state)
    e.store(e.fma(e.sum(sums), new, b.fmul(total, old)), state, 4)
    e.store(old, weights)
    e.store(new, weights, 4)


@vector_code(types.int64, types.int64)
def clear(e: Emit, x: Value, vectors: Value) -> None:
    """x = 0."""

    def zero(i: Value, _: list[Value]) -> list[Value]:
        e.store(e.all(F32, 0.0), e.add(x, e.mul(i, 32)))
        return []

    e.loop(vectors, zero)


@vector_code(types.int64, types.int64, types.int64, types.int64)
def embed_row(e: Emit, table: Value, groups: Value, token: Value, out: Value) -> None:
    """One channel of an 8-bit matrix as float32."""
    b = e.builder
    block = e.add(table, e.mul(e.mul(b.sdiv(token, e.i64(BLOCK)), groups), Q8_BYTES))
    channel = b.srem(token, e.i64(BLOCK))

    def group(g: Value, _: list[Value]) -> list[Value]:
        at, target = e.add(e.add(block, e.mul(channel, 2)), e.mul(g, Q8_BYTES)), e.add(out, e.mul(g, 128))
        scale = e.splat(b.fpext(e.load(F16, at, 512), F32), 2)
        for j in range(16):
            pair = e.load(vec(I8, 2), at, 32 * j)
            e.store(b.fmul(b.sitofp(pair, vec(F32, 2)), scale), target, 8 * j)
        return []

    e.loop(groups, group)


def _make_store(element: Any) -> Any:
    """Store a head's `count` numbers `stride` bytes apart, as float32 or float16 (which ends at 65504)."""

    @vector_code(*[types.int64] * 4)
    def store(e: Emit, x: Value, out: Value, count: Value, stride: Value) -> None:
        b = e.builder

        def one(i: Value, _: list[Value]) -> list[Value]:
            value = e.load(F32, e.add(x, e.mul(i, 4)), align=4)
            if element == F16:
                value = b.fptrunc(e.minimum(e.maximum(value, e.f32(-65504.0)), e.f32(65504.0)), F16)
            e.store(value, e.add(out, e.mul(i, stride)), align=2)
            return []

        e.loop(count, one)

    return store


_store_f32, _store_f16 = _make_store(F32), _make_store(F16)


@native
def store_head(is_half: bool, x: int, out: int, count: int, stride: int) -> None:
    """Numbers of one key or value into a page, `stride` numbers apart."""
    if is_half:
        _store_f16(x, out, count, stride * 2)
    else:
        _store_f32(x, out, count, stride * 4)
