"""Every error a user can meet, as one tree. Each class fixes its HTTP status, OpenAI type and code once.

    StreamServeError
    ├── RequestError                 the request is at fault; nothing was started
    │   ├── InvalidRequest           400  a field has a wrong type or value
    │   │   ├── ContextOverflow      400  prompt and answer do not fit the context
    │   │   └── GrammarFailed        400  the answer's grammar took more than its limits while it was followed
    │   ├── AuthenticationFailed     401  missing or wrong API key
    │   ├── OriginForbidden          403  a page of an origin that is not allowed
    │   ├── ModelNotFound            404  no such model is served
    │   ├── NotFound                 404  no such route or object
    │   ├── MethodNotAllowed         405  the route exists, the method does not
    │   ├── StreamTaken              409  another connection reads the stream now
    │   ├── Conflict                 409  not as things stand now
    │   ├── StreamGone               410  the events asked for are no longer kept
    │   ├── RequestTooLarge          413  body or frame over the limit
    │   └── QueueFull                429  too many requests wait; try again after `retry_after_s`
    ├── EngineError                  the server is at fault
    │   ├── StepFailed               500  the step that held this request raised
    │   ├── DeadlineExceeded         504  the time the request, or the server, allows for an answer was over
    │   ├── SlowReader               500  the client stopped reading; its request was aborted
    │   └── EngineStopped            503  starting, draining or broken
    ├── CallFailed                   what another server answered, where it is none of the above
    │   └── Unreachable              503  it did not answer
    ├── ProgramEnded                 a program (lang/) was ended before all of it was done
    └── StartError                   the server cannot start; the message says what to do
        ├── ConfigError              a setting is out of range or contradicts another
        └── CheckpointError          the model files are missing, broken or unsupported

A message says what was asked, what is allowed and what to do.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar


class StreamServeError(Exception):
    """Root of the tree. `str(error)` is the message for the user."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __reduce__(self) -> tuple[Any, ...]:
        """Exceptions are pickled as a call of their class with `args`, which not all of ours can be made by."""
        return type(self).__new__, (type(self), *self.args), self.__dict__


class RequestError(StreamServeError):
    """A request that cannot be served as it is. `param` names the field at fault, if one is."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str] = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """A field has a wrong type or value."""

    code: ClassVar[str] = "invalid_value"


class ContextOverflow(InvalidRequest):
    """Prompt and answer together exceed the context."""

    code: ClassVar[str] = "context_length_exceeded"


class GrammarFailed(InvalidRequest):
    """The grammar compiled, but following it took more than its limits. Sent again, it would fail again."""

    code: ClassVar[str] = "grammar_failed"


class AuthenticationFailed(RequestError):
    """Missing or wrong API key."""

    status: ClassVar[int] = 401
    type: ClassVar[str] = "authentication_error"
    code: ClassVar[str] = "invalid_api_key"


class OriginForbidden(RequestError):
    """The request comes from a page of an origin that may not call this server."""

    status: ClassVar[int] = 403
    type: ClassVar[str] = "permission_error"
    code: ClassVar[str] = "origin_forbidden"


class ModelNotFound(RequestError):
    """No model of that name is served."""

    status: ClassVar[int] = 404
    code: ClassVar[str] = "model_not_found"


class NotFound(RequestError):
    """No such route or object."""

    status: ClassVar[int] = 404
    code: ClassVar[str] = "not_found"


class MethodNotAllowed(RequestError):
    """The route exists; the method does not."""

    status: ClassVar[int] = 405
    code: ClassVar[str] = "method_not_allowed"


class StreamTaken(RequestError):
    """Another connection reads the stream now."""

    status: ClassVar[int] = 409
    code: ClassVar[str] = "stream_taken"


class Conflict(RequestError):
    """What is asked for cannot be done as things stand now; the message says why."""

    status: ClassVar[int] = 409
    code: ClassVar[str] = "conflict"


class StreamGone(RequestError):
    """The events asked for are no longer kept."""

    status: ClassVar[int] = 410
    code: ClassVar[str] = "stream_gone"


class RequestTooLarge(RequestError):
    """Body or frame over the limit."""

    status: ClassVar[int] = 413
    code: ClassVar[str] = "request_too_large"


class QueueFull(RequestError):
    """Too many requests wait already. `retry_after_s` is estimated from measured throughput."""

    status: ClassVar[int] = 429
    type: ClassVar[str] = "rate_limit_error"
    code: ClassVar[str] = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class EngineError(StreamServeError):
    """The server is at fault, not the request."""


class StepFailed(EngineError):
    """The step that held this request raised; other requests go on."""

    code: ClassVar[str] = "step_failed"


class DeadlineExceeded(EngineError):
    """The time that the request or the server allows for an answer was over; what ran was aborted."""

    status: ClassVar[int] = 504
    type: ClassVar[str] = "timeout_error"
    code: ClassVar[str] = "deadline_exceeded"


class SlowReader(EngineError):
    """The client stopped reading for longer than the bound; its request was aborted."""

    code: ClassVar[str] = "slow_reader"


class EngineStopped(EngineError):
    """The engine is starting, draining or broken."""

    status: ClassVar[int] = 503
    type: ClassVar[str] = "service_unavailable"
    code: ClassVar[str] = "engine_stopped"


class CallFailed(StreamServeError):
    """Another server, called over its API, answered with an error that has no class here. `answered` is its status."""

    status: ClassVar[int] = 502
    code: ClassVar[str] = "call_failed"

    def __init__(self, message: str, *, answered: int | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.answered = answered
        self.param = param


class Unreachable(CallFailed):
    """Another server did not answer, or its answer ended in the middle."""

    status: ClassVar[int] = 503
    code: ClassVar[str] = "unreachable"


class ProgramEnded(StreamServeError):
    """A program of the language was ended before all of it was done. Only its own readers meet this."""

    code: ClassVar[str] = "program_ended"


class StartError(StreamServeError):
    """The server cannot start."""

    code: ClassVar[str] = "start_failed"


class ConfigError(StartError):
    """A setting is out of range or contradicts another."""


class CheckpointError(StartError):
    """The model files are missing, broken or of an unsupported kind."""


def error_body(error: StreamServeError) -> dict[str, Any]:
    """The JSON body of an error: OpenAI's nested `error` object beside the flat keys SGLang's and LMDeploy's clients read."""
    flat = {
        "message": str(error),
        "type": error.type,
        "param": getattr(error, "param", None),
        "code": error.code,
    }
    return {"error": dict(flat), "object": "error", **flat}


def error_of(status: int | None, body: Any, *, retry_after_s: float | None = None) -> StreamServeError:
    """The error that a server answered with, back from its status (None: of an event in a stream) and its decoded body.

    What this server said is an instance of the class it was; what another said, of the class with its status.
    """
    given = body.get("error", body) if isinstance(body, Mapping) else {"message": body}
    if not isinstance(given, Mapping):
        given = {"message": given}
    message = str(given.get("message") or given.get("detail") or f"the server answered {status} and did not say why")
    param, code, said = given.get("param"), given.get("code"), given.get("code") if status is None else status
    param = param if isinstance(param, str) else None
    plain: tuple[type[StreamServeError], ...] = (InvalidRequest, NotFound, Conflict, EngineStopped)
    told_by_status = (*plain, *_kinds(RequestError))  # of one status the class that says no more than that
    by_code = (kind for kind in _kinds(StreamServeError) if kind.code == code)
    by_status = (kind for kind in told_by_status if kind.status == said)
    found: type[StreamServeError] = next(by_code, None) or next(by_status, CallFailed)
    if found is QueueFull:
        return QueueFull(message, retry_after_s=1.0 if retry_after_s is None else retry_after_s, param=param)
    if issubclass(found, CallFailed):
        return found(message, answered=status, param=param)
    return found(message, param=param) if issubclass(found, RequestError) else found(message)


def _kinds(root: type[StreamServeError]) -> Iterator[type[StreamServeError]]:
    """Those of the tree above; what others make of them is theirs."""
    for kind in (kind for kind in root.__subclasses__() if kind.__module__ == __name__):
        yield kind
        yield from _kinds(kind)
