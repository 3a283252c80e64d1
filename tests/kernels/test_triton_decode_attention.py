"""Decode attention against float64: norm, RoPE, the write into pages, splits and their merge."""

import pytest
import torch
from torch import Tensor

from streamserve.kernels.impl.triton_decode_attention import DecodeAttention
from tests.kernels.paged import Paged, Shape, tolerance

EPS = 1e-5
LAYER = 1
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 150]


def angles(max_len: int, dim: int, device: str) -> Tensor:
    angles_Nd = torch.outer(torch.arange(max_len).double(), 10000 ** -(torch.arange(dim // 2) * 2 / dim).double())
    return torch.cat((angles_Nd.cos(), angles_Nd.sin()), dim=1).float().to(device)


def turned(x_HD: Tensor, weight_D: Tensor | None, cos_sin_D: Tensor) -> Tensor:
    """Norm and RoPE in float64, rounded where transformers rounds."""
    dtype, half = x_HD.dtype, x_HD.shape[1] // 2
    x = x_HD.double()
    if weight_D is not None:
        x = (x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()).to(dtype).double() * weight_D.double()
        x = x.to(dtype).double()
    cos, sin = cos_sin_D[:half].double(), cos_sin_D[half:].double()
    low, high = x[:, :half], x[:, half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=1).to(dtype)


class Case:
    """A step of decode rows, one per slot, each with all its tokens in KV but the new one."""

    def __init__(self, shape: Shape, lengths: list[int], device: str, dtype: torch.dtype, *, norm: bool = False) -> None:
        torch.manual_seed(sum(lengths) + shape.head_dim)
        self.shape, self.lengths, self.dtype, self.device = shape, lengths, dtype, device
        self.paged = Paged(shape, lengths, room=1, device=device, dtype=dtype)
        self.qkv = torch.randn(len(lengths), shape.qkv_size, device=device).to(dtype)
        self.cos_sin = angles(max(lengths) + 1, shape.head_dim, device)
        self.norms: tuple[Tensor | None, Tensor | None] = (None, None)
        if norm:
            self.norms = tuple((1 + torch.randn(2, shape.head_dim, device=device) / 4).to(dtype))

    def attention(self, num_sms: int, deterministic: bool = False) -> DecodeAttention:
        return DecodeAttention(
            self.shape, max_rows=len(self.lengths) + 2, num_sms=num_sms, device=self.device, deterministic=deterministic
        )

    def run(self, attention: DecodeAttention, rows: list[int] | None = None) -> Tensor:
        """Output lines of `rows` (of all); -1 is a surplus row."""
        rows = list(range(len(self.lengths))) if rows is None else rows
        inputs = self.paged.inputs([(slot, self.lengths[slot] if slot >= 0 else 0) for slot in rows])
        out = torch.full((len(rows), self.shape.num_heads * self.shape.head_dim), float("nan")).to(self.device, self.dtype)
        qkv = self.qkv[rows].contiguous()
        attention.attend(qkv, inputs, LAYER, self.cos_sin, *self.norms, EPS, out)
        return out

    def check(self, out: Tensor) -> None:
        """Outputs, and what was written, of a run over all rows."""
        q_TH, k_TK, v_TK = self.shape.split(self.qkv)
        for slot, position in enumerate(self.lengths):
            k_NKD, v_NKD = self.paged.read(LAYER, slot, position + 1)
            expected_k = turned(k_TK[slot], self.norms[1], self.cos_sin[position])
            torch.testing.assert_close(k_NKD[position], expected_k, **tolerance(self.dtype))
            assert torch.equal(v_NKD[position], v_TK[slot])
            q_HD = turned(q_TH[slot], self.norms[0], self.cos_sin[position])
            expected = self.paged.attention(LAYER, slot, position, q_HD)
            torch.testing.assert_close(out[slot].double(), expected, **tolerance(self.dtype))


@pytest.mark.parametrize("num_sms", [1, 100], ids=["whole", "split"])
@pytest.mark.parametrize("shape", [Shape(), Shape(num_heads=4, num_kv_heads=1, head_dim=64), Shape(3, 3, 16)])
def test_rows_of_all_lengths(shape: Shape, num_sms: int, device: str, dtype: torch.dtype) -> None:
    case = Case(shape, LENGTHS, device, dtype)
    case.check(case.run(case.attention(num_sms)))


def test_one_long_row_is_split_and_merged(device: str, dtype: torch.dtype) -> None:
    case = Case(Shape(), [700], device, dtype)
    attention = case.attention(10)  # ten programs per head: two tiles each, the last one fewer
    assert attention.max_splits(1) == 10
    case.check(case.run(attention))


def test_query_and_key_norm(device: str, dtype: torch.dtype) -> None:
    case = Case(Shape(), [0, 33, 130], device, dtype, norm=True)
    case.check(case.run(case.attention(9)))


@pytest.mark.parametrize("window", [1, 2, 16, 70])
def test_sliding_window(window: int, device: str, dtype: torch.dtype) -> None:
    case = Case(Shape(sliding_window=window), [0, 1, 64, 69, 70, 150, 300], device, dtype)
    case.check(case.run(case.attention(20)))


def test_surplus_rows_read_and_write_nothing(device: str, dtype: torch.dtype) -> None:
    case = Case(Shape(), [40, 200], device, dtype)
    before = case.paged.k.clone(), case.paged.v.clone()
    out = case.run(case.attention(50), [-1, 1, -1, 0])
    assert out[[0, 2]].isnan().all()
    case.check(out[[3, 1]])
    for pages, old in zip((case.paged.k, case.paged.v), before, strict=True):
        changed = (pages.view(torch.uint8) != old.view(torch.uint8)).unflatten(-1, (-1, pages.element_size())).any(-1)
        assert int(changed.any(-1).sum()) == 2 * case.shape.num_kv_heads  # one token of one layer per real row


def test_the_same_launch_gives_the_same_bits(device: str, dtype: torch.dtype) -> None:
    case = Case(Shape(), [5, 500, 130], device, dtype)
    attention = case.attention(40)
    first = case.run(attention)
    for _ in range(3):  # the counters of the merge are back at 0, too
        assert torch.equal(case.run(attention), first)


def test_deterministic_rows_do_not_depend_on_each_other(device: str, dtype: torch.dtype) -> None:
    case = Case(Shape(), [600, 3, 260], device, dtype)
    attention = case.attention(40, deterministic=True)
    together = case.run(attention)
    case.check(together)
    for slot in range(len(case.lengths)):
        assert torch.equal(case.run(attention, [slot, -1])[0], together[slot])
        assert torch.equal(case.run(attention, [slot])[0], together[slot])
