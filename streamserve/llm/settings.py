"""Keyword arguments of an engine as its settings: the server's flags in Python's spelling.

Owns which of them an engine without a network has no use for, and how errors about flags read in Python. SGLang's arguments are
read as its command lines are (sglang_flags.py); of vLLM's, the aliases of flags.py are understood and the few below.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import structlog

from streamserve.config import Config
from streamserve.errors import ConfigError, StartError
from streamserve.flags import ALIASES, Parser, UsageError, add_flags, read_config, settings
from streamserve.resolve import check, flag_of
from streamserve.sglang_flags import arguments_of, read

log = structlog.get_logger(__name__)

# Of the server: what sockets, browsers and operators need.
_NETWORK = frozenset(
    {
        *("host", "port", "api_key", "admin_api_key", "cors_origins", "keep_alive_s", "write_timeout_s", "send_interval_ms"),
        *("drain_timeout_s", "resume_window_s", "ssl_certfile", "ssl_keyfile", "disable_playground", "log_format"),
    }
)
# What those are in this process, where a stream's reader may take a day.
_INSIDE: Mapping[str, Any] = {"disable_playground": True, "keep_alive_s": 0.0, "resume_window_s": 0.0, "write_timeout_s": 86400.0}
_NO_LIMIT = 10_000_000  # requests that may wait: they are all the caller's own
_VLLM = {"seed": "random_seed", "enforce_eager": "disable_cuda_graph", "hf_revision": "revision", "tokenizer": "tokenizer_path"}


def config_of(given: Mapping[str, Any]) -> Config:
    """The settings, checked. None means: not given. Raises ConfigError."""
    named = {_VLLM.get(name, name): value for name, value in given.items() if value is not None}
    if "enable_prefix_caching" in named:
        named["disable_radix_cache"] = not named.pop("enable_prefix_caching")
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
    scheduler, server = config.scheduler, replace(config.server, **_INSIDE)
    if "max_queued_requests" not in fixed:
        scheduler = replace(scheduler, max_queued_requests=_NO_LIMIT)
    if "log_level" not in fixed:
        server = replace(server, log_level="warning")
    return replace(config, scheduler=scheduler, server=server)


def in_python(message: str, given: Iterable[str] = ()) -> str:
    """What is said of flags, said of keyword arguments: max_total_tokens in the place of --max-total-tokens."""
    flags = {setting.flag for setting in settings()} | {alias for alias, _ in ALIASES} | {flag_of(name) for name in given}
    near = re.search(r"did you mean (--[a-z-]+)", message)
    if near:
        flags.add(near[1])
    return re.sub(r"--[a-z][a-z0-9-]*", lambda found: _name(found[0]) if found[0] in flags else found[0], message)


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _arguments(given: Mapping[str, Any]) -> list[str]:
    """As flags. Our settings that are lists have a flag for each entry."""
    lists = {setting.field.name for setting in settings() if setting.is_list}
    arguments = arguments_of({name: value for name, value in given.items() if name not in lists})
    for name in lists & given.keys():
        entries = [given[name]] if isinstance(given[name], str) else given[name]
        for entry in entries:
            arguments += [flag_of(name), str(entry)]
    return arguments
