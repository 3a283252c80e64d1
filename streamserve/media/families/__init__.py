"""One file per family of vision models, named after Hugging Face's model_type: how its pictures are prepared."""

import importlib
import pkgutil

from streamserve.errors import CheckpointError
from streamserve.media.family import MakeFamily


def find(model_type: str) -> MakeFamily:
    """The Family class of the file named like `model_type`. Raises CheckpointError."""
    if model_type not in supported_types():
        raise CheckpointError(f"model_type {model_type!r} takes no pictures here; these do: {', '.join(supported_types())}")
    made: MakeFamily = importlib.import_module(f"{__name__}.{model_type}").Family
    return made


def supported_types() -> list[str]:
    """Every model_type that has a file here. Files whose names begin with _ are parts that several share."""
    return sorted(entry.name for entry in pkgutil.iter_modules(__path__) if not entry.name.startswith("_"))
