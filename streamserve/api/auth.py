"""Who may come in: API keys, browser origins. Nothing here looks at a body.

Owns the keys and the list of allowed origins. Knows nothing of routes beyond which ones are public.
"""

from collections.abc import Mapping
from dataclasses import replace
from hmac import compare_digest
from ipaddress import ip_address
from urllib.parse import SplitResultBytes, urlsplit

from starlette.types import Scope

from streamserve.api.wire import Headers, header_of
from streamserve.config import ServerConfig
from streamserve.errors import AuthenticationFailed, ConfigError, OriginForbidden
from streamserve.keys import ADMIN_KEY, API_KEY, keys_in, keys_of

PREFLIGHT_AGE_S = 600
OWNER = "streamserve.owner"  # in the scope of a call from this process: in whose name; clients cannot put it there


class Door:
    """Checks on headers that come before everything else."""

    def __init__(self, config: ServerConfig) -> None:
        self._keys = tuple(key.encode() for key in config.api_key)
        self._admin_keys = (config.admin_api_key.encode(),) if config.admin_api_key else ()
        self._origins = frozenset(origin.encode().rstrip(b"/") for origin in config.cors_origins)
        self._is_loopback = is_loopback(config.host)

    @property
    def needs_key(self) -> bool:
        """Whether clients have to send a key for what everybody uses."""
        return bool(self._keys)

    def check_key(self, scope: Scope, *, is_admin: bool = False) -> None:
        """Raises AuthenticationFailed unless the request carries a right key, or none is needed. `is_admin`: for a route that
        only holders of the admin key may use, where there is one."""
        allowed = self._allowed(is_admin)
        if not allowed or (OWNER in scope and not is_admin):
            return
        key = given_key(scope)
        if key is None:
            raise AuthenticationFailed("no API key; send the header 'Authorization: Bearer KEY'", param="authorization")
        if not _is_among(key, allowed):
            which = "the server's admin key" if is_admin and self._admin_keys else "a key of this server"
            raise AuthenticationFailed(
                f"the API key is wrong; send 'Authorization: Bearer KEY' with {which}", param="authorization"
            )

    def is_key(self, key: bytes) -> bool:
        """Whether this key opens what everybody uses. Takes the same time whatever is wrong with it."""
        return not self._keys or _is_among(key, self._allowed(is_admin=False))

    def _allowed(self, is_admin: bool) -> tuple[bytes, ...]:
        """The keys that open a route; none: it is open. An admin's key opens every route."""
        if is_admin and self._admin_keys:
            return self._admin_keys
        return (*self._keys, *self._admin_keys) if self._keys else ()

    def allows_origin(self, scope: Scope) -> bool:
        """Whether a page from the request's Origin may open a socket: same host, or listed. Programs send no Origin."""
        origin = header_of(scope, b"origin")
        return origin is None or b"*" in self._origins or origin in self._origins or is_same_host(scope, origin)

    def check_origin(self, scope: Scope) -> None:
        """Raises OriginForbidden for a request that may change something and comes from a page that is not allowed to. Browsers
        send simple POSTs of any page without asking, and only keep the answer from it."""
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and not self.allows_origin(scope):
            raise OriginForbidden("pages of this origin may not call this server (--cors-origins)", param="origin")

    def cors_headers(self, scope: Scope) -> Headers:
        """What every answer to this request carries, so that a page may read it."""
        origin = header_of(scope, b"origin")
        if origin is None:
            return ()
        if b"*" in self._origins:
            allowed = b"*"
        elif origin in self._origins:
            allowed = origin
        else:
            return ((b"vary", b"Origin"),)
        return (
            (b"access-control-allow-origin", allowed),
            (b"access-control-expose-headers", b"Retry-After, X-Request-Id, Request-Id, X-Streamserve-Warning"),
            (b"vary", b"Origin"),
        )

    def preflight_headers(self, scope: Scope) -> Headers:
        """The answer to a browser's OPTIONS, which carries no key."""
        wanted = header_of(scope, b"access-control-request-headers") or b"authorization, content-type, x-api-key"
        return (
            (b"access-control-allow-methods", b"GET, POST, PUT, DELETE, OPTIONS"),
            (b"access-control-allow-headers", wanted),
            (b"access-control-max-age", str(PREFLIGHT_AGE_S).encode()),
        )

    def is_admin(self, key: bytes | None) -> bool:
        """Whether this key opens the routes that ask for the admin's, or they are open to everybody."""
        allowed = self._allowed(is_admin=True)
        return not allowed or (key is not None and _is_among(key, allowed))

    def may_see_texts(self, scope: Scope, key: bytes | None) -> bool:
        """Whether previews of other requests' texts may be shown."""
        return self.why_no_texts(scope, key) is None

    def why_no_texts(self, scope: Scope, key: bytes | None) -> str | None:
        """Why other requests' texts may not be shown to whoever asks with this key; None: they may. The key is the admin's; or no
        key is set, the server is bound to loopback, and the asker is a program or our own page, not a foreign one that reached
        loopback through the user's browser."""
        if self._admin_keys and key is not None and _is_among(key, self._admin_keys):
            return None
        if self._admin_keys:
            return "texts of other requests are shown to the admin key only (--admin-api-key)"
        if self._keys:
            return "keys are set: texts of other requests are shown to an admin key only (--admin-api-key)"
        if not self._is_loopback:
            return "other machines may call: texts of other requests are shown to an admin key only (--admin-api-key)"
        place = _split(b"//" + (header_of(scope, b"host") or b""))
        origin = header_of(scope, b"origin")
        is_ours = place is not None and place.hostname is not None and is_loopback(place.hostname.decode("latin1"))
        if is_ours and (origin is None or is_same_host(scope, origin)):
            return None
        return "texts of other requests are shown to this machine's own page and programs only"


def given_key(scope: Scope) -> bytes | None:
    """The key a request carries: in `Authorization: Bearer KEY`, or in `x-api-key`, where Anthropic's clients put it."""
    header = header_of(scope, b"authorization")
    if header is None:
        return header_of(scope, b"x-api-key")
    scheme, _, key = header.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def _is_among(key: bytes, allowed: tuple[bytes, ...]) -> bool:
    """Compared with every key, each in constant time: how long it takes says nothing of which one is nearly right."""
    return sum([compare_digest(key, one) for one in allowed]) > 0


def read_keys(server: ServerConfig, environ: Mapping[str, str]) -> ServerConfig:
    """Settings whose keys are the keys themselves: `@FILE` is replaced by what the file holds, one key a line, and a key that
    stands in the environment (STREAMSERVE_API_KEY, one or several, one a line; STREAMSERVE_ADMIN_API_KEY) is taken in. Raises
    ConfigError."""
    given = [key for entry in server.api_key for key in keys_of(entry, "--api-key")] + keys_in(environ, API_KEY)
    admin = server.admin_api_key if server.admin_api_key is not None else environ.get(ADMIN_KEY) or None
    admins = [] if admin is None else keys_of(admin, "--admin-api-key")
    if len(admins) > 1:
        raise ConfigError(f"--admin-api-key names a file with {len(admins)} keys; one is expected")
    return replace(server, api_key=tuple(dict.fromkeys(given)), admin_api_key=admins[0] if admins else None)


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_same_host(scope: Scope, origin: bytes) -> bool:
    """Whether an Origin header names the host (and port) that the request was sent to."""
    place = _split(origin)
    return place is not None and place.netloc == header_of(scope, b"host")


def _split(url: bytes) -> SplitResultBytes | None:
    """A URL's parts; None for one that is malformed, as a header may be."""
    try:
        return urlsplit(url)
    except ValueError:
        return None
