"""Pictures that come as tiles of one size, and places that stand for several patches each.

Owns the way back from a batch of tiles to pictures, and the order in which patches of a square are joined (pixel shuffle, as
Idefics 3 and InternVL have it). Shape letters: N tiles, P patches or places of each, D numbers of each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, split

from streamserve.errors import CheckpointError


def joined_squares(x_NPD: Tensor, side: int) -> Tensor:
    """Each `side` x `side` square of patches as one place, [N, P / side², D * side²], row after row within the square. Tiles are
    squares too."""
    count, num_patches, width = x_NPD.shape
    rows = int(num_patches**0.5)
    cut = x_NPD.reshape(count, rows // side, side, rows // side, side, width).permute(0, 1, 3, 2, 4, 5)
    return cut.reshape(count, num_patches // side**2, width * side**2)


def of_pictures(x_NPD: Tensor, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """What was computed of all tiles, picture after picture: [its tiles * P, D] of each."""
    counts = [len(one["pixels"]) for one in inputs]
    return [part.flatten(0, 1) for part in split(x_NPD, counts)]


def check_squares(image_size: int, patch_size: int, side: int) -> None:
    """That patches of a tile can be joined by squares. Raises CheckpointError."""
    if image_size // patch_size % side:
        raise CheckpointError(
            f"config.json: a tile of {image_size} has {image_size // patch_size} patches of {patch_size} along a side, which "
            f"cannot be joined by squares of {side}"
        )
