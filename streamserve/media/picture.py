"""A picture as everything behind the decoder knows it. Knows no file formats."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """Upright, opaque, RGB. `digest` is the SHA-256 of the file that it came in."""

    pixels: NDArray[np.uint8]  # [H, W, 3]
    digest: bytes

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.pixels.shape[1])
