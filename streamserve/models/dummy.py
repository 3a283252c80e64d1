"""Random weights for a folder that holds config.json only: the same for every run. For tests and benchmarks."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from streamserve.kernels.ops import Packed
from streamserve.models import find
from streamserve.models.spec import read_spec
from streamserve.models.vision import find as find_vision


class RandomSource:
    """Weights drawn from a generator seeded by each weight's name. Implements checkpoint.Source."""

    def __init__(self, path: Path, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path = path
        self.config = config
        self.generation_config: dict[str, Any] = {}
        self._shapes = shapes

    @property
    def sizes(self) -> Mapping[str, int]:
        """Every tensor the family needs, as float32."""
        return {name: 4 * prod(shape) for name, shape in self._shapes.items()}

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset({"F32"})

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        tensor = torch.empty(self._shapes[name])
        self.load(name, tensor)
        return tensor

    def load(self, name: str, out: Tensor) -> None:
        """Norms are 1, biases 0, matrices normal with deviation 1 / sqrt(inputs): activations and logits stay near 1. Drawn
        where `out` lies and in its type, so that nothing is copied; every kind of device has its own numbers."""
        if out.ndim == 1:
            out.fill_(0.0 if name.endswith(".bias") else 1.0)
            return
        generator = torch.Generator(out.device).manual_seed(crc32(name.encode()))
        out.normal_(0.0, out[0].numel() ** -0.5, generator=generator)

    def finish(self) -> None: ...

    def packed(self, name: str) -> Packed | None:
        return None


def random_model(path: Path, config: dict[str, Any]) -> RandomSource:
    """The weights of a language model with this config."""
    model = find(str(config.get("model_type")))
    spec = read_spec(config, model.traits(config))
    return RandomSource(path, config, {**model.weights(spec), **model.optional_weights(spec)})


def random_vision(path: Path, config: dict[str, Any]) -> RandomSource:
    """The weights of the encoder of a vision model with this config."""
    return RandomSource(path, config, find_vision(str(config.get("model_type"))).weights(config))
