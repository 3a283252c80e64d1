"""The web page and its files, from a table read once at start: a request's path is looked up, never joined to a folder.

Pages name their files below static/VERSION/, where VERSION is a digest of all files: browsers keep those for good, and modules
find each other by relative paths as ever. Below static/ itself the same files are asked for anew each time.

Owns the policy under which the page runs. Knows nothing of what the page does.
"""

import gzip
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
)
ASK_AGAIN = (b"cache-control", b"no-cache")  # each time; the entity tag makes the answer small
FOR_GOOD = (b"cache-control", b"public, max-age=31536000, immutable")
VARIES = (b"vary", b"accept-encoding")
WORTH = 0.9  # of its size is the most that a compressed file may have
# Not left to the machine's own table, which may know less.
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html", ".json": "application/json"}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file, as it is sent. `gzipped`: the same, compressed, where that is worth it."""

    body: bytes
    gzipped: bytes | None
    content_type: bytes
    tag: bytes


class Playground:
    """The page at / and its files under /static/. Empty when the folder is missing or the page is switched off."""

    def __init__(self, folder: Path | None) -> None:
        files = {} if folder is None else {path.relative_to(folder).as_posix(): path.read_bytes() for path in _files(folder)}
        self._version = _digest(*(part for name, body in files.items() for part in (name.encode(), body)))[:16]
        self._assets = {name: _asset(name, self._placed(name, body)) for name, body in files.items()}

    async def page(self, exchange: Exchange) -> None:
        """GET /"""
        await self._send(exchange, "index.html")

    async def docs(self, exchange: Exchange) -> None:
        """GET /docs: a page that shows /openapi.json and lets one try it."""
        await self._send(exchange, "docs.html")

    async def file(self, exchange: Exchange) -> None:
        """GET /static/{name}"""
        name = exchange.scope["path_params"]["name"]
        lasting = name.removeprefix(f"{self._version}/")
        await self._send(exchange, lasting, is_lasting=lasting != name)

    def _placed(self, name: str, body: bytes) -> bytes:
        """A page whose files are named where they stay the same for good."""
        if not name.endswith(".html"):
            return body
        for attribute in (b'src="', b'href="'):
            body = body.replace(attribute + b"static/", attribute + b"static/%b/" % self._version.encode())
        return body

    async def _send(self, exchange: Exchange, name: str, *, is_lasting: bool = False) -> None:
        asset = self._assets.get(name)
        if asset is None:
            raise NotFound(f"no file {name[:200]!r} belongs to the page" if self._assets else "the playground is switched off")
        is_zipped = asset.gzipped is not None and _takes_gzip(exchange.header(b"accept-encoding") or b"")
        tag = asset.tag[:-1] + b'-gz"' if is_zipped else asset.tag
        head = [*HEADERS, FOR_GOOD if is_lasting else ASK_AGAIN, VARIES, (b"etag", tag)]
        if exchange.header(b"if-none-match") == tag:
            await exchange.start(304, head)
            await exchange.end()
        elif is_zipped and asset.gzipped is not None:
            await exchange.answer(200, asset.gzipped, asset.content_type, [*head, (b"content-encoding", b"gzip")])
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


def _asset(name: str, body: bytes) -> Asset:
    kind = TYPES.get(Path(name).suffix) or guess_type(name)[0] or "application/octet-stream"
    is_text = kind.startswith("text/") or kind == "application/json"
    zipped = gzip.compress(body, mtime=0)
    return Asset(
        body,
        zipped if len(zipped) < WORTH * len(body) else None,
        f"{kind}; charset=utf-8".encode() if is_text else kind.encode(),
        b'"%b"' % _digest(body)[:32].encode(),
    )


def _digest(*parts: bytes) -> str:
    digest = sha256()
    for part in parts:
        digest.update(b"%d:%b" % (len(part), part))
    return digest.hexdigest()


def _takes_gzip(header: bytes) -> bool:
    """Whether an Accept-Encoding allows it: named, and not with a weight of 0."""
    for entry in header.lower().split(b","):
        coding, _, weight = entry.replace(b" ", b"").partition(b";q=")
        if coding == b"gzip":
            return weight.strip(b"0.") != b"" or not weight
    return False
