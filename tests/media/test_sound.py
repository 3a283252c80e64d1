"""Sound files as samples: which files, at which rates, and what each refusal says."""

import struct
import sys
from io import BytesIO
from math import ceil
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streamserve.errors import InvalidRequest
from streamserve.media.sound import FLOAT, LOUDEST, PCM, decode_sound, resampled

av = pytest.importorskip("av")
RATE = 16_000


def tone(hertz: float, seconds: float, rate: int = RATE, level: float = 0.5) -> NDArray[np.float32]:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def wav(data: bytes, *, kind: int = PCM, channels: int = 1, rate: int = RATE, bits: int = 16, size: int | None = None) -> bytes:
    """A WAV file of these samples, with a chunk that nobody knows before them. `size`: what the header says of them."""
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * channels * bits // 8, channels * bits // 8, bits)
    if kind == 0xFFFE:
        form += struct.pack("<HHIH14x", 22, bits, 0, PCM)
    parts = b"LIST" + struct.pack("<I", 3) + b"abc\0fmt " + struct.pack("<I", len(form)) + form
    parts += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(parts)) + b"WAVE" + parts


def pcm16(samples: NDArray[np.float32]) -> bytes:
    return (samples * 32767).round().astype("<i2").tobytes()


def encoded(container: str, codec: str, *, seconds: float = 1.0, rate: int = 48_000, format: str = "fltp") -> bytes:
    """A tone on the left and silence on the right, by FFmpeg."""
    data = BytesIO()
    with av.open(data, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="stereo")
        both = np.stack([tone(440, seconds, rate), np.zeros(round(seconds * rate), np.float32)])
        shaped = (both * 32767).astype(np.int16) if format.startswith("s16") else both
        frame = av.AudioFrame.from_ndarray(
            shaped if format.endswith("p") else shaped.T.reshape(1, -1), format=format, layout="stereo"
        )
        frame.sample_rate = rate
        resampler = av.AudioResampler(format=stream.format, layout="stereo", rate=rate, frame_size=stream.frame_size or None)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return data.getvalue()


def decoded(data: bytes, **limits: Any) -> NDArray[np.float32]:
    sound = decode_sound(data, "audio.url", **{"rate": RATE, "max_seconds": 30, **limits})
    assert sound.samples.dtype == np.float32 and sound.samples.ndim == 1
    return sound.samples


def refusal(data: bytes, **limits: Any) -> str:
    with pytest.raises(InvalidRequest) as refused:
        decoded(data, **limits)
    assert refused.value.param == "audio.url"
    assert str(refused.value).startswith("audio.url is ")
    return str(refused.value)


# ---- what is read ------------------------------------------------------------------------------------------------------


def test_every_width_of_numbers_in_a_wav_file_is_the_same_sound() -> None:
    samples = tone(440, 0.1)
    wide = (samples.astype(np.float64) * (2**31 - 1)).round().astype("<i4")
    files = {
        8: wav(((samples * 127) + 128).round().astype(np.uint8).tobytes(), bits=8),
        16: wav(pcm16(samples)),
        24: wav(wide.view(np.uint8).reshape(-1, 4)[:, 1:].tobytes(), bits=24),
        32: wav(wide.tobytes(), bits=32),
        64: wav(samples.astype("<f8").tobytes(), kind=FLOAT, bits=64),
        0: wav(samples.tobytes(), kind=FLOAT, bits=32),
        1: wav(pcm16(samples), kind=0xFFFE),
    }
    for bits, file in files.items():
        np.testing.assert_allclose(decoded(file), samples, atol=0.01 if bits == 8 else 1e-4, err_msg=str(bits))


def test_channels_are_mixed_and_rates_changed() -> None:
    both = np.stack([tone(440, 0.5, 48_000), tone(880, 0.5, 48_000)], axis=1)
    found = decoded(wav(pcm16(both), channels=2, rate=48_000))
    expected = (tone(440, 0.5) + tone(880, 0.5)) / 2
    assert len(found) == len(expected)
    np.testing.assert_allclose(found[200:-200], expected[200:-200], atol=1e-3)


def test_a_wav_file_that_was_written_to_a_pipe_is_read_to_its_end() -> None:
    np.testing.assert_allclose(decoded(wav(pcm16(tone(440, 0.1)), size=0xFFFFFFFF)), tone(440, 0.1), atol=1e-4)


@pytest.mark.parametrize(
    ("container", "codec", "format"),
    [
        ("mp3", "libmp3lame", "fltp"),
        ("flac", "flac", "s16"),
        ("ogg", "libopus", "flt"),
        ("webm", "libopus", "flt"),
        ("ipod", "aac", "fltp"),
        ("adts", "aac", "fltp"),
        ("wav", "pcm_mulaw", "s16"),
    ],
)
def test_other_formats_are_read(container: str, codec: str, format: str) -> None:
    found = decoded(encoded(container, codec, format=format))
    assert len(found) == pytest.approx(RATE, abs=2_000)  # some fill up their last frame, or their first
    middle = found[4_000:12_000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert spectrum.argmax() * RATE / len(middle) == pytest.approx(440, abs=3)
    assert np.abs(middle).max() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("given", [8_000, 11_025, 22_050, 24_000, 44_100, 48_000, 96_000, 192_000])
def test_resampling_keeps_what_both_rates_hold_and_nothing_else(given: int) -> None:
    for hertz in (100, 1_000, 3_400):
        found = resampled(tone(hertz, 0.3, given), given, RATE)
        assert len(found) == ceil(round(0.3 * given) * RATE / given)
        expected = tone(hertz, len(found) / RATE)
        np.testing.assert_allclose(found[400:-400], expected[400:-400], atol=1e-5)
    if given > 2 * 9_000:
        assert np.abs(resampled(tone(9_000, 0.3, given), given, RATE)[400:-400]).max() < 1e-5
    flat = resampled(np.ones(given // 2, np.float32), given, RATE)
    np.testing.assert_allclose(flat[400:-400], 1, atol=1e-5)


def test_sounds_of_any_length_are_resampled() -> None:
    for length in (1, 2, 3, 440, 441, 442):
        assert len(resampled(np.ones(length, np.float32), 44_100, RATE)) == -(-length * 160 // 441)


# ---- what is refused ---------------------------------------------------------------------------------------------------


def test_a_header_that_promises_ten_hours_is_refused_by_its_word() -> None:
    assert "36000.0 s; this model hears at most 30 s" in refusal(wav(bytes(100), size=36_000 * 2 * RATE))
    assert "31.0 s" in refusal(wav(bytes(31 * 2 * RATE)))


def test_a_file_that_unpacks_to_more_than_it_says_is_refused_while_it_does() -> None:
    file = bytearray(encoded("flac", "flac", seconds=3, format="s16"))
    assert "3.0 s; this model hears at most 1 s" in refusal(bytes(file), max_seconds=1)
    file[21] &= 0xF0  # the number of samples in all: unknown
    file[22:26] = bytes(4)
    assert "of over 1 s; this model" in refusal(bytes(file), max_seconds=1)
    assert len(decoded(bytes(file), max_seconds=4)) == 3 * RATE


def test_broken_files_are_refused() -> None:
    sound = tone(440, 0.1)
    bad = sound.copy()
    bad[7] = np.nan
    whole = encoded("mp3", "libmp3lame")
    for data, says in (
        (b"", "is empty"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "no sound file that is known here; allowed are WAV"),
        (b"<html></html>", "no sound file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "no sound file"),
        (wav(pcm16(sound))[:-100], "cut off: it has 1550 of 1600 samples"),
        (wav(pcm16(sound))[:40], "header is cut off"),
        (wav(b""), "without samples"),
        (wav(pcm16(sound), rate=0), "0 samples a second"),
        (wav(pcm16(sound), rate=44_099), "multiples of 25"),
        (wav(pcm16(sound), rate=2_000_000_000), "2000000000 samples a second"),
        (wav(pcm16(sound), channels=0), "0 channels"),
        (wav(pcm16(sound), channels=999), "999 channels"),
        (wav(pcm16(sound), bits=12), "12 bits"),
        (wav(bad.tobytes(), kind=FLOAT, bits=32), "no numbers up to 256"),
        (wav((sound * 4 * LOUDEST).tobytes(), kind=FLOAT, bits=32), "no numbers up to 256"),
        (wav((sound.astype(np.float64) * 1e300).tobytes(), kind=FLOAT, bits=64), "no numbers up to 256"),
        (wav(pcm16(sound), kind=0x55), "broken or cut off|not read|without samples"),
        (b"ID3" + bytes(500), "broken or cut off"),
        (b"fLaC" + bytes(500), "broken or cut off"),
        (b"OggS" + bytes(500), "broken or cut off"),
        (b"\x1a\x45\xdf\xa3" + bytes(500), "broken or cut off"),
        (bytes(4) + b"ftypM4A " + bytes(500), "broken or cut off"),
        (b"\xff\xf1" + bytes(500), "broken or cut off|without samples"),
        (whole[:20], "broken or cut off"),
    ):
        assert any(word in refusal(data) for word in says.split("|")), (data[:40], refusal(data))


def test_a_file_cut_off_in_the_middle_is_heard_as_far_as_it_goes_or_refused() -> None:
    for container, codec, format in (("mp3", "libmp3lame", "fltp"), ("ogg", "libopus", "flt"), ("flac", "flac", "s16")):
        whole = encoded(container, codec, format=format)
        for end in range(100, len(whole), len(whole) // 6):
            try:
                assert len(decoded(whole[:end])) <= 1.2 * RATE
            except InvalidRequest as error:
                assert error.param == "audio.url"


def test_a_video_without_sound_is_refused() -> None:
    data = BytesIO()
    with av.open(data, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        file.mux(stream.encode(None))
    assert "a file without sound" in refusal(data.getvalue())


def test_a_sound_in_a_codec_that_nobody_knows_is_refused() -> None:
    assert "a codec that nobody knows" in refusal(encoded("webm", "libopus", format="flt").replace(b"A_OPUS", b"A_XYZW"))


def test_without_its_extra_a_server_reads_wav_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    other = encoded("mp3", "libmp3lame")
    monkeypatch.setitem(sys.modules, "av", None)
    assert "streamserve[audio]" in refusal(other)
    assert len(decoded(wav(pcm16(tone(440, 0.1))))) == 1600
