"""Streams that survive their socket: cut anywhere and read on over another one, or over HTTP, they are what one socket gets."""

from typing import Any

import httpx
import pytest

from streamserve.config import ServerConfig
from tests.e2e.serving import FakeServer, fake_server
from tests.e2e.test_websocket import Talk, talk, text_of

pytestmark = pytest.mark.anyio
NUM_TOKENS = 300


def body_of(num_tokens: int = NUM_TOKENS, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "tell me everything"}]
    return {"messages": messages, "max_tokens": num_tokens, "ignore_eos": True, "resumable": True, **fields}


class Listener:
    """Who reads one stream over any number of sockets."""

    def __init__(self) -> None:
        self.stream = ""
        self.numbers: list[int] = []
        self.chunks: list[dict[str, Any]] = []
        self.last: dict[str, Any] = {}

    async def begin(self, socket: Talk, body: dict[str, Any], count: int | None = None) -> None:
        await socket.say(type="chat.create", id="a", request=body)
        await self.listen(socket, count)

    async def go_on(self, socket: Talk, count: int | None = None) -> None:
        await socket.say(type="stream.resume", id="a", stream=self.stream, after=len(self.numbers))
        await self.listen(socket, count)

    async def listen(self, socket: Talk, count: int | None) -> None:
        """To the end, or so many chunks."""
        while count is None or count > 0:
            frame = await socket.hear()
            assert frame["id"] == "a"
            if frame["type"] == "stream":
                self.stream = frame["stream"]
            elif frame["type"] == "chunk":
                self.numbers.append(frame["n"])
                self.chunks.append(frame["chunk"])
                count = None if count is None else count - 1
            else:
                self.last = frame
                return

    @property
    def text(self) -> str:
        return text_of(self.chunks)


async def whole_text(server: FakeServer) -> str:
    listener = Listener()
    async with talk(server) as socket:
        await listener.begin(socket, body_of())
    return listener.text


async def test_an_answer_cut_many_times_is_the_answer_in_one() -> None:
    async with fake_server() as server:
        listener = Listener()
        async with talk(server) as socket:
            await listener.begin(socket, body_of(), 7)
        for _ in range(12):
            async with talk(server) as socket:
                await listener.go_on(socket, 9)
        async with talk(server) as socket:
            await listener.go_on(socket)
        assert listener.numbers == list(range(1, len(listener.numbers) + 1))
        assert listener.text == await whole_text(server)
        assert (listener.last["type"], listener.last["usage"]["completion_tokens"]) == ("done", NUM_TOKENS)


async def test_what_began_on_a_socket_can_be_read_over_http_and_ended_there() -> None:
    async with fake_server(step_s=0.01) as server, httpx.AsyncClient(base_url=server.url, timeout=10) as http:
        listener = Listener()
        async with talk(server) as socket:
            await listener.begin(socket, body_of(40), 5)
        rest = await http.get(f"/v1/streams/{listener.stream}", headers={"last-event-id": f"{listener.stream}:5"})
        assert rest.text.split("\n\n")[-2].endswith("data: [DONE]")
        async with talk(server) as socket:
            await listener.begin(socket, body_of(5000), 5)
        gone = (await http.delete(f"/v1/streams/{listener.stream}")).json()
        assert gone["aborted"] is True
        await server.until_idle()
        async with talk(server) as socket:
            await listener.go_on(socket)
        assert listener.last["error"]["code"] == "not_found"


async def test_a_cancel_ends_it_at_once_also_on_the_socket_that_came_later() -> None:
    async with fake_server(step_s=0.01) as server:
        listener = Listener()
        async with talk(server) as socket:
            await listener.begin(socket, body_of(5000), 5)
        assert server.engine.load().running == 1, "its socket's end is not its own"
        async with talk(server) as socket:
            await listener.go_on(socket, 5)
            await socket.say(type="cancel", id="a")
            await listener.listen(socket, None)
        assert listener.chunks[-1]["choices"][0]["finish_reason"] == "abort"
        assert listener.last["type"] == "done"
        await server.until_idle()


async def test_it_ends_when_nobody_comes_back_and_its_pages_are_free() -> None:
    async with fake_server(ServerConfig(resume_window_s=0.2)) as server:
        listener = Listener()
        async with talk(server) as socket:
            await listener.begin(socket, body_of(8000), 5)
        await server.until_idle()
        load = server.engine.load()
        assert load.free_tokens + load.evictable_tokens == load.total_tokens
        async with talk(server) as socket:
            await listener.go_on(socket)
        assert listener.last["error"]["code"] == "not_found"


async def test_the_newer_reader_goes_on_and_the_older_one_is_told() -> None:
    async with fake_server(step_s=0.01) as server, talk(server) as older, talk(server) as newer:
        first, second = Listener(), Listener()
        await first.begin(older, body_of(100), 5)
        second.stream, second.numbers, second.chunks = first.stream, first.numbers[:], first.chunks[:]
        await second.go_on(newer)
        await first.listen(older, None)
        assert first.last["error"]["code"] == "stream_taken"
        assert second.last["type"] == "done" and len(second.text) == 100


async def test_a_stream_is_its_keys_alone_and_wrong_places_are_refused() -> None:
    async with fake_server(ServerConfig(api_key=("sesame", "mellon")), step_s=0.01) as server:
        listener = Listener()

        async def refusal(key: str, **fields: Any) -> tuple[str, str]:
            async with talk(server) as socket:
                await socket.say(type="auth", api_key=key)
                assert (await socket.hear())["type"] == "auth.ok"
                await socket.say(type="stream.resume", id="b", **{"stream": listener.stream, "after": 0, **fields})
                error = (await socket.hear())["error"]
                return error["code"], error["param"]

        async with talk(server) as socket:
            await socket.say(type="auth", api_key="sesame")
            await socket.hear()
            await listener.begin(socket, body_of(5000), 3)
        assert await refusal("mellon") == ("not_found", "stream")
        assert await refusal("sesame", stream="nobody") == ("not_found", "stream")
        assert await refusal("sesame", stream=7) == ("invalid_value", "stream")
        for after in (-1, 9_999_999, True, "1"):
            assert await refusal("sesame", after=after) == ("invalid_value", "after")


async def test_a_server_that_keeps_no_streams_says_so() -> None:
    async with fake_server(ServerConfig(resume_window_s=0)) as server, talk(server) as socket:
        listener = Listener()
        await listener.begin(socket, body_of())
        assert (listener.last["error"]["code"], listener.last["error"]["param"]) == ("invalid_value", "resumable")
