"""Where requests go: a server's address, how it is reached, and what every request to it carries.

Owns URLs, TLS and the heads of requests, and calls that are made before the clock runs. Knows no workload.
"""

import http.client
import json
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from streamserve.errors import StartError

LIMIT_S = 60.0  # of such a call


@dataclass(frozen=True, slots=True)
class Target:
    """One server. `prefix` stands before every path; `headers` go with every request."""

    host: str
    port: int
    is_tls: bool = False
    prefix: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def url(self) -> str:
        """As people write it."""
        return f"http{'s' if self.is_tls else ''}://{self._netloc}{self.prefix}"

    @property
    def _netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def tls(self) -> ssl.SSLContext | None:
        """How certificates are checked: by the system's authorities, or the file that SSL_CERT_FILE names."""
        return ssl.create_default_context() if self.is_tls else None

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """A whole request."""
        data = json.dumps(body).encode()
        head = (
            f"POST {self.prefix}{path} HTTP/1.1",
            f"Host: {self._netloc}",
            "Content-Type: application/json",
            *(f"{name}: {value}" for name, value in self.headers),
            f"Content-Length: {len(data)}",
        )
        return "\r\n".join(head).encode() + b"\r\n\r\n" + data

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and decoded body of one call; None for a body that is no JSON. Raises StartError where nobody answers."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **dict(self.headers)}
        make = http.client.HTTPSConnection if self.is_tls else http.client.HTTPConnection
        more: dict[str, Any] = {"context": self.tls()} if self.is_tls else {}
        line = make(self.host, self.port, timeout=LIMIT_S, **more)
        try:
            line.request(method, self.prefix + path, data, headers)
            answer = line.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise StartError(f"{self.url} does not answer: {error}") from None
        finally:
            line.close()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, None


def target_at(url: str, headers: tuple[tuple[str, str], ...] = ()) -> Target:
    """The server at a URL; a "/v1" at its end is not needed and left out. Raises ValueError."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no URL such as http://127.0.0.1:30000")
    is_tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Target(parts.hostname, parts.port or (443 if is_tls else 80), is_tls, prefix, headers)
