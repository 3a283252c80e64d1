"""Where weights come from, as networks and checkpoints see it: a GGUF file, a folder, random numbers, or a part of one.

Owns nothing. Knows no file format.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from streamserve.kernels.ops import Packed


class Source(Protocol):
    """Where weights come from. Names are Hugging Face's."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @property
    def sizes(self) -> Mapping[str, int]: ...  # bytes of every tensor held
    @property
    def kinds(self) -> frozenset[str]: ...  # how matrices are held: Q4_1, F32, ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> Tensor: ...
    def load(self, name: str, out: Tensor) -> None: ...  # the same, into memory that is there; any float type and device
    def finish(self) -> None: ...  # give back what load() keeps between calls
    def packed(self, name: str) -> Packed | None: ...
