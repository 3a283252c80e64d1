"""Hugging Face folders as a source of weights: config.json beside safetensors files, read through mmap, or straight into a
GPU's memory (staging.py).

Owns the file names and the layout of that format. Knows no network.
"""

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.ops import Packed
from streamserve.models.staging import Staging

_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TABLES = {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one tensor lies: `offset` from the beginning of the file."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class FolderSource:
    """Weights of one folder, in one safetensors file or several shards. Implements checkpoint.Source.

    `stage` gives the staging memory on the way to a device; None: numbers are copied by torch. `tables` names tensors that are
    no weights: they may hold whole numbers."""

    def __init__(
        self, path: Path, stage: "Callable[[torch.device], Staging | None] | None" = None, tables: Collection[str] = ()
    ) -> None:
        self.path = path
        self._stage = stage or _stage
        self._tables = tables
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        if "quantization_config" in self.config:
            method = self.config["quantization_config"].get("quant_method")
            raise CheckpointError(
                f"{path} holds weights quantised by {method!r}; not supported yet: use the float model or a GGUF file"
            )
        self._files: dict[str, Any] = {}
        self._entries: dict[str, _Entry] = {}
        self._kinds: set[str] = set()
        self._loading: _Loading | None = None
        for shard in self._shards():
            self._open(shard)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Every tensor, with its bytes in the file."""
        return {name: entry.dtype.itemsize * prod(entry.shape) for name, entry in self._entries.items()}

    @property
    def kinds(self) -> frozenset[str]:
        """Float types of the matrices."""
        return frozenset(self._kinds)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def load(self, name: str, out: Tensor) -> None:
        if self._loading is None and (staging := self._stage(out.device)) is not None:
            self._loading = _Loading(staging)
        if self._loading is None:
            out.copy_(self.read(name))
        else:
            self._loading.load(self._entries[name], out)

    def finish(self) -> None:
        if self._loading is not None:
            self._loading.close()
            self._loading = None

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
        for name, (offset, kind, shape) in _layout(shard).items():
            if name.endswith("embeddings.position_ids"):  # 0, 1, 2 …: older versions of transformers saved them
                continue
            kinds = {**_FLOATS, **_TABLES} if name in self._tables else _FLOATS
            if kind not in kinds:
                raise CheckpointError(f"{name} in {shard} is held as {kind}; supported are {', '.join(kinds)}")
            self._files[name], self._entries[name] = file, _Entry(shard, offset, kinds[kind], shape)
            if len(shape) == 2:
                self._kinds.add(kind)


def _stage(device: torch.device) -> Staging | None:
    return None if device.type == "cpu" else Staging(CUDA(device.index or 0))


class _Loading:
    """What loading into a GPU keeps open: the files, once each, and the staging memory."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._files: dict[Path, int] = {}
        self._open = ExitStack()
        self._open.callback(staging.close)

    def load(self, entry: _Entry, out: Tensor) -> None:
        if entry.path not in self._files:
            file = self._open.enter_context(entry.path.open("rb", buffering=0))
            self._files[entry.path] = file.fileno()
        self._staging.load(self._files[entry.path], entry.offset, entry.dtype, out)

    def close(self) -> None:
        self._open.close()


def _layout(shard: Path) -> dict[str, tuple[int, str, tuple[int, ...]]]:
    """Offset in the file, type and shape of every tensor. The header: its length in 8 bytes, then JSON; data follow it.
    safe_open has checked the file before."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: (8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


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
