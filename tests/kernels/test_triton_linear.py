"""The batch-invariant product: right, and the same bits for a row wherever it stands."""

import pytest
import torch
from torch import Tensor

from streamserve.kernels.impl.triton_linear import linear


def draw(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


# Fewer and more than a tile of 64 each way, whole tiles, and sums that do not fill their last tile.
@pytest.mark.parametrize(("rows", "columns", "size"), [(1, 64, 64), (7, 100, 200), (65, 130, 576), (130, 33, 70)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(rows: int, columns: int, size: int, has_bias: bool, device: str, dtype: torch.dtype) -> None:
    x, weight = draw(rows, size, dtype=dtype, device=device), draw(columns, size, dtype=dtype, device=device)
    bias = draw(columns, dtype=dtype, device=device) if has_bias else None
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    for out_dtype in (None, torch.float32):
        found = linear(x, weight, bias, out_dtype)
        assert found.dtype == (out_dtype or dtype)
        is_rounded = found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=5e-3 if is_rounded else 1e-5, atol=1e-4)


def test_more_lines_of_tiles_than_a_group(device: str, dtype: torch.dtype) -> None:
    x, weight = draw(64 * 9 + 1, 64, dtype=dtype, device=device), draw(70, 64, dtype=dtype, device=device)
    found = linear(x, weight, None, torch.float32)
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [200, 576])
def test_a_rows_bits_do_not_depend_on_the_batch(size: int, device: str, dtype: torch.dtype) -> None:
    x, weight = draw(150, size, dtype=dtype, device=device), draw(96, size, dtype=dtype, device=device)
    row = x[17:18].clone()
    for rows in (7, 64, 150):
        for place in {0, 5, rows - 1}:
            batch = x[:rows].clone()
            batch[place] = row
            # Alone is alone on a GPU. The interpreter multiplies tiles with numpy, whose product treats the lines of a tile
            # unlike each other, so there the row stands in the same line, with nothing but copies of itself before it.
            few = row.expand(1 if device == "cuda" else place % 64 + 1, -1).contiguous()
            alone = linear(few, weight, None, torch.float32)[-1]
            assert linear(batch, weight, None, torch.float32)[place].equal(alone), (rows, place)


def test_a_bad_row_spoils_only_itself(device: str, dtype: torch.dtype) -> None:
    x, weight = draw(5, 64, dtype=dtype, device=device), draw(64, 64, dtype=dtype, device=device)
    clean = linear(x, weight, None)
    x[2] = float("nan")
    found = linear(x, weight, None)
    assert found[2].isnan().all()
    assert found[[0, 1, 3, 4]].equal(clean[[0, 1, 3, 4]])


def test_no_rows_are_no_work(device: str, dtype: torch.dtype) -> None:
    weight = draw(64, 64, dtype=dtype, device=device)
    assert linear(draw(0, 64, dtype=dtype, device=device), weight, None).shape == (0, 64)
