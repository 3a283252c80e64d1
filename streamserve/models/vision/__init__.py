"""Encoders of vision models, one file per family, named after Hugging Face's model_type: class Vision. Of what hears, too.

Owns the type they share and how a file is found. A folder of such a model holds the weights of a language model as well; which
are whose only the family knows.
"""

import importlib
import pkgutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from streamserve.errors import CheckpointError

Read = Callable[[str], Tensor]  # a weight by its canonical name, on the right device and in the right type
Repeat = Callable[[Callable[[Tensor], Tensor], Tensor, Hashable], Tensor]


def at_once(run: Callable[[Tensor], Tensor], x: Tensor, key: Hashable) -> Tensor:
    """The Repeat of a device on which launches cost nothing."""
    return run(x)


class Vision:
    """An encoder and the projector behind it: arrays of pictures (or sounds) to embeddings in the language model's stream.

    `num_deepstack`: so many further embeddings stand beside each, to be added to the stream behind the first layers (Qwen3-VL);
    what encode() returns is then (1 + num_deepstack) times as wide as the stream. `whole_spans`: places of a picture look at
    each other in both directions, so that a run must be computed in one piece (Gemma 3). `repeat` calls functions that launch
    alike whenever the key and the shape of what goes in are alike, and wait for nothing: a runner may put one here that records
    them (kernels/devices/recorder.py).
    """

    repeat: Repeat = staticmethod(at_once)
    num_deepstack: int = 0
    whole_spans: ClassVar[bool] = False

    @staticmethod
    def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
        """The language model's own config.json, whose model_type has a file in models/."""
        raise NotImplementedError

    @staticmethod
    def text_name(name: str) -> str | None:
        """What the language model calls a weight that the folder calls `name`; None: it is not the language model's."""
        raise NotImplementedError

    @staticmethod
    def encoder_name(name: str) -> str | None:
        """The canonical name of a weight of the encoder or projector; None: it is the language model's, or no weight. Folders
        written by several versions of transformers name weights differently."""
        raise NotImplementedError

    @classmethod
    def weights(cls, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Canonical name and shape of every weight of encoder and projector."""
        raise NotImplementedError

    @classmethod
    def deepstack_of(cls, config: Mapping[str, Any]) -> int:
        """`num_deepstack` before anything is loaded."""
        return 0

    def __init__(self, config: Mapping[str, Any], read: Read, *, device: torch.device, dtype: torch.dtype) -> None:
        """`read` gives the weights by canonical name. `config` is the folder's whole config.json."""
        raise NotImplementedError

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """The embeddings [places, width] of each picture, from the arrays that its family prepared (media.family.Prepared).
        Only launches on a GPU."""
        raise NotImplementedError


def find(model_type: str) -> type[Vision]:
    """The Vision class of the file named like `model_type`. Raises CheckpointError."""
    if model_type not in supported_types():
        raise CheckpointError(f"model_type {model_type!r} has no encoder here; these do: {', '.join(supported_types())}")
    vision: type[Vision] = importlib.import_module(f"{__name__}.{model_type}").Vision
    return vision


def supported_types() -> list[str]:
    """Every model_type that has a file here. Files whose names begin with _ are parts that several share."""
    return sorted(entry.name for entry in pkgutil.iter_modules(__path__) if not entry.name.startswith("_"))
