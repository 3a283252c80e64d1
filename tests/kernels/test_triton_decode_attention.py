"""Decode attention against float64: norm, RoPE, the write into pages, splits and their merge; rows in groups."""

from dataclasses import replace

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


Group = tuple[list[int], int]  # rows, tokens they share


class Case:
    """A step of decode rows, one per slot, each with all its tokens in KV but the new one."""

    def __init__(self, shape: Shape, lengths: list[int], device: str, dtype: torch.dtype, *, norm: bool = False) -> None:
        torch.manual_seed(sum(lengths) + shape.head_dim)
        self.shape, self.lengths, self.dtype, self.device = shape, lengths, dtype, device
        self.paged = Paged(shape, lengths, room=1, device=device, dtype=dtype)
        self.qkv = torch.randn(len(lengths), shape.qkv_size, device=device).to(dtype)
        self.cos_sin = angles(max(lengths) + 1, shape.head_dim, device)
        self.line_of: list[int] | None = None  # of cos_sin, by row; None: its position
        self.norms: tuple[Tensor | None, Tensor | None] = (None, None)
        if norm:
            self.norms = tuple((1 + torch.randn(2, shape.head_dim, device=device) / 4).to(dtype))

    def attention(self, num_sms: int, deterministic: bool = False) -> DecodeAttention:
        return DecodeAttention(
            self.shape, max_rows=len(self.lengths) + 2, num_sms=num_sms, device=self.device, deterministic=deterministic
        )

    def share(self, groups: list[Group]) -> None:
        """The first tokens of a group's rows: from now on in the pages of its first one, and nowhere else."""
        for (leader, *others), shared in groups:
            pages = shared // self.paged.page_size
            for slot in others:
                self.paged.share(leader, slot, pages)

    def run(
        self, attention: DecodeAttention, rows: list[int] | None = None, parts: list[tuple[Group, int]] | None = None
    ) -> Tensor:
        """Output lines of `rows` (of all); -1 is a surplus row. `parts`: groups by index into `rows`, and their splits."""
        rows = list(range(len(self.lengths))) if rows is None else rows
        inputs = self.paged.inputs([(slot, self.lengths[slot] if slot >= 0 else 0) for slot in rows])
        if parts is not None:
            lines = [
                [*members, *[-1] * (attention.rows_per_group - len(members)), shared, split, splits]
                for (members, shared), splits in parts
                for split in range(splits)
            ]
            surplus = [[-1] * (attention.rows_per_group + 3)] * (attention.num_parts(len(rows)) - len(lines))
            inputs = replace(inputs, parts_PR=torch.tensor(lines + surplus, dtype=torch.int32, device=self.device))
        if self.line_of is not None:
            inputs = replace(inputs, rope_3T=inputs.positions_T.expand(3, -1))
        out = torch.full((len(rows), self.shape.num_heads * self.shape.head_dim), float("nan")).to(self.device, self.dtype)
        qkv = self.qkv[rows].contiguous()
        cos_sin = self.cos_sin if self.line_of is None else self.cos_sin[self.line_of]
        attention.attend(qkv, inputs, LAYER, cos_sin, *self.norms, EPS, out)
        return out

    def check(self, out: Tensor) -> None:
        """Outputs, and what was written, of a run over all rows."""
        q_TH, k_TK, v_TK = self.shape.split(self.qkv)
        for slot, position in enumerate(self.lengths):
            k_NKD, v_NKD = self.paged.read(LAYER, slot, position + 1)
            line = self.cos_sin[position if self.line_of is None else self.line_of[slot]]
            expected_k = turned(k_TK[slot], self.norms[1], line)
            torch.testing.assert_close(k_NKD[position], expected_k, **tolerance(self.dtype))
            assert torch.equal(v_NKD[position], v_TK[slot])
            q_HD = turned(q_TH[slot], self.norms[0], line)
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


@pytest.mark.parametrize("is_grouped", [False, True])
def test_rows_are_turned_by_lines_of_their_own_where_positions_are_three(
    is_grouped: bool, device: str, dtype: torch.dtype
) -> None:
    case = Case(Shape(), [70, 33, 130], device, dtype)
    case.line_of = [5, 99, 41]
    attention = case.attention(9)
    parts = [(([0, 2], 64), 2), (([1], 0), 1)] if is_grouped else None
    if is_grouped:
        case.share([([0, 2], 64)])
    case.check(case.run(attention, parts=parts))


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


# Own parts of no, one, a few, a whole tile's and several tiles' tokens; rows alone, short, empty and long.
LENS = [128, 129, 150, 192, 300, 0, 1, 64, 200]
GROUPS: list[Group] = [([3, 0], 128), ([1, 4], 64), ([2], 0), ([5], 0), ([6], 0), ([8, 7], 64)]


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_rows_that_share_pages_are_attended_in_groups(splits: int, norm: bool, device: str, dtype: torch.dtype) -> None:
    case = Case(Shape(), LENS, device, dtype, norm=norm)  # three query heads a key/value head: five rows a group
    case.share(GROUPS)
    attention = case.attention(48)
    assert attention.rows_per_group == 5
    case.check(case.run(attention, parts=[(group, splits) for group in GROUPS]))


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("splits", [1, 4])
def test_groups_of_all_sizes(group: int, splits: int, device: str, dtype: torch.dtype) -> None:
    most = 16 // group
    lengths = [64 + 37 * i % 150 for i in range(most)] + [70] * max(most - 1, 1)
    groups: list[Group] = [(list(range(most)), 64), (list(range(most, len(lengths))), 64)]
    case = Case(Shape(2 * group, 2, 16), lengths, device, dtype)
    case.share(groups)
    attention = case.attention(100)
    assert attention.rows_per_group == most
    case.check(case.run(attention, parts=[(g, splits) for g in groups]))


def test_a_split_without_a_token_of_some_member(device: str, dtype: torch.dtype) -> None:
    """Own tiles of one member fill whole splits, in which the lines of the others see nothing."""
    case = Case(Shape(), [700, 5, 64, 300], device, dtype)
    attention = case.attention(16)
    for splits in (5, 18):
        case.check(case.run(attention, parts=[(([1, 0, 3, 2], 0), splits)]))


def test_surplus_rows_are_in_no_group(device: str, dtype: torch.dtype) -> None:
    case = Case(Shape(), [140, 200, 64], device, dtype)
    case.share([([1, 0], 128)])
    before = case.paged.k.clone(), case.paged.v.clone()
    out = case.run(case.attention(50), [-1, 1, -1, 0, 2], [(([1, 3], 128), 2), (([4], 0), 3)])
    assert out[[0, 2]].isnan().all()
    case.check(out[[3, 1, 4]])
    for pages, old in zip((case.paged.k, case.paged.v), before, strict=True):
        changed = (pages.view(torch.uint8) != old.view(torch.uint8)).unflatten(-1, (-1, pages.element_size())).any(-1)
        assert int(changed.any(-1).sum()) == 3 * case.shape.num_kv_heads  # one token of one layer per real row


def test_the_same_groups_give_the_same_bits(device: str, dtype: torch.dtype) -> None:
    case = Case(Shape(), [500, 130, 270], device, dtype)
    case.share([([0, 2], 256)])
    attention = case.attention(8)
    parts: list[tuple[Group, int]] = [(([0, 2], 256), 5), (([1], 0), 3)]
    first = case.run(attention, parts=parts)
    case.check(first)
    for _ in range(2):  # the counters of the merge are back at 0, too
        assert torch.equal(case.run(attention, parts=parts), first)
    case.check(case.run(attention))  # and the scratch serves rows without groups as before


def test_where_groups_are_not_used(device: str) -> None:
    assert Case(Shape(), [1], device, torch.float32).attention(1, deterministic=True).rows_per_group == 1
    assert Case(Shape(sliding_window=9), [1], device, torch.float32).attention(1).rows_per_group == 1
    assert Case(Shape(16, 1), [1], device, torch.float32).attention(1).rows_per_group == 1


DRAFTED = [(0, 3), (15, 2), (63, 4), (64, 1), (130, 5), (14, 18)]  # tokens in KV, new ones


class DraftedCase(Case):
    """A step whose rows follow one another: of slot i, DRAFTED[i]. A line of `qkv` per row, in order."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype, *, norm: bool = False) -> None:
        super().__init__(shape, [length for length, _ in DRAFTED], device, dtype, norm=norm)
        self.paged = Paged(shape, self.lengths, room=max(count for _, count in DRAFTED), device=device, dtype=dtype)
        self.rows = [(slot, length + i) for slot, (length, count) in enumerate(DRAFTED) for i in range(count)]
        self.qkv = torch.randn(len(self.rows), shape.qkv_size, device=device).to(dtype)
        self.cos_sin = angles(200, shape.head_dim, device)

    def attend(self, attention: DecodeAttention, rows: list[int], *, is_drafted: bool) -> Tensor:
        """Output lines of some rows, by index; -1 is a surplus row."""
        inputs = self.paged.inputs([self.rows[i] if i >= 0 else (-1, 0) for i in rows])
        out = torch.full((len(rows), self.shape.num_heads * self.shape.head_dim), float("nan")).to(self.device, self.dtype)
        inputs = replace(inputs, is_drafted=is_drafted)
        attention.attend(self.qkv[rows].contiguous(), inputs, LAYER, self.cos_sin, *self.norms, EPS, out)
        return out

    def attention(self, num_sms: int, deterministic: bool = False) -> DecodeAttention:
        rows = len(self.rows) + 2
        return DecodeAttention(self.shape, max_rows=rows, num_sms=num_sms, device=self.device, deterministic=deterministic)


@pytest.mark.parametrize(("num_sms", "norm", "window"), [(1, False, None), (200, True, None), (200, False, 40)])
def test_rows_that_follow_one_another_see_each_other(
    num_sms: int, norm: bool, window: int | None, device: str, dtype: torch.dtype
) -> None:
    case = DraftedCase(Shape(sliding_window=window), device, dtype, norm=norm)
    out = case.attend(case.attention(num_sms), [*range(len(case.rows)), -1, -1], is_drafted=True)
    q_TH, k_TK, v_TK = case.shape.split(case.qkv)
    for i, (slot, position) in enumerate(case.rows):
        k_NKD, v_NKD = case.paged.read(LAYER, slot, position + 1)
        expected_k = turned(k_TK[i], case.norms[1], case.cos_sin[position])
        torch.testing.assert_close(k_NKD[position], expected_k, **tolerance(dtype))
        assert torch.equal(v_NKD[position], v_TK[i])
        expected = case.paged.attention(LAYER, slot, position, turned(q_TH[i], case.norms[0], case.cos_sin[position]))
        torch.testing.assert_close(out[i].double(), expected, **tolerance(dtype))
    assert out[-2:].isnan().all()


def test_deterministic_rows_are_the_same_drafted_and_one_by_one(device: str, dtype: torch.dtype) -> None:
    case = DraftedCase(Shape(), device, dtype, norm=True)
    attention = case.attention(40, deterministic=True)
    together = case.attend(attention, list(range(len(case.rows))), is_drafted=True)
    written = case.paged.k.clone(), case.paged.v.clone()
    alone = torch.cat([case.attend(attention, [i], is_drafted=False) for i in range(len(case.rows))])
    # A GPU's compiler may contract the same float32 expression in one kernel and not in the other. That is why guesses and
    # --deterministic exclude each other there.
    exact = {"rtol": 0.0, "atol": 1e-5 if device == "cuda" and dtype is torch.float32 else 0.0}
    torch.testing.assert_close(alone, together, **exact)
    for pages, before in zip((case.paged.k, case.paged.v), written, strict=True):
        torch.testing.assert_close(pages, before, equal_nan=True, **exact)
