"""Who may come in: API keys, browser origins. Nothing here looks at a body.

Owns the key and the list of allowed origins. Knows nothing of routes beyond which ones are public.
"""

from hmac import compare_digest
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import Scope

from streamserve.api.wire import Headers, header_of
from streamserve.config import ServerConfig
from streamserve.errors import AuthenticationFailed

PREFLIGHT_AGE_S = 600


class Door:
    """Checks on headers that come before everything else."""

    def __init__(self, config: ServerConfig) -> None:
        self._key = config.api_key.encode() if config.api_key else None
        self._origins = frozenset(origin.encode().rstrip(b"/") for origin in config.cors_origins)
        self._is_loopback = is_loopback(config.host)

    @property
    def needs_key(self) -> bool:
        """Whether clients have to send a key."""
        return self._key is not None

    def check_key(self, scope: Scope) -> None:
        """Raises AuthenticationFailed unless the request carries the key, or none is needed."""
        if self._key is None:
            return
        header = header_of(scope, b"authorization")
        if header is None:
            raise AuthenticationFailed("no API key; send the header 'Authorization: Bearer KEY'", param="authorization")
        scheme, _, key = header.partition(b" ")
        if scheme.lower() != b"bearer" or not self.is_key(key.strip()):
            raise AuthenticationFailed(
                "the API key is wrong; send 'Authorization: Bearer KEY' with the server's key", param="authorization"
            )

    def is_key(self, key: bytes) -> bool:
        """Whether this is the key. Takes the same time whatever is wrong with it."""
        return self._key is None or compare_digest(key, self._key)

    def allows_origin(self, scope: Scope) -> bool:
        """Whether a page from the request's Origin may open a socket: same host, or listed. Programs send no Origin."""
        origin = header_of(scope, b"origin")
        return origin is None or b"*" in self._origins or origin in self._origins or is_same_host(scope, origin)

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
            (b"access-control-expose-headers", b"Retry-After, X-Request-Id"),
            (b"vary", b"Origin"),
        )

    def preflight_headers(self, scope: Scope) -> Headers:
        """The answer to a browser's OPTIONS, which carries no key."""
        wanted = header_of(scope, b"access-control-request-headers") or b"authorization, content-type"
        return (
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-allow-headers", wanted),
            (b"access-control-max-age", str(PREFLIGHT_AGE_S).encode()),
        )

    def may_see_texts(self, scope: Scope) -> bool:
        """Whether previews of other requests' texts may be shown: no key is set, the server is bound to loopback, and
        the asker is a program or our own page, not a foreign one that reached loopback through the user's browser."""
        host = urlsplit(b"//" + (header_of(scope, b"host") or b"")).hostname
        if self._key is not None or not self._is_loopback or host is None or not is_loopback(host.decode("latin1")):
            return False
        origin = header_of(scope, b"origin")
        return origin is None or is_same_host(scope, origin)


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_same_host(scope: Scope, origin: bytes) -> bool:
    """Whether an Origin header names the host (and port) that the request was sent to."""
    return urlsplit(origin).netloc == (header_of(scope, b"host") or b"")
