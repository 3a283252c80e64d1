"""Every implementation of the small ops and of paged attention against its formula, over a shared table of shapes."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from streamserve.cache.pool import KVPool
from streamserve.kernels import registry
from streamserve.kernels.ops import Batch, rope_angles
from streamserve.kernels.registry import Facts, Implementation


@dataclass(frozen=True)
class Shape:
    num_layers: int = 2
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 16
    sliding_window: int | None = None
    window_layers: frozenset[int] | None = None


def implementations(op: str) -> list[Any]:
    return [pytest.param(impl, id=impl.name) for impl in registry.load().found if impl.op == op]


def skip_if_refused(impl: Implementation, shape: Any, page_size: int = 16) -> None:
    reason = impl.refusal(Facts("cpu", "float32", shape, page_size, "float32", frozenset({"F32"})))
    if reason:
        pytest.skip(f"{impl.name}: {reason}")


@pytest.mark.parametrize("impl", implementations("norm.rms"))
@pytest.mark.parametrize("rows", [1, 7])
def test_rms_norm(impl: Implementation, rows: int) -> None:
    skip_if_refused(impl, Shape())
    x, weight = torch.randn(rows, 33) * 5, torch.randn(33)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(impl.run(x, weight, 1e-5), expected)


@pytest.mark.parametrize("impl", implementations("rope.apply"))
def test_rope_turns_pairs_by_position_times_frequency(impl: Implementation) -> None:
    skip_if_refused(impl, Shape())
    x, freq = torch.randn(3, 2, 8), [1.0, 0.5, 0.25, 0.125]
    positions = torch.tensor([0, 5, 100])
    got = impl.run(x, *rope_angles(positions, freq, 1.0, torch.float32))
    pairs = torch.view_as_complex(torch.stack((x[..., :4], x[..., 4:]), dim=-1))
    turned = pairs * torch.polar(torch.ones(3, 1, 4), (positions[:, None] * torch.tensor(freq))[:, None])
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), dim=-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", implementations("mlp.silu_mul"))
def test_silu_mul(impl: Implementation) -> None:
    skip_if_refused(impl, Shape())
    gate, up = torch.randn(3, 10), torch.randn(3, 10)
    torch.testing.assert_close(impl.run(torch.cat((gate, up), dim=1)), gate * gate.sigmoid() * up)


# (tokens already in KV, new tokens) of every row
BATCHES = {
    "one token": [(0, 1)],
    "one prompt": [(0, 37)],
    "full pages": [(16, 16), (31, 1), (15, 1)],
    "decode rows of many lengths": [(3, 1), (90, 1), (4, 1), (17, 1), (60, 1)],
    "a chunk behind a prefix": [(21, 9)],
    "all kinds": [(5, 1), (0, 20), (33, 7), (70, 1)],
}


@pytest.mark.parametrize("impl", implementations("attention.paged"))
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("shape", [Shape(), Shape(num_heads=3, num_kv_heads=3), Shape(sliding_window=10)])
def test_paged_attention(impl: Implementation, rows: list[tuple[int, int]], shape: Shape) -> None:
    skip_if_refused(impl, shape)
    pool = KVPool(shape, num_pages=40, page_size=16)
    pool.k.normal_(std=5)  # what other requests left behind
    pool.v.normal_(std=5)
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    full = [(torch.randn(old + new, kv_heads, dim), torch.randn(old + new, kv_heads, dim)) for old, new in rows]
    free = torch.randperm(40).tolist()
    tables = [[free.pop() for _ in range(-(-(old + new) // 16))] for old, new in rows]
    for (old, _), (k, v), pages in zip(rows, full, tables, strict=True):
        positions = torch.arange(old)
        pool.write(1, k[:old], v[:old], torch.tensor(pages)[positions // 16], positions % 16)
    ends = torch.tensor([new for _, new in rows]).cumsum(0).tolist()
    width = max(len(pages) for pages in tables)
    batch = Batch(
        token_ids_T=torch.zeros(ends[-1], dtype=torch.int64),
        positions_T=torch.cat([torch.arange(old, old + new) for old, new in rows]),
        row_start=[0, *ends],
        kv_len=[old + new for old, new in rows],
        page_table_BP=torch.tensor([pages + [0] * (width - len(pages)) for pages in tables], dtype=torch.int32),
        logit_rows_R=torch.tensor([0]),
        pool=pool,
    )
    q = torch.randn(ends[-1], heads, dim)
    new_k, new_v = (torch.cat([kv[i][old:] for (old, _), kv in zip(rows, full, strict=True)]) for i in (0, 1))
    attention = impl.run(shape)
    got = attention.attend(attention.prepare(batch), 1, q, new_k, new_v)
    expected = [
        attend(q[end - new : end], k, v, shape.sliding_window) for (_, new), end, (k, v) in zip(rows, ends, full, strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=1e-5)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Attention of the last positions of one row, spelled out."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,nhd->htn", q, k) / q.shape[2] ** 0.5
    distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    hidden = (distance < 0) | (distance >= window if window else False)
    return torch.einsum("htn,nhd->thd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
