"""Command-line flags, derived from the fields of the settings: one flag per field, named after it.

Owns spelling: aliases, human numbers, nearest matches. Knows no setting by name but the aliased ones. Imports nothing slow.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, fields
from difflib import get_close_matches
from typing import Any, NoReturn, get_args, get_type_hints

from streamserve.config import Config
from streamserve.resolve import flag_of

# SGLang's names are ours; these are the ones people type out of habit from elsewhere.
ALIASES = (
    ("--model", "model_path"),
    ("--max-model-len", "context_length"),
    ("--max-num-seqs", "max_running_requests"),
    ("--max-num-batched-tokens", "chunked_prefill_size"),
    ("--gpu-memory-utilization", "mem_fraction_static"),
    ("--speculative-algorithm", "speculative"),
    ("--speculative-config", "speculative"),
)
# What others say in several flags and one says here; by how theirs begin.
_ELSEWHERE = (
    ("--speculative-", "--speculative says it in one: eagle=PATH,N is who guesses, the network, how many tokens at most"),
    ("--num-speculative-", "--speculative says it: ngram,N is who guesses, how many tokens at most"),
)
_TITLES = (("model", "model"), ("cache", "KV memory"), ("scheduler", "scheduling"), ("device", "device"), ("server", "server"))
_UNITS = {"k": 1024, "m": 1024**2, "g": 1024**3}


class UsageError(Exception):
    """The command line cannot be understood; the message says what would be."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of one settings class, seen as a flag."""

    group: str  # field of Config: model, cache, scheduler, device, server
    field: "Field[Any]"
    kind: type  # bool, int, float, str
    is_list: bool

    @property
    def flag(self) -> str:
        """Its spelling."""
        return flag_of(self.field.name)

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other spellings that are understood."""
        return tuple(alias for alias, name in ALIASES if name == self.field.name)

    @property
    def is_common(self) -> bool:
        """Whether --help shows it."""
        return bool(self.field.metadata.get("common", False))


def settings() -> Iterator[Setting]:
    """Every setting, in the order of the classes."""
    for part in fields(Config):
        owner = get_type_hints(Config)[part.name]
        hints = get_type_hints(owner)
        for entry in fields(owner):
            kinds = [kind for kind in (get_args(hints[entry.name]) or (hints[entry.name],)) if kind not in (type(None), ...)]
            assert kinds[0] in (bool, int, float, str), f"{entry.name}: no flag is known for {hints[entry.name]}"
            yield Setting(part.name, entry, kinds[0], isinstance(entry.default, tuple))


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError, and takes no abbreviations."""

    def __init__(self, prog: str, **more: Any) -> None:
        super().__init__(prog, allow_abbrev=False, formatter_class=_Formatter, usage=f"{prog} [arguments]", **more)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (`{self.prog} --help` shows the flags)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Like parse_args; an unknown flag gets its nearest match."""
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return namespace

    def _unknown(self, argument: str) -> str:
        name = argument.split("=", 1)[0]
        near = get_close_matches(name, [flag for flag in self._option_string_actions if flag.startswith("--")], n=1)
        kind = "flag" if name.startswith("-") else "argument"
        said = next((said for beginning, said in _ELSEWHERE if name.startswith(beginning)), None)
        return f"unknown {kind} {name}" + (f"; {said}" if said else f"; did you mean {near[0]}?" if near else "")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


def add_flags(parser: Parser, *, show_all: bool) -> None:
    """Add a flag for every setting; uncommon ones are hidden from --help unless `show_all`."""
    groups = {name: parser.add_argument_group(title) for name, title in _TITLES}
    for setting in settings():
        entry = setting.field
        more: dict[str, Any] = {"dest": entry.name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if show_all or setting.is_common:
            more["help"] = _help(setting)
        if setting.kind is bool:
            more["action"] = "store_true"
        else:
            more["type"] = {int: human_int, float: float, str: str}[setting.kind]
            more["choices"] = entry.metadata.get("choices")
            more["metavar"] = None if more["choices"] else {int: "N", float: "X", str: "TEXT"}[setting.kind]
            if setting.is_list:
                more["action"] = "append"
        group = groups[setting.group]
        group.add_argument(setting.flag, *(setting.aliases if show_all else ()), **more)
        if setting.aliases and not show_all:
            group.add_argument(*setting.aliases, **{**more, "help": argparse.SUPPRESS})


def read_config(namespace: argparse.Namespace) -> tuple[Config, frozenset[str]]:
    """The settings a command line gives, and the names of the fields it gave."""
    given = vars(namespace)
    parts: dict[str, dict[str, Any]] = {part.name: {} for part in fields(Config)}
    for setting in settings():
        name = setting.field.name
        if name in given:
            parts[setting.group][name] = tuple(given[name]) if setting.is_list else given[name]
    hints = get_type_hints(Config)
    config = Config(**{name: hints[name](**values) for name, values in parts.items()})
    return config, frozenset(name for values in parts.values() for name in values)


def human_int(text: str) -> int:
    """A whole number; k, m and g stand for 1024, 1024² and 1024³, so that 8k is a context of 8,192."""
    unit = _UNITS.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1]) * unit if unit > 1 else int(text)
        if value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number such as 8192 or 8k")


def _help(setting: Setting) -> str:
    entry = setting.field
    text = str(entry.metadata["help"]).replace("%", "%%")
    if setting.kind is bool or entry.default in (None, (), "auto"):
        return text
    default = entry.default
    return f"{text} (default {' '.join(default) if isinstance(default, tuple) else default})"
