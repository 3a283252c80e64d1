"""Checkpoints: a model's numbers and weights, wherever they come from.

Owns the check that a source holds exactly the weights its family needs, and the loading progress. The sources (GGUF file,
Hugging Face folder, random) know their own formats.
"""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.kernels.ops import Packed
from streamserve.models import find
from streamserve.models.dummy import random_model, random_vision
from streamserve.models.gguf_file import GGUFSource
from streamserve.models.hf_folder import FolderSource, read_json
from streamserve.models.hub import download
from streamserve.models.part import OpenVision, PartSource
from streamserve.models.source import Source
from streamserve.models.spec import ModelSpec, read_spec
from streamserve.models.vision import find as find_vision
from streamserve.models.vision import supported_types as vision_types

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Checkpoint:
    """An open checkpoint, known to hold every weight its family needs. Implements kernels.ops.Weights.

    Reading runs in the caller's thread.
    """

    def __init__(self, source: Source, progress: Progress | None = None, vision: OpenVision | None = None) -> None:
        """`vision`: the encoder beside it; None: the model sees nothing."""
        self.vision = vision
        self._source = source
        self._progress = progress
        self.model = find(str(source.config.get("model_type")))
        self.spec: ModelSpec = read_spec(source.config, self.model.traits(source.config), source.generation_config)
        self._shapes = self.model.weights(self.spec)
        optional = self.model.optional_weights(self.spec)
        # Whether the layers that guess tokens ahead are there: some copies of a model lack them.
        self.has_optional_weights = any(name in source.sizes for name in optional)
        self._optional = optional if self.has_optional_weights else {}
        self._check_names()
        self._sizes = {name: source.sizes[name] for name in self._shapes}
        self._read: set[str] = set()
        self._bytes_read = 0

    @property
    def path(self) -> Path:
        """The file or folder that was opened (for a hub id, the local copy)."""
        return self._source.path

    @property
    def names(self) -> frozenset[str]:
        """Every weight of the network itself, by Hugging Face name."""
        return frozenset(self._shapes)

    @property
    def weight_kinds(self) -> frozenset[str]:
        """How the matrices are held: ggml types (Q4_1, ...) or float types (F32, BF16, ...)."""
        return self._source.kinds

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights as they are stored."""
        return sum(self._sizes.values())

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights."""
        return sum(prod(shape) for shape in self._shapes.values())

    @property
    def num_optional_parameters(self) -> int:
        """Numbers in the weights that answers do not need."""
        return sum(prod(shape) for shape in self._optional.values())

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """generation_config.json, or nothing."""
        return self._source.generation_config

    def tensor(self, name: str) -> Tensor:
        """A weight as a float tensor (float32, bfloat16 or float16), dequantised if need be."""
        self._check_shape(name)
        tensor = self._source.read(name)
        self._count(name)
        return tensor

    def load(self, name: str, out: Tensor) -> None:
        """Fill `out` with a weight. On a GPU the last bytes may be under way, in stream order. Call `finish` in the end."""
        self._check_shape(name)
        wanted = self._wanted_shape(name)
        assert tuple(out.shape) == wanted, f"{name}: {tuple(out.shape)} is not {wanted}"
        self._source.load(name, out)
        self._count(name)

    def finish(self) -> None:
        """All weights are loaded: give back the memory and threads that loading took. May be called twice."""
        self._source.finish()

    def packed(self, name: str) -> Packed | None:
        """A matrix still quantised, or None when it is not held so."""
        packed = self._source.packed(name)
        if packed is not None:
            self._count(name)
        return packed

    def _count(self, name: str) -> None:
        if name in self._read or name in self._optional:  # a tied head reads the embedding twice
            return
        self._read.add(name)
        self._bytes_read += self._sizes[name]
        if self._progress is not None:
            self._progress(self._bytes_read, self.num_bytes)

    def _check_shape(self, name: str) -> None:
        held, wanted = self._source.shape(name), self._wanted_shape(name)
        if held != wanted:
            raise CheckpointError(f"{name} in {self.path} has shape {held}; config asks for {wanted}")

    def _wanted_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._shapes else self._optional[name]

    def _check_names(self) -> None:
        held, known = set(self._source.sizes), {*self._shapes, *self._optional}
        missing = sorted(known - held)
        extra = sorted(name for name in held - known if not self._is_harmless(name))
        if missing or extra:
            parts = [f"{_listed(names)} {word}" for names, word in ((missing, "missing"), (extra, "unknown")) if names]
            raise CheckpointError(
                f"{self._source.path} does not hold the weights of a {self.spec.model_type} network with its config: "
                + "; ".join(parts)
            )

    def _is_harmless(self, name: str) -> bool:
        """Tensors some files hold although the network derives them: a tied head, RoPE frequencies."""
        return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and self.spec.tie_embeddings)


def open_checkpoint(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    load_format: str = "auto",
    progress: Progress | None = None,
) -> Checkpoint:
    """Open a GGUF file, a Hugging Face folder or a hub id (downloaded first). Blocks. Raises CheckpointError.

    `load_format` "dummy" needs a folder with config.json only and draws random weights. `progress` is called while
    weights are read, with bytes done and bytes in all."""
    path = locate(path_or_id, revision=revision, config_only=load_format == "dummy")
    if path.suffix == ".gguf" and load_format != "dummy":
        return Checkpoint(GGUFSource(path), progress)
    return _of_config(path, read_json(path / "config.json"), is_dummy=load_format == "dummy", progress=progress)


def open_eyes(folder: Path) -> OpenVision:
    """The encoder of a vision model's folder, for a language model that comes from elsewhere. Raises CheckpointError."""
    config = read_json(folder / "config.json")
    kind = find_vision(str(config.get("model_type")))
    return OpenVision(PartSource(FolderSource(folder), config, kind.encoder_name), config)


def _of_config(path: Path, config: dict[str, Any], *, is_dummy: bool, progress: Progress | None) -> Checkpoint:
    """A folder as one language model, or as that and an encoder."""
    if config.get("model_type") not in vision_types():
        return Checkpoint(random_model(path, config) if is_dummy else FolderSource(path), progress)
    kind = find_vision(str(config["model_type"]))
    text_config = kind.text_config(config)
    if is_dummy:
        return Checkpoint(random_model(path, text_config), progress, OpenVision(random_vision(path, config), config))
    folder = FolderSource(path)
    vision = OpenVision(PartSource(folder, config, kind.encoder_name), config)
    text = PartSource(folder, text_config, kind.text_name)
    text.config.setdefault("tie_word_embeddings", "lm_head.weight" not in text.sizes)
    return Checkpoint(text, progress, vision)


def locate(path_or_id: str | Path, *, revision: str | None = None, config_only: bool = False) -> Path:
    """The local GGUF file or folder behind a path or hub id; downloads a hub id."""
    path = Path(path_or_id).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is not a model: give a .gguf file or the folder that holds config.json")
        return path
    if path.is_dir():
        return _in_folder(path)
    if not _is_hub_id(str(path_or_id)):
        raise CheckpointError(f"{path_or_id} does not exist; give a .gguf file, a Hugging Face folder or a hub id (owner/name)")
    return _in_folder(download(str(path_or_id), revision=revision, config_only=config_only))


def _in_folder(folder: Path) -> Path:
    """A folder with config.json is a model; one with a single GGUF file (or one split set) stands for that file."""
    if (folder / "config.json").is_file():
        return folder
    files = sorted(file for file in folder.glob("*.gguf") if "-of-" not in file.name or "-00001-of-" in file.name)
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(f"{folder} holds {len(files)} models; name one: {', '.join(file.name for file in files)}")
    raise CheckpointError(f"{folder} holds neither config.json nor a .gguf file")


def _is_hub_id(text: str) -> bool:
    parts = text.split("/")
    return 1 <= len(parts) <= 2 and all(part and not part.startswith((".", "~")) for part in parts)


def _listed(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
