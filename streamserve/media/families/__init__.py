"""One file per family of models that see or hear, named after Hugging Face's model_type: how pictures or sounds are prepared."""

import importlib
import pkgutil

from streamserve.errors import CheckpointError
from streamserve.media.family import MakeFamily
from streamserve.messages import AUDIO

HEARING = frozenset({"qwen2_audio"})  # these take sounds, and no pictures


def find(model_type: str) -> MakeFamily:
    """The Family class of the file named like `model_type`. Raises CheckpointError."""
    if model_type not in supported_types():
        raise CheckpointError(
            f"model_type {model_type!r} takes neither pictures nor sounds here; these do: {', '.join(supported_types())}"
        )
    made: MakeFamily = importlib.import_module(f"{__name__}.{model_type}").Family
    return made


def supported_types() -> list[str]:
    """Every model_type that has a file here. Files whose names begin with _ are parts that several share."""
    return sorted(entry.name for entry in pkgutil.iter_modules(__path__) if not entry.name.startswith("_"))


def types_that_take(kind: str) -> list[str]:
    """Those of them whose models take this kind of media."""
    return [model_type for model_type in supported_types() if (model_type in HEARING) == (kind == AUDIO)]
