"""From states to vectors: pooling, dense layers and normalising, as the modules of a sentence-transformers folder say.

Owns the meaning of modules.json and the files it names. Knows no network.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.models.hf_folder import FolderSource, read_json
from streamserve.models.packing import PackedBatch

_POOLING = ("cls", "mean", "max", "mean_sqrt_len_tokens", "lasttoken")
_DENSE_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"Tanh": torch.tanh, "Identity": lambda x: x, "ReLU": F.relu}

Step = Callable[[Tensor], Tensor]


class Modules:
    """modules.json of sentence-transformers: what becomes of the network's states. Without one: the network's
    default pooling, normalised."""

    def __init__(self, folder: Path, hidden_size: int, default_pooling: str) -> None:
        self.dimension = hidden_size
        self.pooling = default_pooling
        self.is_normalised = False
        self.steps: list[Callable[[torch.device], Step]] = []
        path = folder / "modules.json"
        entries = _read_list(path) if path.is_file() else [{"type": "models.Normalize"}]
        for entry in entries:
            kind = str(entry.get("type", "")).rsplit(".", 1)[-1]
            place = folder / str(entry.get("path", ""))
            match kind:
                case "Transformer":
                    pass
                case "Pooling":
                    if self.steps:
                        raise CheckpointError(f"{path} names Pooling behind Dense or Normalize; supported is the reverse order")
                    self.pooling = _pooling_mode(place / "config.json")
                case "Dense":
                    self._add_dense(place)
                case "Normalize":
                    self.is_normalised = True
                    self.steps.append(lambda device: _normalised)
                case _:
                    raise CheckpointError(
                        f"{path} names the module {kind!r}; supported are Transformer, Pooling, Dense, Normalize"
                    )

    def _add_dense(self, place: Path) -> None:
        config = read_json(place / "config.json")
        name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
        if name not in _DENSE_ACTIVATIONS:
            raise CheckpointError(
                f"{place}/config.json: activation_function is {name}; supported are {', '.join(_DENSE_ACTIVATIONS)}"
            )
        activation = _DENSE_ACTIVATIONS[name]
        source = FolderSource(place)
        held = {name: source.shape(name) for name in source.sizes}
        shape = held.get("linear.weight", ())
        if len(shape) != 2 or shape[1] != self.dimension or held.get("linear.bias", shape[:1]) != shape[:1]:
            raise CheckpointError(f"{place} holds {held}; a linear.weight with {self.dimension} columns is needed, and its bias")
        self.dimension = shape[0]

        def step(device: torch.device) -> Step:
            weight = source.read("linear.weight").to(device, torch.float32)
            bias = source.read("linear.bias").to(device, torch.float32) if "linear.bias" in held else None
            return lambda rows: activation(F.linear(rows, weight, bias))

        self.steps.append(step)


def _read_list(path: Path) -> list[dict[str, Any]]:
    try:
        entries = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path} does not hold a list of modules")
    return entries


def _pooling_mode(path: Path) -> str:
    config = read_json(path)
    modes = [str(config["pooling_mode"])] if "pooling_mode" in config else []
    modes += [key.removeprefix("pooling_mode_") for key, value in config.items() if key.startswith("pooling_mode_") and value]
    modes = [mode.removesuffix("_tokens").removesuffix("_token") if mode not in _POOLING else mode for mode in modes]
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise CheckpointError(
            f"{path} asks for the pooling {' and '.join(modes) or 'none'}; supported is one of {', '.join(_POOLING)}"
        )
    if config.get("include_prompt") is False and modes[0] not in ("cls", "lasttoken"):
        raise CheckpointError(f"{path}: include_prompt is false; supported is pooling over all tokens, a prompt's too")
    return modes[0]


def first_tokens(batch: PackedBatch) -> Tensor:
    """Where each sequence begins."""
    return batch.lengths_B.cumsum(0) - batch.lengths_B


def pooled(mode: str, x_TE: Tensor, batch: PackedBatch) -> Tensor:
    """One float32 row per sequence."""
    match mode:
        case "cls":
            return x_TE[first_tokens(batch)].float()
        case "lasttoken":
            return x_TE[batch.lengths_B.cumsum(0) - 1].float()
        case "max":
            return torch.segment_reduce(x_TE.float(), "max", lengths=batch.lengths_B)
        case "mean":
            return torch.segment_reduce(x_TE.float(), "mean", lengths=batch.lengths_B)
    assert mode == "mean_sqrt_len_tokens"
    return torch.segment_reduce(x_TE.float(), "sum", lengths=batch.lengths_B) / batch.lengths_B.sqrt()[:, None]


def _normalised(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1)
