"""Weights from a file to a device: threads read pieces into pinned memory, from where they are copied in order.

Owns the pinned slots and the reading threads. Knows where bytes lie in a file, no file format and no network. No tensor is
made on the CPU, and a type is changed on the device: the page cache and the bus set the speed.
"""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.kernels.devices.device import Device, Event

SLOT_BYTES = 8 << 20
MIN_PIECE_BYTES = 1 << 20  # less is not worth a thread
MAX_THREADS = 8


@dataclass(slots=True)
class _Slot:
    bytes: Tensor  # uint8
    copied: Event  # behind the last copy out of it


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a tensor, on its way: `first` and `count` in numbers of the tensor."""

    slot: _Slot
    first: int
    count: int
    read: "Future[None]"


class Staging:
    """Fills tensors from files. Calls come from one thread."""

    def __init__(self, device: Device, *, slot_bytes: int = SLOT_BYTES, threads: int | None = None) -> None:
        assert slot_bytes % 8 == 0
        self._device = device
        self._threads = threads or min(MAX_THREADS, os.cpu_count() or 1)
        self._readers = ThreadPoolExecutor(self._threads, "weights-read")
        # Twice as many slots as readers: half are filled while the other half is copied.
        self._slots = [_Slot(device.pinned((slot_bytes,), torch.uint8), device.event()) for _ in range(2 * self._threads)]
        self._next = 0

    def load(self, file: int, offset: int, kind: torch.dtype, out: Tensor) -> None:
        """Fill `out` with as many numbers of type `kind` as it holds, from `offset` of an open file descriptor. Returns when
        all is read; the last copies may be under way, in stream order. Raises CheckpointError."""
        target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        numbers, size = target.view(-1), kind.itemsize
        wanted = -(-prod(out.shape) * size // self._threads)
        step = min(self._slots[0].bytes.numel(), max(MIN_PIECE_BYTES, wanted)) // size
        pieces: deque[_Piece] = deque()
        try:
            for first in range(0, numbers.numel(), step):
                if len(pieces) == len(self._slots):
                    _copy(pieces.popleft(), kind, numbers)
                count = min(step, numbers.numel() - first)
                slot = self._slots[self._next]
                self._next = (self._next + 1) % len(self._slots)
                slot.copied.synchronize()
                read = self._readers.submit(_read, file, offset + first * size, slot.bytes[: count * size])
                pieces.append(_Piece(slot, first, count, read))
            while pieces:
                _copy(pieces.popleft(), kind, numbers)
        finally:
            for piece in pieces:  # after an error: no thread may go on writing into a slot
                piece.read.exception()
        if target is not out:
            out.copy_(target)

    def close(self) -> None:
        """Wait until all that was loaded lies in its place, and end the threads; the slots go with this object."""
        self._readers.shutdown()
        self._device.synchronize()


def _copy(piece: _Piece, kind: torch.dtype, numbers: Tensor) -> None:
    piece.read.result()
    held = piece.slot.bytes[: piece.count * kind.itemsize].view(kind)
    part = numbers[piece.first : piece.first + piece.count]
    # torch would change the type on the CPU, in this thread: bring the bytes over as they are first.
    part.copy_(held if part.dtype == kind else held.to(part.device, non_blocking=True), non_blocking=True)
    piece.slot.copied.record()


def _read(file: int, offset: int, into: Tensor) -> None:
    """All of `into` (uint8) from `offset` on; the GIL is free meanwhile."""
    view = into.numpy().data
    while view:
        num_bytes = os.preadv(file, [view], offset)
        if num_bytes == 0:
            raise CheckpointError("a weights file ends before its last tensor: download it again")
        view, offset = view[num_bytes:], offset + num_bytes
