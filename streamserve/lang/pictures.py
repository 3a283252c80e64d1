"""A program's picture as a URL that a server takes. Owns how paths, bytes and open pictures become data: URLs; decodes none."""

import io
from base64 import b64encode
from os import PathLike, fspath
from pathlib import Path
from typing import Any

_SIGNATURES = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"), (b"BM", "bmp"))
_READY = ("data:", "http://", "https://")


def check_picture(source: Any) -> None:
    """Raises TypeError for what cannot be one."""
    if not isinstance(source, str | PathLike | bytes | bytearray | memoryview) and not callable(getattr(source, "save", None)):
        raise TypeError(
            f"a picture is {type(source).__name__}; allowed are a path, a file's bytes, an open picture and a data: or http URL"
        )


def url_of(source: Any) -> str:
    """A picture, checked, as a URL; what is one already stays as it is. Reads files: runs in a worker thread."""
    if isinstance(source, str) and source.startswith(_READY):
        return source
    if isinstance(source, str | PathLike):
        data = Path(fspath(source)).expanduser().read_bytes()
    elif isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    else:  # an open picture, as pillow's
        file = io.BytesIO()
        source.save(file, format="PNG")
        data = file.getvalue()
    return f"data:image/{_kind_of(data)};base64,{b64encode(data).decode()}"


def _kind_of(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((kind for signature, kind in _SIGNATURES if data.startswith(signature)), "png")
