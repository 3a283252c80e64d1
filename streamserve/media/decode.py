"""Bytes of a file to an upright RGB picture, by decoders that are named here and within limits that hold before they run.

Owns the formats, the limits on sizes, and what each refusal says. Knows nothing of where the bytes come from.

A header may promise anything: what a picture would take is computed from it before memory is taken. Pillow is used without its
registry of formats and its global settings, some of which start programs or print warnings: one decoder reads one format,
and of a file's metadata only what says how it is turned is read, here.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import Image, fromarray
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from streamserve.errors import InvalidRequest
from streamserve.media.picture import Picture

MEGAPIXELS = 1 << 20
MAX_SIDE = 32_768
MAX_RATIO = 200  # of the longer side to the shorter: beyond it no model sees anything
KEPT_PIXELS, KEPT_SIDE = 16 * MEGAPIXELS, 8_192  # what a picture has at most: no model takes more; larger ones are made smaller
MAX_SCANNED = 640 * MEGAPIXELS  # pixels of a JPEG times its scans, of which a progressive one has about ten
MAX_PARTS = 65_536  # chunks, segments, blocks: walking them is Python's work
STRIP_PIXELS = 1 << 20  # converted at once
TURN_TAG = 0x0112  # EXIF's Orientation


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself. `max_pixels`: of its kind some 250 MiB of memory are enough for so many. `turn`: EXIF's
    orientation, 1 to 8."""

    width: int
    height: int
    max_pixels: int = 32 * MEGAPIXELS
    turn: int = 1

    @property
    def num_pixels(self) -> int:
        """How large it is."""
        return self.width * self.height


@dataclass(frozen=True, slots=True)
class Format:
    """A format that is read. `header` raises struct.error, IndexError or ValueError where the file is broken. `bare` leaves out
    what makes no pixels: texts, profiles and the like could be made to take long, or to unpack to more than they say."""

    name: str
    open: Callable[[BytesIO], ImageFile]
    header: Callable[[bytes], Header]
    bare: Callable[[bytes], bytes] = bytes


def decode(data: bytes, param: str) -> Picture:
    """The picture in `data`. Raises InvalidRequest, saying of `param` what is wrong."""
    found = _format_of(data, param)
    header = _checked_header(data, found, param)
    try:
        image = found.open(BytesIO(found.bare(data)))
        if image.size != (header.width, header.height):
            raise ValueError
        if (factor := _factor(image.width, image.height)) > 1:
            image.draft(None, (image.width // factor, image.height // factor))  # a JPEG is made smaller while it is decoded
        image.load()
        pixels = _rgb(image, _factor(image.width, image.height))
    except Exception as error:  # whatever Pillow raises on a broken file: OSError, SyntaxError, EOFError, IndexError, …
        raise InvalidRequest(f"{param} is a {found.name} file that is broken or cut off; {_reason(error)}", param=param) from None
    return Picture(_upright(pixels, header.turn), sha256(data).digest())


def num_pixels_of(data: bytes, param: str) -> int:
    """How many pixels decoding has to do with. Raises InvalidRequest where decode() would refuse by the header."""
    return _checked_header(data, _format_of(data, param), param).num_pixels


def _checked_header(data: bytes, found: Format, param: str) -> Header:
    try:
        header = found.header(data)
    except (struct.error, IndexError, ValueError) as error:
        why = str(error) if type(error) is ValueError else "its header is cut off"
        raise InvalidRequest(f"{param} is a {found.name} file that cannot be read: {why}", param=param) from None
    _check_size(header, found, param)
    return header


def _check_size(header: Header, found: Format, param: str) -> None:
    width, height = header.width, header.height
    shown = f"{param} is a {found.name} file of {width} x {height} pixels"
    if not (width and height):
        raise InvalidRequest(f"{shown}; at least 1 x 1 is needed", param=param)
    if header.num_pixels > header.max_pixels:
        raise InvalidRequest(f"{shown}; at most {header.max_pixels} in all are taken, send it smaller", param=param)
    if max(width, height) > MAX_SIDE:
        raise InvalidRequest(f"{shown}; a side may have at most {MAX_SIDE}", param=param)
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InvalidRequest(f"{shown}; the longer side may have at most {MAX_RATIO} times as many as the other", param=param)


def _reason(error: Exception) -> str:
    """In words of ours: Pillow's may quote the file, which whoever named its URL may not be meant to read."""
    ends = isinstance(error, (struct.error, IndexError, EOFError)) or "runcated" in str(error) or "unpack" in str(error)
    return "it ends too soon" if ends else "its data make no picture"


# ---- which format ----------------------------------------------------------------------------------------------------


def _format_of(data: bytes, param: str) -> Format:
    for magic, found in FORMATS:
        if data.startswith(magic) and (found is not WEBP or data[8:12] == b"WEBP"):
            return found
    allowed = "allowed are PNG, JPEG, WebP, GIF and BMP"
    if not data:
        raise InvalidRequest(f"{param} is empty; {allowed}", param=param)
    raise InvalidRequest(f"{param} is {_name_of(data)}; {allowed}", param=param)


def _name_of(data: bytes) -> str:
    """What a file that is not read is."""
    for magic, name in OTHERS:
        if data.startswith(magic):
            return f"a file of type {name}"
    if data[4:8] == b"ftyp":
        return f"a file of type {BRANDS.get(data[8:12], 'MP4')}"
    beginning = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if beginning.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in beginning:
        return "an SVG file"
    if beginning.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<!--")):
        return "an HTML page"
    return "no picture file that is known here"


OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\1\0", "ICO"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"PK\3\4", "ZIP"),
    (b"\x1f\x8b", "gzip"),
)
BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}


# ---- headers ---------------------------------------------------------------------------------------------------------

_TOO_MANY = f"it has more than {MAX_PARTS} parts"
_NO_SIZE = "it does not say how large it is"


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each chunk, its length and check sum included; the last may be cut off."""
    start = 8
    for _ in range(MAX_PARTS):
        if start + 8 > len(data):
            return
        length, name = struct.unpack_from(">I4s", data, start)
        yield name, start, min(start + 12 + length, len(data))
        start += 12 + length
    raise ValueError(_TOO_MANY)


def _png_header(data: bytes) -> Header:
    name, width, height = struct.unpack_from(">4sII", data, 12)
    if name != b"IHDR":
        raise ValueError(_NO_SIZE)
    turn = next((_turn(data[start + 8 : end - 4]) for name, start, end in _png_chunks(data) if name == b"eXIf"), 1)
    return Header(width, height, turn=turn)


def _bare_png(data: bytes) -> bytes:
    kept = [data[start:end] for name, start, end in _png_chunks(data) if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")]
    return b"".join([data[:8], *kept])


_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # between these stand pixels, or nothing that means anything
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of segments that say how large a JPEG is
_SCAN, _END = 0xDA, 0xD9
_LEFT_OUT = frozenset(range(0xE1, 0xF0)) - {0xEE} | {0xFE}  # metadata; the others say what colours are meant


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment; behind a scan's stand its pixels."""
    start = 2
    for _ in range(MAX_PARTS):
        found = _JPEG_MARKER.search(data, start)
        if found is None:
            return
        start, marker = found.start(), data[found.start() + 1]
        length = 0 if marker in (0x01, 0xD8, _END) else struct.unpack_from(">H", data, start + 2)[0]
        yield marker, start, start + 2 + length
        if marker == _END:
            return
        start += 2 + length
    raise ValueError(_TOO_MANY)


def _jpeg_header(data: bytes) -> Header:
    size, turn, num_scans = None, 1, 0
    for marker, start, end in _jpeg_segments(data):
        if marker in _FRAMES and size is None:
            size = struct.unpack_from(">HH", data, start + 5)
        elif marker == _SCAN:
            num_scans += 1
        elif marker == 0xE1 and turn == 1 and data[start + 4 : start + 10] == b"Exif\0\0":
            turn = _turn(data[start + 10 : end])
    if size is None:
        raise ValueError(_NO_SIZE)
    height, width = size
    most = 64 if num_scans == 1 else 32  # of several scans all is held until the last
    return Header(width, height, min(most * MEGAPIXELS, MAX_SCANNED // max(1, num_scans)), turn)


def _bare_jpeg(data: bytes) -> bytes:
    kept = [data[:2]]
    for marker, start, end in _jpeg_segments(data):
        if marker == _SCAN:
            kept.append(data[start:])
            break
        if marker not in _LEFT_OUT:
            kept.append(data[start:end])
    return b"".join(kept)


def _webp_header(data: bytes) -> Header:
    kind, most = data[12:16], 16 * MEGAPIXELS  # the decoder holds a picture four times
    if kind == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
        width, height = (high_width << 16 | low_width) + 1, (high_height << 16 | low_height) + 1
        return Header(width, height, most, _turn(_riff_chunk(data, b"EXIF").removeprefix(b"Exif\0\0")))
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, most)
    if kind != b"VP8 ":
        raise ValueError(_NO_SIZE)
    width, height = struct.unpack_from("<HH", data, 26)
    return Header(width & 0x3FFF, height & 0x3FFF, most)


def _riff_chunk(data: bytes, wanted: bytes) -> bytes:
    start = 12
    for _ in range(MAX_PARTS):
        if start + 8 > len(data):
            return b""
        name, length = struct.unpack_from("<4sI", data, start)
        if name == wanted:
            return data[start + 8 : start + 8 + length]
        start += 8 + length + (length & 1)
    raise ValueError(_TOO_MANY)


def _gif_header(data: bytes) -> Header:
    """A GIF is as large as it says, or as its first frame asks for."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    start = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
    is_in_block = False
    for _ in range(MAX_PARTS):
        if is_in_block:
            is_in_block = data[start] > 0
            start += 1 + data[start]
        elif data[start] == 0x21:  # an extension: a type, then blocks
            start, is_in_block = start + 2, True
        elif data[start] == 0x2C:
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, start + 1)
            return Header(max(width, left + frame_width), max(height, top + frame_height))
        elif data[start] == 0x3B:
            raise ValueError("it has no frame")
        else:
            start += 1
    raise ValueError(_TOO_MANY)


def _bmp_header(data: bytes) -> Header:
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:
        return Header(*struct.unpack_from("<HH", data, 18))
    width, height, _, _, compression = struct.unpack_from("<iiHHI", data, 18)
    if compression not in (0, 3, 6):  # Pillow's decoder of the others is written in Python
        raise ValueError("it is compressed; only plain ones are read")
    return Header(abs(width), abs(height))


def _turn(exif: bytes) -> int:
    """The orientation in an EXIF block; 1, which is upright, where it says nothing that can be understood."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, at)
            if tag == TURN_TAG:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


WEBP = Format("WebP", WebPImageFile, _webp_header)
GIF = Format("GIF", GifImageFile, _gif_header)
FORMATS: tuple[tuple[bytes, Format], ...] = (
    (b"\x89PNG\r\n\x1a\n", Format("PNG", PngImageFile, _png_header, _bare_png)),
    (b"\xff\xd8\xff", Format("JPEG", JpegImageFile, _jpeg_header, _bare_jpeg)),
    (b"RIFF", WEBP),
    (b"GIF87a", GIF),
    (b"GIF89a", GIF),
    (b"BM", Format("BMP", BmpImageFile, _bmp_header)),
)


# ---- pixels ----------------------------------------------------------------------------------------------------------


def _factor(width: int, height: int) -> int:
    """By what whole number a picture is made smaller."""
    factor = 1
    while (width // factor) * (height // factor) > KEPT_PIXELS or max(width, height) // factor > KEPT_SIDE:
        factor += 1
    return factor


def _has_holes(image: Image) -> bool:
    return "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa")


def _rgb(image: Image, factor: int) -> NDArray[np.uint8]:
    """Red, green and blue of a loaded picture on a white ground, made smaller by `factor`; strip by strip, so that there is no
    second picture of its size."""
    num_rows = factor * max(1, STRIP_PIXELS // (image.width * factor))
    if factor == 1 and image.height <= num_rows:
        return _rgb_of_strip(image)
    out = np.empty((-(-image.height // factor), -(-image.width // factor), 3), np.uint8)
    for top in range(0, image.height, num_rows):
        strip = _rgb_of_strip(image.crop((0, top, image.width, min(top + num_rows, image.height))))
        if factor > 1:
            strip = np.asarray(fromarray(strip).reduce(factor))
        out[top // factor : top // factor + len(strip)] = strip
    return out


def _rgb_of_strip(strip: Image) -> NDArray[np.uint8]:
    if strip.mode.startswith("I"):  # 16 bit grey
        grey = np.asarray(strip)
        bright = (grey >> 8).astype(np.uint8)
        bright[grey == strip.info.get("transparency")] = 255
        return np.repeat(bright[:, :, None], 3, axis=2)
    if not _has_holes(strip):
        return np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    rgba = np.asarray(strip if strip.mode == "RGBA" else strip.convert("RGBA"))
    alpha = rgba[:, :, 3:].astype(np.uint16)
    return ((rgba[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _upright(pixels: NDArray[np.uint8], turn: int) -> NDArray[np.uint8]:
    """Undo EXIF's orientation."""
    if turn in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):  # counted from the bottom
        pixels = pixels[::-1]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    pixels = np.ascontiguousarray(pixels)
    pixels.flags.writeable = False  # some are already: they are a view of what Pillow gave
    return pixels
