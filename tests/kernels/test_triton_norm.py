"""Embedding and norms against torch in float64."""

import pytest
import torch
from torch import Tensor

from streamserve.kernels.impl.triton_norm import add_media, add_rms_norm, embed, rms_norm
from streamserve.messages import MEDIA_BASE

EPS = 1e-5
SHAPES = [(1, 64), (5, 576), (3, 200), (2, 4096)]


def draw(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def expected_norm(x: Tensor, weight: Tensor) -> Tensor:
    """In float64, from the values as they are held."""
    x64 = x.double()
    return x64 * torch.rsqrt(x64.square().mean(dim=-1, keepdim=True) + EPS) * weight.double()


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within a few roundings of `dtype` (bfloat16 is rounded before and after the weight)."""
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1.2e-2 if dtype == torch.bfloat16 else 2e-6, atol=1e-6)


@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_rows_of_the_table_are_copied(rows: int, size: int, device: str, dtype: torch.dtype) -> None:
    table = draw(7, size, dtype=dtype, device=device)
    tokens = torch.tensor([6, 0, 3, 3, 1][:rows], dtype=torch.int32, device=device)
    assert embed(tokens, table).equal(table[tokens.long()])


def test_a_surplus_row_reads_a_row_that_exists(device: str, dtype: torch.dtype) -> None:
    table = draw(4, 64, dtype=dtype, device=device)
    found = embed(torch.tensor([2, -1], dtype=torch.int32, device=device), table)
    assert found.equal(table[[2, 0]])


def test_places_of_media_take_their_line_and_what_it_adds_later(device: str, dtype: torch.dtype) -> None:
    size = 1030  # more than a block
    table, media = (torch.randn(rows, width, device=device).to(dtype) for rows, width in ((5, size), (4, 2 * size)))
    tokens = torch.tensor([3, MEDIA_BASE, -1, MEDIA_BASE], dtype=torch.int32, device=device)
    found = embed(tokens, table, media)
    assert found.equal(torch.stack([table[3], media[1, :size], table[0], media[3, :size]]))
    before = found.clone()
    add_media(found, tokens, media, 1)
    assert found[[0, 2]].equal(before[[0, 2]])
    assert found[[1, 3]].equal(before[[1, 3]] + media[[1, 3], size:])


@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_rms_norm(rows: int, size: int, device: str, dtype: torch.dtype) -> None:
    x, weight = draw(rows, size, dtype=dtype, device=device) * 3, draw(size, dtype=dtype, device=device)
    assert_close(rms_norm(x, weight, EPS), expected_norm(x, weight), dtype)


def test_rms_norm_of_chosen_rows(device: str, dtype: torch.dtype) -> None:
    x, weight = draw(6, 96, dtype=dtype, device=device), draw(96, dtype=dtype, device=device)
    x[1] = float("nan")  # not asked for, must not matter
    # As in serving, the indices lie inside a buffer, at any address.
    rows = torch.tensor([9, 5, 0, 5], dtype=torch.int32, device=device)[1:]
    found = rms_norm(x, weight, EPS, rows)
    assert_close(found, expected_norm(x, weight)[[5, 0, 5]], dtype)
    assert rms_norm(x, weight, EPS, rows[:0]).shape == (0, 96)


@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_add_rms_norm_keeps_the_sum_and_returns_its_norm(rows: int, size: int, device: str, dtype: torch.dtype) -> None:
    x, delta = draw(rows, size, dtype=dtype, device=device), draw(rows + 1, size, dtype=dtype, device=device)[1:] * 2
    weight = draw(size, dtype=dtype, device=device)
    total = x + delta
    found = add_rms_norm(x, delta, weight, EPS)
    assert x.equal(total)
    assert_close(found, expected_norm(total, weight), dtype)


def test_the_norm_rounds_as_transformers_does(device: str, dtype: torch.dtype) -> None:
    """The normed value is rounded before the weight is applied; float32 sums differ in order only, hence the few misses."""
    x, weight = draw(8, 576, dtype=dtype, device=device), draw(576, dtype=dtype, device=device)
    normed = x.float() * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + EPS)
    expected = weight * normed.to(dtype)
    found = rms_norm(x, weight, EPS)
    is_same = (found == expected).float().mean().item()
    assert is_same > (0.99 if dtype == torch.bfloat16 else 0.5)
    assert_close(found, expected.double(), dtype)


def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(device: str, dtype: torch.dtype) -> None:
    x, delta = draw(7, 576, dtype=dtype, device=device), draw(7, 576, dtype=dtype, device=device)
    weight = draw(576, dtype=dtype, device=device)
    alone = add_rms_norm(x[4:5].clone(), delta[4:5].clone(), weight, EPS)
    assert add_rms_norm(x, delta, weight, EPS)[4:5].equal(alone)


def test_no_tokens_are_no_work(device: str, dtype: torch.dtype) -> None:
    x, weight = draw(0, 64, dtype=dtype, device=device), draw(64, dtype=dtype, device=device)
    assert rms_norm(x, weight, EPS).shape == (0, 64)
    assert add_rms_norm(x, x.clone(), weight, EPS).shape == (0, 64)
