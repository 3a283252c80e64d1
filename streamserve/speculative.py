"""What --speculative says: who guesses the next tokens, and how many at most in a step.

Owns the spellings: our own, the names of SGLang's --speculative-algorithm and the JSON of vLLM's --speculative-config. Knows
nothing of drafters, models or devices.
"""

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from streamserve.errors import ConfigError

FLAG = "--speculative"
MAX_DRAFTS = 32
ALLOWED = "auto, none, ngram, ngram_shared, draft_model=PATH, eagle=PATH or mtp, each with ,N behind it for N guesses at most"
WITH_PATH = ("draft_model", "eagle")
# Guesses that a step verifies at most. What an n-gram matched goes on for long and costs nothing to make; a network's guesses
# cost a pass each, and the fourth one in a row is seldom right.
DEFAULT_DRAFTS = {"auto": 12, "none": 0, "ngram": 12, "ngram_shared": 12, "draft_model": 4, "eagle": 4, "mtp": 4}
_OTHER_NAMES = {
    "eagle3": "eagle",
    "nextn": "mtp",
    "mimo_mtp": "mtp",
    "standalone": "draft_model",
    "draft": "draft_model",
    "off": "none",
}


@dataclass(frozen=True, slots=True)
class Speculative:
    """`kind`: a key of DEFAULT_DRAFTS. `path`: of the network that guesses, for kinds in WITH_PATH. `max_drafts`: most guesses
    for an answer in one step; 0 only of "none"."""

    kind: str
    path: str | None = None
    max_drafts: int = 0


def read_speculative(text: str) -> Speculative:
    """The setting, checked as far as it can be without a model. Raises ConfigError."""
    if text.lstrip().startswith("{"):
        return _from_json(text)
    rest, number = text.strip(), None
    before, comma, last = rest.rpartition(",")
    if comma and _is_number(last):
        rest, number = before, int(last)
    kind, equals, path = rest.partition("=")
    return _checked(text, kind.strip(), path.strip() if equals else None, number)


def _is_number(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()


def _checked(asked: str, kind: str, path: str | None, number: int | None) -> Speculative:
    name = kind.lower().replace("-", "_")
    name = _OTHER_NAMES.get(name, name)
    if name not in DEFAULT_DRAFTS:
        _refuse(asked, f"allowed is {ALLOWED}")
    if name in WITH_PATH and not path:
        _refuse(asked, f"the network that guesses is missing; give {name}=PATH, a file, folder or hub id")
    if name not in WITH_PATH and path is not None:
        _refuse(asked, f"{name} takes no path; {' and '.join(WITH_PATH)} do")
    if name == "none" and number:
        _refuse(asked, "none makes no guesses, so there is no number of them")
    if number is not None and name != "none" and not 1 <= number <= MAX_DRAFTS:
        _refuse(asked, f"{number} guesses in a step are asked for; allowed is 1 to {MAX_DRAFTS}")
    return Speculative(name, path, DEFAULT_DRAFTS[name] if number is None else number)


def _from_json(text: str) -> Speculative:
    try:
        given: dict[str, Any] = json.loads(text)
    except ValueError as error:
        _refuse(text, f"it begins as JSON, but is none: {error}")
    known = {"method", "model", "num_speculative_tokens"}
    if unknown := sorted(given.keys() - known):
        _refuse(text, f"of this JSON {', '.join(unknown)} has no meaning here; {', '.join(sorted(known))} have")
    method, path, number = given.get("method"), given.get("model"), given.get("num_speculative_tokens")
    if not isinstance(method, str) or not isinstance(path, str | None) or type(number) not in (int, type(None)):
        _refuse(text, "method (text) is needed; model is a text and num_speculative_tokens a whole number")
    return _checked(text, method, path, number)


def _refuse(asked: str, why: str) -> NoReturn:
    raise ConfigError(f"{FLAG} is {asked!r}: {why}")
