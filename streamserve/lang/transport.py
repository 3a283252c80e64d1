"""How calls of a server's API travel: over HTTP here; in this process elsewhere.

Owns the connections to one server, and how its failures become errors. Knows nothing of what is asked or answered.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit
from weakref import finalize

import httpx

from streamserve.errors import CallFailed, InvalidRequest, Unreachable, error_of

# More calls at once wait for one to end. In one pool of 256 connections a call took 8 ms of this process, since httpx looks at
# all of them several times for each; in pools of 8 it takes 0.9 ms.
MAX_CALLS = 256
LANE_WIDTH = 8
CONNECT_TIMEOUT_S = 20.0
KEPT_S = 4.0  # a connection without calls: less than servers keep theirs, or a call meets one that is being closed
LOOPBACK = ("127.0.0.1", "::1", "localhost")
DONE = "[DONE]"


class Transport(Protocol):
    """Calls of one server. All methods run on the background loop (loops.py). What fails raises a StreamServeError."""

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """The answer, decoded. Cancelling the call ends the request."""
        ...

    def events(self, path: str, body: Any) -> AsyncGenerator[Any, None]:
        """The decoded data of each event that a POST answers with, up to the stream's end. Closing it ends the request."""
        ...

    async def aclose(self) -> None:
        """Let go of what is held open."""
        ...


def close_when_gone(owner: object, close: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Closes what `owner` opened on the running loop once nobody has the owner any longer: programs drop a back end without a
    word, and its connections must not wait for the process to end. `close` must not know the owner."""
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[object]] = []  # a loop does not hold its tasks

    def closing() -> None:  # from any thread
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(close())))

    finalize(owner, closing).atexit = False


@dataclass(slots=True)
class Lane:
    """A client with few connections, and how many calls go over it now."""

    client: httpx.AsyncClient
    num_calls: int = 0


class Http:
    """A server at a URL. Opens nothing before the first call. An answer may take as long as it takes."""

    def __init__(self, url: str, *, api_key: str | None = None, verify: bool | str | ssl.SSLContext = True) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidRequest(f"the server's URL is {url!r}; it begins with http:// or https://", param="base_url")
        self.url = url.rstrip("/")
        self._options: dict[str, Any] = {
            "headers": {} if api_key is None else {"authorization": f"Bearer {api_key}"},
            "verify": verify if url.startswith("https:") else False,
            "timeout": httpx.Timeout(None, connect=CONNECT_TIMEOUT_S, pool=None),
            # Calls are counted here: a pool's own limit counts a call that was cancelled before it connected for ever.
            "limits": httpx.Limits(max_connections=None, keepalive_expiry=KEPT_S),
            "trust_env": urlsplit(url).hostname not in LOOPBACK,  # no proxy leads back here
        }
        self._room = asyncio.Semaphore(MAX_CALLS)
        self._lanes: list[Lane] = []

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """See Transport."""
        try:
            async with self._lane() as client:
                reply = await client.request(method, self.url + path, **_content(body))
        except httpx.HTTPError as error:
            raise self._unreachable(method, path, error) from error
        if reply.status_code >= 300:
            raise failure_of(reply.status_code, reply.content, reply.headers.get("retry-after"))
        return decoded(reply.content)

    async def events(self, path: str, body: Any) -> AsyncGenerator[Any, None]:
        """See Transport."""
        try:
            async with self._lane() as client, client.stream("POST", self.url + path, **_content(body)) as reply:
                if reply.status_code >= 300:
                    raise failure_of(reply.status_code, await reply.aread(), reply.headers.get("retry-after"))
                async with aclosing(events_of(reply.aiter_bytes())) as events:
                    async for event in events:
                        yield event
        except httpx.HTTPError as error:
            raise self._unreachable("POST", path, error) from error

    async def aclose(self) -> None:
        """See Transport."""
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            await lane.client.aclose()

    @asynccontextmanager
    async def _lane(self) -> AsyncGenerator[httpx.AsyncClient, None]:
        """The client that has the least to do; another one where all have their fill."""
        async with self._room:
            lane = min(self._lanes, key=lambda lane: lane.num_calls, default=None)
            if lane is None or lane.num_calls >= LANE_WIDTH:
                if self._options["verify"] is True or isinstance(self._options["verify"], str):
                    self._options["verify"] = httpx.create_ssl_context(self._options["verify"])  # once for all: it takes 20 ms
                lane = Lane(httpx.AsyncClient(**self._options))
                close_when_gone(self, lane.client.aclose)
                self._lanes.append(lane)
            lane.num_calls += 1
            try:
                yield lane.client
            finally:
                lane.num_calls -= 1

    def _unreachable(self, method: str, path: str, error: httpx.HTTPError) -> Unreachable:
        why = str(error) or type(error).__name__
        return Unreachable(f"{method} {self.url}{path} was not answered: {why}; is the server running?")


def _content(body: Any) -> dict[str, Any]:
    if body is None:
        return {}
    return {"content": json.dumps(body).encode(), "headers": {"content-type": "application/json"}}


def failure_of(status: int, content: bytes, retry_after: str | None) -> Exception:
    """The error that an answer of this status is."""
    try:
        body = json.loads(content)
    except ValueError:
        body = content.decode("utf-8", "replace")[:1000] or None
    try:
        retry_after_s = None if retry_after is None else float(retry_after)
    except ValueError:  # it may be a date
        retry_after_s = None
    return error_of(status, {} if body is None else body, retry_after_s=retry_after_s)


def decoded(content: bytes) -> Any:
    """The value of an answer's body; the text where it is not JSON; None where there is none."""
    if not content:
        return None
    try:
        return json.loads(content)
    except ValueError:
        return content.decode("utf-8", "replace")


async def events_of(parts: AsyncIterable[bytes]) -> AsyncGenerator[Any, None]:
    """The decoded data of each event, up to `[DONE]`. Raises what an event with an `error` says, and Unreachable for a stream
    that ends without either: its end is missing."""
    async for data in _data_of(parts):
        if data == DONE:
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise CallFailed(f"an event of the stream is no JSON: {data[:200]}") from None
        if isinstance(event, Mapping) and event.get("error"):
            raise error_of(None, event)
        yield event
    raise Unreachable("the stream ended in the middle; is the server still running?")


async def _data_of(parts: AsyncIterable[bytes]) -> AsyncGenerator[str, None]:
    lines: list[str] = []
    held = b""
    async for part in parts:
        *whole, held = (held + part).split(b"\n")
        for line in whole:
            text = line.rstrip(b"\r").decode()
            if text.startswith("data:"):
                lines.append(text[5:].removeprefix(" "))
            elif not text and lines:
                yield "\n".join(lines)
                lines.clear()
    if lines:
        yield "\n".join(lines)
