"""Calls over HTTP, many at once and given up at any moment, against a server of a few lines."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from streamserve.errors import InvalidRequest
from streamserve.lang.endpoint import RuntimeEndpoint
from streamserve.lang.transport import LANE_WIDTH, MAX_CALLS, Http

pytestmark = pytest.mark.anyio


class Server:
    """Answers /quick at once, and /slow when it is told to."""

    def __init__(self) -> None:
        self.url = ""
        self.num_waiting = 0
        self.goes_on = asyncio.Event()
        self.serving: set[asyncio.Task[None] | None] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.serving.add(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET /slow"):
                    self.num_waiting += 1
                    await self.goes_on.wait()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ntrue")
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    found = Server()
    listening = await asyncio.start_server(found.serve, "127.0.0.1", backlog=2 * MAX_CALLS)
    found.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    yield found
    found.goes_on.set()
    listening.close()
    await asyncio.wait({task for task in found.serving if task is not None})


async def test_calls_given_up_at_any_moment_leave_room_for_others(server: Server) -> None:
    http = Http(server.url)
    for num_turns in range(40):
        tasks = [asyncio.create_task(http.call("GET", "/slow")) for _ in range(LANE_WIDTH)]
        for _ in range(num_turns):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(20):
        assert await asyncio.gather(*[http.call("GET", "/quick") for _ in range(LANE_WIDTH)]) == [True] * LANE_WIDTH
    await http.aclose()


def test_what_is_no_url_is_refused_at_once() -> None:
    for url in ("localhost:30000", "ftp://host", ""):
        with pytest.raises(InvalidRequest, match="begins with http://"):
            RuntimeEndpoint(url)


async def test_no_call_waits_for_a_slow_one_while_there_is_room(server: Server) -> None:
    http, num_slow = Http(server.url), MAX_CALLS - 6
    slow = [asyncio.create_task(http.call("GET", "/slow")) for _ in range(num_slow)]
    while server.num_waiting < num_slow:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    async with asyncio.timeout(20):
        assert await asyncio.gather(*[http.call("GET", "/quick") for _ in range(40)]) == [True] * 40
    server.goes_on.set()
    assert await asyncio.gather(*slow) == [True] * num_slow
    assert len(http._lanes) == MAX_CALLS // LANE_WIDTH
    await http.aclose()
