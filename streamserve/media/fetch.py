"""Files from http and https URLs that clients name, without lending them the server's place in the network.

Owns which hosts may be asked, and the limits on sizes, times and redirects. Knows nothing of pictures.

The address that is checked is the one that is connected to: a name is resolved once for each hop, here, and never again. No
proxies, no cookies, no credentials, no compression, no connection that another request made.
"""

from collections.abc import Awaitable, Callable, Iterable
from io import BytesIO
from socket import SOCK_STREAM
from ssl import SSLContext

import httpx
from anyio import CapacityLimiter, fail_after, getaddrinfo, to_thread

from streamserve import __version__
from streamserve.errors import InvalidRequest
from streamserve.media.addresses import is_public

ANY_PUBLIC = "*"
MAX_REDIRECTS = 3
MAX_ADDRESSES = 3  # of a name that are tried
FETCH_S, CONNECT_S = 10.0, 3.0
MAX_FETCHES = 32  # at once
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = {
    "accept": "image/png, image/jpeg, image/webp, image/gif, image/bmp, video/*, audio/*",
    "accept-encoding": "identity",
    "user-agent": f"StreamServe/{__version__}",
}

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def addresses_of(host: str, port: int) -> list[str]:
    """The addresses of a name, as the system knows them; forms that only it takes for an address (2130706433) as well."""
    found = await getaddrinfo(host, port, type=SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Fetcher:
    """Asks those hosts only that are named in `hosts`: NAME or NAME:PORT, whatever its addresses are, or "*", which is every
    host that has public addresses alone. `resolve` and `transport` are for tests."""

    def __init__(
        self,
        hosts: Iterable[str],
        max_bytes: int,
        *,
        limit_s: float = FETCH_S,
        resolve: Resolve = addresses_of,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._hosts = frozenset(host.strip().lower().replace("[", "").replace("]", "") for host in hosts)
        self._max_bytes = max_bytes
        self._limit_s = limit_s
        self._resolve = resolve
        self._transport = transport
        self._limiter = CapacityLimiter(MAX_FETCHES)

    async def fetch(self, url: str, param: str) -> bytes:
        """The body behind a URL. Raises InvalidRequest, saying of `param` what is wrong, and nothing of what was received."""
        try:
            with fail_after(self._limit_s):
                async with self._limiter:
                    return await self._follow(_parsed(url, param), param)
        except TimeoutError:
            raise InvalidRequest(f"{param}: the host did not send the file within {self._limit_s:g} s", param=param) from None

    async def _follow(self, url: httpx.URL, param: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            found = await self._ask(url, await self._allowed_addresses(url, param), param)
            if isinstance(found, bytes):
                return found
            url = _parsed(found, param, url)
        raise InvalidRequest(f"{param}: the host redirects more than {MAX_REDIRECTS} times", param=param)

    async def _allowed_addresses(self, url: httpx.URL, param: str) -> list[str]:
        """Where this URL may be asked for. Raises InvalidRequest where it may not."""
        host, port = url.raw_host.decode("ascii"), _port_of(url)
        names = {name.lower().rstrip(".") for name in (host, url.host)}
        is_named = not self._hosts.isdisjoint({*names, *(f"{name}:{port}" for name in names)})
        if not is_named and ANY_PUBLIC not in self._hosts:
            raise InvalidRequest(f"{param}: host {_shown(host)} is none that files are fetched from (--media-hosts)", param=param)
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError):
            addresses = []
        if not addresses:
            raise InvalidRequest(f"{param}: host {_shown(host)} has no address", param=param)
        if not is_named and not all(is_public(address) for address in addresses):
            raise InvalidRequest(
                f"{param}: host {_shown(host)} is not on the public network; there only hosts of --media-hosts are asked",
                param=param,
            )
        return addresses[:MAX_ADDRESSES]

    async def _ask(self, url: httpx.URL, addresses: list[str], param: str) -> bytes | str:
        """The body, or where a redirect leads."""
        transport = await self._opened()
        headers = {**HEADERS, "host": url.netloc.decode("ascii")}
        timeout = httpx.Timeout(self._limit_s, connect=CONNECT_S).as_dict()
        extensions = {"sni_hostname": url.raw_host.decode("ascii"), "timeout": timeout}
        for address in addresses:
            try:
                request = httpx.Request("GET", url.copy_with(host=address), headers=headers, extensions=extensions)
                return await self._read(await transport.handle_async_request(request), param)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
            except (httpx.HTTPError, httpx.InvalidURL, ValueError):
                raise InvalidRequest(f"{param}: the host's answer cannot be read", param=param) from None
        raise InvalidRequest(f"{param}: host {_shown(url.host)} cannot be connected to", param=param)

    async def _read(self, response: httpx.Response, param: str) -> bytes | str:
        try:
            if response.status_code in REDIRECTS and "location" in response.headers:
                return str(response.headers["location"])
            if response.status_code != 200:
                raise InvalidRequest(f"{param}: the host answered with status {response.status_code}", param=param)
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise InvalidRequest(f"{param}: the host answered with a compressed file", param=param)
            announced = response.headers.get("content-length", "")
            if announced.isascii() and announced.isdigit() and int(announced) > self._max_bytes:
                raise too_long(param, self._max_bytes)
            body = BytesIO()  # gives what it holds without a second copy of it
            assert isinstance(response.stream, httpx.AsyncByteStream)
            async for part in response.stream:
                if body.tell() + len(part) > self._max_bytes:
                    raise too_long(param, self._max_bytes)
                body.write(part)
            return body.getvalue()
        finally:
            await response.aclose()

    async def _opened(self) -> httpx.AsyncBaseTransport:
        if self._transport is None:
            made = await to_thread.run_sync(make_transport)  # reads certificates
            if self._transport is None:  # others may have been waiting too
                self._transport = made
        return self._transport


def make_transport(verify: SSLContext | bool = True) -> httpx.AsyncBaseTransport:
    """Without a client around it, which would keep cookies. No connection is kept: it would be known by its address alone, and
    for another name there nobody would ask for a certificate."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncHTTPTransport(verify=verify, trust_env=False, limits=limits)


def too_long(param: str, max_bytes: int) -> InvalidRequest:
    """Of a file over the limit."""
    return InvalidRequest(f"{param}: the file has more than {max_bytes} bytes, which is the most (--max-body-mb)", param=param)


def _parsed(url: str, param: str, base: httpx.URL | None = None) -> httpx.URL:
    try:
        found = httpx.URL(url) if base is None else base.join(url)
        has_host, is_port = bool(found.raw_host), found.port is None or 0 < found.port < 65_536
    except (httpx.InvalidURL, ValueError, UnicodeError):
        raise InvalidRequest(f"{param} is no URL that can be understood", param=param) from None
    if found.scheme not in ("http", "https"):
        what = f"the host redirects to {_shown(found.scheme)}" if base is not None else f"scheme {_shown(found.scheme)}"
        raise InvalidRequest(f"{param}: {what} is not fetched; allowed are https, http and data", param=param)
    if not (has_host and is_port):
        raise InvalidRequest(f"{param} is a URL without a {'port that there is' if has_host else 'host'}", param=param)
    if found.userinfo:
        raise InvalidRequest(f"{param} is a URL with a user's name; files are fetched without credentials", param=param)
    return found


def _port_of(url: httpx.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


def _shown(name: str) -> str:
    return repr(name[:100])
