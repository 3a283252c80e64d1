"""A body of type multipart/form-data to its fields, while it arrives: no more of it is ever held than the limit on bodies.

Owns how such a body is read. Knows nothing of what its fields mean.
"""

from dataclasses import dataclass, field
from io import BytesIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from streamserve.api.schema import MAX_NAME_CHARS, show
from streamserve.api.wire import Exchange
from streamserve.errors import InvalidRequest

MAX_FIELDS = 32


@dataclass(frozen=True, slots=True)
class FormField:
    """A field. `filename`: what the client calls the file that it is; None: it is a plain value."""

    data: bytes
    filename: str | None = None


async def read_form(exchange: Exchange, max_bytes: int) -> dict[str, FormField]:
    """The fields of a request's form, each of which may be there once. Raises InvalidRequest or RequestTooLarge."""
    given = (exchange.header(b"content-type") or b"").decode("latin1")
    kind, options = parse_options_header(given)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequest(
            f"content-type is {show(given)}; multipart/form-data with a boundary is expected", param="content-type"
        )
    form = _Form()
    try:
        parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": form.begin,
                "on_header_field": form.header_name,
                "on_header_value": form.header_value,
                "on_header_end": form.header_end,
                "on_headers_finished": form.headers_finished,
                "on_part_data": form.data,
                "on_part_end": form.end,
                "on_end": form.finish,
            },
        )
        async for part in exchange.parts(max_bytes):
            if part:
                parser.write(part)
    except FormParserError as error:
        raise InvalidRequest(f"the body is no multipart/form-data: {str(error)[:200]}", param="body") from None
    if not form.is_whole:
        raise InvalidRequest("the body is no multipart/form-data: it ends before its last boundary", param="body")
    return form.fields


@dataclass(slots=True)
class _Form:
    """What was read so far."""

    fields: dict[str, FormField] = field(default_factory=dict)
    is_whole: bool = False
    _headers: dict[bytes, bytes] = field(default_factory=dict)
    _header: tuple[bytes, bytes] = (b"", b"")
    _name: str = ""
    _filename: str | None = None
    _data: BytesIO = field(default_factory=BytesIO)

    def begin(self) -> None:
        if len(self.fields) == MAX_FIELDS:
            raise InvalidRequest(f"the form has more than {MAX_FIELDS} fields", param="body")
        self._headers, self._header, self._data = {}, (b"", b""), BytesIO()

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0] + data[start:end], b"")

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0], self._header[1] + data[start:end])

    def header_end(self) -> None:
        name, value = self._header
        self._headers[name.lower()] = value
        self._header = (b"", b"")

    def headers_finished(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b"").decode("latin1"))
        if kind != b"form-data" or b"name" not in options:
            raise InvalidRequest("a part of the form has no name", param="body")
        encoding = self._headers.get(b"content-transfer-encoding", b"binary").lower()
        try:
            self._name = options[b"name"].decode()[:MAX_NAME_CHARS]
            self._filename = options[b"filename"].decode() if b"filename" in options else None
        except UnicodeDecodeError:
            raise InvalidRequest("a name in the form is not valid UTF-8", param="body") from None
        if encoding not in (b"binary", b"8bit", b"7bit"):
            raise InvalidRequest(
                f"{self._name} is encoded as {show(encoding.decode('latin1'))}; send it as it is", param=self._name
            )
        if self._name in self.fields:
            raise InvalidRequest(f"{self._name} is given twice", param=self._name)

    def data(self, data: bytes, start: int, end: int) -> None:
        self._data.write(memoryview(data)[start:end])

    def end(self) -> None:
        self.fields[self._name] = FormField(self._data.getvalue(), self._filename)

    def finish(self) -> None:
        self.is_whole = True
