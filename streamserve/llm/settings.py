"""Keyword arguments of an engine as its settings: the server's flags in Python's spelling.

Owns which of them an engine without a network has no use for, and how errors about flags read in Python. SGLang's arguments are
read as its command lines are (sglang_flags.py); of vLLM's, the aliases of flags.py are understood and the few below.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import structlog

from streamserve.config import Config
from streamserve.errors import ConfigError, StartError
from streamserve.flags import ALIASES, Parser, UsageError, add_flags, read_config, settings
from streamserve.resolve import check, flag_of
from streamserve.sglang_flags import THEIR_FLAGS, arguments_of, read

log = structlog.get_logger(__name__)

# Of the server: what sockets, browsers and operators need.
_NETWORK = frozenset(
    {
        *("host", "port", "api_key", "admin_api_key", "cors_origins", "keep_alive_s", "write_timeout_s", "send_interval_ms"),
        *("drain_timeout_s", "resume_window_s", "ssl_certfile", "ssl_keyfile", "disable_playground", "log_format"),
    }
)
# What those are in this process, where a stream's reader may take a day.
INSIDE: Mapping[str, Any] = {"disable_playground": True, "keep_alive_s": 0.0, "resume_window_s": 0.0, "write_timeout_s": 86400.0}
_INSIDE_UNLESS: Mapping[str, Any] = {"log_level": "warning", "max_body_mb": 512}  # unless they are given
_NO_LIMIT = 10_000_000  # requests that may wait: they are all the caller's own
_VLLM = {"seed": "random_seed", "enforce_eager": "disable_cuda_graph", "hf_revision": "revision", "tokenizer": "tokenizer_path"}
_SAME = _VLLM | {alias.removeprefix("--").replace("-", "_"): name for alias, name in ALIASES if name != "speculative"}
# Of vLLM, without effect here, and why.
_NEEDLESS = {
    **dict.fromkeys(("task", "runner"), "a model says what it is for; embedding_model names one for vectors beside it"),
    **dict.fromkeys(("disable_log_stats", "disable_log_requests"), "an engine logs warnings only"),
    **dict.fromkeys(("swap_space", "block_size"), "the prefix cache holds what there is room for"),
    "enable_chunked_prefill": "a long prompt is always computed in pieces",
    "max_logprobs": "a request may ask for up to 20",
    "limit_mm_per_prompt": "a prompt may have as many pictures as fit",
    "distributed_executor_backend": "the model runs in this process",
    "compilation_config": "kernels are chosen at the start",
}


def config_of(given: Mapping[str, Any]) -> Config:
    """The settings, checked. None means: not given. Raises ConfigError."""
    named: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in _NEEDLESS:
            log.warning("setting_without_effect", why=f"{name} means nothing here: {_NEEDLESS[name]}")
            continue
        known = _SAME.get(name, name)
        if known in named:
            twin = next(other for other in given if other != name and _SAME.get(other, other) == known)
            raise ConfigError(f"{twin} and {name} are the same setting; give one")
        named[known] = value
    if "enable_prefix_caching" in named:
        named["disable_radix_cache"] = not named.pop("enable_prefix_caching")
    _check_kinds(named)
    useless = next((name for name in given if name in _NETWORK and name in named), None)
    if useless is not None:
        raise ConfigError(f"{useless} is for a server; an engine in this process listens nowhere: leave it out")
    try:
        found = read(_arguments(named))
        parser = Parser("streamserve serve")
        add_flags(parser, show_all=True)
        config, fixed = read_config(parser.parse(found.flags))
    except UsageError as error:
        message = str(error).split(" (`streamserve", 1)[0].replace("unknown flag", "unknown setting")
        raise ConfigError(in_python(message, named)) from None
    for note in found.notes:
        log.warning("setting_without_effect", why=in_python(note, named))
    try:
        check(config)
    except StartError as error:
        raise type(error)(in_python(str(error))) from None
    open_ones = {name: value for name, value in _INSIDE_UNLESS.items() if name not in fixed}
    scheduler, server = config.scheduler, replace(config.server, **INSIDE, **open_ones)
    if "max_queued_requests" not in fixed:
        scheduler = replace(scheduler, max_queued_requests=_NO_LIMIT)
    return replace(config, scheduler=scheduler, server=server)


def _check_kinds(named: Mapping[str, Any]) -> None:
    """What is on or off is so in Python too, and nothing else is."""
    for setting in settings():
        value = named.get(setting.field.name)
        if value is None or isinstance(value, bool) == (setting.kind is bool):
            continue
        allowed = "True or False" if setting.kind is bool else "a number" if setting.kind in (int, float) else "a text"
        raise ConfigError(f"{setting.field.name} is {value!r}; allowed is {allowed}")


def in_python(message: str, given: Iterable[str] = ()) -> str:
    """What is said of flags, said of keyword arguments: max_total_tokens in the place of --max-total-tokens."""
    flags = _flags() | {flag_of(name) for name in given}
    message = re.sub(r"^argument (--[a-z0-9-]+)[^:]*:", r"\1:", message)  # argparse names all spellings of a flag
    return re.sub(r"--[a-z][a-z0-9-]*", lambda found: _name(found[0]) if found[0] in flags else found[0], message)


@cache
def _flags() -> frozenset[str]:
    return frozenset({setting.flag for setting in settings()} | {alias for alias, _ in ALIASES} | THEIR_FLAGS)


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _arguments(given: Mapping[str, Any]) -> list[str]:
    """As flags. Our settings that are lists have a flag for each entry."""
    lists = {setting.field.name for setting in settings() if setting.is_list}
    arguments = arguments_of(
        {name: json.dumps(value) if isinstance(value, Mapping) else value for name, value in given.items() if name not in lists}
    )
    for name in lists & given.keys():
        entries = [given[name]] if isinstance(given[name], str) else given[name]
        for entry in entries:
            arguments += [flag_of(name), str(entry)]
    return arguments
