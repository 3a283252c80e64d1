"""A video file as a clip: some of its frames, evenly spread, upright and in RGB. Read with PyAV (FFmpeg), which is an extra.

Owns the containers and codecs that are read, which frames are taken, and the limits. Frames are decoded one by one when they are
asked for: nobody holds all of them in their own size. Sound is left out. Knows nothing of where the bytes come from.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from io import BytesIO
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamserve.errors import InvalidRequest

FRAMES_PER_SECOND = 2
MIN_FRAMES, MAX_FRAMES = 4, 256  # where the file has so many
MAX_PIXELS = 4096 * 2304  # of a frame
MAX_SECONDS = 20.0  # of decoding
CONTAINERS = "MP4, MOV, WebM and MKV"
CODECS = {"h264": "H.264", "hevc": "H.265", "av1": "AV1", "vp8": "VP8", "vp9": "VP9"}
PICTURE_BRANDS = frozenset((b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1", b"heim", b"heis"))

Frame = NDArray[np.uint8]  # [H, W, 3]


def demuxer_of(data: bytes) -> str | None:
    """FFmpeg's name of what reads this file, by its first bytes; None: it is no video that is read here."""
    if data[4:8] == b"ftyp" and data[8:12] not in PICTURE_BRANDS:
        return "mov"
    return "matroska" if data.startswith(b"\x1a\x45\xdf\xa3") else None


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """Frames of a video. `times`: of each frame, in seconds. `digest` is the SHA-256 of the file that it came in. `tick` is
    called for every frame that is decoded: what it raises ends that."""

    data: bytes
    param: str
    height: int
    width: int
    places: tuple[int, ...]  # the frames that are taken, of all frames in order
    rate: float  # of all frames, per second
    seconds: float
    digest: bytes
    tick: Callable[[], None]

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(place / self.rate for place in self.places)

    @property
    def seconds_apart(self) -> float:
        """How long a frame stands for."""
        return self.seconds / len(self.places)

    def frames(self) -> Iterator[Frame]:
        """Decode them. Raises InvalidRequest for a file that is broken, or takes too long."""
        wanted, frame = iter(self.places), None
        next_place: int | None = next(wanted)
        with _opened(self.data, self.param) as file:
            for place, frame in enumerate(_decoded(file, self.param)):
                self.tick()
                while next_place == place:
                    yield _upright(frame)
                    next_place = next(wanted, None)
                if next_place is None:
                    return
        if frame is None:
            raise InvalidRequest(f"{self.param} is a video whose frames cannot be decoded", param=self.param)
        while next_place is not None:  # the file has fewer frames than it says
            yield _upright(frame)
            next_place = next(wanted, None)


def nothing() -> None:
    """The tick of a clip that everybody waits for."""


def open_clip(data: bytes, param: str, tick: Callable[[], None] = nothing) -> Clip:
    """The clip in a video file. Raises InvalidRequest, saying of `param` what is wrong; so it does where PyAV is missing."""
    with _opened(data, param) as file:
        stream = _stream(file, param)
        first = next(_decoded(file, param), None)
        if first is None:
            raise InvalidRequest(f"{param} is a video whose frames cannot be decoded", param=param)
        height, width, _ = _upright(first).shape
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        seconds = float(stream.duration * stream.time_base) if stream.duration else (file.duration or 0) / 1e6
        num_frames = stream.frames or round(seconds * rate)
    if rate <= 0 or num_frames <= 0:
        raise InvalidRequest(f"{param} is a video that does not say how long it is", param=param)
    places, digest = chosen(num_frames, rate), sha256(data).digest()
    return Clip(data, param, height, width, places, rate, num_frames / rate, digest, tick)


def chosen(num_frames: int, rate: float) -> tuple[int, ...]:
    """Which of so many frames are taken: some each second, the first and the last among them."""
    wanted = min(max(int(num_frames / rate * FRAMES_PER_SECOND), MIN_FRAMES), MAX_FRAMES, num_frames)
    return tuple(np.linspace(0, num_frames - 1, wanted).round().astype(int).tolist())


def _opened(data: bytes, param: str) -> Any:
    try:
        import av
    except ImportError:
        raise InvalidRequest(
            f"{param} is a video; this server was installed without what reads those (pip install 'streamserve[video]')",
            param=param,
        ) from None
    demuxer = demuxer_of(data)
    if demuxer is None:
        raise InvalidRequest(f"{param} is no video that is known here; allowed are {CONTAINERS}", param=param)
    try:
        # The demuxer is named, so that no playlist or script of FFmpeg's is ever read, and no other file opened.
        return av.open(BytesIO(data), format=demuxer, options={"protocol_whitelist": "", "enable_drefs": "0"})
    except (av.FFmpegError, ValueError) as error:
        raise InvalidRequest(f"{param} is a video that is broken or cut off: {type(error).__name__}", param=param) from None


def _stream(file: Any, param: str) -> Any:
    if not file.streams.video:
        raise InvalidRequest(f"{param} is a file without pictures; a video has some", param=param)
    stream = file.streams.video[0]
    context = stream.codec_context  # None: a codec that FFmpeg does not know
    codec = "an unknown codec" if context is None else context.codec.canonical_name
    if codec not in CODECS:
        raise InvalidRequest(f"{param} is a video in {codec}; allowed are {', '.join(CODECS.values())}", param=param)
    stream.codec_context.thread_count = 1  # how many videos are decoded at once is said elsewhere
    return stream


def _decoded(file: Any, param: str) -> Iterator[Any]:
    import av

    until = monotonic() + MAX_SECONDS
    stream = _stream(file, param)
    try:
        _check_size(stream.codec_context.width, stream.codec_context.height, param)
        for frame in file.decode(stream):
            _check_size(frame.width, frame.height, param)
            if monotonic() > until:
                raise InvalidRequest(f"{param} is a video that takes more than {MAX_SECONDS:g} s to decode", param=param)
            yield frame
    except (av.FFmpegError, ValueError) as error:
        raise InvalidRequest(f"{param} is a video that is broken or cut off: {type(error).__name__}", param=param) from None


def _check_size(width: int, height: int, param: str) -> None:
    if width * height > MAX_PIXELS:
        raise InvalidRequest(
            f"{param} is a video of {width} x {height} pixels; at most {MAX_PIXELS} of them are taken", param=param
        )


def _upright(frame: Any) -> Frame:
    pixels: Frame = frame.to_ndarray(format="rgb24")
    turns = round(Fraction(int(frame.rotation), 90)) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
