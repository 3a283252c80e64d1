"""Repacks quantised matrices of a GGUF file into blocks of 16 channels (layouts: numba_tiles.py), in one arena of memory.

Q4_1 and Q4_0 keep their bits: a group's bytes are only reordered. Q8_0 too. Every other kind becomes Q8_0, whose rounding
(1/254 of a group's largest weight) is well below that of the kinds it replaces. Owns the arena; knows no network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamserve.kernels.impl.numba_tiles import BLOCK, Q4_BYTES, Q8_BYTES

Bytes = NDArray[np.uint8]
GROUP = 32
BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A packed matrix in the arena."""

    address: int
    bits: int  # 4 or 8
    channels: int
    groups: int  # of inputs

    @property
    def num_bytes(self) -> int:
        return matrix_bytes(self.bits, self.channels, self.groups)


def matrix_bytes(bits: int, channels: int, groups: int) -> int:
    return channels // BLOCK * groups * (Q4_BYTES if bits == 4 else Q8_BYTES)


def aligned_bytes(num_bytes: int) -> Bytes:
    """Zeroed memory that begins at a cache line."""
    raw = np.zeros(num_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + num_bytes]


class Arena:
    """Memory of all matrices, filled from the front."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = aligned_bytes(num_bytes)
        self._used = 0

    def place(self, packed: "NDArray[Any]", bits: int, channels: int, groups: int) -> Matrix:
        matrix = Matrix(self.memory.ctypes.data + self._used, bits, channels, groups)
        end = self._used + matrix.num_bytes
        self.memory[self._used : end] = packed.reshape(-1).view(np.uint8)
        self._used = end
        return matrix

    def view(self, matrix: Matrix) -> Bytes:
        """The bytes of a matrix."""
        start = matrix.address - self.memory.ctypes.data
        return self.memory[start : start + matrix.num_bytes]


def pack_rows(kind: str, rows: Bytes) -> "NDArray[np.uint16]":
    """Rows of ggml groups as blocks: [channels / 16, groups, uint16], padded to whole blocks."""
    missing = -len(rows) % BLOCK
    if missing:
        rows = np.concatenate((rows, np.zeros((missing, rows.shape[1]), np.uint8)))
    return {"Q4_0": _pack_q4_0, "Q4_1": _pack_q4_1, "Q8_0": _pack_q8_0}[kind](np.ascontiguousarray(rows))


def _pack_q4_1(rows: Bytes) -> "NDArray[np.uint16]":
    """ggml: f16 d, f16 m, 16 bytes with input i in the low and i + 16 in the high nibble: the same pairs as ours."""
    words = rows.view(np.uint32).reshape(len(rows) // BLOCK, BLOCK, -1, 5)
    blocks, groups = words.shape[0], words.shape[2]
    out = np.empty((blocks, groups, Q4_BYTES // 2), np.uint16)
    out[..., : 8 * BLOCK].view(np.uint32).reshape(blocks, groups, 4, BLOCK)[...] = words[..., 1:].transpose(0, 2, 3, 1)
    scales = np.ascontiguousarray(words[..., 0].transpose(0, 2, 1)).view(np.uint16).reshape(blocks, groups, BLOCK, 2)
    out[..., 8 * BLOCK :].reshape(blocks, groups, 2, BLOCK)[...] = scales.swapaxes(2, 3)
    return out


def _pack_q4_0(rows: Bytes) -> "NDArray[np.uint16]":
    """ggml: f16 d, then nibbles as in Q4_1, meaning d * (q - 8)."""
    words = rows.view(np.uint16).reshape(len(rows), -1, 9)
    out = np.empty((*words.shape[:2], 10), np.uint16)
    out[..., 0] = words[..., 0]
    out[..., 1] = (words[..., 0].view(np.float16) * np.float16(-8)).view(np.uint16)
    out[..., 2:] = words[..., 1:]
    return _pack_q4_1(out.reshape(len(rows), -1).view(np.uint8))


def _pack_q8_0(rows: Bytes) -> "NDArray[np.uint16]":
    """ggml: f16 d, then 32 x int8."""
    words = rows.view(np.uint16).reshape(len(rows) // BLOCK, BLOCK, -1, 17)
    out = np.empty((words.shape[0], words.shape[2], 17, BLOCK), np.uint16)
    out[:, :, :16] = words[..., 1:].transpose(0, 2, 3, 1)
    out[:, :, 16] = words[..., 0].transpose(0, 2, 1)
    return out.reshape(*out.shape[:2], -1)


def unpack_q8_0(packed: Bytes, groups: int, rows: "NDArray[np.int64]") -> "NDArray[np.float32]":
    """Some rows of an 8-bit matrix that was packed, as floats: the numbers that products with it see."""
    words = packed.view(np.uint16).reshape(-1, groups, 17, BLOCK)[rows // BLOCK, :, :, rows % BLOCK]
    whole, scale = np.ascontiguousarray(words[..., :16]).view(np.int8), words[..., 16:].view(np.float16)
    return np.multiply(whole, scale, dtype=np.float32).reshape(len(rows), -1)


def quantise_q8_0(weight: "NDArray[np.float32]") -> Bytes:
    """Rows of ggml's Q8_0 groups from floats."""
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = (np.abs(groups).max(-1, keepdims=True) / 127).astype(np.float16)
    wide = scale.astype(np.float32)
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide > 0)
    whole = np.clip(np.rint(groups * inverse), -127, 127).astype(np.int8)
    joined = np.concatenate((scale.view(np.uint8), whole.view(np.uint8)), axis=-1)
    return joined.reshape(len(weight), -1)


def interleave(parts: Sequence["NDArray[np.uint16]"], blocks: int) -> "NDArray[np.uint16]":
    """Matrices of equal size, `blocks` blocks of each in turn."""
    split = [part.reshape(-1, blocks, *part.shape[1:]) for part in parts]
    return np.stack(split, axis=1).reshape(-1, *parts[0].shape[1:])
