"""Pictures for tests of the API: files, URLs of them, and a family that counts what it prepares."""

import struct
import zlib
from base64 import b64encode
from typing import Any

from streamserve.media.family import Prepared
from streamserve.media.fixed import FixedFamily
from streamserve.media.picture import Picture


def png(red: int = 200, green: int = 30, blue: int = 30, *, width: int = 6, height: int = 4) -> bytes:
    """A file of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes((red, green, blue)) * width) * height
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def data_url(file: bytes) -> str:
    """The file as a URL."""
    return "data:image/png;base64," + b64encode(file).decode()


RED, BLUE = png(), png(20, 20, 220)
RED_URL, BLUE_URL = data_url(RED), data_url(BLUE)


def shown(url: str = RED_URL, **more: Any) -> dict[str, Any]:
    """A part of a chat's message."""
    return {"type": "image_url", "image_url": {"url": url, **more}}


def said(text: str) -> dict[str, Any]:
    """A part of a chat's message."""
    return {"type": "text", "text": text}


class CountingFamily(FixedFamily):
    """`prepared`: digests of the pictures that went through it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.prepared: list[bytes] = []

    def prepare(self, picture: Picture) -> Prepared:
        self.prepared.append(picture.digest)
        return super().prepare(picture)
