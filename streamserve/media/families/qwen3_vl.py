"""Qwen3-VL's pictures: see _qwen.py. Of a clip, each patch's frames are shown like a picture, behind their time as a text."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from streamserve.media.families._qwen import QwenFamily, shown
from streamserve.messages import Layout, Run


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

    def clip_layout(self, times: Sequence[float], seconds_apart: float, rows: int, columns: int) -> Layout:
        num_places, grid = rows * columns, (1, rows, columns)
        text = "".join([f"<{time:.1f} seconds>{shown(num_places)}" for time in times])
        return Layout(text, (Run(num_places, grid),) * len(times))
