"""Errors over the wire and back."""

import pickle

import pytest

from streamserve.errors import (
    CallFailed,
    Conflict,
    EngineStopped,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    QueueFull,
    RequestError,
    StreamServeError,
    error_body,
    error_of,
)


def every(root: type[StreamServeError]) -> list[type[StreamServeError]]:
    """Those of errors.py."""
    own = [child for child in root.__subclasses__() if child.__module__ == root.__module__]
    return [kind for child in own for kind in (child, *every(child))]


@pytest.mark.parametrize("kind", [kind for kind in every(StreamServeError) if kind not in (RequestError,)])
def test_every_error_comes_back_as_what_it_was(kind: type[StreamServeError]) -> None:
    extra = {"retry_after_s": 3.0} if kind is QueueFull else {}
    param = {"param": "stop[2]"} if issubclass(kind, RequestError) else {}
    sent = kind("it is so", **extra, **param)  # type: ignore[arg-type]
    for status in (kind.status, None):  # an answer; an event of a stream
        back = error_of(status, error_body(sent), retry_after_s=3.0)
        own_code = "code" in vars(kind)
        assert (type(back) is kind if own_code else isinstance(back, StreamServeError)) and str(back) == "it is so"
        assert getattr(back, "param", None) == param.get("param")
    if kind is QueueFull:
        assert isinstance(back, QueueFull) and back.retry_after_s == 3.0


def test_other_servers_errors_are_told_by_their_status() -> None:
    assert type(error_of(400, {"error": {"message": "bad", "code": "who_knows"}})) is InvalidRequest
    assert type(error_of(404, {"error": {"message": "no", "code": "model_not_found"}})) is ModelNotFound
    assert type(error_of(404, {"detail": "Not Found"})) is NotFound
    assert type(error_of(409, "<h1>Conflict</h1>")) is Conflict
    assert type(error_of(None, {"error": {"message": "full", "code": 503}})) is EngineStopped
    teapot = error_of(418, "short and stout")
    assert isinstance(teapot, CallFailed) and teapot.answered == 418 and str(teapot) == "short and stout"
    assert str(error_of(422, {"detail": "field required"})) == "field required"
    assert "did not say why" in str(error_of(500, {}))


def test_errors_cross_processes_whole() -> None:
    for error in (QueueFull("full", retry_after_s=3.0, param="x"), InvalidRequest("no", param="y"), StreamServeError("it")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
