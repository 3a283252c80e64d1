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
    BLOCK,
    COARSE,
    EIGHT,
    FINE,
    FINE_PART,
    Q4_ROW_BYTES,
    Q8_ROW_BYTES,
    block_bytes,
    block_product,
    row_group_bytes,
)

pytestmark = pytest.mark.skipif(processor_refusal() is not None, reason=str(processor_refusal()))

Floats = NDArray[np.float32]
INPUTS, CHANNELS = 96, 48
FORMS = (COARSE, FINE, EIGHT)
LARGEST = {COARSE: 127, FINE: (127 << FINE_PART) + (1 << FINE_PART) // 2 - 1, EIGHT: 32767}
SIZES = {COARSE: Q4_ROW_BYTES, FINE: Q8_ROW_BYTES, EIGHT: Q8_ROW_BYTES}


@njit(nogil=True)
def product(
    form: int, weights: int, groups: int, rows: int, row_bytes: int, num_rows: int, out: int, blocks: int, adds: int
) -> None:
    for n in range(blocks):
        at, width = weights + n * block_bytes(form, groups), blocks * BLOCK * 4
        block_product(form, at, groups, rows, row_bytes, num_rows, out + n * BLOCK * 4, width, adds)


@njit(nogil=True)
def quantise(form: int, x: int, num_rows: int, groups: int, out: int) -> None:
    for r in range(num_rows):
        quantise_row(form, x + r * groups * 128, groups, out + r * groups * row_group_bytes(form))


@njit(nogil=True)
def norm(form: int, x: int, weight: int, groups: int, out: int) -> None:
    norm_row(form, x, weight, groups, 1e-5, out)


@njit(nogil=True)
def gate(form: int, x: int, out: int) -> None:
    gate_group(form, x, out)


def quantised(x: Floats, form: int) -> NDArray[np.uint8]:
    groups = x.shape[1] // 32
    out = np.zeros((len(x), groups * SIZES[form]), np.uint8)
    x = np.ascontiguousarray(x)
    quantise(form, x.ctypes.data, len(x), groups, out.ctypes.data)
    return out


def read(rows: NDArray[np.uint8], form: int) -> tuple[Any, Any, Any]:
    """Integers [rows, groups, 32], scales and scaled sums [rows, groups]."""
    groups = rows.reshape(len(rows), -1, SIZES[form])
    width = 32 if form == COARSE else 64
    whole = np.ascontiguousarray(groups[..., :width]).view(np.int16 if form == EIGHT else np.int8).astype(np.int64)
    if form == FINE:
        whole = (whole[..., :32] << FINE_PART) + whole[..., 32:]
    rest = np.ascontiguousarray(groups[..., width:]).view(np.float32)
    return whole, rest[..., 0], rest[..., 1]


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_quantised_to_the_nearest_integers_of_their_groups(form: int) -> None:
    x = np.random.default_rng(0).standard_normal((5, INPUTS)).astype(np.float32)
    x[2, 32:64] = 0
    whole, scale, total = read(quantised(x, form), form)
    assert np.abs(whole).max() == LARGEST[form]
    back = whole * scale[..., None]
    assert np.all(np.abs(back.reshape(x.shape) - x).reshape(5, -1, 32).max(-1) <= 0.51 * scale)
    assert not whole[2, 1].any() and scale[2, 1] == 0
    if form != EIGHT:
        np.testing.assert_allclose(total, scale * whole.sum(-1), rtol=1e-6)


@pytest.mark.parametrize(("kind", "form"), [("Q4_0", COARSE), ("Q4_1", COARSE), ("Q4_1", FINE), ("Q8_0", EIGHT)])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 9])
def test_products_are_those_of_the_quantised_numbers(kind: str, form: int, num_rows: int) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((CHANNELS, INPUTS)).astype(np.float32)
    packed = quantize(weight, GGMLQuantizationType[kind])
    exact = dequantize(packed, GGMLQuantizationType[kind]).astype(np.float64)
    arena = Arena(matrix_bytes(8, CHANNELS, 3))
    matrix = arena.place(pack_rows(kind, packed), 8 if kind == "Q8_0" else 4, CHANNELS, 3)
    rows = quantised(rng.standard_normal((num_rows, INPUTS)).astype(np.float32), form)
    whole, scale, _ = read(rows, form)
    x = (whole * scale[..., None].astype(np.float64)).reshape(num_rows, INPUTS)
    out = np.full((num_rows, CHANNELS), 0.5, np.float32)

    def multiply(adds: int) -> Floats:
        args = matrix.address, 3, rows.ctypes.data, rows.shape[1], num_rows, out.ctypes.data, CHANNELS // BLOCK, adds
        product(form, *args)
        return out.copy()

    np.testing.assert_allclose(multiply(1), x @ exact.T + 0.5, atol=2e-5)
    np.testing.assert_allclose(multiply(0), x @ exact.T, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_largest_numbers_do_not_overflow(form: int) -> None:
    kind = "Q8_0" if form == EIGHT else "Q4_1"
    weight = np.ones((16, 32), np.float32)
    weight[:, 0] = -1 if form == EIGHT else 0
    packed = quantize(weight, GGMLQuantizationType[kind])
    for sign in (1, -1):
        rows = quantised(np.full((4, 32), sign, np.float32), form)
        out = np.zeros((4, 16), np.float32)
        arena = Arena(matrix_bytes(8, 16, 1))
        matrix = arena.place(pack_rows(kind, packed), 8 if form == EIGHT else 4, 16, 1)
        product(form, matrix.address, 1, rows.ctypes.data, rows.shape[1], 4, out.ctypes.data, 1, 0)
        np.testing.assert_allclose(out, sign * weight.sum(1)[None].repeat(4, 0), rtol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_norm_and_gate_are_numpys_quantised(form: int) -> None:
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((1, 64)) * 3).astype(np.float32)
    weight = rng.uniform(0.5, 1.5, 64).astype(np.float32)
    size = SIZES[form]
    out = np.zeros((1, 2 * size), np.uint8)
    norm(form, x.ctypes.data, weight.ctypes.data, 2, out.ctypes.data)
    wide = x.astype(np.float64)
    _check_group(out, form, wide / np.sqrt((wide**2).mean() + 1e-5) * weight)
    gated = np.zeros((1, size), np.uint8)
    x[0, :3] = 100, -100, 0  # ends of the exponential
    gate(form, x.ctypes.data, gated.ctypes.data)
    wide = x.astype(np.float64)
    _check_group(gated, form, wide[:, :32] / (1 + np.exp(-wide[:, :32])) * wide[:, 32:])


def _check_group(rows: NDArray[np.uint8], form: int, expected: NDArray[np.float64]) -> None:
    whole, scale, _ = read(rows, form)
    error = np.abs(whole * scale[..., None] - expected.reshape(whole.shape))
    assert np.all(error.max(-1) <= 0.51 * scale + 1e-6)
