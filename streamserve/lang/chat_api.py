"""What back ends of other people's APIs share: a client, where answers may stand, what there is nothing for, what is counted.

Owns these rules. Loads no client package: it is told which, and knows that all are made alike. These APIs take whole turns, so a
program's answers stand at the beginning of an assistant's turn, or where the API can be told to go on, anywhere in it.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from streamserve.errors import CallFailed, InvalidRequest, Unreachable, error_of
from streamserve.lang.backend import Piece, Prompt, Sampling
from streamserve.lang.dtypes import REGEXES
from streamserve.lang.roles import TemplateRoles
from streamserve.lang.transport import close_when_gone

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


class PaidApi:
    """What is alike in all of them, see backend.Backend. `package` is the client's, `make` makes one."""

    def __init__(self, model_name: str, whose: str, roles: TemplateRoles, package: Any, make: Callable[[], Any]) -> None:
        self.model_name = model_name
        self.token_usage = TokenUsage()
        self._whose = whose
        self._roles = roles
        self._package = package
        self._make = make
        self._client: Any = None

    async def roles(self) -> TemplateRoles:
        """See Backend. The API has its own: these are of the program's text."""
        return self._roles

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Piece]:
        """See Backend."""
        raise NotImplementedError

    async def cache_prefix(self, prompt: Prompt) -> None:
        """See Backend: a call that is paid for is made for an answer only."""

    async def flush_cache(self) -> None:
        """See Backend."""
        raise InvalidRequest(f"{self._whose} interface has no call that forgets what is cached")

    async def server_info(self) -> dict[str, Any]:
        """See Backend: the client's address, there is no more."""
        return {"base_url": str(self._opened().base_url)}

    async def model_info(self) -> dict[str, Any]:
        """See Backend."""
        with self._failures():
            card = await self._opened().models.retrieve(self.model_name)
        return {"model_path": self.model_name, "served_model_name": self.model_name, "is_generation": True, **card.model_dump()}

    async def aclose(self) -> None:
        """See Backend."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _one(self, prompt: Prompt, sampling: Sampling) -> Piece:
        return (await self.generate(prompt, sampling))[0]

    def _opened(self) -> Any:
        if self._client is None:
            try:
                self._client = self._make()
            except self._package.APIError.__base__ as error:  # the package's root: no key, most often
                raise InvalidRequest(str(error), param="api_key") from None
            close_when_gone(self, self._client.close)
        return self._client

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """The client's errors become those of errors.py."""
        try:
            yield
        except self._package.APIStatusError as error:
            body, headers = error.body or error.message, error.response.headers
            raise error_of(error.status_code, body, retry_after_s=_seconds(headers.get("retry-after"))) from error
        except self._package.APIConnectionError as error:
            raise Unreachable(f"the server was not reached: {error.__cause__ or error}") from error
        except self._package.APIError as error:
            raise error_of(None, error.body or error.message) from error


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


def choice_of(text: str, choices: Collection[str]) -> str:
    """The choice in an answer to `choice_schema`."""
    decision = value_of(text, "choice")
    if decision not in choices:
        raise CallFailed(f"the model chose {decision[:200]!r}, which is none of the choices")
    return decision


def pattern_of(sampling: Sampling) -> str | None:
    """The regular expression of an answer, for APIs that take one."""
    return REGEXES[sampling.dtype] if sampling.dtype is not None else sampling.regex


def _seconds(retry_after: str | None) -> float | None:
    try:
        return None if retry_after is None else float(retry_after)
    except ValueError:  # it may be a date
        return None


def _wrapped(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {VALUE: schema}, "required": [VALUE], "additionalProperties": False}
