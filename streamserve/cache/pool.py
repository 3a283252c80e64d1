"""KV memory: the tensors that hold keys and values, page by page.

Owns the layout. Knows nothing of who holds a page (cache/pages.py) or of tokens.

    k [L, pages, K, D, S]   keys lie transposed inside a page: the S tokens of a page are contiguous per dimension,
    v [L, pages, K, S, D]   so both q.k over tokens and p.v over dimensions are contiguous vector loops on a CPU.

L layers, K key/value heads, D head size, S tokens per page.
"""

from collections.abc import Iterable
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class KVShape(Protocol):
    """The numbers that fix the size of a page; models.spec.ModelSpec has them."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros whose memory the system hands out page by page on first use: numpy asks for it so, torch clears it all at once."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    flat = np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(flat).view(dtype).view(shape)


class KVPool:
    """Keys and values of `num_pages` pages in every layer. Implements kernels.ops.KVPages."""

    __slots__ = ("k", "num_pages", "page_size", "v")

    def __init__(
        self,
        shape: KVShape,
        *,
        num_pages: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        layers, heads, dim = shape.num_layers, shape.num_kv_heads, shape.head_dim
        self.num_pages = num_pages
        self.page_size = page_size
        # Zeroed once: a masked position must never hold NaN, because 0 * NaN would reach the output.
        self.k = _zeros((layers, num_pages, heads, dim, page_size), dtype, device)
        self.v = _zeros((layers, num_pages, heads, page_size, dim), dtype, device)

    @classmethod
    def bytes_per_page(cls, shape: KVShape, dtype: torch.dtype, page_size: int = 16) -> int:
        """Memory of one page over all layers, keys and values."""
        return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * page_size * dtype.itemsize

    def write(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, pages_T: Tensor, offsets_T: Tensor) -> None:
        """Store one key and value per token at `offsets_T` inside `pages_T`."""
        self.k[layer][pages_T, :, :, offsets_T] = k_TKD.to(self.k.dtype)
        self.v[layer][pages_T, :, offsets_T] = v_TKD.to(self.v.dtype)

    def reader(self, page_table_BP: Tensor) -> "PageReader":
        """Reads these pages, layer after layer."""
        return PageReader(self, page_table_BP)

    def copy_pages(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy page src to page dst in every layer, for each (src, dst), in order."""
        for src, dst in pairs:
            self.k[:, dst] = self.k[:, src]
            self.v[:, dst] = self.v[:, src]

    def arrays(self) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
        """Keys and values as numpy views of the same memory, for kernels that take arrays. CPU pools only."""
        return self.k.numpy(), self.v.numpy()


class DevicePool:
    """Keys and values in a GPU's memory: k, v [L, pages, K, S, D]. What one head keeps of a page is contiguous: 4 KiB at
    S = 16, D = 128, 16 bits."""

    __slots__ = ("k", "num_pages", "page_size", "v")

    def __init__(self, shape: KVShape, *, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        size = (shape.num_layers, num_pages, shape.num_kv_heads, page_size, shape.head_dim)
        self.num_pages = num_pages
        self.page_size = page_size
        # Zeroed once: a masked position must never hold NaN, because 0 * NaN would reach the output.
        self.k = torch.zeros(size, dtype=dtype, device=device)
        self.v = torch.zeros(size, dtype=dtype, device=device)

    def copy_pages(self, src_N: Tensor, dst_N: Tensor) -> None:
        """Copy pages src to pages dst in every layer, all at once: no page may be in both. int32 on the device."""
        src, dst = src_N.long(), dst_N.long()
        for pages in (self.k, self.v):
            pages.index_copy_(1, dst, pages.index_select(1, src))


class PageReader:
    """Copies the pages of a table out of one layer at a time. What it returns is overwritten by its next read.

    One pair of buffers serves all layers: fresh memory for every layer costs more than the copy (5 ms instead of 2 for
    11 MB, in page faults).
    """

    __slots__ = ("_k", "_pages", "_pool", "_table_shape", "_v")

    def __init__(self, pool: KVPool, page_table_BP: Tensor) -> None:
        self._pool = pool
        self._table_shape = page_table_BP.shape
        self._pages = page_table_BP.reshape(-1)
        self._k = torch.empty(len(self._pages), *pool.k.shape[2:], dtype=pool.k.dtype, device=pool.k.device)
        self._v = torch.empty(len(self._pages), *pool.v.shape[2:], dtype=pool.v.dtype, device=pool.v.device)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [B, P, K, D, S] and values [B, P, K, S, D]."""
        torch.index_select(self._pool.k[layer], 0, self._pages, out=self._k)
        torch.index_select(self._pool.v[layer], 0, self._pages, out=self._v)
        return self._k.unflatten(0, self._table_shape), self._v.unflatten(0, self._table_shape)  # type: ignore[no-untyped-call]
