"""Watching the engine at work over a real server: steps and requests, once, or again and again on a socket."""

import asyncio
from typing import Any

import httpx
import pytest

from streamserve.config import ServerConfig
from tests.e2e.serving import fake_server
from tests.e2e.test_websocket import HI, Talk, talk

pytestmark = pytest.mark.anyio


async def hear_engine(socket: Talk) -> dict[str, Any]:
    """The next frame about the engine; others are passed over."""
    while (frame := await socket.hear())["type"] != "engine":
        pass
    engine: dict[str, Any] = frame["engine"]
    return engine


async def test_a_socket_that_subscribes_is_told_of_every_step_once_and_of_its_own_requests_by_its_own_names() -> None:
    async with fake_server(ServerConfig(api_key=("sesame",)), step_s=0.005) as server:
        headers = {"authorization": "Bearer sesame"}
        async with (
            talk(server, additional_headers=headers, max_queue=None) as other,
            talk(server, additional_headers=headers) as socket,
        ):
            await other.say(
                type="chat.create", id="theirs", request={**HI, "max_tokens": 200, "rid": "their name", "ignore_eos": True}
            )
            await socket.say(type="engine.subscribe", interval_ms=50)
            assert await socket.hear() == {"type": "engine.ok", "subscribed": True}
            await socket.say(
                type="chat.create", id="ours", request={**HI, "max_tokens": 40, "rid": "our name", "ignore_eos": True}
            )
            told: list[dict[str, Any]] = []
            while not any(one.get("frame_id") for shown in told for one in shown["requests"]) or len(told) < 4:
                told.append(await hear_engine(socket))
            await socket.say(type="cancel", id="ours")
            await other.say(type="cancel", id="theirs")
            while told[-1]["requests"]:
                told.append(await hear_engine(socket))
            await socket.say(type="engine.unsubscribe")
            while (frame := await socket.hear())["type"] != "engine.ok":
                assert frame["type"] in ("engine", "done", "chunk")
            assert frame == {"type": "engine.ok", "subscribed": False}
            await socket.say(type="ping")
            assert (await socket.hear())["type"] == "pong", "nothing comes after that"
    numbers = [step[0] for shown in told for step in shown["steps"]]
    assert numbers == list(range(1, len(numbers) + 1)), "every step once, in order"
    requests = [one for shown in told for one in shown["requests"]]
    mine = [one for one in requests if one.get("frame_id") == "ours"]
    assert mine and all(one["client_id"] == "our name" and one["id"].startswith("chatcmpl-") for one in mine)
    others = [one for one in requests if one.get("frame_id") is None]
    assert others and all(one["id"] is None and one["client_id"] is None for one in others)
    assert {one["state"] for one in requests} <= {"running", "waiting"}


async def test_what_a_subscription_may_not_be_is_said_and_the_socket_lives() -> None:
    async with fake_server(step_s=0.0) as server, talk(server) as socket:
        wrong: tuple[Any, ...] = (0, 49, 10_001, "x", True, [])
        for interval in wrong:
            await socket.say(type="engine.subscribe", interval_ms=interval)
            frame = await socket.hear()
            assert (frame["type"], frame["error"]["param"]) == ("error", "interval_ms")
        await socket.say(type="engine.subscribe", every=3)
        assert (await socket.hear())["error"]["param"] == "every"
        await socket.say(type="engine.unsubscribe")
        assert await socket.hear() == {"type": "engine.ok", "subscribed": False}
        await socket.say(type="engine.subscribe", interval_ms=10_000)
        assert {(await socket.hear())["type"] for _ in range(2)} == {"engine.ok", "engine"}
        await socket.say(type="engine.subscribe", interval_ms=50)  # from now on: it need not wait for ten seconds
        assert await socket.hear() == {"type": "engine.ok", "subscribed": True}
        async with httpx.AsyncClient(base_url=server.url) as http:
            await http.post("/v1/chat/completions", json={**HI, "max_tokens": 4})
        assert (await hear_engine(socket))["steps"]
        await socket.say(type="ping")
        async with asyncio.timeout(5):
            while (await socket.hear())["type"] != "pong":
                pass


async def test_a_server_that_stops_does_not_wait_for_those_who_watch() -> None:
    async with fake_server(step_s=0.0) as server, talk(server) as socket:
        await socket.say(type="engine.subscribe")
        await hear_engine(socket)
        server.app.close_idle_sockets()
        await asyncio.wait_for(socket.socket.wait_closed(), 5)
        assert socket.socket.close_code == 1001


async def test_steps_can_be_read_by_whoever_opens_no_socket() -> None:
    async with fake_server(step_s=0.0) as server, httpx.AsyncClient(base_url=server.url) as http:
        empty = (await http.get("/engine/steps")).json()
        assert (empty["steps"], empty["last"], empty["requests"], empty["shows_ids"]) == ([], 0, [], True)
        for _ in range(2):
            await http.post("/v1/chat/completions", json={**HI, "max_tokens": 12, "ignore_eos": True})
        shown = (await http.get("/engine/steps")).json()
        columns = [dict(zip(shown["columns"], step, strict=True)) for step in shown["steps"]]
        assert sum(step["prompt_rows"] for step in columns) == 2
        assert sum(step["decode_rows"] for step in columns) >= 22
        assert columns[-1]["prompt_tokens_hit"] > 0 and shown["hit_rate"] > 0
        last = (await http.get(f"/engine/steps?since={shown['last'] - 2}&limit=1")).json()
        assert (last["steps"], last["missed"], last["last"]) == (shown["steps"][-1:], 1, shown["last"])
