"""OpenAI's Files API: pictures that are sent once and then meant by their id, and the requests and answers of batches.

Owns these routes: what a form may say, and the answers' shapes. How files are kept is uploads.py's; how one becomes a picture
media/loader.py's, which asks for it by its id and owner.
"""

from asyncio import get_running_loop
from io import BytesIO
from typing import Any, Literal, cast

import anyio
from anyio import to_thread
from msgspec import Struct, to_builtins

from streamserve.api.batch_runner import MAX_LINES
from streamserve.api.batch_todo import BadInput, indexed
from streamserve.api.multipart import FormField, read_form
from streamserve.api.query import page_of, query_of
from streamserve.api.routes import RouteSpec
from streamserve.api.schema import MAX_NAME_CHARS, show
from streamserve.api.service import Service
from streamserve.api.uploads import Upload, Uploads
from streamserve.api.wire import MAX_PART_BYTES, Exchange
from streamserve.errors import InvalidRequest, NotFound
from streamserve.media.decode import num_pixels_of

PURPOSES = ("vision", "user_data", "batch")
Purpose = Literal["vision", "user_data", "batch", "batch_output"]
MIN_TTL_S, TTL_S, MAX_TTL_S = 3_600, 24 * 3_600, 30 * 24 * 3_600
MAX_LISTED = 10_000
FILE_KINDS = "PNG, JPEG, WebP, GIF or BMP, where purpose is vision; requests as JSON lines, where it is batch"
FORM: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "description": FILE_KINDS},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {
            "type": "integer",
            "minimum": MIN_TTL_S,
            "maximum": MAX_TTL_S,
            "description": f"how long the file is kept; {TTL_S} unless given",
        },
    },
}


class FileObject(Struct):
    """A file that is kept."""

    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"


class FileList(Struct):
    """A page of the files that are kept."""

    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class FileDeleted(Struct):
    """A file that is kept no longer."""

    id: str
    deleted: Literal[True]
    object: Literal["file"] = "file"


class Files:
    """These routes."""

    def __init__(self, service: Service, store: Uploads) -> None:
        self._service = service
        self._store = store

    def routes(self) -> list[RouteSpec]:
        """What there is here."""
        path, one = "/v1/files", "/v1/files/{id}"
        return [
            RouteSpec("POST", path, self.create, result=FileObject, form=FORM, errors=(400, 413)),
            RouteSpec(
                "GET",
                path,
                self.list,
                result=FileList,
                query=(
                    ("purpose", f"only files for this: {', '.join(PURPOSES)}, batch_output"),
                    ("limit", f"1 to {MAX_LISTED}, which is also what it is when left out"),
                    ("order", "desc (newest first, when left out) or asc"),
                    ("after", "only files behind this one"),
                ),
            ),
            RouteSpec("GET", one, self.retrieve, result=FileObject),
            RouteSpec("GET", f"{one}/content", self.content, media="application/octet-stream"),
            RouteSpec("DELETE", one, self.delete, result=FileDeleted, errors=(409,)),
        ]

    async def create(self, exchange: Exchange) -> None:
        """POST /v1/files: keep a file for a while. Requests name it by its id in the place of a picture's URL."""
        form = await read_form(exchange, self._service.max_body_bytes)
        for name in form:
            if name not in FORM["properties"]:
                raise InvalidRequest(
                    f"unknown field {show(name)}; allowed is {', '.join(FORM['properties'])}", param=name[:MAX_NAME_CHARS]
                )
        file, purpose = _file(form), _value(form, "purpose")
        if purpose not in PURPOSES:
            shown = "missing" if purpose is None else show(purpose)
            raise InvalidRequest(f"purpose is {shown}; allowed is {', '.join(PURPOSES)}", param="purpose")
        ttl_s = _ttl_s(form)
        if purpose == "vision":
            await to_thread.run_sync(num_pixels_of, file.data, "file")
        if purpose == "batch":
            await to_thread.run_sync(self._check_lines, file.data, limiter=self._service.checks)
        kept = self._store.put(
            file.data,
            owner=self._owner(exchange),
            filename=(file.filename or "")[:MAX_NAME_CHARS] or "file",
            purpose=purpose,
            ttl_s=ttl_s,
        )
        get_running_loop().call_later(ttl_s + 1, self._store.drop_expired)
        await exchange.answer_json(_shown(kept))

    async def list(self, exchange: Exchange) -> None:
        """GET /v1/files: the files that are kept, newest first unless order=asc."""
        query = query_of(exchange, "purpose", "limit", "order", "after")
        purpose = query["purpose"][-1] if "purpose" in query else None
        files = [_shown(kept) for kept in self._store.listed(self._owner(exchange)) if purpose in (None, kept.purpose)]
        await exchange.answer_json(page_of(query, files, MAX_LISTED, MAX_LISTED, "file that is listed"))

    async def retrieve(self, exchange: Exchange) -> None:
        """GET /v1/files/{id}: what is known of a file."""
        await exchange.answer_json(_shown(self._found(exchange)))

    async def content(self, exchange: Exchange) -> None:
        """GET /v1/files/{id}/content: the file as it was sent."""
        # Nothing that a browser would show: it is anybody's, and this server's origin is not theirs.
        headers = [(b"content-disposition", b"attachment"), (b"x-content-type-options", b"nosniff")]
        kept, kind = self._found(exchange), b"application/octet-stream"
        if kept.path is None:
            await exchange.answer(200, kept.data, kind, headers)
            return
        async with await anyio.open_file(kept.path, "rb") as file:
            await exchange.start(200, [(b"content-type", kind), (b"content-length", b"%d" % kept.size), *headers])
            while part := await file.read(MAX_PART_BYTES):
                await exchange.write(part)
            await exchange.end()

    async def delete(self, exchange: Exchange) -> None:
        """DELETE /v1/files/{id}: keep it no longer."""
        kept = self._found(exchange)
        self._store.delete(kept.id, kept.owner)
        await exchange.answer_json(to_builtins(FileDeleted(kept.id, deleted=True)))

    def _check_lines(self, data: bytes) -> None:
        """Of a batch. Blocks. Raises InvalidRequest that names the line."""
        try:
            indexed(lambda: BytesIO(data), self._service.max_body_bytes, max_lines=MAX_LINES)
        except BadInput as error:
            raise InvalidRequest(f"file: {error}", param="file") from None

    def _owner(self, exchange: Exchange) -> str:
        return self._service.owner_of(exchange.scope)

    def _found(self, exchange: Exchange) -> Upload:
        id = exchange.scope["path_params"]["id"]
        kept = self._store.get(id, self._owner(exchange))
        if kept is None:
            raise NotFound(f"there is no file {show(id)}, or no longer; GET /v1/files lists what there is", param="id")
        return kept


def _shown(kept: Upload) -> dict[str, Any]:
    shown: dict[str, Any] = to_builtins(
        FileObject(
            id=kept.id,
            bytes=kept.size,
            created_at=kept.created_s,
            expires_at=kept.expires_s,
            filename=kept.filename,
            purpose=cast(Purpose, kept.purpose),
        )
    )
    return shown


def _file(form: dict[str, FormField]) -> FormField:
    found = form.get("file")
    if found is None:
        raise InvalidRequest("file is missing", param="file")
    if found.filename is None:
        raise InvalidRequest("file is a plain value; a part with a filename is expected", param="file")
    return found


def _value(form: dict[str, FormField], name: str) -> str | None:
    found = form.get(name)
    if found is None:
        return None
    if found.filename is not None or len(found.data) > MAX_NAME_CHARS:
        raise InvalidRequest(f"{name} is a file or a long text; a plain value is expected", param=name)
    return found.data.decode("utf-8", "replace")


def _ttl_s(form: dict[str, FormField]) -> int:
    names = ("expires_after[anchor]", "expires_after[seconds]")
    anchor, seconds = (_value(form, name) for name in names)
    if anchor is None and seconds is None:
        return TTL_S
    if anchor != "created_at":
        shown = "missing" if anchor is None else show(anchor)
        raise InvalidRequest(f"{names[0]} is {shown}; allowed is created_at", param=names[0])
    given = int(seconds) if seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) < 12 else -1
    if not MIN_TTL_S <= given <= MAX_TTL_S:
        shown = "missing" if seconds is None else show(seconds)
        raise InvalidRequest(f"{names[1]} is {shown}; allowed is {MIN_TTL_S} to {MAX_TTL_S}", param=names[1])
    return given
