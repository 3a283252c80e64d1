"""KV memory: what is written is gathered back; copies take whole pages; sizes are as planned."""

from types import SimpleNamespace

import pytest
import torch

from streamserve.cache.pool import KVPool

SHAPE = SimpleNamespace(num_layers=2, num_kv_heads=3, head_dim=5)


def filled(dtype: torch.dtype = torch.float32) -> tuple[KVPool, torch.Tensor, torch.Tensor]:
    """A pool of pages of 4 with 10 tokens in pages 5, 1, 3 of layer 1."""
    pool = KVPool(SHAPE, num_pages=6, page_size=4, dtype=dtype)
    k, v = torch.randn(10, 3, 5), torch.randn(10, 3, 5)
    positions = torch.arange(10)
    pool.write(1, k, v, torch.tensor([5, 1, 3])[positions // 4], positions % 4)
    return pool, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tokens_are_gathered_as_they_were_written(dtype: torch.dtype) -> None:
    pool, k, v = filled(dtype)
    reader = pool.reader(torch.tensor([[5, 1, 3], [3, 5, 1]], dtype=torch.int32))
    got_k, got_v = reader.read(1)
    assert got_k.shape == (2, 3, 3, 5, 4)
    assert got_v.shape == (2, 3, 3, 4, 5)
    k_THD, v_THD = got_k.permute(0, 1, 4, 2, 3).flatten(1, 2), got_v.transpose(2, 3).flatten(1, 2)
    torch.testing.assert_close(k_THD[0, :10], k.to(dtype))
    torch.testing.assert_close(v_THD[0, :10], v.to(dtype))
    torch.testing.assert_close(k_THD[1, 4:8], k[:4].to(dtype))
    assert not any(x.any() for x in reader.read(0))


def test_copied_pages_are_equal_in_every_layer_and_then_apart() -> None:
    pool, _, _ = filled()
    pool.v[0, 5] = 7.0
    before = pool.k.clone(), pool.v.clone()
    pool.copy_pages([(5, 0), (0, 2)])
    for kept, now in zip(before, (pool.k, pool.v), strict=True):
        assert torch.equal(now[:, 0], kept[:, 5]) and torch.equal(now[:, 2], kept[:, 5])
        assert torch.equal(now[:, [1, 3, 4, 5]], kept[:, [1, 3, 4, 5]])
    pool.k[:, 5] = 9.0
    assert torch.equal(pool.k[:, 0], before[0][:, 5])


def test_planned_bytes_are_the_bytes_held() -> None:
    pool = KVPool(SHAPE, num_pages=6, page_size=4, dtype=torch.float16)
    assert 6 * KVPool.bytes_per_page(SHAPE, torch.float16, 4) == pool.k.nbytes + pool.v.nbytes


def test_arrays_are_the_same_memory() -> None:
    pool, _, _ = filled()
    k, v = pool.arrays()
    k[0, 2, 1, 4, 3] = 11.0
    v[1, 2, 1, 3, 4] = 12.0
    assert pool.k[0, 2, 1, 4, 3] == 11.0
    assert pool.v[1, 2, 1, 3, 4] == 12.0
