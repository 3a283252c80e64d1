"""Requests in paged KV memory for tests of attention, and what attention over them is, in float64.

Pages are handed out in random order; whatever is not a token of a request is NaN, so that a kernel which lets it in shows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from streamserve.kernels.ops import PromptRow, StepInputs


@dataclass(frozen=True)
class Shape:
    """What attention kernels look at of kernels.ops.NetworkShape."""

    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    sliding_window: int | None = None
    num_layers: int = 2
    window_layers: frozenset[int] | None = None

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def split(self, qkv_TJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, H, D], [T, K, D], [T, K, D]"""
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = qkv_TJ.unflatten(1, (-1, self.head_dim)).split(sizes, dim=1)
        return q, k, v


class Paged:
    """Slot b holds kv_lens[b] tokens of random keys and values in every layer, and pages for `room` more."""

    def __init__(
        self,
        shape: Shape,
        kv_lens: list[int],
        *,
        room: int,
        device: str,
        dtype: torch.dtype,
        page_size: int = 16,
    ) -> None:
        self.shape = shape
        self.page_size = page_size
        counts = [-(-(length + room) // page_size) for length in kv_lens]
        pages = torch.randperm(sum(counts) + 3)[: sum(counts)].int()
        size = (shape.num_layers, sum(counts) + 3, shape.num_kv_heads, page_size, shape.head_dim)
        self.k = torch.full(size, float("nan"), device=device, dtype=dtype)
        self.v = torch.full(size, float("nan"), device=device, dtype=dtype)
        self.table = torch.full((len(kv_lens), max(counts) + 1), 10**6, dtype=torch.int32)
        at = 0
        for slot, count in enumerate(counts):
            self.table[slot, :count] = pages[at : at + count]
            at += count
        self._places = self.table  # on the host: launches of index arithmetic are what a sanitizer is slow at
        self.table = self.table.to(device)
        for layer in range(shape.num_layers):
            for slot, length in enumerate(kv_lens):
                new = torch.randn(2, length, shape.num_kv_heads, shape.head_dim, device=device).to(dtype)
                self.write(layer, slot, 0, new[0], new[1])

    def _where(self, slot: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, end)
        return self._places[slot, positions // self.page_size].long(), positions % self.page_size

    def write(self, layer: int, slot: int, start: int, k_NKD: Tensor, v_NKD: Tensor) -> None:
        """Tokens from `start` on, as kernels.impl.triton_rope.write_prompt leaves them."""
        pages, offsets = self._where(slot, start, start + len(k_NKD))
        self.k[layer][pages, :, offsets] = k_NKD
        self.v[layer][pages, :, offsets] = v_NKD

    def share(self, leader: int, slot: int, num_pages: int) -> None:
        """The slot's first pages are the leader's from now on; what it had there itself is gone."""
        old = self._places[slot, :num_pages].clone().long()
        self._places[slot, :num_pages] = self._places[leader, :num_pages]
        self.table.copy_(self._places)
        self.k[:, old] = self.v[:, old] = float("nan")

    def read(self, layer: int, slot: int, end: int) -> tuple[Tensor, Tensor]:
        """[N, K, D] each, for tokens 0 .. end - 1."""
        pages, offsets = self._where(slot, 0, end)
        return self.k[layer][pages, :, offsets], self.v[layer][pages, :, offsets]

    def attention(self, layer: int, slot: int, position: int, q_HD: Tensor) -> Tensor:
        """What the query at `position` sees, [X], float64; computed on the host."""
        pages, offsets = self._where(slot, 0, position + 1)
        k_NKD, v_NKD = (x[layer].cpu()[pages, :, offsets].double() for x in (self.k, self.v))
        first = 0 if self.shape.sliding_window is None else max(position + 1 - self.shape.sliding_window, 0)
        group = self.shape.num_heads // self.shape.num_kv_heads
        q_KGD = q_HD.cpu().double().unflatten(0, (-1, group))
        scores_KGN = torch.einsum("kgd,nkd->kgn", q_KGD, k_NKD[first:]) * self.shape.head_dim**-0.5
        return torch.einsum("kgn,nkd->kgd", scores_KGN.softmax(-1), v_NKD[first:]).flatten().to(q_HD.device)

    def inputs(self, decode: list[tuple[int, int]], prompts: list[tuple[int, int, int]] | None = None) -> StepInputs:
        """A step. decode: (slot, position); prompts: (slot, start, num_tokens)."""
        rows, starts, slots = [], [len(decode)], [slot for slot, _ in decode]
        positions = [position for _, position in decode]
        for slot, start, count in prompts or []:
            rows.append(PromptRow(slot=slot, first=starts[-1], num_tokens=count, start=start))
            starts.append(starts[-1] + count)
            slots += [slot] * count
            positions += range(start, start + count)

        def ints(values: list[int]) -> Tensor:
            # A view that starts in the middle of a buffer, as a step's integers do.
            return torch.tensor([0, *values], dtype=torch.int32, device=self.table.device)[1:]

        return StepInputs(
            num_decode=len(decode),
            prompts=tuple(rows),
            tokens_T=ints([0] * len(slots)),
            positions_T=ints(positions),
            slots_T=ints(slots),
            prompt_starts=ints(starts),
            page_table_SP=self.table,
            logit_rows_R=ints([]),
            logit_slots_R=ints([]),
            k=self.k,
            v=self.v,
        )


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """For values of about 1."""
    return {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 2e-5, "rtol": 2e-5}
