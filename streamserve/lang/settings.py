"""What holds for all programs of a process: the back end they run on where none is named.

Owns that one object and how a back end is found from what users pass.
"""

from dataclasses import dataclass
from typing import Any, cast

from streamserve.lang.backend import Backend
from streamserve.lang.loops import run


@dataclass(slots=True)
class GlobalConfig:
    """SGLang's global_config, as far as it means something here."""

    default_backend: Any = None
    enable_precache_with_tracing: bool = True  # a batch lets one program compute what all share (gates.Leader)


global_config = GlobalConfig()


def set_default_backend(backend: Any) -> None:
    """What programs run on from now on where `run(backend=...)` names nothing else: an endpoint, a runtime, an engine."""
    if backend is not None:
        backend_of(backend)
    global_config.default_backend = backend


def backend_of(backend: Any = None) -> Backend:
    """The back end itself behind what a user passed, or behind the default."""
    found = global_config.default_backend if backend is None else backend
    if found is None:
        raise RuntimeError(
            "there is no back end: call set_default_backend(RuntimeEndpoint(url)), or set_default_backend(Engine(model_path)), "
            "or pass backend=..."
        )
    found = getattr(found, "endpoint", found)
    if isinstance(found, type) or not all(callable(getattr(found, name, None)) for name in ("roles", "generate", "choose")):
        raise TypeError(f"backend is {found!r}; allowed are an endpoint (RuntimeEndpoint(url)), a runtime and an engine")
    return cast(Backend, found)


def flush_cache(backend: Any = None) -> bool:
    """Makes the server forget all prefixes."""
    run(backend_of(backend).flush_cache())
    return True


def get_server_info(backend: Any = None) -> dict[str, Any]:
    """What the server says of itself."""
    return run(backend_of(backend).server_info())
