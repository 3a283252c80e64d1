"""Hugging Face folders as a source of weights: config.json beside safetensors files, read through mmap.

Owns the file names of that format. Knows no network.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.kernels.ops import Packed

_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class FolderSource:
    """Weights of one folder, in one safetensors file or several shards. Implements checkpoint.Source."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        if "quantization_config" in self.config:
            method = self.config["quantization_config"].get("quant_method")
            raise CheckpointError(
                f"{path} holds weights quantised by {method!r}; not supported yet: use the float model or a GGUF file"
            )
        self._files: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._kinds: set[str] = set()
        for shard in self._shards():
            self._open(shard)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Every tensor, with its bytes in the file."""
        return self._sizes

    @property
    def kinds(self) -> frozenset[str]:
        """Float types of the matrices."""
        return frozenset(self._kinds)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def packed(self, name: str) -> Packed | None:
        return None

    def _shards(self) -> list[Path]:
        if (self.path / _INDEX).is_file():
            names = sorted(set(read_json(self.path / _INDEX)["weight_map"].values()))
            missing = [name for name in names if not (self.path / name).is_file()]
            if missing:
                raise CheckpointError(f"{self.path} lacks {', '.join(missing)}, named by {_INDEX}: download the model again")
            return [self.path / name for name in names]
        files = sorted(self.path.glob("*.safetensors"))
        if (self.path / "model.safetensors") in files:
            return [self.path / "model.safetensors"]
        if files:
            return files
        if any(self.path.glob("*.bin")):
            raise CheckpointError(
                f"{self.path} holds weights as torch pickles (.bin), which can run code when read; convert them to safetensors"
            )
        raise CheckpointError(f"{self.path} holds no .safetensors file; for random weights add --load-format dummy")

    def _open(self, shard: Path) -> None:
        try:
            file: Any = safe_open(shard, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} cannot be read ({error}): download it again") from error
        for name in file.keys():  # noqa: SIM118 - not a dict: it has no iterator
            described = file.get_slice(name)
            shape, kind = described.get_shape(), described.get_dtype()
            if kind not in _FLOATS:
                raise CheckpointError(f"{name} in {shard} is held as {kind}; supported are {', '.join(_FLOATS)}")
            self._files[name], self._sizes[name] = file, _FLOATS[kind] * prod(shape)
            if len(shape) == 2:
                self._kinds.add(kind)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value
