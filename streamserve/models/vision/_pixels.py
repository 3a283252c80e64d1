"""Pictures on their way from a family's arrays to an encoder: batches of equal size, on its device, normalised there.

Owns what `pixels`, `scale` and `shift` among Prepared.inputs mean: bytes as the picture has them, and what each channel is
multiplied by and what is then added. Bytes are a quarter of what floats would take, while a picture waits and while it is copied.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A tensor of these numbers. Never waits for what a GPU is doing."""
    if device.type != "cuda":
        return torch.from_numpy(np.ascontiguousarray(array))
    # Copied by numpy: torch would ask a thread of every core for a part, and those then spin for milliseconds.
    kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
    staged = torch.empty(array.shape, dtype=kind, pin_memory=True)
    staged.numpy()[...] = array
    return staged.to(device, non_blocking=True)


def normalised(inputs: Sequence[Mapping[str, Any]], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The pixels of pictures of equal size, [B, C, H, W]. Those that are tiles, [N, C, H, W], stand one behind another."""
    arrays = [one["pixels"] if one["pixels"].ndim == 4 else one["pixels"][None] for one in inputs]
    joined = to_device(arrays[0] if len(arrays) == 1 else np.concatenate(arrays), device)
    scale, shift = (to_device(inputs[0][name], device)[:, None, None] for name in ("scale", "shift"))
    return torch.addcmul(shift, joined.float(), scale).to(dtype)


def by_size(inputs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Which of the pictures have pixels of the same shape."""
    groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, one in enumerate(inputs):
        groups[one["pixels"].shape].append(index)
    return list(groups.values())
