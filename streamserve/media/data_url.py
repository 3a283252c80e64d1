"""data: URLs to bytes. Owns how they are read: strictly. Knows nothing of pictures, videos and sounds beyond the word in a media
type."""

import re
from binascii import Error, a2b_base64
from urllib.parse import unquote_to_bytes

from streamserve.errors import InvalidRequest
from streamserve.media.fetch import too_long

SCHEME = "data:"
MAX_HEAD = 256  # characters before the comma
PART = 1 << 16  # base64 digits, a multiple of four
_TYPES = re.compile(r"((image|video|audio)/[\w.+-]+|application/octet-stream|)", re.ASCII)
_BROKEN_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2})")


def bytes_of(url: str, max_bytes: int, param: str) -> bytes:
    """What a data: URL holds. Raises InvalidRequest, saying of `param` what is wrong. Not for the event loop: it may be long."""
    comma = url.find(",", len(SCHEME), len(SCHEME) + MAX_HEAD)
    if comma < 0:
        raise InvalidRequest(f"{param} is a data: URL without a comma before its data", param=param)
    kind, *options = [part.strip().lower() for part in url[len(SCHEME) : comma].split(";")]
    if not _TYPES.fullmatch(kind):
        raise InvalidRequest(
            f"{param} is a data: URL of type {kind[:60]!r}; allowed are image/…, video/… and audio/…", param=param
        )
    is_base64 = options[-1:] == ["base64"]
    # Checked before anything is copied: three escapes, or four digits for three bytes, are the most that a byte can take.
    if (len(url) - comma - 1) * (3 if is_base64 else 4) > max_bytes * (12 if "%" in url else 4):
        raise too_long(param, max_bytes)
    data: str | bytes = url[comma + 1 :]
    try:
        if "%" in url:
            if _BROKEN_ESCAPE.search(url, comma):
                raise InvalidRequest(f"{param} is a data: URL with a % that begins no escape", param=param)
            data = unquote_to_bytes(data)
        found = _of_base64(data) if is_base64 else data if isinstance(data, bytes) else data.encode("ascii")
    except Error as error:
        raise InvalidRequest(f"{param} is not valid base64: {str(error)[:80].lower()}", param=param) from None
    except ValueError:
        raise InvalidRequest(f"{param} is a data: URL with characters outside ASCII", param=param) from None
    if len(found) > max_bytes:
        raise too_long(param, max_bytes)
    return found


def _of_base64(data: str | bytes) -> bytes:
    """In parts: decoding holds the interpreter, 2.5 ms for half a megabyte, for which running answers would wait."""
    if data.find("=" if isinstance(data, str) else b"=", 0, -2) >= 0:  # type: ignore[arg-type]
        return a2b_base64(data, strict_mode=True)  # which says what is wrong: only the last part may be padded
    return b"".join([a2b_base64(data[at : at + PART], strict_mode=True) for at in range(0, len(data), PART)])
