"""/v1/ws on an application in this process, with a client whose connection is slow."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from streamserve.api.app import Api, create_app
from streamserve.config import ServerConfig
from streamserve.text.byte_tokenizer import byte_text_model
from tests.api.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio


class SlowSocket:
    """A client's end: every frame takes `send_s` to leave. `heard`: what came, the close as its code."""

    def __init__(self, app: Api, send_s: float) -> None:
        self.heard: list[Any] = []
        self._send_s = send_s
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "websocket.connect"})
        scope = {"type": "websocket", "path": "/v1/ws", "query_string": b"", "headers": []}
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._send))

    def say(self, **frame: Any) -> None:
        self._incoming.put_nowait({"type": "websocket.receive", "text": json.dumps(frame)})

    async def leave(self) -> None:
        self._incoming.put_nowait({"type": "websocket.disconnect"})
        await self.task

    async def _send(self, message: Any) -> None:
        await asyncio.sleep(self._send_s)
        if message["type"] == "websocket.send":
            self.heard.append(json.loads(message["text"]))
        elif message["type"] == "websocket.close":
            self.heard.append(message["code"])

    async def until(self, kind: str, count: int = 1) -> None:
        async with asyncio.timeout(5):
            while [frame["type"] for frame in self.heard].count(kind) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@asynccontextmanager
async def slow_socket(send_s: float = 0.005) -> AsyncIterator[tuple[Api, SlowSocket]]:
    app = create_app(ScriptedEngine(), byte_text_model(), ServerConfig(), model_name="tiny")
    socket = SlowSocket(app, send_s)
    yield app, socket
    await socket.leave()


async def test_the_last_frame_leaves_before_the_socket_closes() -> None:
    async with slow_socket() as (app, socket):
        socket.say(type="completion.create", id="a", request={"prompt": "x"})
        await socket.until("chunk")
        app.close_idle_sockets()
        async with asyncio.timeout(5):
            await socket.task
        assert socket.heard[-2]["type"] == "done" and socket.heard[-1] == 1001


async def test_an_id_is_taken_until_its_last_frame_has_its_turn() -> None:
    async with slow_socket(0.02) as (app, socket):
        socket.say(type="completion.create", id="a", request={"prompt": "x"})
        await socket.until("chunk")
        async with asyncio.timeout(5):
            while app._service._runs:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert socket.heard[-1]["type"] == "chunk", "it has ended, and its client does not know yet"
        socket.say(type="completion.create", id="a", request={"prompt": "y"})
        await socket.until("error")
        await socket.until("done")
        assert [frame["error"]["code"] for frame in socket.heard if frame["type"] == "error"] == ["duplicate_id"]
        socket.say(type="completion.create", id="a", request={"prompt": "z"})
        await socket.until("done", 2)
