"""Models on the Hugging Face hub: fetched into the local cache, with a progress bar."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from streamserve.errors import CheckpointError

_CONFIG_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
_WEIGHT_FILES = ("*.safetensors",)


def download(hub_id: str, *, revision: str | None = None, config_only: bool = False) -> Path:
    """The folder of a hub model, downloaded if it is not in the cache yet. Blocks. Raises CheckpointError."""
    patterns = [*_CONFIG_FILES, *(() if config_only else _WEIGHT_FILES)]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no model {hub_id!r} that you may read; check the name, or log in with `hf auth login` if it is gated"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id!r} is not in the local cache and the hub cannot be reached; connect, set HF_ENDPOINT to a mirror, "
            "or give the path of a .gguf file or a folder"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{hub_id!r} is neither an existing path nor a valid hub id (owner/name)") from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"downloading {hub_id!r} failed: {error}") from error
