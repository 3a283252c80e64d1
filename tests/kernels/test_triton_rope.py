"""Norm, rotation and page writes of prompt tokens against torch in float64."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from streamserve.kernels.impl.triton_rope import pick_angles, rope_table, write_prompt
from streamserve.kernels.ops import PromptRow, StepInputs, rope_angles

EPS = 1e-6
LAYER = 1


@dataclass(frozen=True)
class Shape:
    """What write_prompt reads of a NetworkShape."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def draw(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def step(shape: Shape, lens: list[tuple[int, int]], num_decode: int, *, page_size: int, dtype: torch.dtype, device: str) -> Any:
    """A step of decode rows and of prompt rows (start, tokens). Pages out of order; all of the pool holds NaN."""
    starts, total = [num_decode], num_decode
    positions, slots = [3] * num_decode, [0] * num_decode
    for row, (start, count) in enumerate(lens):
        total += count
        starts.append(total)
        positions += range(start, start + count)
        slots += [row + 1] * count
    pages = torch.randperm(40, generator=torch.Generator().manual_seed(1)).int().view(5, 8)
    kv = torch.full((3, 40, shape.num_kv_heads, page_size, shape.head_dim), float("nan"), dtype=dtype, device=device)
    # As in serving, all integers are slices of one buffer, at any address.
    ints = torch.tensor([7, *positions, *slots, *starts], dtype=torch.int32, device=device)
    return StepInputs(
        num_decode=num_decode,
        prompts=tuple(PromptRow(i + 1, starts[i], count, start) for i, (start, count) in enumerate(lens)),
        tokens_T=ints[1 : 1 + total],
        positions_T=ints[1 : 1 + total],
        slots_T=ints[1 + total : 1 + 2 * total],
        prompt_starts=ints[1 + 2 * total :],
        page_table_SP=pages.to(device),
        logit_rows_R=ints[:0],
        logit_slots_R=ints[:0],
        k=kv,
        v=kv.clone(),
    )


def expected(x_TKD: Tensor, norm_D: Tensor | None, table: Tensor, positions_T: Tensor) -> Tensor:
    """Norm and rotation in float64."""
    x = x_TKD.double()
    if norm_D is not None:
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS) * norm_D.double()
    cos, sin = (half.unsqueeze(1) for half in table.double()[positions_T.long()].chunk(2, dim=-1))
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Within three roundings of bfloat16, of elements up to about 10 that may cancel out."""
    is_short = found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2 if is_short else 1e-5, atol=6e-2 if is_short else 1e-5)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    ("shape", "page_size", "num_decode", "lens"),
    [
        (Shape(4, 2, 16), 4, 0, [(0, 1)]),
        (Shape(9, 3, 64), 16, 2, [(0, 17), (13, 5)]),
        (Shape(32, 8, 32), 4, 1, [(5, 4)]),  # 48 heads: three blocks, one of them keys and values only
        (Shape(0, 2, 16), 4, 0, [(0, 3), (2, 1)]),  # keys and values alone
        (Shape(3, 3, 96), 4, 0, [(2, 3)]),  # half a head is no power of two
    ],
)
def test_prompt_tokens_are_rotated_and_written(
    shape: Shape,
    page_size: int,
    num_decode: int,
    lens: list[tuple[int, int]],
    has_norm: bool,
    device: str,
    dtype: torch.dtype,
) -> None:
    inputs = step(shape, lens, num_decode, page_size=page_size, dtype=dtype, device=device)
    total, size = len(inputs.positions_T), shape.head_dim
    qkv = draw(total, (shape.num_heads + 2 * shape.num_kv_heads) * size, dtype=dtype, device=device)
    q_norm, k_norm = (draw(size, dtype=dtype, device=device) * scale if has_norm else None for scale in (1, 2))
    table = rope_table([10000 ** (-2 * i / size) for i in range(size // 2)], 1.25, 64, device)
    before = qkv.clone().view(total, -1, size)
    write_prompt(qkv, inputs, LAYER, table, q_norm, k_norm, EPS, shape)  # type: ignore[arg-type]

    after = qkv.view(total, -1, size)
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    assert after[:num_decode].equal(before[:num_decode])
    positions = inputs.positions_T[num_decode:]
    q, k, v = before[num_decode:].split([heads, kv_heads, kv_heads], dim=1)
    new_q, new_k, new_v = after[num_decode:].split([heads, kv_heads, kv_heads], dim=1)
    assert_close(new_q, expected(q, q_norm, table, positions))
    assert_close(new_k, expected(k, k_norm, table, positions))
    assert new_v.equal(v)

    pages = inputs.page_table_SP[inputs.slots_T[num_decode:].long(), positions.long() // page_size].long()
    offsets = positions.long() % page_size
    assert inputs.k[LAYER, pages, :, offsets].equal(new_k)
    assert inputs.v[LAYER, pages, :, offsets].equal(v)
    written = torch.zeros((*inputs.k.shape[:2], page_size), dtype=torch.bool, device=device)
    written[LAYER, pages, offsets] = True
    for kv in (inputs.k, inputs.v):  # nothing else was touched
        assert kv.isnan().all(dim=-1).equal(~written.unsqueeze(2).expand(kv.shape[:-1]))


def test_a_token_with_three_positions_is_turned_by_each_in_its_frequencies(device: str, dtype: torch.dtype) -> None:
    shape, size = Shape(4, 2, 16), 16
    inputs = step(shape, [(0, 5), (2, 3)], 1, page_size=4, dtype=dtype, device=device)
    table = rope_table([10000 ** (-2 * i / size) for i in range(size // 2)], 1.0, 64, device)
    axes = [0, 1, 2, 0, 1, 2, 2, 0]
    buffer = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(3)).int().to(device)
    rope_3T = buffer[:, :9]  # in a step's buffer lines are longer than the step
    angles_TD = pick_angles(table, rope_3T, torch.tensor(axes, dtype=torch.int32, device=device))
    halves = [table[rope_3T[axis].long()][:, (i, size // 2 + i)] for i, axis in enumerate(axes)]
    assert angles_TD.equal(torch.stack(halves, dim=2).flatten(1))

    qkv = draw(9, 8 * size, dtype=dtype, device=device)
    before = qkv.clone().view(9, -1, size)
    write_prompt(qkv, replace(inputs, rope_3T=rope_3T), LAYER, angles_TD, None, None, EPS, shape)  # type: ignore[arg-type]
    turned = qkv.view(9, -1, size)[1:, :6]
    assert_close(turned, expected(before[1:, :6], None, angles_TD, torch.arange(1, 9)))
    positions = inputs.positions_T[1:].long()
    pages = inputs.page_table_SP[inputs.slots_T[1:].long(), positions // 4].long()
    assert inputs.k[LAYER, pages, :, positions % 4].equal(turned[:, 4:])  # pages know the places alone


def test_a_surplus_row_writes_no_page(device: str, dtype: torch.dtype) -> None:
    shape = Shape(2, 1, 16)
    inputs = step(shape, [(0, 3)], 0, page_size=4, dtype=dtype, device=device)
    inputs.slots_T[1] = -1
    qkv = draw(3, 4 * 16, dtype=dtype, device=device)
    table = rope_table([1.0] * 8, 1.0, 8, device)
    write_prompt(qkv, inputs, LAYER, table, None, None, EPS, shape)  # type: ignore[arg-type]
    assert int((~inputs.k.isnan()).sum()) == int((~inputs.v.isnan()).sum()) == 2 * 16


def test_the_table_holds_the_angles_of_the_reference(device: str) -> None:
    inv_freq = [500000 ** (-i / 32) for i in range(32)]
    table = rope_table(inv_freq, 0.75, 5000, device)
    cos, sin = rope_angles(torch.arange(5000, device=device), inv_freq, 0.75, torch.float32)
    assert table.shape == (5000, 64)
    torch.testing.assert_close(table, torch.cat((cos[:, :32], sin[:, :32]), dim=1), rtol=1e-6, atol=1e-6)
