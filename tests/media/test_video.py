"""Video files as clips: which frames, which files, and what each refusal says."""

from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from anyio import CancelScope, from_thread

from streamserve.errors import InvalidRequest
from streamserve.media import video
from streamserve.media.families.qwen3_vl import Family
from streamserve.media.fetch import Fetcher
from streamserve.media.loader import Loader
from streamserve.media.video import Clip, chosen, demuxer_of, open_clip

av = pytest.importorskip("av")
RATE, NUM_FRAMES = 10, 30


def filmed(
    container: str = "mp4", codec: str = "libx264", *, num_frames: int = NUM_FRAMES, size: tuple[int, int] = (64, 48)
) -> bytes:
    """A video whose frames become brighter, with a dark right half."""
    data = BytesIO()
    with av.open(data, "w", format=container) as file:
        stream = file.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(num_frames):
            pixels = np.full((size[1], size[0], 3), min(8 * number, 255), np.uint8)
            pixels[:, size[0] // 2 :] = 0
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
    return data.getvalue()


def brightness(clip: Clip) -> list[int]:
    return [round(frame[:, :20].mean() / 8) for frame in clip.frames()]


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "libx264"), ("mov", "libx265"), ("matroska", "libvpx-vp9"), ("webm", "libvpx")]
)
def test_two_frames_a_second_are_taken_of_every_container(container: str, codec: str) -> None:
    clip = open_clip(filmed(container, codec), "url")
    assert (clip.height, clip.width) == (48, 64)
    assert clip.places == (0, 6, 12, 17, 23, 29)
    assert list(clip.times) == [0.0, 0.6, 1.2, 1.7, 2.3, 2.9]
    assert clip.seconds_apart == pytest.approx(0.5)
    assert brightness(clip) == list(clip.places)
    assert brightness(clip) == list(clip.places)  # again


def test_frames_are_rows_of_rgb() -> None:
    frame = next(open_clip(filmed(), "url").frames())
    assert frame.shape == (48, 64, 3)
    last = list(open_clip(filmed(), "url").frames())[-1]
    assert last[:, :20].mean() > 200
    assert last[:, -20:].mean() < 20


def test_short_and_long_clips_have_frames_within_limits() -> None:
    assert chosen(1, 25) == (0,)
    assert chosen(3, 25) == (0, 1, 2)
    assert chosen(50, 25) == (0, 16, 33, 49)
    assert len(chosen(100_000, 25)) == video.MAX_FRAMES
    assert brightness(open_clip(filmed(num_frames=1), "url")) == [0]


def test_a_file_that_holds_fewer_frames_than_it_says_repeats_its_last() -> None:
    clip = open_clip(filmed(), "url")
    longer = Clip(clip.data, "url", 48, 64, (*clip.places, 40, 41), clip.rate, 4.2, clip.digest, video.nothing)
    assert brightness(longer) == [*clip.places, 29, 29]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (filmed()[:1200], "broken or cut off"),
        (filmed()[:40], "broken or cut off"),
        (b"\x1a\x45\xdf\xa3" + bytes(200), "broken or cut off"),
        (b"\0\0\0\x18ftypisom" + bytes(200), "video"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "no video that is known here"),
        (filmed("mov", "mpeg4"), "a video in mpeg4; allowed are H.264"),
        (filmed("matroska", "libvpx-vp9").replace(b"V_VP9", b"V_XYZ"), "a video in an unknown codec; allowed are H.264"),
    ],
)
def test_what_cannot_be_read_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^url is .*{says}"):
        list(open_clip(data, "url").frames())


def test_a_frame_that_is_too_large_is_refused_before_it_is_decoded() -> None:
    data = filmed(size=(128, 96))
    with patch.object(video, "MAX_PIXELS", 100 * 100), pytest.raises(InvalidRequest, match="128 x 96 pixels; at most 10000"):
        open_clip(data, "url")


def test_decoding_ends_in_time() -> None:
    clip = open_clip(filmed(), "url")
    with patch.object(video, "MAX_SECONDS", -1.0), pytest.raises(InvalidRequest, match="to decode"):
        list(clip.frames())


@pytest.mark.anyio
async def test_a_client_who_leaves_ends_the_decoding_and_many_videos_are_refused() -> None:
    decoded: list[int] = []
    loader = Loader(Fetcher([], 1 << 20), lambda *_: None, 1 << 20)
    url = "data:video/mp4;base64," + b64encode(filmed(num_frames=200)).decode()

    def watched(clip: Clip) -> int:
        for frame in clip.frames():
            decoded.append(len(frame))
            from_thread.run_sync(scope.cancel)
        return len(decoded)

    with CancelScope() as scope:
        await loader.load(url, "url", lambda _: 0, prepare_clip=watched)
    assert scope.cancelled_caught
    assert len(decoded) == 1
    with pytest.raises(InvalidRequest, match="one video too many; a request may have 4"):
        await loader.load_all([(url, f"urls[{i}]") for i in range(5)], lambda _: 0, prepare_clip=lambda _: 1)
    assert await loader.load_all([(url, f"urls[{i}]") for i in range(4)], lambda _: 0, prepare_clip=lambda _: 1) == [1] * 4
    with pytest.raises(InvalidRequest, match="MP4"):
        await loader.load(url, "url", lambda _: 0)  # of a model that takes pictures only


def test_without_pyav_a_video_is_refused_with_what_is_missing() -> None:
    with patch.dict("sys.modules", {"av": None}), pytest.raises(InvalidRequest, match=r"streamserve\[video\]"):
        open_clip(filmed(), "url")


def test_pictures_of_similar_files_are_no_videos() -> None:
    assert demuxer_of(b"\0\0\0\x18ftypavif") is None
    assert demuxer_of(b"\0\0\0\x18ftypheic") is None
    assert demuxer_of(b"\x89PNG\r\n\x1a\n") is None
    assert demuxer_of(b"") is None
    assert demuxer_of(b"\0\0\0\x18ftypqt  ") == "mov"


def test_a_turned_video_is_upright() -> None:
    class Turned:
        rotation = -90

        def to_ndarray(self, **_: Any) -> Any:
            return np.arange(24, dtype=np.uint8).reshape(2, 4, 3)

    assert video._upright(Turned()).shape == (4, 2, 3)
    assert video._upright(Turned())[0, -1].tolist() == [0, 1, 2]  # clockwise: what was at the left is at the top


def test_a_clip_becomes_frames_behind_their_times(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_vl",
        "vision_config": {"patch_size": 4},
        "text_config": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64},
    }
    prepared = Family(tmp_path, config).prepare_clip(open_clip(filmed(), "url"))
    pixels = prepared.inputs["pixels"]
    assert pixels.shape == (6, 80, 112, 3)
    assert prepared.layout.text.startswith("<0.3 seconds><|vision_start|><|image_pad|>")
    assert prepared.layout.text.count("<|vision_end|>") == 3
    assert [run.grid for run in prepared.layout.runs] == [(1, 10, 14)] * 3
    assert prepared.layout.text.count("<|image_pad|>") == prepared.layout.num_tokens == 3 * 140
