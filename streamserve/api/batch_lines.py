"""Lines of batches, in OpenAI's format: what one asks, and how its answer is written.

    in   {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {...}}
    out  {"id": "batch_req_…", "custom_id": "a", "error": null,
          "response": {"status_code": 200, "request_id": "…", "body": {...}}}

Owns this format. An answer's id is a digest of what was asked, so that an answer tells whether it belongs to a line that has been
changed since. Knows nothing of files, nor of how a line is answered.
"""

from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from typing import BinaryIO, Literal, get_args

import msgspec
import orjson
from msgspec import Raw, Struct

from streamserve.api.schema import convert, load_object, show
from streamserve.errors import InvalidRequest

Endpoint = Literal[
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/score",
    "/v1/classify",
    "/generate",
]
ENDPOINTS: tuple[str, ...] = get_args(Endpoint)
ID = "batch_req_"
START = f'{{"id":"{ID}'.encode()  # of every line that is written here
MAX_ID_CHARS = 512
BLANK = b" \t\r\n"


class BadLine(InvalidRequest):
    """A line that cannot be asked. `line` is its number."""

    def __init__(self, message: str, line: int, *, param: str | None = None) -> None:
        super().__init__(f"line {line}: {message}", param=param)
        self.line = line


class _Line(Struct, forbid_unknown_fields=True):
    custom_id: str
    method: str
    url: str
    body: Raw


class _Unchecked(Struct, forbid_unknown_fields=True):
    """The same for messages: what is wrong with a line is said by the code that checks bodies."""

    custom_id: str
    method: str
    url: str
    body: dict[str, object]


class Line(Struct, frozen=True):
    """One request of a batch. `id` is its answer's."""

    number: int
    id: str
    custom_id: str
    url: str
    body: bytes

    @property
    def key(self) -> int:
        """Of its custom_id."""
        return key_of(self.custom_id)

    @property
    def digest(self) -> int:
        """Of all that it asks."""
        return digest_of(self.id)


def numbered(source: BinaryIO, max_bytes: int, max_lines: int | None = None) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers. Raises BadLine at one that is too long, or too many."""
    number = 0
    while data := source.readline(max_bytes + 1):
        number += 1
        if max_lines is not None and number > max_lines:
            raise BadLine(f"there are more than {max_lines} lines", number)
        if len(data) > max_bytes:
            raise BadLine(f"it has more than {max_bytes} bytes (--max-body-mb)", number)
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if data.strip(BLANK):
            yield number, data


def read_line(data: bytes, number: int) -> Line:
    """The request on a line. Raises BadLine."""
    try:
        given = msgspec.json.decode(data, type=_Line)
        raw = bytes(given.body)
        body = orjson.loads(raw)
        if not isinstance(body, dict):
            raise BadLine(f"body is {show(body)}; an object is expected", number, param="body")
        id = _id_of(given.custom_id, given.url, body)
    except (RecursionError, orjson.JSONEncodeError):  # which has 254 levels for a limit
        raise BadLine("it is nested too deeply", number) from None
    except (msgspec.MsgspecError, orjson.JSONDecodeError, UnicodeDecodeError):
        try:
            convert(load_object(data), _Unchecked)
        except InvalidRequest as error:
            raise BadLine(str(error), number, param=error.param) from None
        raise BadLine("it is no JSON object", number) from None
    if not 0 < len(given.custom_id) <= MAX_ID_CHARS:
        raise BadLine(
            f"custom_id has {len(given.custom_id)} characters; allowed is 1 to {MAX_ID_CHARS}", number, param="custom_id"
        )
    if given.method != "POST":
        raise BadLine(f"method is {show(given.method)}; allowed is POST", number, param="method")
    if given.url not in ENDPOINTS:
        raise BadLine(f"url is {show(given.url)}; allowed is {', '.join(ENDPOINTS)}", number, param="url")
    for name in ("stream", "background"):
        if body.get(name):
            raise BadLine(
                f"body.{name} is {show(body[name])}; answers of a batch are written whole", number, param=f"body.{name}"
            )
    return Line(number, id, given.custom_id, given.url, raw)


def _id_of(custom_id: str, url: str, body: object) -> str:
    """However the body's JSON is spaced and ordered, it is the same request."""
    digest = blake2b(digest_size=16)
    for part in (orjson.dumps(custom_id), orjson.dumps(url), orjson.dumps(body, option=orjson.OPT_SORT_KEYS)):
        digest.update(part + b"\n")
    return ID + digest.hexdigest()


def key_of(custom_id: str) -> int:
    """A number for a custom_id: millions of them have to be held."""
    return int.from_bytes(blake2b(custom_id.encode(), digest_size=8).digest())


def digest_of(id: str) -> int:
    """An answer's id as a number."""
    return int(id[len(ID) : len(ID) + 16], 16)


def answer_line(line: Line, status: int, request_id: str, body: bytes) -> bytes:
    """The line of an answer; `body` is JSON."""
    if b"\n" in body:
        body = orjson.dumps(orjson.loads(body))
    head = orjson.dumps({"id": line.id, "custom_id": line.custom_id})[:-1]
    response = b'{"status_code":%d,"request_id":%b,"body":%b}' % (status, orjson.dumps(request_id), body)
    return b'%b,"response":%b,"error":null}\n' % (head, response)


def error_line(line: Line, code: str, message: str) -> bytes:
    """The line of a request that was not asked."""
    error = {"code": code, "message": message}
    return orjson.dumps({"id": line.id, "custom_id": line.custom_id, "response": None, "error": error}) + b"\n"


class Usage(Struct):
    """Sums over answers, under the names that OpenAI's batches have for them."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def add(self, more: "Usage") -> None:
        """Take in those of another answer."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(more, name))


class _Details(Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Counts(Struct):
    """Both of OpenAI's spellings."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Body(Struct):
    usage: _Counts | None = None
    meta_info: _Counts | None = None  # of /generate


def usage_of(body: bytes | Raw) -> Usage:
    """The tokens that an answer says it took; nothing where it says nothing."""
    counts = None
    with suppress(msgspec.MsgspecError, RecursionError):  # a list, or numbers that are none
        read = msgspec.json.decode(body, type=_Body)
        counts = read.usage or read.meta_info
    if counts is None:
        return Usage()
    prompt = counts.prompt_tokens_details or counts.input_tokens_details or _Details()
    answer = counts.completion_tokens_details or counts.output_tokens_details or _Details()
    return Usage(
        counts.prompt_tokens or counts.input_tokens,
        prompt.cached_tokens,
        counts.completion_tokens or counts.output_tokens,
        answer.reasoning_tokens,
    )


class _Response(Struct):
    status_code: int
    body: Raw


class _Error(Struct):
    code: str


class _Answer(Struct):
    id: str
    custom_id: str
    response: _Response | None
    error: _Error | None


class Answered(Struct, frozen=True):
    """What is known of a line that was written earlier."""

    key: int
    digest: int
    is_good: bool
    usage: Usage


def read_answer(data: bytes) -> Answered | None:
    """What was answered on a line; None: it is no such line."""
    try:
        given = msgspec.json.decode(data, type=_Answer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if not given.id.startswith(ID) or len(given.id) != len(ID) + 32 or not given.id[len(ID) :].isalnum():
        return None
    try:
        digest = digest_of(given.id)
    except ValueError:
        return None
    response = given.response
    is_good = response is not None and is_success(response.status_code)
    return Answered(key_of(given.custom_id), digest, is_good, usage_of(response.body) if response is not None else Usage())


def is_success(status: int) -> bool:
    """Whether an answer of that status is what was asked for."""
    return 200 <= status < 300
