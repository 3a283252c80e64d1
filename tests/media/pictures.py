"""Pictures as files, made for tests."""

import zlib
from io import BytesIO
from struct import pack
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, fromarray


def scene(height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """Red on the left, blue on the right, a green stripe at the top: no turn of it looks like another."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 250
    pixels[:, width // 2 :, 2] = 250
    pixels[: height // 4, :] = (0, 250, 0)
    return pixels


def image(pixels: NDArray[np.uint8] | None = None) -> Image:
    """The scene, or these pixels, as Pillow has it."""
    return fromarray(scene() if pixels is None else pixels)


def file_of(image: Image, format: str = "PNG", **options: Any) -> bytes:
    """An encoded file."""
    out = BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return pack(">I", len(data)) + name + data + pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and nothing else."""
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def exif(turn: int, order: str = "<", kind: int = 3) -> bytes:
    """An EXIF block, as files hold it behind its name, that says how the picture is turned."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    entry = pack(order + "HHIHH", 0x0112, kind, 1, turn, 0)
    return start + pack(order + "IH", 8, 1) + entry + pack(order + "I", 0)
