"""A sound file as numbers: mono, at the rate that a model hears at. WAV is read here, others with PyAV (FFmpeg), an extra.

Owns the formats that are read, the limits, mixing and resampling. Knows nothing of where the bytes come from, nor of models.

A header may promise anything: how long a sound says it is is checked before it is decoded, and what comes is counted.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from math import ceil, gcd
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamserve.errors import InvalidRequest

MIN_RATE, MAX_RATE = 4_000, 192_000
RATE_STEP = 25  # every rate in use is a multiple of it; of others, resampling would take long
MAX_CHANNELS = 8
MAX_CHUNKS = 1_024  # of a WAV file, before its samples
LOUDEST = 256.0  # 1 is full scale; floats may go beyond, but not anywhere
ALLOWED = "allowed are WAV, MP3, FLAC, Ogg, WebM, M4A and AAC"
# FFmpeg's names of codecs in those files.
CODECS = frozenset(("mp3", "flac", "vorbis", "opus", "aac", "alac", "pcm_mulaw", "pcm_alaw"))

Samples = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """Mono, full scale is 1. `digest` is the SHA-256 of the file that it came in."""

    samples: Samples  # [N]
    rate: int  # of them in a second
    digest: bytes


def decode_sound(data: bytes, param: str, *, rate: int, max_seconds: float) -> Sound:
    """The sound in a file, at `rate`. Raises InvalidRequest, saying of `param` what is wrong; so it does where PyAV is needed and
    missing."""
    wav = _wav_of(data, param)
    if wav is not None:
        _check_form(wav.rate, wav.channels, param)
        if wav.num_promised > max_seconds * wav.rate:
            raise _too_long(f"{wav.num_promised / wav.rate:.1f}", max_seconds, param)
        if wav.num_promised > (held := len(wav.frames) // wav.frame_bytes):
            raise InvalidRequest(
                f"{param} is a WAV file that is cut off: it has {held} of {wav.num_promised} samples", param=param
            )
        given, samples = wav.rate, _mono(_floats(wav))
    else:
        given, samples = _decoded(data, param, max_seconds)
    if not len(samples):
        raise InvalidRequest(f"{param} is a sound without samples", param=param)
    if not np.abs(samples).max() <= LOUDEST:  # or it holds what is no number
        raise InvalidRequest(f"{param} is a sound with samples that are no numbers up to {LOUDEST:g}", param=param)
    return Sound(resampled(samples, given, rate), rate, sha256(data).digest())


def _check_form(rate: int, channels: int, param: str) -> None:
    if not MIN_RATE <= rate <= MAX_RATE or rate % RATE_STEP:
        raise InvalidRequest(
            f"{param} is a sound of {rate} samples a second; allowed are multiples of {RATE_STEP} from {MIN_RATE} to {MAX_RATE}",
            param=param,
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise InvalidRequest(f"{param} is a sound of {channels} channels; allowed are 1 to {MAX_CHANNELS}", param=param)


def _too_long(seconds: str, max_seconds: float, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param} is a sound of {seconds} s; this model hears at most {max_seconds:g} s at once, send it in parts", param=param
    )


# ---- WAV -------------------------------------------------------------------------------------------------------------

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
TO_THE_END = 0xFFFFFFFF  # a size that was not known when the header was written


class _Wav(NamedTuple):
    """A WAV file of plain numbers. `num_promised`: samples of each channel that its header speaks of."""

    rate: int
    channels: int
    bits: int
    is_float: bool
    frames: memoryview
    num_promised: int

    @property
    def frame_bytes(self) -> int:
        return self.channels * self.bits // 8


def _wav_of(data: bytes, param: str) -> _Wav | None:
    """None: another format, or a codec that is not read here."""
    if data[:4] not in (b"RIFF", b"RF64") or data[8:12] != b"WAVE":
        return None
    found = None
    for name, start, size in _chunks(data):
        if name == b"fmt ":
            try:
                kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", data, start)
                if kind == EXTENSIBLE:
                    (kind,) = struct.unpack_from("<H", data, start + 24)
            except struct.error:
                raise InvalidRequest(f"{param} is a WAV file whose header is cut off", param=param) from None
            if kind not in (PCM, FLOAT):
                return None
            if bits not in ((8, 16, 24, 32) if kind == PCM else (32, 64)):
                raise InvalidRequest(f"{param} is a WAV file with samples of {bits} bits, which are not read", param=param)
            found = (rate, channels, bits, kind == FLOAT)
        elif name == b"data" and found is not None:
            frame_bytes = max(1, found[1] * found[2] // 8)
            held = (len(data) - start) // frame_bytes
            promised = held if size == TO_THE_END else size // frame_bytes
            end = start + min(held, promised) * frame_bytes
            return _Wav(*found, memoryview(data)[start:end], promised)
    raise InvalidRequest(f"{param} is a WAV file without samples", param=param)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and size of what is in each chunk."""
    start = 12
    for _ in range(MAX_CHUNKS):
        if start + 8 > len(data):
            return
        name, size = struct.unpack_from("<4sI", data, start)
        yield name, start + 8, size
        start += 8 + size + (size & 1)


def _floats(wav: _Wav) -> Samples:
    """[N, channels]"""
    numbers: Samples
    if wav.is_float:
        samples = np.frombuffer(wav.frames, f"<f{wav.bits // 8}")
        with np.errstate(over="ignore"):  # too large for float32: infinite, which is refused
            numbers = samples.astype(np.float32)
    elif wav.bits == 8:
        numbers = np.frombuffer(wav.frames, np.uint8).astype(np.float32) / np.float32(128) - np.float32(1)
    elif wav.bits == 24:
        bytes_N3 = np.frombuffer(wav.frames, np.uint8).reshape(-1, 3)
        wide = np.zeros((len(bytes_N3), 4), np.uint8)
        wide[:, 1:] = bytes_N3
        numbers = wide.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)
    else:
        numbers = np.frombuffer(wav.frames, f"<i{wav.bits // 8}").astype(np.float32) / np.float32(2 ** (wav.bits - 1))
    return numbers.reshape(-1, wav.channels)


def _mono(samples_NC: Samples) -> Samples:
    return samples_NC[:, 0] if samples_NC.shape[1] == 1 else samples_NC.mean(axis=1, dtype=np.float32)


# ---- other files -----------------------------------------------------------------------------------------------------


def _demuxer_of(data: bytes) -> str | None:
    """FFmpeg's name of what reads this file, by its first bytes; None: it is no sound that is read here."""
    for magic, name in (
        (b"RIFF", "wav"),
        (b"ID3", "mp3"),
        (b"fLaC", "flac"),
        (b"OggS", "ogg"),
        (b"\x1a\x45\xdf\xa3", "matroska"),
    ):
        if data.startswith(magic):
            return name if name != "wav" or data[8:12] == b"WAVE" else None
    if data[4:8] == b"ftyp":
        return "mov"
    if len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0:  # a frame of MPEG audio, or, as layer 0, of AAC
        return "mp3" if data[1] & 0x06 else "aac"
    return None


def _decoded(data: bytes, param: str, max_seconds: float) -> tuple[int, Samples]:
    """Rate and samples."""
    file: Any
    demuxer = _demuxer_of(data)
    if demuxer is None:
        what = "is no sound file that is known here" if data else "is empty"
        raise InvalidRequest(f"{param} {what}; {ALLOWED}", param=param)
    try:
        import av
    except ImportError:
        raise InvalidRequest(
            f"{param} is a sound that is no plain WAV; this server was installed without what reads others (pip install "
            "'streamserve[audio]')",
            param=param,
        ) from None
    parts: list[Samples] = []
    num_frames = rate = 0
    try:
        # The demuxer is named, so that no playlist or script of FFmpeg's is ever read, and no other file opened.
        with av.open(BytesIO(data), format=demuxer, options={"protocol_whitelist": "", "enable_drefs": "0"}) as file:
            stream = _stream(file, param)
            promised = float(stream.duration * stream.time_base) if stream.duration else (file.duration or 0) / 1e6
            if promised > max_seconds + 1:  # some only guess
                raise _too_long(f"{promised:.1f}", max_seconds, param)
            for frame in file.decode(stream):
                rate = rate or frame.sample_rate  # what the file says by itself is half of it in some (HE-AAC)
                if frame.sample_rate != rate:
                    raise InvalidRequest(f"{param} is a sound whose rate changes", param=param)
                _check_form(rate, frame.layout.nb_channels, param)
                num_frames += frame.samples
                if num_frames > max_seconds * rate:
                    raise _too_long(f"over {max_seconds:g}", max_seconds, param)
                parts.append(_mono(_frame_floats(frame)))
    except (av.FFmpegError, ValueError) as error:
        raise InvalidRequest(f"{param} is a sound that is broken or cut off: {type(error).__name__}", param=param) from None
    return rate, np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _stream(file: Any, param: str) -> Any:
    if not file.streams.audio:
        raise InvalidRequest(f"{param} is a file without sound", param=param)
    stream = file.streams.audio[0]
    context = stream.codec_context
    codec = "a codec that nobody knows" if context is None else context.codec.canonical_name
    if codec not in CODECS:
        raise InvalidRequest(f"{param} is a sound in {codec}, which is not read; {ALLOWED}", param=param)
    context.thread_count = 1  # how many sounds are decoded at once is said elsewhere
    return stream


def _frame_floats(frame: Any) -> Samples:
    """[N, channels]"""
    found = frame.to_ndarray()
    rows = found.T if frame.format.is_planar else found.reshape(-1, frame.layout.nb_channels)
    scale = 1.0 if rows.dtype.kind == "f" else float(np.iinfo(rows.dtype).max) + 1
    numbers: Samples = rows.astype(np.float32) / np.float32(scale)
    return numbers


# ---- rates -----------------------------------------------------------------------------------------------------------

CROSSINGS = 48  # of the filter's sinc, on each side
PASSED = 0.945  # of what the lower of the two rates can hold
BETA = 12.0  # of its Kaiser window: what is cut off is 118 dB down
AT_ONCE = 128  # samples of the result that one row of a matrix product gives, at least


def resampled(samples: Samples, given: int, wanted: int) -> Samples:
    """The sound at another rate, by a sinc within a Kaiser window (polyphase): places of the result lie between the given ones in
    a pattern that repeats, so that all is one product with a matrix of their weights."""
    if given == wanted:
        return samples
    common = gcd(given, wanted)
    times = -(-AT_ONCE // (wanted // common))
    up, down = times * wanted // common, times * given // common  # one pattern: so many samples become so many
    cutoff = min(1.0, wanted / given) * PASSED  # in half the given rate
    reach = ceil(CROSSINGS / cutoff)
    place_U = np.arange(up) * (down / up)
    first_U = place_U.astype(np.int64)
    near_UK = first_U[:, None] + np.arange(1 - reach, reach + 1)
    distance_UK = near_UK - place_U[:, None]
    weights_UK = np.sinc(cutoff * distance_UK) * np.i0(BETA * np.sqrt(np.maximum(0.0, 1 - (distance_UK / reach) ** 2)))
    matrix_WU = np.zeros((down + 2 * reach, up), np.float32)
    matrix_WU[near_UK + reach, np.arange(up)[:, None]] = weights_UK / weights_UK.sum(axis=1, keepdims=True)
    num_patterns = -(-len(samples) // down)
    padded = np.pad(samples, (reach, num_patterns * down - len(samples) + reach))
    windows_PW = np.lib.stride_tricks.sliding_window_view(padded, down + 2 * reach)[::down]
    found: Samples = (np.ascontiguousarray(windows_PW) @ matrix_WU).ravel()[: ceil(len(samples) * wanted / given)]
    return found
