"""What users give to gen, select and run, checked where it is given: an error names the argument before anything runs.

Owns names and types. Ranges are the server's, which knows its model; what it refuses is the program's error.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from streamserve.lang.backend import FORMS, Sampling
from streamserve.lang.dtypes import name_of

# SGLang has two names for these: one of gen, one of run.
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
_UNICODE_CLASS = re.compile(r"\\[pP](\{\w+\}|\w)")  # \p{L}: servers know it, Python does not
SAMPLING_NAMES: Mapping[str, str] = {**{each.name: each.name for each in fields(Sampling)}, **_RENAMED}


def sampling_of(given: Mapping[str, Any]) -> Sampling:
    """A Sampling of arguments by the names of SAMPLING_NAMES. None is as good as nothing."""
    found = {SAMPLING_NAMES[name]: _checked(name, value) for name, value in given.items() if value is not None}
    forms = [name for name in FORMS if name in found]
    if len(forms) > 1:
        raise ValueError(f"{' and '.join(forms)} are given together; an answer takes one form")
    return Sampling(**found)


def name_given(name: Any) -> str | None:
    """A variable's name."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name is {name!r}; allowed is a string: the variable that the answer becomes")
    return name


def strings(name: str, value: Any) -> tuple[str, ...]:
    """A string, or several."""
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(each, str) for each in found):
        raise TypeError(f"{name} is {value!r}; allowed are a string and a list of strings")
    return found


def number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; allowed is a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; allowed is a finite number")
    return int(value) if isinstance(value, Integral) else float(value)


def whole_number(name: str, value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}; allowed is a whole number")
    return int(value)


def _checked(name: str, value: Any) -> Any:
    return _CHECKS[SAMPLING_NAMES[name]](name, value)


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; allowed are True and False")
    return value


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        value = (value,)
    return tuple(whole_number(name, each) for each in value)


def _dtype(_: str, value: Any) -> str | None:
    return name_of(value)


def _regex(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; allowed is a string")
    try:
        re.compile(_UNICODE_CLASS.sub(r"\\w", value))
    except re.error as error:
        raise ValueError(f"{name} is {value!r}, which is no regular expression: {error}") from None
    return value


def _schema(name: str, value: Any) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(value)
        schema = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
    if not isinstance(schema, dict):
        raise TypeError(f"{name} is {value!r}; allowed is a schema: an object, or its JSON")
    return text


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("max_tokens", "min_tokens", "n", "top_k", "logprob_start_len", "top_logprobs_num"), whole_number),
    **dict.fromkeys(("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty"), number),
    **dict.fromkeys(("ignore_eos", "return_logprob", "return_text_in_logprobs"), _truth),
    **dict.fromkeys(("stop", "stop_regex"), strings),
    "stop_token_ids": _ids,
    "dtype": _dtype,
    "regex": _regex,
    "json_schema": _schema,
}
