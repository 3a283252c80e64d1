"""The two parts of a vision model's folder: the language model as if it had a folder of its own, and the encoder.

Owns who calls a weight how. Knows no network; the encoders are in vision/.
"""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.kernels.ops import Packed
from streamserve.models.source import Source
from streamserve.models.vision import Vision, find


class PartSource:
    """Some weights of a source under other names, with a config of their own. Implements checkpoint.Source."""

    def __init__(self, source: Source, config: Mapping[str, Any], name_of: Callable[[str], str | None]) -> None:
        self.path = source.path
        self.config = dict(config)
        self.generation_config = source.generation_config
        self._source = source
        self._names = {ours: name for name in source.sizes if (ours := name_of(name)) is not None}

    @property
    def sizes(self) -> Mapping[str, int]:
        sizes = self._source.sizes
        return {ours: sizes[name] for ours, name in self._names.items()}

    @property
    def kinds(self) -> frozenset[str]:
        return self._source.kinds

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name])

    def read(self, name: str) -> Tensor:
        return self._source.read(self._names[name])

    def load(self, name: str, out: Tensor) -> None:
        self._source.load(self._names[name], out)

    def finish(self) -> None:
        self._source.finish()

    def packed(self, name: str) -> Packed | None:
        return self._source.packed(self._names[name])


class OpenVision:
    """An encoder whose weights are known to be there and have yet to be read."""

    def __init__(self, source: Source, config: Mapping[str, Any]) -> None:
        """`source`: of the encoder's weights under their canonical names; `config`: the whole of config.json. Raises
        CheckpointError."""
        self.kind: type[Vision] = find(str(config.get("model_type")))
        self.config = config
        self._source = source
        self._shapes = self.kind.weights(config)
        missing = sorted(self._shapes.keys() - source.sizes.keys())
        wrong = [name for name, shape in self._shapes.items() if name in source.sizes and source.shape(name) != shape]
        if missing or wrong:
            name = (missing or wrong)[0]
            what = "is missing" if missing else f"has shape {source.shape(name)}; config asks for {self._shapes[name]}"
            raise CheckpointError(f"{source.path}: the encoder's weight {name} {what}")

    @property
    def path(self) -> Path:
        """The folder."""
        return self._source.path

    @property
    def num_deepstack(self) -> int:
        """See Vision."""
        return self.kind.deepstack_of(self.config)

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights of the encoder."""
        return sum(prod(shape) for shape in self._shapes.values())

    def load(self, device: torch.device, dtype: torch.dtype) -> Vision:
        """Read the weights. Blocks."""

        def read(name: str) -> Tensor:
            out = torch.empty(self._shapes[name], dtype=dtype, device=device)
            self._source.load(name, out)
            return out

        vision = self.kind(self.config, read, device=device, dtype=dtype)
        self._source.finish()
        return vision
