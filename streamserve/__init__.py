"""StreamServe: an asyncio-native streaming server for large language models; its language for programs, and its engine offline.

Everything public is here under one name, and is loaded when it is first asked for: `import streamserve` loads nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the names below, for tools that read this file and do not run it
    from streamserve.api.app import create_app
    from streamserve.errors import StreamServeError
    from streamserve.lang import (
        assistant,
        assistant_begin,
        assistant_end,
        flush_cache,
        function,
        gen,
        gen_int,
        gen_string,
        get_server_info,
        global_config,
        image,
        select,
        separate_reasoning,
        set_default_backend,
        system,
        system_begin,
        system_end,
        user,
        user_begin,
        user_end,
        video,
    )
    from streamserve.lang.anthropic import Anthropic
    from streamserve.lang.choices import greedy_token_selection, token_length_normalized, unconditional_likelihood_normalized
    from streamserve.lang.endpoint import RuntimeEndpoint
    from streamserve.lang.openai import OpenAI
    from streamserve.lang.runtime import Runtime
    from streamserve.llm import LLM, Engine, SamplingParams

# Where public names come from that are not the language's own.
_HOMES = {
    "streamserve.api.app": ("create_app",),
    "streamserve.errors": ("StreamServeError",),
    "streamserve.lang.anthropic": ("Anthropic",),
    "streamserve.lang.choices": ("greedy_token_selection", "token_length_normalized", "unconditional_likelihood_normalized"),
    "streamserve.lang.endpoint": ("RuntimeEndpoint",),
    "streamserve.lang.openai": ("OpenAI",),
    "streamserve.lang.runtime": ("Runtime",),
    "streamserve.llm": ("LLM", "Engine", "SamplingParams"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "Anthropic",
    "Engine",
    "OpenAI",
    "Runtime",
    "RuntimeEndpoint",
    "SamplingParams",
    "StreamServeError",
    "__version__",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "create_app",
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
]


def __getattr__(name: str) -> Any:
    """A public name, on its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOME_OF.get(name, "streamserve.lang")), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
