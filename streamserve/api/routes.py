"""What a route is, as data: method, path, who may use it, what it takes and gives. The router and /openapi.json read the same.

Owns nothing. Knows nothing of what the routes do.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from msgspec import Struct

from streamserve.api.wire import Exchange

Answer = Callable[[Exchange], Awaitable[None]]


class Key(Enum):
    """Which key a route asks for, where one is set."""

    NONE = auto()  # open to everybody: probes, and the page's own files
    USER = auto()  # --api-key
    ADMIN = auto()  # --admin-api-key where one is set, else --api-key


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """One route. The first sentence of `answer`'s docstring is its summary.

    `body` is the type that checks the request's JSON, `result` the type of the answer, `event` the type of each event's data
    when the request asks for a stream; None where there is no such thing. `media` is the type of an answer that is no JSON,
    `form` the JSON schema of a body that is a form.
    `query` names parameters in the URL and says what they are for. `example` is a body to try. `errors` are
    statuses it may end with beside those of its kind. `is_shown`: it stands in /openapi.json.
    """

    method: str
    path: str
    answer: Answer
    body: type[Struct] | None = None
    result: Any = None
    event: Any = None
    key: Key = Key.USER
    media: str | None = None
    form: Mapping[str, Any] | None = None
    query: tuple[tuple[str, str], ...] = ()
    example: Mapping[str, Any] | None = None
    errors: tuple[int, ...] = ()
    is_shown: bool = True
