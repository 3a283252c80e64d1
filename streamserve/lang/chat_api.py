"""What back ends of other people's APIs share: where answers may stand, what there is nothing for, what is counted.

Owns these rules. Knows no client package. These APIs take whole turns, so a program's answers stand at the beginning of an
assistant's turn, or where the API can be told to go on, anywhere in it.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from streamserve.errors import CallFailed, InvalidRequest
from streamserve.lang.backend import Prompt, Sampling
from streamserve.lang.dtypes import REGEXES

# Values that ask for nothing.
_HARMLESS: Mapping[str, Any] = {"top_k": -1, "min_p": 0, "min_tokens": 0, "n": 1, "frequency_penalty": 0, "presence_penalty": 0}
_JSON_TYPES: Mapping[str, str] = {"int": "integer", "float": "number", "bool": "boolean", "str": "string"}
VALUE = "value"


class TokenUsage:
    """Tokens that were paid for, over all calls."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def reset(self) -> None:
        """Begins anew."""
        self.prompt_tokens = self.completion_tokens = 0

    def add(self, prompt_tokens: int | None, completion_tokens: int | None) -> None:
        """One call's."""
        self.prompt_tokens += prompt_tokens or 0
        self.completion_tokens += completion_tokens or 0


def meta_of(id: str, finish: str | None, prompt_tokens: int | None, completion_tokens: int | None) -> dict[str, Any]:
    """What is known of an answer, under SGLang's names."""
    reason = (
        None
        if finish is None
        else {"type": {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}.get(finish, finish)}
    )
    return {"id": id, "finish_reason": reason, "prompt_tokens": prompt_tokens or 0, "completion_tokens": completion_tokens or 0}


def check_turn(prompt: Prompt, whose: str) -> None:
    """Raises InvalidRequest for an answer outside an assistant's turn."""
    if prompt.role != "assistant":
        where = "outside all turns" if prompt.role is None else f"in a turn of {prompt.role!r}"
        raise InvalidRequest(f"an answer is asked for {where}; {whose} answers in an assistant's turn: s += assistant(gen(...))")


def check_served(sampling: Sampling, served: Collection[str], whose: str) -> None:
    """Raises InvalidRequest for the first field that is wanted and that an API has nothing for."""
    plain = Sampling()
    for name in sampling.__dataclass_fields__:
        value = getattr(sampling, name)
        is_wanted = value != getattr(plain, name) and value is not False and value != _HARMLESS.get(name)
        if is_wanted and name not in served:
            raise InvalidRequest(f"{name} is {value!r}; {whose} has nothing for it, leave it out", param=name)


def check_one_form(sampling: Sampling) -> None:
    """Raises InvalidRequest where an answer's form is given twice."""
    given = [name for name in ("regex", "json_schema", "dtype") if getattr(sampling, name) is not None]
    if len(given) > 1:
        raise InvalidRequest(f"{given[0]} and {given[1]} are both given; an answer has one form", param=given[1])


def typed_schema(dtype: str) -> dict[str, Any]:
    """A schema whose one value is of the type: for APIs that know schemas, but neither types nor patterns."""
    return _wrapped({"type": _JSON_TYPES[dtype]})


def choice_schema(choices: Collection[str]) -> dict[str, Any]:
    """A schema whose one value is one of the choices."""
    return _wrapped({"type": "string", "enum": list(choices)})


def value_of(text: str, dtype: str) -> str:
    """The value in an answer to `typed_schema` or `choice_schema`, as a program has it: as Python writes it; strings of a type in
    quotes, a choice without ("choice")."""
    try:
        value = json.loads(text)[VALUE]
    except (ValueError, TypeError, KeyError):
        raise CallFailed(f"the answer {text[:200]!r} is not of the schema that was asked for") from None
    return json.dumps(value, ensure_ascii=False) if dtype == "str" else str(value)


def pattern_of(sampling: Sampling) -> str | None:
    """The regular expression of an answer, for APIs that take one."""
    return REGEXES[sampling.dtype] if sampling.dtype is not None else sampling.regex


def _wrapped(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {VALUE: schema}, "required": [VALUE], "additionalProperties": False}
