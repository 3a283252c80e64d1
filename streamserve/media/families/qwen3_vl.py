"""Qwen3-VL's pictures: see _qwen.py. Of a clip, each patch's frames are shown like a picture, behind their time as a text."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from streamserve.media.families._qwen import TOKEN, QwenFamily
from streamserve.messages import Layout, Run

BEGIN, END = "<|vision_start|>", "<|vision_end|>"


class Family(QwenFamily):
    """What its folder means where it is silent."""

    encoder_defaults: ClassVar[Mapping[str, Any]] = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "patch_size": 16,
    }
    settings_defaults: ClassVar[Mapping[str, Any]] = {
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    }
    marker: str | None = BEGIN + TOKEN + END  # all of it, since a clip has several in its place

    def picture_layout(self, rows: int, columns: int) -> Layout:
        plain = super().picture_layout(rows, columns)
        return Layout(BEGIN + plain.text + END, plain.runs)

    def clip_layout(self, times: Sequence[float], seconds_apart: float, rows: int, columns: int) -> Layout:
        shown = BEGIN + TOKEN * (rows * columns) + END
        run = Run(rows * columns, (1, rows, columns))
        return Layout("".join([f"<{time:.1f} seconds>{shown}" for time in times]), (run,) * len(times))
