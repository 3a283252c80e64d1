"""Attention of tokens that follow one another in a request, against float64: causal among themselves, blocks, splits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from streamserve.kernels.impl.triton_decode_attention import DecodeAttention
from streamserve.kernels.impl.triton_drafted_attention import DraftedAttention
from tests.kernels.paged import Paged, Shape, tolerance
from tests.kernels.test_triton_decode_attention import EPS, LAYER, angles, turned

ROWS = [(0, 3), (15, 2), (63, 4), (64, 1), (130, 5), (14, 18)]  # of each slot: tokens in KV, new ones


class Case:
    """A step of rows that follow one another. A line of `qkv` per row, in order."""

    def __init__(self, shape: Shape, rows: list[tuple[int, int]], device: str, dtype: torch.dtype, *, norm: bool = False) -> None:
        torch.manual_seed(shape.head_dim)
        self.shape, self.device, self.dtype = shape, device, dtype
        lengths, counts = [length for length, _ in rows], [count for _, count in rows]
        self.paged = Paged(shape, lengths, room=max(counts), device=device, dtype=dtype)
        self.rows = [(slot, length + i) for slot, (length, count) in enumerate(rows) for i in range(count)]
        self.qkv = torch.randn(len(self.rows), shape.qkv_size, device=device).to(dtype)
        self.cos_sin = angles(max(lengths) + max(counts), shape.head_dim, device)
        self.line_of: list[int] | None = None  # of cos_sin, by row; None: its position
        self.norms: tuple[Tensor | None, Tensor | None] = (None, None)
        if norm:
            self.norms = tuple((1 + torch.randn(2, shape.head_dim, device=device) / 4).to(dtype))

    def attention(self, num_sms: int) -> DraftedAttention:
        return DraftedAttention(self.shape, max_rows=len(self.rows) + 2, num_sms=num_sms, device=self.device)

    def run(self, attention: DraftedAttention | DecodeAttention, surplus: int = 0) -> Tensor:
        inputs = replace(self.paged.inputs([*self.rows, *[(-1, 0)] * surplus]), is_drafted=True)
        out = torch.full((len(self.rows) + surplus, self.shape.num_heads * self.shape.head_dim), float("nan"))
        out = out.to(self.device, self.dtype)
        qkv = torch.cat([self.qkv, self.qkv.new_full((surplus, self.shape.qkv_size), float("nan"))])
        cos_sin = self.cos_sin
        if self.line_of is not None:
            inputs, cos_sin = replace(inputs, rope_3T=inputs.positions_T.expand(3, -1)), cos_sin[self.line_of]
        attention.attend(qkv, inputs, LAYER, cos_sin, *self.norms, EPS, out)
        return out

    def check(self, out: Tensor) -> None:
        """Outputs, and what was written."""
        q_TH, k_TK, v_TK = self.shape.split(self.qkv)
        for i, (slot, position) in enumerate(self.rows):
            k_NKD, v_NKD = self.paged.read(LAYER, slot, position + 1)
            line = self.cos_sin[position if self.line_of is None else self.line_of[i]]
            expected_k = turned(k_TK[i], self.norms[1], line)
            torch.testing.assert_close(k_NKD[position], expected_k, **tolerance(self.dtype))
            assert torch.equal(v_NKD[position], v_TK[i])
            q_HD = turned(q_TH[i], self.norms[0], line)
            expected = self.paged.attention(LAYER, slot, position, q_HD)
            torch.testing.assert_close(out[i].double(), expected, **tolerance(self.dtype))


@pytest.mark.parametrize("num_sms", [1, 40], ids=["whole", "split"])
@pytest.mark.parametrize("shape", [Shape(), Shape(num_heads=8, num_kv_heads=1, head_dim=64), Shape(3, 3, 16)])
def test_rows_that_follow_one_another_see_each_other(shape: Shape, num_sms: int, device: str, dtype: torch.dtype) -> None:
    case = Case(shape, ROWS, device, dtype)
    case.check(case.run(case.attention(num_sms)))


def test_query_and_key_norm(device: str, dtype: torch.dtype) -> None:
    case = Case(Shape(), ROWS, device, dtype, norm=True)
    case.check(case.run(case.attention(30)))


@pytest.mark.parametrize("is_own_kernel", [True, False])
def test_rows_are_turned_by_lines_of_their_own_where_positions_are_three(
    is_own_kernel: bool, device: str, dtype: torch.dtype
) -> None:
    case = Case(Shape(), [(70, 3), (20, 18), (33, 1)], device, dtype)
    case.line_of = [(7 * i + 3) % len(case.cos_sin) for i in range(len(case.rows))]
    own = case.attention(9)
    other = DecodeAttention(case.shape, max_rows=len(case.rows), num_sms=9, device=device)
    case.check(case.run(own if is_own_kernel else other))


def test_the_longest_row(device: str, dtype: torch.dtype) -> None:
    case = Case(Shape(2, 2, 16), [(70, 64), (3, 1)], device, dtype)
    case.check(case.run(case.attention(1)))


def test_surplus_rows_read_and_write_nothing(device: str, dtype: torch.dtype) -> None:
    case = Case(Shape(), [(40, 3), (200, 2)], device, dtype)
    before = case.paged.k.clone(), case.paged.v.clone()
    out = case.run(case.attention(50), surplus=2)
    assert out[-2:].isnan().all()
    case.check(out[:-2])
    for pages, old in zip((case.paged.k, case.paged.v), before, strict=True):
        changed = (pages.view(torch.uint8) != old.view(torch.uint8)).unflatten(-1, (-1, pages.element_size())).any(-1)
        assert int(changed.any(-1).sum()) == 5 * case.shape.num_kv_heads  # one token of one layer per real row


def test_the_same_launch_gives_the_same_bits(device: str, dtype: torch.dtype) -> None:
    case = Case(Shape(), [(5, 2), (500, 5), (130, 1)], device, dtype)
    attention = case.attention(40)
    first = case.run(attention)
    for _ in range(2):  # the counters of the merge are back at 0, too
        assert torch.equal(case.run(attention), first)
