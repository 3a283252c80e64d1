"""What families' preparations have in common: a folder's settings for pictures, resizing, cropping, normalising.

Owns how preprocessor_config.json is read. Resizing is Pillow's, so that every byte is what transformers' processors (with their
backend "pil") give; the tests hold each family to them. Knows no model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from streamserve.errors import CheckpointError

Pixels = NDArray[np.uint8]  # [H, W, 3]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
BICUBIC = 3
MAX_RESIZED = (
    8 << 20
)  # pixels: of what becomes larger only the part that is kept is computed, at the price of a bit here and there


def read_settings(folder: Path) -> dict[str, Any]:
    """The image processor's settings of a folder: of preprocessor_config.json, or in processor_config.json, where transformers 5
    puts them; nothing where there are none. Raises CheckpointError."""
    own, whole = _read(folder / "preprocessor_config.json"), _read(folder / "processor_config.json")
    if own is None and whole is not None:
        own = whole.get("image_processor")
    return dict(own or {})


def read_processor(folder: Path) -> dict[str, Any]:
    """What a folder says of how pictures and text are put together: processor_config.json, or nothing. Raises CheckpointError."""
    return dict(_read(folder / "processor_config.json") or {})


def token_text(folder: Path, token_id: Any) -> str | None:
    """The text of a special token; None where the folder has no tokenizer of its own or `token_id` is None. Raises
    CheckpointError where it has one, and this token is not in it."""
    tokenizer = _read(folder / "tokenizer.json")
    if tokenizer is None or token_id is None:
        return None
    for entry in tokenizer.get("added_tokens") or ():
        if entry.get("id") == token_id:
            return str(entry["content"])
    added = (_read(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder") or {}
    if (entry := added.get(str(token_id))) is not None:
        return str(entry["content"])
    raise CheckpointError(
        f"{folder}: config.json names token {token_id} for pictures, and tokenizer.json has no such special token"
    )


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found


def normalising(
    settings: Mapping[str, Any], mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> dict[str, NDArray[np.float32]]:
    """What the encoder multiplies bytes by and then adds, per channel: `scale` and `shift` of Prepared.inputs. `mean` and `std`:
    where the settings name none."""
    factor = float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0
    if not settings.get("do_normalize", True):
        return {"scale": np.full(3, factor, np.float32), "shift": np.zeros(3, np.float32)}
    middle = np.broadcast_to(np.asarray(settings.get("image_mean", mean), np.float64), 3)
    spread = np.broadcast_to(np.asarray(settings.get("image_std", std), np.float64), 3)
    return {"scale": (factor / spread).astype(np.float32), "shift": (-middle / spread).astype(np.float32)}


def resized(pixels: Pixels, height: int, width: int, resample: int = BICUBIC) -> Pixels:
    """The picture in another size. `resample`: Pillow's number of the filter."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling(resample)))


def middle_of_resized(pixels: Pixels, height: int, width: int, crop: tuple[int, int], resample: int = BICUBIC) -> Pixels:
    """The middle of the picture in another size, of the height and width that `crop` says; where it is smaller, with black
    around it."""
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    if height * width > MAX_RESIZED and top >= 0 and left >= 0:
        y, x = pixels.shape[0] / height, pixels.shape[1] / width
        box = (left * x, top * y, (left + crop[1]) * x, (top + crop[0]) * y)
        return np.asarray(Image.fromarray(pixels).resize((crop[1], crop[0]), Image.Resampling(resample), box))
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling(resample))
    if top >= 0 and left >= 0:
        return np.asarray(image.crop((left, top, left + crop[1], top + crop[0])))
    missing_y, missing_x = max(0, crop[0] - height), max(0, crop[1] - width)
    above, before = -(-missing_y // 2), -(-missing_x // 2)
    larger = np.pad(np.asarray(image), ((above, missing_y - above), (before, missing_x - before), (0, 0)))
    top, left = (larger.shape[0] - crop[0]) // 2, (larger.shape[1] - crop[1]) // 2
    return larger[top : top + crop[0], left : left + crop[1]]


def channels_first(pixels: Pixels) -> NDArray[np.uint8]:
    """[3, H, W], in one piece."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def cut(pixels: Pixels, side: int) -> NDArray[np.uint8]:
    """Square tiles of this many pixels, row after row, [N, 3, side, side]. The picture is whole tiles."""
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    return pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
