"""Packed products and quantised rows against numpy."""

from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

pytest.importorskip("numba")

from numba import njit

from streamserve.kernels.impl.numba_decoder import processor_refusal
from streamserve.kernels.impl.numba_pack import Arena, matrix_bytes, pack_rows
from streamserve.kernels.impl.numba_rows import gate_group, norm_row, quantise_row
from streamserve.kernels.impl.numba_tiles import (
    AVX2,
    BLOCK,
    LOW_BITS,
    ROW_BYTES,
    block_bytes,
    block_product,
    host_instructions,
    make_block_product,
)

pytestmark = pytest.mark.skipif(processor_refusal() is not None, reason=str(processor_refusal()))

Floats = NDArray[np.float32]
INPUTS, CHANNELS = 96, 48
BITS = (4, 8)
LARGEST = {4: (127 << LOW_BITS) + (1 << LOW_BITS) // 2 - 1, 8: 32767}


def of_blocks(block_product: Any) -> Any:
    @njit(nogil=True)
    def product(
        bits: int, weights: int, groups: int, rows: int, row_bytes: int, num_rows: int, out: int, blocks: int, adds: int
    ) -> None:
        for n in range(blocks):
            at, width = weights + n * block_bytes(bits, groups), blocks * BLOCK * 4
            block_product(bits, at, groups, rows, row_bytes, num_rows, out + n * BLOCK * 4, width, adds, 0)

    return product


product = of_blocks(block_product)


@njit(nogil=True)
def quantise(bits: int, x: int, num_rows: int, groups: int, out: int) -> None:
    for r in range(num_rows):
        quantise_row(bits, x + r * groups * 128, groups, out + r * groups * ROW_BYTES)


@njit(nogil=True)
def norm(bits: int, x: int, weight: int, groups: int, out: int) -> None:
    norm_row(bits, x, weight, groups, 1e-5, out)


@njit(nogil=True)
def gate(bits: int, x: int, out: int) -> None:
    gate_group(bits, x, out)


def quantised(x: Floats, bits: int) -> NDArray[np.uint8]:
    groups = x.shape[1] // 32
    out = np.zeros((len(x), groups * ROW_BYTES), np.uint8)
    x = np.ascontiguousarray(x)
    quantise(bits, x.ctypes.data, len(x), groups, out.ctypes.data)
    return out


def read(rows: NDArray[np.uint8], bits: int) -> tuple[Any, Any, Any]:
    """Integers [rows, groups, 32], scales and scaled sums [rows, groups]."""
    groups = rows.reshape(len(rows), -1, ROW_BYTES)
    whole = np.ascontiguousarray(groups[..., :64]).view(np.int16 if bits == 8 else np.int8).astype(np.int64)
    if bits == 4:
        whole = (whole[..., :32] << LOW_BITS) + whole[..., 32:]
    rest = np.ascontiguousarray(groups[..., 64:]).view(np.float32)
    return whole, rest[..., 0], rest[..., 1]


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_quantised_to_the_nearest_integers_of_their_groups(bits: int) -> None:
    x = np.random.default_rng(0).standard_normal((5, INPUTS)).astype(np.float32)
    x[2, 32:64] = 0
    whole, scale, total = read(quantised(x, bits), bits)
    assert np.abs(whole).max() == LARGEST[bits]
    back = whole * scale[..., None]
    assert np.all(np.abs(back.reshape(x.shape) - x).reshape(5, -1, 32).max(-1) <= 0.51 * scale)
    assert not whole[2, 1].any() and scale[2, 1] == 0
    if bits == 4:
        np.testing.assert_allclose(total, scale * whole.sum(-1), rtol=1e-6)


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 9])
def test_products_are_those_of_the_quantised_numbers(kind: str, bits: int, num_rows: int) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((CHANNELS, INPUTS)).astype(np.float32)
    packed = quantize(weight, GGMLQuantizationType[kind])
    exact = dequantize(packed, GGMLQuantizationType[kind]).astype(np.float64)
    arena = Arena(matrix_bytes(8, CHANNELS, 3))
    matrix = arena.place(pack_rows(kind, packed), 8 if kind == "Q8_0" else 4, CHANNELS, 3)
    rows = quantised(rng.standard_normal((num_rows, INPUTS)).astype(np.float32), bits)
    whole, scale, _ = read(rows, bits)
    x = (whole * scale[..., None].astype(np.float64)).reshape(num_rows, INPUTS)
    out = np.full((num_rows, CHANNELS), 0.5, np.float32)

    def multiply(adds: int) -> Floats:
        args = matrix.address, 3, rows.ctypes.data, rows.shape[1], num_rows, out.ctypes.data, CHANNELS // BLOCK, adds
        product(bits, *args)
        return out.copy()

    np.testing.assert_allclose(multiply(1), x @ exact.T + 0.5, atol=2e-5)
    np.testing.assert_allclose(multiply(0), x @ exact.T, atol=2e-5)


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_numbers_do_not_overflow(bits: int) -> None:
    kind = "Q8_0" if bits == 8 else "Q4_1"
    weight = np.ones((16, 32), np.float32)
    weight[:, 0] = -1 if bits == 8 else 0
    packed = quantize(weight, GGMLQuantizationType[kind])
    for sign in (1, -1):
        rows = quantised(np.full((4, 32), sign, np.float32), bits)
        out = np.zeros((4, 16), np.float32)
        arena = Arena(matrix_bytes(8, 16, 1))
        matrix = arena.place(pack_rows(kind, packed), bits, 16, 1)
        product(bits, matrix.address, 1, rows.ctypes.data, rows.shape[1], 4, out.ctypes.data, 1, 0)
        np.testing.assert_allclose(out, sign * weight.sum(1)[None].repeat(4, 0), rtol=1e-3)


@pytest.mark.parametrize("isa", host_instructions()[:-1], ids=lambda isa: isa.name)
def test_every_instruction_set_gives_the_bits_of_avx2(isa: Any) -> None:
    rng = np.random.default_rng(3)
    plain, fast = (of_blocks(make_block_product(each)) for each in (AVX2, isa))
    weight = (rng.standard_normal((CHANNELS, INPUTS)) * rng.uniform(0.01, 10, (CHANNELS, 1))).astype(np.float32)
    weight[:16] = 1e3  # with the largest of 4 and of 8 bits in every place
    weight[:16, ::32] = 0
    for kind, bits in (("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)):
        arena = Arena(matrix_bytes(8, CHANNELS, 3))
        matrix = arena.place(pack_rows(kind, quantize(weight, GGMLQuantizationType[kind])), bits, CHANNELS, 3)
        for num_rows in range(1, 27):
            x = rng.standard_normal((num_rows, INPUTS)).astype(np.float32)
            x[0], x[-1, :32] = -7.0, 5.0
            rows, outs = quantised(x, bits), [np.full((num_rows + 1, CHANNELS), 0.5, np.float32) for _ in range(2)]
            for adds in (1, 0):
                for each, out in zip((plain, fast), outs, strict=True):
                    at = matrix.address, 3, rows.ctypes.data, rows.shape[1], num_rows, out.ctypes.data
                    each(bits, *at, CHANNELS // BLOCK, adds)
                assert np.array_equal(outs[0].view(np.int32), outs[1].view(np.int32)), (kind, num_rows, adds)
                assert (outs[1][-1] == 0.5).all()


@pytest.mark.parametrize("bits", BITS)
def test_norm_and_gate_are_numpys_quantised(bits: int) -> None:
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((1, 64)) * 3).astype(np.float32)
    weight = rng.uniform(0.5, 1.5, 64).astype(np.float32)
    size = ROW_BYTES
    out = np.zeros((1, 2 * size), np.uint8)
    norm(bits, x.ctypes.data, weight.ctypes.data, 2, out.ctypes.data)
    wide = x.astype(np.float64)
    _check_group(out, bits, wide / np.sqrt((wide**2).mean() + 1e-5) * weight)
    gated = np.zeros((1, size), np.uint8)
    x[0, :3] = 100, -100, 0  # ends of the exponential
    gate(bits, x.ctypes.data, gated.ctypes.data)
    wide = x.astype(np.float64)
    _check_group(gated, bits, wide[:, :32] / (1 + np.exp(-wide[:, :32])) * wide[:, 32:])


def _check_group(rows: NDArray[np.uint8], bits: int, expected: NDArray[np.float64]) -> None:
    whole, scale, _ = read(rows, bits)
    error = np.abs(whole * scale[..., None] - expected.reshape(whole.shape))
    assert np.all(error.max(-1) <= 0.51 * scale + 1e-6)
