"""Files of every kind become upright RGB pictures, or a refusal that says which part is wrong and why."""

import zlib
from collections.abc import Callable
from hashlib import sha256
from struct import pack

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL.Image import Transpose, fromarray, new

from streamserve.errors import InvalidRequest
from streamserve.media.decode import KEPT_PIXELS, KEPT_SIDE, MAX_PARTS, decode, num_pixels_of
from tests.media.pictures import exif, file_of, image, png_chunk, png_header, scene

PARAM = "messages[0].content[1].image_url.url"
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "GIF": {}}
# How a camera held in that way stores what it sees, by EXIF's orientation.
STORED: dict[int, Transpose | None] = {
    1: None,
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}


def refusal(data: bytes) -> str:
    """What is said of a file that is not taken."""
    with pytest.raises(InvalidRequest) as found:
        decode(data, PARAM)
    assert found.value.param == PARAM and found.value.status == 400
    assert str(found.value).startswith(PARAM)
    return str(found.value)


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", LOSSLESS)
def test_a_lossless_file_gives_its_very_pixels(format: str) -> None:
    data = file_of(image(), format, **LOSSLESS[format])
    picture = decode(data, PARAM)
    assert np.array_equal(picture.pixels, scene())
    assert (picture.height, picture.width) == (48, 64)
    assert picture.digest == sha256(data).digest()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 95, "subsampling": 0}])
def test_a_jpeg_gives_about_its_pixels(options: dict[str, int]) -> None:
    picture = decode(file_of(image(), "JPEG", **options), PARAM)
    assert np.abs(picture.pixels.astype(int) - scene()).mean() < 4


@pytest.mark.parametrize(
    ("mode", "format"),
    [("1", "PNG"), ("L", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("CMYK", "JPEG")],
)
def test_other_colours_become_red_green_and_blue(mode: str, format: str) -> None:
    grey = np.repeat(np.repeat(np.array([[0, 255], [255, 0]], np.uint8), 8, 0), 8, 1)
    found = fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else fromarray(grey).convert(mode)
    pixels = decode(file_of(found, format, quality=100), PARAM).pixels
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels.astype(int) - grey[:, :, None]).max() <= 3


def test_sixteen_bits_of_colour_become_eight() -> None:
    rows = b"".join(b"\0" + pack(">6H", 0xFF00, 0x8000, 0, 0x1234, 0xFFFF, 0x00FF) for _ in range(2))
    head = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    pixels = decode(head + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""), PARAM).pixels
    assert pixels[0].tolist() == [[0xFF, 0x80, 0], [0x12, 0xFF, 0]]


def test_what_is_transparent_becomes_white_whatever_colour_it_hides() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (10, 20, 30, 0)
    rgba[1, 0] = (0, 0, 0, 128)
    pixels = decode(file_of(fromarray(rgba)), PARAM).pixels
    assert pixels[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert pixels[1, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "I;16"])
def test_a_colour_that_stands_for_nothing_becomes_white(mode: str) -> None:
    grey = np.array([[0, 200], [200, 0]], np.uint8)
    if mode == "I;16":
        data = file_of(fromarray(grey.astype(np.uint16)), transparency=0)
    else:
        data = file_of(fromarray(grey).convert(mode), transparency=(0, 0, 0) if mode == "RGB" else 0)
    pixels = decode(data, PARAM).pixels
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() != [255, 255, 255]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(format: str) -> None:
    frames = [image(), new("RGB", (64, 48), "white"), new("RGB", (64, 48), "black")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = file_of(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(decode(data, PARAM).pixels, scene())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_strips_join_without_a_seam(mode: str) -> None:
    pixels = scene(1100, 1003) & 0x80
    image = fromarray(pixels)
    picture = decode(file_of(image.quantize(8) if mode == "P" else image.convert(mode), compress_level=1), PARAM)
    assert np.array_equal(picture.pixels, pixels)
    with pytest.raises(ValueError, match="read-only"):
        picture.pixels[0] = 0


# ---- how it is turned ------------------------------------------------------------------------------------------------


def _turned(turn: int) -> NDArray[np.uint8]:
    how = STORED[turn]
    return np.asarray(image() if how is None else image().transpose(how))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_picture_is_put_upright(format: str, turn: int) -> None:
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    block = exif(turn, "<" if turn % 2 else ">")
    given = block if format == "PNG" else b"Exif\0\0" + block
    picture = decode(file_of(fromarray(_turned(turn)), format, exif=given, **options), PARAM)
    assert picture.pixels.shape == (48, 64, 3)
    assert np.abs(picture.pixels.astype(int) - scene()).mean() < 4
    assert picture.pixels.flags.c_contiguous


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"Exif\0\0",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        exif(9),
        exif(0),
        exif(6, kind=7),
        exif(6)[:14],
        b"\0" * 40,
        b"MM\0*" * 9,
    ],
)
def test_a_broken_exif_block_is_no_error(block: bytes) -> None:
    data = file_of(image(), "JPEG", exif=b"Exif\0\0" + block)
    assert decode(data, PARAM).pixels.shape == (48, 64, 3)


# ---- large ones ------------------------------------------------------------------------------------------------------


def test_a_picture_larger_than_any_model_takes_is_made_smaller() -> None:
    small = scene(48, 64)
    large = np.repeat(np.repeat(small, 96, 0), 96, 1)  # 4,608 x 6,144
    pixels = decode(file_of(fromarray(large).convert("P"), compress_level=1), PARAM).pixels
    assert pixels.shape == (2304, 3072, 3)
    assert pixels.shape[0] * pixels.shape[1] <= KEPT_PIXELS
    assert np.abs(pixels[24::48, 24::48].astype(int) - small).max() <= 8


def test_a_large_jpeg_is_made_smaller_while_it_is_decoded() -> None:
    data = file_of(new("RGB", (9000, 6000), (200, 100, 50)), "JPEG")
    pixels = decode(data, PARAM).pixels
    assert pixels.shape == (3000, 4500, 3)
    assert np.abs(pixels[::500, ::500].astype(int) - (200, 100, 50)).max() <= 3


def test_a_long_strip_is_made_shorter() -> None:
    pixels = decode(file_of(new("1", (20_001, 101), 1)), PARAM).pixels
    assert pixels.shape == (34, 6667, 3) and max(pixels.shape) <= KEPT_SIDE
    assert pixels.min() == 255


def test_the_number_of_pixels_is_known_before_they_are_read() -> None:
    assert num_pixels_of(png_header(300, 200), PARAM) == 60_000


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "an SVG file"),
        (b"<?xml version='1.0'?>\n<!-- x --><svg/>", "an SVG file"),
        (b"\xef\xbb\xbf  <!DOCTYPE html><title>x</title>", "an HTML page"),
        (b"<html>", "an HTML page"),
        (b"%PDF-1.7", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "PostScript"),
        (b"II*\0....", "TIFF"),
        (b"MM\0*....", "TIFF"),
        (b"\0\0\0\x1cftypavif", "AVIF"),
        (b"\0\0\0\x1cftypheic", "HEIC"),
        (b"\0\0\0\x1cftypisom", "MP4"),
        (b"\0\0\1\0", "ICO"),
        (b"RIFF\0\0\0\0WAVEfmt ", "no picture file"),
        (b"hello", "no picture file"),
        (bytes(1000), "no picture file"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, said: str) -> None:
    message = refusal(data)
    assert said in message
    assert message.endswith("allowed are PNG, JPEG, WebP, GIF and BMP")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_a_file_that_is_cut_off_is_refused_wherever_it_is_cut(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    data = file_of(fromarray(noise), format)
    for length in (*range(1, 60), *range(60, len(data) * 9 // 10, max(1, len(data) // 40))):
        refusal(data[:length])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_a_file_with_wrong_bytes_is_a_picture_or_a_refusal(format: str) -> None:
    data = file_of(image(), format)
    random = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(data)
        for at in random.integers(2, len(data), 4):
            broken[at] = random.integers(256)
        try:
            assert decode(bytes(broken), PARAM).pixels.ndim == 3
        except InvalidRequest as error:
            assert error.param == PARAM


def _sized(format: str, width: int, height: int) -> bytes:
    """The beginning of a file that says it is that large."""
    if format == "PNG":
        return png_header(width, height)
    if format == "JPEG":
        return b"\xff\xd8\xff\xc0" + pack(">HBHHB", 8, 8, height, width, 0) + b"\xff\xda" + pack(">H", 2)
    if format == "GIF":
        return b"GIF89a" + pack("<HHBBB", width, height, 0, 0, 0) + b"," + pack("<HHHHB", 0, 0, 1, 1, 0)
    if format == "frame of a GIF":
        return b"GIF89a" + pack("<HHBBB", 1, 1, 0, 0, 0) + b"," + pack("<HHHHB", 0, 0, width, height, 0)
    if format == "BMP":
        return b"BM" + bytes(12) + pack("<IiiHHI", 40, width, -height, 1, 24, 0)
    if format == "WebP":
        sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        return b"RIFF\0\0\0\0WEBPVP8X" + pack("<IBBBB", 10, 0, 0, 0, 0) + sizes
    assert format == "lossless WebP"
    return b"RIFF\0\0\0\0WEBPVP8L" + pack("<IBI", 5, 0x2F, (width - 1) & 0x3FFF | ((height - 1) & 0x3FFF) << 14)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "frame of a GIF", "BMP", "WebP"])
def test_fifty_thousand_by_fifty_thousand_pixels_are_refused_by_the_header(format: str) -> None:
    message = refusal(_sized(format, 50_000, 50_000))
    assert "50000 x 50000" in message and "at most" in message


@pytest.mark.parametrize(
    ("format", "width", "height", "said"),
    [
        ("PNG", 8192, 4097, "at most 33554432"),
        ("JPEG", 8192, 8193, "at most 67108864"),
        ("lossless WebP", 16_383, 1025, "at most 16777216"),
        ("BMP", 40_000, 400, "a side may have at most 32768"),
        ("PNG", 201, 1, "200 times"),
        ("GIF", 1, 30_000, "200 times"),
        ("PNG", 0, 5, "at least 1 x 1"),
        ("JPEG", 5, 0, "at least 1 x 1"),
    ],
)
def test_each_limit_on_sizes_says_what_is_allowed(format: str, width: int, height: int, said: str) -> None:
    message = refusal(_sized(format, width, height))
    assert f"{width} x {height}" in message and said in message


def test_texts_and_profiles_of_a_png_are_not_unpacked() -> None:
    bomb = zlib.compress(bytes(1 << 26), 9)
    start, rest = file_of(image())[:33], file_of(image())[33:]
    hidden = png_chunk(b"iCCP", b"x\0\0" + bomb) + png_chunk(b"zTXt", b"x\0\0" + bomb) + png_chunk(b"acTL", b"\0")
    assert np.array_equal(decode(start + hidden + rest, PARAM).pixels, scene())


def test_more_pixels_than_a_png_says_are_left_packed() -> None:
    bomb = png_header(64, 48) + png_chunk(b"IDAT", zlib.compress(bytes(1 << 26), 9)) + png_chunk(b"IEND", b"")
    assert decode(bomb, PARAM).pixels.shape == (48, 64, 3)


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    data = file_of(image(np.zeros((2000, 2000, 3), np.uint8)), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    decode(data, PARAM)
    assert "2000 x 2000" in refusal(data[:scan] + data[scan:-2] * 1000 + data[-2:])


@pytest.mark.parametrize(
    "many",
    [
        lambda: png_header(4, 4) + png_chunk(b"tEXt", b"") * (MAX_PARTS + 1),
        lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * (MAX_PARTS + 1),
        lambda: b"GIF89a" + pack("<HHBBB", 4, 4, 0, 0, 0) + b"!\xfe" + b"\1x" * (MAX_PARTS + 1),
        lambda: b"RIFF\0\0\0\0WEBPVP8X" + pack("<IBBBB", 10, 8, 0, 0, 0) + bytes(6) + b"abcd\0\0\0\0" * (MAX_PARTS + 1),
    ],
)
def test_a_file_of_endless_small_parts_is_refused(many: Callable[[], bytes]) -> None:
    assert "parts" in refusal(many())


def test_run_lengths_in_a_bmp_are_refused() -> None:
    assert "compressed" in refusal(b"BM" + bytes(12) + pack("<IiiHHI", 40, 4, 4, 1, 8, 1))
