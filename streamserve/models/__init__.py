"""Model families, one file each, named after Hugging Face's model_type."""

import importlib
import pkgutil

from streamserve.errors import CheckpointError
from streamserve.models.bert import FAMILIES
from streamserve.models.decoder import Decoder


def find(model_type: str) -> type[Decoder]:
    """The Model class of the file named like `model_type`. Raises CheckpointError listing what is supported."""
    supported = supported_types()
    file_name = model_type.replace("-", "_")
    if file_name not in supported:
        hint = "; it is an encoder: name it with --embedding-model" if model_type in FAMILIES else ""
        raise CheckpointError(f"model_type {model_type!r} is not supported; supported are {', '.join(supported)}{hint}")
    model: type[Decoder] = importlib.import_module(f"{__name__}.{file_name}").Model
    return model


def supported_types() -> list[str]:
    """Every model_type that has a file here."""
    return sorted(entry.name for entry in pkgutil.iter_modules(__path__) if entry.name not in _NOT_FAMILIES)


_NOT_FAMILIES = frozenset(
    {
        *("bert", "causal", "checkpoint", "decoder", "device_heads", "drafting", "dummy", "eagle", "encoder", "gguf_file"),
        *("heads", "hf_folder", "hub", "layers", "mtp", "network", "packing", "part", "pooling"),
        *("source", "spec", "staging", "vision"),
    }
)
