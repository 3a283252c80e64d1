"""Vectors: OpenAI's /v1/embeddings and SGLang's native /encode.

Owns the fields of their bodies, the form of vectors in JSON, and how long a call may take. Which model answers is
service.py's to say, texts become tokens in encoders.py.

`dimensions` cuts vectors to their first numbers and gives them length 1 again, for any model: only those trained for it
(Matryoshka) lose little by that.
"""

from asyncio import sleep
from asyncio import timeout as timing_out
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Literal, TypeVar

import numpy as np
import orjson
from msgspec import Struct

from streamserve.api.encoders import Cut, EncoderModel, Rows
from streamserve.api.fields import ENCODED, Decision
from streamserve.api.openai import warning_headers
from streamserve.api.routes import RouteSpec
from streamserve.api.schema import check_range, convert, load_object, show
from streamserve.api.service import Service
from streamserve.api.stream import new_id
from streamserve.api.wire import Exchange, leaving_noticed
from streamserve.errors import DeadlineExceeded, InvalidRequest, StreamServeError
from streamserve.messages import EncoderInput

MAX_INPUTS = 2048  # OpenAI's
AT_ONCE = 8192  # numbers written between two turns of the event loop: a few tenths of a millisecond

T = TypeVar("T")
Work = Callable[[Mapping[str, Any]], Awaitable[tuple[bytes, int]]]  # a body's object to an answer in JSON and its tokens


class Encoded(Struct, kw_only=True):
    """Fields that all routes of an embedding model share."""

    model: str | None = None
    truncate: bool = False
    truncate_prompt_tokens: int | None = None  # -1: to what the model takes
    timeout: float | None = None  # seconds
    user: str | None = None  # checked for its type, without effect here


class EmbeddingRequest(Encoded, kw_only=True):
    """Body of POST /v1/embeddings. `prompt_name`: which of the model's own prompts stands before each text."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    prompt_name: str | None = None


class EncodeRequest(Encoded, kw_only=True):
    """Body of POST /encode: text or input_ids, one or many."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    dimensions: int | None = None
    rid: str | list[str] | None = None


class Usage(Struct):
    """Tokens of a request."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Struct):
    """One vector. As base64 its numbers are little-endian float32."""

    object: str
    index: int
    embedding: list[float] | str


class EmbeddingList(Struct):
    """Answer of POST /v1/embeddings."""

    object: str
    model: str
    data: list[Embedding]
    usage: Usage


class EncodeMeta(Struct):
    """What SGLang says beside a vector."""

    id: str
    finish_reason: None
    prompt_tokens: int


class EncodeResult(Struct):
    """One vector of POST /encode."""

    embedding: list[float]
    meta_info: EncodeMeta


class Embeddings:
    """These routes. `embed` answers one body, for every other transport."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[RouteSpec]:
        """What there is here."""
        return [
            RouteSpec(
                "POST",
                "/v1/embeddings",
                self.embeddings,
                EmbeddingRequest,
                EmbeddingList,
                example={"input": ["A text", "Another"]},
            ),
            *(
                RouteSpec(
                    method, "/encode", self.encode, EncodeRequest, EncodeResult | list[EncodeResult], example={"text": "A text"}
                )
                for method in ("POST", "PUT")
            ),
        ]

    async def embeddings(self, exchange: Exchange) -> None:
        """POST /v1/embeddings: a vector for each text."""
        await answer_with(self._service, exchange, self._embed)

    async def encode(self, exchange: Exchange) -> None:
        """POST or PUT /encode: a vector for a text or for each of several, in SGLang's shape."""
        await answer_with(self._service, exchange, self._encode)

    async def embed(self, given: Mapping[str, Any]) -> tuple[bytes, int, tuple[str, ...]]:
        """The JSON answer to a body of /v1/embeddings, its number of tokens, and what of the body has no effect."""
        return *await _answered(self._service, given, self._embed, new_id("embd")), _warnings(given)

    async def _embed(self, given: Mapping[str, Any]) -> tuple[bytes, int]:
        request = convert(given, EmbeddingRequest)
        encoder = self._encoder(request)
        inputs = await _inputs(encoder, request.input, "input", cut_of(encoder, request), request.prompt_name)
        rows = _cut(await encoder.encode(inputs), request.dimensions, encoder)
        is_text = request.encoding_format == "base64"
        vectors = await written(rows, is_text)
        num_tokens = sum(len(given.token_ids) for given in inputs)
        data = b",".join(
            b'{"object":"embedding","index":%d,"embedding":%b}' % (index, vector) for index, vector in enumerate(vectors)
        )
        usage = orjson.dumps({"prompt_tokens": num_tokens, "total_tokens": num_tokens})
        name = orjson.dumps(encoder.name)
        return b'{"object":"list","model":%b,"data":[%b],"usage":%b}' % (name, data, usage), num_tokens

    async def _encode(self, given: Mapping[str, Any]) -> tuple[bytes, int]:
        request = convert(given, EncodeRequest)
        if (request.text is None) == (request.input_ids is None):
            raise InvalidRequest("give either text or input_ids", param="text")
        encoder = self._encoder(request)
        source: str | Sequence[Any] = request.text if request.text is not None else request.input_ids or []
        where = "text" if request.text is not None else "input_ids"
        inputs = await _inputs(encoder, source, where, cut_of(encoder, request), None)
        is_single = isinstance(source, str) or isinstance(source[0], int)
        ids = _rids(request.rid, len(inputs), is_single)
        rows = _cut(await encoder.encode(inputs), request.dimensions, encoder)
        results = [
            b'{"embedding":%b,"meta_info":%b}'
            % (vector, orjson.dumps({"id": rid, "finish_reason": None, "prompt_tokens": len(given.token_ids)}))
            for vector, rid, given in zip(await written(rows, False), ids, inputs, strict=True)
        ]
        return results[0] if is_single else b"[%b]" % b",".join(results), sum(len(given.token_ids) for given in inputs)

    def _encoder(self, request: EmbeddingRequest | EncodeRequest) -> EncoderModel:
        encoder = self._service.encoder_named(request.model)
        if encoder.facts.labels:
            raise InvalidRequest(
                f"model {encoder.name!r} classifies and has no vectors; it answers {encoder.routes}", param="model"
            )
        check_range("dimensions", request.dimensions, 1, encoder.facts.dimension)
        return encoder


def cut_of(encoder: EncoderModel, request: Encoded) -> Cut:
    """What becomes of long texts. Checks `timeout` as well, for all routes here."""
    if request.timeout is not None and not request.timeout > 0:
        raise InvalidRequest(f"timeout is {show(request.timeout)}; allowed is above 0 (seconds)", param="timeout")
    return encoder.cut_of(request.truncate, request.truncate_prompt_tokens)


async def _inputs(
    encoder: EncoderModel, given: str | Sequence[Any], where: str, cut: Cut, prompt_name: str | None
) -> list[EncoderInput]:
    """A text, a list of texts, ids, or a list of ids."""
    if isinstance(given, str):
        return await encoder.of_texts([given], [where], cut, encoder.prompt_of(prompt_name))
    if not given:
        raise InvalidRequest(f"{where} is []; at least one entry is needed", param=where)
    kinds = set(map(type, given))
    if len(kinds) > 1:
        raise InvalidRequest(f"{where} mixes texts, token ids and lists; allowed is a list of one kind", param=where)
    if kinds == {int}:
        return [encoder.of_ids(given, where, cut)]
    check_count(len(given), where)
    if kinds == {str}:
        names = [f"{where}[{index}]" for index in range(len(given))]
        return await encoder.of_texts(given, names, cut, encoder.prompt_of(prompt_name))
    return [encoder.of_ids(ids, f"{where}[{index}]", cut) for index, ids in enumerate(given)]


def check_count(count: int, where: str) -> None:
    """Raises InvalidRequest when a list is too long for one request."""
    if count > MAX_INPUTS:
        raise InvalidRequest(f"{where} has {count} entries; at most {MAX_INPUTS} are allowed in one request", param=where)


def _rids(given: str | Sequence[str] | None, count: int, is_single: bool) -> list[str]:
    if given is None:
        return [new_id("embd") for _ in range(count)]
    if isinstance(given, str) != is_single or (not isinstance(given, str) and len(given) != count):
        raise InvalidRequest(f"rid is {show(given)}; one name for one text, or a list of {count}, is expected", param="rid")
    return [given] if isinstance(given, str) else list(given)


def _cut(rows: Rows, dimensions: int | None, encoder: EncoderModel) -> Rows:
    if dimensions is None or dimensions == encoder.facts.dimension:
        return rows
    return normalised(rows[:, :dimensions])


def normalised(rows: Rows) -> Rows:
    """The rows with length 1."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.ascontiguousarray(rows / np.maximum(lengths, 1e-12), np.float32)


async def written(rows: Rows, is_base64: bool) -> list[bytes]:
    """Each row in JSON. The event loop has its turns in between."""
    found: list[bytes] = []
    at_once = max(1, AT_ONCE // rows.shape[1])
    for index, row in enumerate(rows):
        if is_base64:
            found.append(b'"%b"' % b64encode(row.astype("<f4", copy=False).tobytes()))
        else:
            found.append(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY))
        if index % at_once == at_once - 1:
            await sleep(0)
    return found


async def answer_with(service: Service, exchange: Exchange, work: Work) -> None:
    """Read a body, do the work while the client stays, answer."""
    given = load_object(await exchange.body(service.max_body_bytes))
    id = new_id("embd")
    async with leaving_noticed(exchange, lambda: None):
        answer, _ = await _answered(service, given, work, id)
        await exchange.answer(200, answer, headers=[(b"x-request-id", id.encode()), *warning_headers(_warnings(given))])


async def _answered(service: Service, given: Mapping[str, Any], work: Work, id: str) -> tuple[bytes, int]:
    """Do the work while there is time; report it."""
    started, outcome, num_tokens = monotonic(), "abort", 0
    try:
        answer, num_tokens = await within(work(given), given.get("timeout"), service.config.request_timeout_s)
        outcome = "stop"
        return answer, num_tokens
    except StreamServeError as error:
        outcome = error.code
        raise
    finally:
        service.report(outcome, monotonic() - started, id=id, prompt_tokens=num_tokens)


def _warnings(given: Mapping[str, Any]) -> tuple[str, ...]:
    """What of a body has no effect."""
    idle = [field for field in ENCODED if field.decision is Decision.WARNED and given.get(field.name) is not None]
    return tuple(f"{field.name} has no effect: {field.note}" for field in idle)


async def within(work: Awaitable[T], asked_s: Any, allowed_s: float) -> T:
    """Await `work` for as long as the request (`asked_s`, when it is a number at all) and the server allow."""
    limits = [limit for limit in (asked_s, allowed_s) if isinstance(limit, (int, float)) and limit > 0]
    limit_s = min(limits, default=None)
    try:
        async with timing_out(limit_s):
            return await work
    except TimeoutError:
        raise DeadlineExceeded(f"there was no answer after {limit_s:g} s; allow it more time, or ask for less") from None
