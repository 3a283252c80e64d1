"""Vector code for numba: a small wrapper over llvmlite's builder, and the decorator that makes an @intrinsic of it.

numba has no vector types, so what must be AVX2 is written as LLVM IR here: operands are addresses (int64) and counts, every
vector lives between a load and a store. Owns nothing; knows no kernel.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-call"

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from llvmlite.ir import values
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Value = Any  # an llvmlite value
I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
LANES = 8  # float32 in one AVX2 register

# Compiled as part of whatever calls it, without the GIL. Division by zero is not looked for.
native = njit(nogil=True, error_model="numpy")


def constant(value: int) -> int:
    """A number to call native code with. numba would compile a function anew for every plain constant among its arguments."""
    return cast(int, np.int64(value))


def vec(element: Value, count: int = LANES) -> Value:
    return ir.VectorType(element, count)


class Emit:
    """Emits the body of one intrinsic. Addresses and counts are int64 values or Python numbers."""

    def __init__(self, builder: Value) -> None:
        self.builder = builder

    def i64(self, value: "Value | int") -> Value:
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def f32(self, value: float) -> Value:
        return ir.Constant(F32, value)

    def all(self, element: Value, value: float, count: int = LANES) -> Value:
        """The same constant in every lane."""
        return ir.Constant(vec(element, count), [value] * count)

    def add(self, a: "Value | int", b: "Value | int") -> Value:
        return self.builder.add(self.i64(a), self.i64(b))

    def mul(self, a: "Value | int", b: "Value | int") -> Value:
        return self.builder.mul(self.i64(a), self.i64(b))

    def load(self, kind: Value, address: Value, offset: int = 0, align: int = 1) -> Value:
        return self.builder.load(self._pointer(kind, address, offset), align=align)

    def store(self, value: Value, address: Value, offset: int = 0, align: int = 1) -> None:
        self.builder.store(value, self._pointer(value.type, address, offset), align=align)

    def _pointer(self, kind: Value, address: Value, offset: int) -> Value:
        return self.builder.inttoptr(self.add(address, offset) if offset else address, kind.as_pointer())

    def splat(self, value: Value, count: int = LANES) -> Value:
        none = ir.Constant(vec(value.type, count), ir.Undefined)
        first = self.builder.insert_element(none, value, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, none, ir.Constant(vec(I32, count), [0] * count))

    def call(self, name: str, result: Value, *args: Value) -> Value:
        """Call an LLVM intrinsic or a symbol of the process."""
        kind = ir.FunctionType(result, [arg.type for arg in args])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), args)

    def prefetch(self, address: Value, offset: int) -> None:
        """Ask for the cache line at an address, which need not exist."""
        hint = [ir.Constant(I32, value) for value in (0, 3, 1)]  # to read, keep in every level, data
        self.call("llvm.prefetch.p0", ir.VoidType(), self._pointer(I8, address, offset), *hint)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        kind = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
        return self.call(f"llvm.fma.{kind}", a.type, a, b, c)

    def maximum(self, a: Value, b: Value) -> Value:
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def minimum(self, a: Value, b: Value) -> Value:
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def abs(self, x: Value) -> Value:
        return self.call("llvm.fabs.v8f32", x.type, x)

    def sum(self, x: Value) -> Value:
        """Sum of the lanes, as a tree: ((0+4)+(2+6)) + ((1+5)+(3+7))."""
        return self._fold(x, self.builder.fadd if x.type.element == F32 else self.builder.add)

    def max(self, x: Value) -> Value:
        return self._fold(x, self.maximum)

    def _fold(self, x: Value, join: Callable[[Value, Value], Value]) -> Value:
        width = x.type.count
        while width > 1:
            width //= 2
            low, high = ([ir.Constant(I32, at + i) for i in range(width)] for at in (0, width))
            parts = [self.builder.shuffle_vector(x, x, ir.Constant(vec(I32, width), index)) for index in (low, high)]
            x = join(*parts)
        return self.builder.extract_element(x, ir.Constant(I32, 0))

    def concat(self, parts: Sequence[Value]) -> Value:
        """Vectors end to end."""
        while len(parts) > 1:
            width = 2 * parts[0].type.count
            order = ir.Constant(vec(I32, width), [ir.Constant(I32, i) for i in range(width)])
            parts = [self.builder.shuffle_vector(a, b, order) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def exp(self, x: Value) -> Value:
        """e^x in every lane, within 2e-7 of it; exactly 1 at 0 and exactly 0 below -87, where float32 ends."""
        b = self.builder
        is_tiny = b.fcmp_ordered("<", x, self.all(F32, -87.0))
        x = self.minimum(self.maximum(x, self.all(F32, -87.0)), self.all(F32, 88.0))
        turns = self.call("llvm.nearbyint.v8f32", x.type, b.fmul(x, self.all(F32, 1.4426950408889634)))
        # ln 2 in two parts, so that the remainder keeps its low bits
        rest = self.fma(turns, self.all(F32, -0.693359375), x)
        rest = self.fma(turns, self.all(F32, 2.12194440054690583e-4), rest)
        y = self.all(F32, 1.9875691500e-4)  # Cephes' expf polynomial
        for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            y = self.fma(y, rest, self.all(F32, factor))
        y = self.fma(b.fmul(rest, rest), y, b.fadd(rest, self.all(F32, 1.0)))
        power = b.shl(b.add(b.fptosi(turns, vec(I32)), self.all(I32, 127)), self.all(I32, 23))
        return b.select(is_tiny, self.all(F32, 0.0), b.fmul(y, b.bitcast(power, vec(F32))))

    def loop(
        self, count: "Value | int", body: Callable[[Value, list[Value]], list[Value]], start: Sequence[Value] = ()
    ) -> list[Value]:
        """body(i, carried) -> carried, for i in 0 .. count - 1; returns what was carried last.

        LLVM is told not to unroll: it would reorder a tile's loads before its products and run out of registers.
        """
        b, count = self.builder, self.i64(count)
        before = b.block
        head, inside, after = (b.append_basic_block(name) for name in ("head", "inside", "after"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        carried = [b.phi(value.type) for value in start]
        b.cbranch(b.icmp_signed("<", i, count), inside, after)
        b.position_at_end(inside)
        end = body(i, list(carried))
        following = self.add(i, 1)
        for phi, first, last in zip([i, *carried], [self.i64(0), *start], [following, *end], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(last, b.block)
        b.branch(head).set_metadata("llvm.loop", self._rolled())
        b.position_at_end(after)
        return list(carried)

    def _rolled(self) -> Value:
        """The mark of a loop that stays a loop: a node whose first operand is itself, as LLVM wants it."""
        module = self.builder.module
        disable = module.add_metadata(["llvm.loop.unroll.disable"])
        node = values.MDValue(module, [disable], name=str(len(module.metadata)))
        node.operands = (node, disable)
        return node


def vector_code(*signature: Any, returns: Any = types.void) -> Callable[[Callable[..., Value]], Any]:
    """Make an @intrinsic of `body(emit, *arguments)`; arguments come in the numba types of `signature`."""

    def wrap(body: Callable[..., Value]) -> Any:
        def typed(typing_context: Any, *given: Any) -> Any:
            def generate(context: Any, builder: Value, _: Any, args: Sequence[Value]) -> Value:
                result = body(Emit(builder), *args)
                return context.get_dummy_value() if returns is types.void else result

            return returns(*signature), generate

        # numba reads how many arguments there are from the signature, and cannot lower *args.
        names = ["typing_context", *list(inspect.signature(body).parameters)[1:]]
        typed.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        )
        typed.__name__ = body.__name__
        return intrinsic(typed)

    return wrap


@vector_code(types.int64, types.int64, returns=types.int64)
def load_i64(e: Emit, array: Value, index: Value) -> Value:
    return e.load(I64, e.add(array, e.mul(index, 8)), align=8)


@vector_code(types.int64, types.int64, returns=types.int64)
def load_i32(e: Emit, array: Value, index: Value) -> Value:
    return e.builder.sext(e.load(I32, e.add(array, e.mul(index, 4)), align=4), I64)


@vector_code(types.int64, types.int64, returns=types.float32)
def load_f32(e: Emit, array: Value, index: Value) -> Value:
    return e.load(F32, e.add(array, e.mul(index, 4)), align=4)


@vector_code(types.int64, types.int64, types.float32)
def store_f32(e: Emit, array: Value, index: Value, value: Value) -> None:
    e.store(value, e.add(array, e.mul(index, 4)), align=4)


@vector_code(types.int64, types.int64)
def prefetch_bytes(e: Emit, address: Value, count: Value) -> None:
    """Ask for all cache lines of a stretch of memory."""

    def line(i: Value, _: list[Value]) -> list[Value]:
        e.prefetch(e.add(address, e.mul(i, 64)), 0)
        return []

    e.loop(e.builder.sdiv(count, e.i64(64)), line)
