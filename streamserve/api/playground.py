"""The web page and its files, from a table read once at start: a request's path is looked up, never joined to a folder.

Owns the policy under which the page runs. Knows nothing of what the page does.
"""

from dataclasses import dataclass
from hashlib import sha256
from mimetypes import guess_type
from pathlib import Path

from streamserve.api.wire import Exchange, Headers
from streamserve.errors import NotFound

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; "
    "worker-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS: Headers = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=(), payment=(), usb=()"),
    (b"cache-control", b"no-cache"),  # ask each time; the entity tag makes the answer small
)
# Not left to the machine's own table, which may know less.
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html", ".json": "application/json"}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file, as it is sent."""

    body: bytes
    content_type: bytes
    tag: bytes


class Playground:
    """The page at / and its files under /static/. Empty when the folder is missing or the page is switched off."""

    def __init__(self, folder: Path | None) -> None:
        self._assets = {} if folder is None else {path.relative_to(folder).as_posix(): _read(path) for path in _files(folder)}

    async def page(self, exchange: Exchange) -> None:
        """GET /"""
        await self._send(exchange, "index.html")

    async def docs(self, exchange: Exchange) -> None:
        """GET /docs: a page that shows /openapi.json and lets one try it."""
        await self._send(exchange, "docs.html")

    async def file(self, exchange: Exchange) -> None:
        """GET /static/{name}"""
        await self._send(exchange, exchange.scope["path_params"]["name"])

    async def _send(self, exchange: Exchange, name: str) -> None:
        asset = self._assets.get(name)
        if asset is None:
            raise NotFound(f"no file {name[:200]!r} belongs to the page" if self._assets else "the playground is switched off")
        head = [*HEADERS, (b"etag", asset.tag)]
        if exchange.header(b"if-none-match") == asset.tag:
            await exchange.start(304, head)
            await exchange.end()
        else:
            await exchange.answer(200, asset.body, asset.content_type, head)


def static_folder() -> Path | None:
    """Where the page's files are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    for folder in (package / "static", package.parent / "static"):
        if (folder / "index.html").is_file():
            return folder
    return None


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]


def _read(path: Path) -> Asset:
    body = path.read_bytes()
    kind = TYPES.get(path.suffix) or guess_type(path.name)[0] or "application/octet-stream"
    is_text = kind.startswith("text/") or kind == "application/json"
    return Asset(
        body, f"{kind}; charset=utf-8".encode() if is_text else kind.encode(), b'"%b"' % sha256(body).hexdigest()[:32].encode()
    )
