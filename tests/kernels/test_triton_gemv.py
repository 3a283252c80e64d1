"""Products of a few rows, fused with norm, bias, residual and gate, against plain torch in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamserve.kernels.impl import triton_gemv as gemv
from streamserve.kernels.impl.triton_decoder import few_rows
from streamserve.kernels.impl.triton_gemv import Tile

EPS = 1e-5
# One tile, several tiles, tiles that end inside a row or behind the last weight row; one or two tiles ahead; tensor cores.
TILES = [
    Tile(4, 64, 1),
    Tile(2, 32, 1),
    Tile(8, 16, 2, ahead=2),
    Tile(1, 64, 1, ahead=2),
    Tile(16, 64, 2, dot=True),
    Tile(32, 32, 1, ahead=2, dot=True),
    Tile(32, 128, 1, dot=True),
    Tile(16, 64, 1, dot=True),
]
ROWS = (1, 2, 3, 5, 8)
DOT_ROWS = (1, 5, 8, 9, 16)


def random(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def normed(x: Tensor, norm: Tensor) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * norm.double()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Every element written, and the error that of the type actual is held in."""
    assert actual.shape == expected.shape
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 6e-3}[actual.dtype]
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < tolerance, float(error)


def case(rows: int, n: int, k: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return random((rows, k), device, dtype, 1), random((k,), device, dtype, 2) + 1, random((n, k), device, dtype, 3) / k**0.5


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("k", [64, 72])
def test_norm_and_product_agree_with_float64(tile: Tile, k: int, device: str, dtype: torch.dtype) -> None:
    x, norm, w = case(3, 21, k, device, dtype)
    bias = random((21,), device, dtype, 4)
    expected = normed(x, norm) @ w.double().T
    assert_near(gemv.norm_linear(x, norm, w, None, EPS, tile=tile), expected)
    assert_near(gemv.norm_linear(x, norm, w, bias, EPS, tile=tile), expected + bias.double())


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("k", [64, 72])
def test_product_is_added_to_the_residual_in_place(tile: Tile, k: int, device: str, dtype: torch.dtype) -> None:
    x, _, w = case(3, 21, k, device, dtype)
    residual = random((3, 21), device, dtype, 5)
    expected = residual.double() + x.double() @ w.double().T
    gemv.linear_add(x, w, residual, tile=tile)
    assert_near(residual, expected)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("k", [64, 72])
def test_gate_and_up_meet(tile: Tile, k: int, device: str, dtype: torch.dtype) -> None:
    x, norm, w = case(3, 26, k, device, dtype)
    gate, up = (normed(x, norm) @ w.double().T).chunk(2, dim=-1)
    assert_near(gemv.norm_gate_up(x, norm, w, EPS, tile=tile), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize(("rows", "dot"), [*((rows, False) for rows in ROWS), *((rows, True) for rows in DOT_ROWS)])
def test_any_number_of_rows(rows: int, dot: bool, device: str, dtype: torch.dtype) -> None:
    tile = Tile(16, 32, 1, ahead=2, dot=True) if dot else Tile(4, 32, 1)
    x, norm, w = case(rows, 20, 64, device, dtype)
    expected = normed(x, norm) @ w.double().T
    assert_near(gemv.norm_linear(x, norm, w, None, EPS, tile=tile), expected)
    gate, up = expected.chunk(2, dim=-1)
    assert_near(gemv.norm_gate_up(x, norm, w, EPS, tile=tile), torch.nn.functional.silu(gate) * up)
    residual = torch.zeros_like(expected, dtype=dtype)
    gemv.linear_add(x, w, residual, tile=tile)
    assert_near(residual, x.double() @ w.double().T)


@pytest.mark.parametrize("dot", [False, True])
def test_logits_of_chosen_rows_are_float32(dot: bool, device: str, dtype: torch.dtype) -> None:
    tile = Tile(16, 32, 1, ahead=2, dot=True) if dot else Tile(4, 32, 1)
    x, norm, w = case(12, 20, 64, device, dtype)
    rows = torch.tensor([11, -1, 4], dtype=torch.int32, device=device)  # -1, in a graph's surplus rows, counts as 0
    logits = gemv.norm_logits(x, norm, w, EPS, rows, tile=tile)
    assert logits.dtype is torch.float32
    expected = normed(x, norm) @ w.double().T
    if dot:  # the normalised row is rounded before tensor cores take it
        logits = logits.to(dtype)
    assert_near(logits, expected[rows.clamp(min=0).long()])
    assert_near(gemv.norm_logits(x[:2], norm, w, EPS, tile=tile).to(dtype), expected[:2])


@pytest.mark.parametrize("dot", [False, True])
def test_a_poisoned_row_spoils_no_other(dot: bool, device: str, dtype: torch.dtype) -> None:
    tile = Tile(16, 32, 1, ahead=2, dot=True) if dot else Tile(4, 32, 1)
    x, norm, w = case(4, 20, 72, device, dtype)
    x[2] = torch.nan
    out = gemv.norm_linear(x, norm, w, None, EPS, tile=tile)
    good = torch.tensor([0, 1, 3], device=device)
    assert_near(out[good], normed(x[good], norm) @ w.double().T)
    assert out[2].isnan().all()


def test_nothing_is_read_or_written_outside(device: str, dtype: torch.dtype) -> None:
    """Neighbours in memory are NaN before and after; the outputs' are untouched."""
    for tile in TILES:
        memory = torch.full((4, 20, 72), torch.nan, dtype=dtype, device=device)
        w, x, residual = memory[1], memory[2].view(-1)[:144].view(2, 72), memory[3].view(-1)[:40].view(2, 20)
        w.copy_(random((20, 72), device, dtype, 3) / 8)
        x.copy_(random((2, 72), device, dtype, 1))
        residual.zero_()
        gemv.linear_add(x, w, residual, tile=tile)
        assert_near(residual, x.double() @ w.double().T)
        assert memory[3].view(-1)[40:].isnan().all() and memory[2].view(-1)[144:].isnan().all() and memory[0].isnan().all()


def test_on_tensor_cores_a_row_says_the_same_whatever_rows_are_beside_it(device: str, dtype: torch.dtype) -> None:
    tile = Tile(16, 64, 2, dot=True)
    x, norm, w = case(8, 20, 64, device, dtype)
    together = gemv.norm_linear(x, norm, w, None, EPS, tile=tile)
    for first, last in ((0, 1), (2, 7)):
        assert torch.equal(gemv.norm_linear(x[first:last], norm, w, None, EPS, tile=tile), together[first:last])


def test_pairs_of_16_bits_are_taken_apart_as_they_were_put_together(device: str) -> None:
    """The interpreter knows float16, if not bfloat16."""
    for rows, k in ((5, 64), (12, 96)):
        x, norm, w = case(rows, 20, k, device, torch.float16)
        expected = normed(x, norm) @ w.double().T
        out = gemv.norm_linear(x, norm, w, None, EPS, tile=Tile(16, 64, 1, dot=True))
        assert (out.double() - expected).norm() / expected.norm() < 2e-3


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_shapes_without_a_measured_tile_get_one_that_works(rows: int, device: str, dtype: torch.dtype) -> None:
    x, norm, w = case(rows, 12, 576, device, dtype)
    gate, up = (normed(x, norm) @ w.double().T).chunk(2, dim=-1)
    assert_near(gemv.norm_gate_up(x, norm, w, EPS), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("served", [torch.bfloat16, torch.float16, torch.float32])
def test_every_step_of_few_rows_gets_tiles_that_take_so_many(served: torch.dtype) -> None:
    for num_rows, num_columns in ((6144, 4096), (1024, 3072), (576, 1536), (960, 576), (100, 50)):
        w = torch.empty(num_rows, num_columns, dtype=served, device="meta")
        for rows in range(1, few_rows(num_columns, served) + 1):
            tile, options = gemv._plan(torch.empty(rows, num_columns, dtype=served, device="meta"), w, rows, False, None)
            assert options["ROWS"] >= rows
            assert not tile.dot or (served is torch.bfloat16 and tile.block_k % (32 * tile.num_warps) == 0)


_ORDER = """
import json, triton
from triton.backends.compiler import GPUTarget
from tests.kernels.compile_targets import source_of, variants
found = []
for kernel, signature, consts, options in variants("gemv"):
    if consts["PDL"] and consts["N"] <= 6144:
        asked = {name: value for name, value in options.items() if name != "only"}
        text = triton.compile(source_of(kernel, signature, consts), GPUTarget("cuda", 90, 32), asked).asm["ptx"]
        before, after = text.split("griddepcontrol.wait;")
        words = ("evict_first", "evict_last", "cp.async.cg")
        loop = text[: text.rindex("mma.sync")] if consts["DOT"] else ""
        exchanges = [word for word in ("shfl.", "bar.sync", "ldmatrix.", "st.shared", "ld.shared") if word in loop]
        found.append([consts["DOT"], exchanges, *([word in part for word in words] for part in (before, after))])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_weights_are_read_before_the_kernels_in_front_are_done_and_activations_after() -> None:
    """In the assembly: a compiler may move loads. Weights are marked evict_first and activations evict_last."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", _ORDER], cwd=root, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {is_dot for is_dot, *_ in found} == {False, True}
    for _, exchanges, before, after in found:
        assert before == [True, False, False] and after[1:] == [True, False]
        assert exchanges == [], "tensor cores should find their operands where the threads have read them"
