"""StreamServe: an asyncio-native streaming server for large language models; its language for programs, and its engine offline.

Everything public is here under one name, and is loaded when it is first asked for: `import streamserve` loads nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Where each public name comes from.
_HOMES = {
    "streamserve.api.app": ("create_app",),
    "streamserve.errors": ("StreamServeError",),
    "streamserve.lang": (
        "assistant",
        "assistant_begin",
        "assistant_end",
        "flush_cache",
        "function",
        "gen",
        "gen_int",
        "gen_string",
        "get_server_info",
        "global_config",
        "greedy_token_selection",
        "image",
        "select",
        "separate_reasoning",
        "set_default_backend",
        "system",
        "system_begin",
        "system_end",
        "token_length_normalized",
        "unconditional_likelihood_normalized",
        "user",
        "user_begin",
        "user_end",
        "video",
    ),
    "streamserve.lang.anthropic": ("Anthropic",),
    "streamserve.lang.endpoint": ("RuntimeEndpoint",),
    "streamserve.lang.openai": ("OpenAI",),
    "streamserve.lang.runtime": ("Runtime",),
    "streamserve.llm": ("LLM", "Engine", "SamplingParams"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    """A public name, on its first use (PEP 562)."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(home), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
