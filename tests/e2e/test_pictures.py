"""Pictures through the real clients of three dialects, on a real server with an engine that makes up tokens."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
import websockets
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI, BadRequestError

from streamserve.media.fetch import Fetcher
from streamserve.media.fixed import NUM_PLACES
from tests.api.pictures import BLUE, BLUE_URL, RED, RED_URL, CountingFamily, said, shown
from tests.e2e.serving import FakeServer, fake_server

pytestmark = pytest.mark.anyio


class Stalled(httpx.AsyncBaseTransport):
    """A host that never answers; `left`: nobody waits for it any more."""

    def __init__(self) -> None:
        self.asked, self.left = asyncio.Event(), asyncio.Event()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()
        raise AssertionError


async def public(host: str, port: int) -> list[str]:
    return ["93.184.216.34"]


@pytest.fixture
def host() -> Stalled:
    return Stalled()


@pytest.fixture
async def server(host: Stalled) -> AsyncIterator[FakeServer]:
    fetcher = Fetcher(["*"], 1 << 20, resolve=public, transport=host)
    async with fake_server(answer_len=30, family=CountingFamily(), fetcher=fetcher) as running:
        running.runner.plans = []
        yield running


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as openai_client:
        yield openai_client


def ask(*parts: dict[str, Any]) -> Any:
    return [{"role": "user", "content": list(parts)}]


def num_encoded(server: FakeServer) -> int:
    assert server.runner.plans is not None
    return sum(len(plan.encodes) for plan in server.runner.plans)


async def test_a_picture_is_answered_encoded_once_and_found_in_the_cache(client: AsyncOpenAI, server: FakeServer) -> None:
    chat = ask(shown(), said("What is in this picture?"))
    first = await client.chat.completions.create(model="tiny", messages=chat)
    stream = await client.chat.completions.create(
        model="tiny", messages=chat, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == first.choices[0].message.content and len(text) == 30
    assert first.usage is not None and (usage := chunks[-1].usage) is not None
    assert usage.prompt_tokens_details is not None and usage.prompt_tokens == first.usage.prompt_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
    assert usage.prompt_tokens_details.model_extra == {"image_tokens": NUM_PLACES}
    assert num_encoded(server) == 1

    chat += [{"role": "assistant", "content": text}, {"role": "user", "content": "And what is beside it?"}]
    later = await client.chat.completions.create(model="tiny", messages=chat)
    details = later.usage and later.usage.prompt_tokens_details
    assert details is not None and (details.cached_tokens or 0) > first.usage.prompt_tokens
    assert num_encoded(server) == 1
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as http:
        prefixes = (await http.get("/cache")).json()["top_prefixes"]
    assert any(prefix["preview"] == "<|im_start|>user\n[picture]" for prefix in prefixes)


async def test_another_picture_shares_nothing_from_its_first_place_on(client: AsyncOpenAI, server: FakeServer) -> None:
    cached = []
    for url in (RED_URL, BLUE_URL):
        answer = await client.chat.completions.create(model="tiny", messages=ask(shown(url), said("What?")))
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 1 + len("user\n")]
    assert num_encoded(server) == 2


async def test_the_responses_client_shows_pictures_and_files(client: AsyncOpenAI, server: FakeServer) -> None:
    file = await client.files.create(file=("red.png", RED), purpose="vision")
    texts = set()
    for picture in ({"image_url": RED_URL, "detail": "auto"}, {"file_id": file.id, "detail": "auto"}):
        content: Any = [{"type": "input_image", **picture}, {"type": "input_text", "text": "What?"}]
        async with client.responses.stream(model="tiny", input=[{"role": "user", "content": content}]) as stream:
            async for _ in stream:
                pass
            answer = await stream.get_final_response()
        texts.add(answer.output_text)
        assert answer.usage is not None and answer.usage.input_tokens_details.model_extra == {"image_tokens": NUM_PLACES}
    assert len(texts) == 1 and num_encoded(server) == 1
    again = await client.responses.create(model="tiny", input="And?", previous_response_id=answer.id)
    assert again.usage is not None and again.usage.input_tokens_details.cached_tokens > NUM_PLACES
    assert num_encoded(server) == 1


async def test_the_anthropic_client_shows_pictures(server: FakeServer) -> None:
    block: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": b64encode(BLUE).decode()}}
    async with AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        chat: Any = [{"role": "user", "content": [block, said("What?")]}]
        whole = await client.messages.create(model="tiny", max_tokens=50, messages=chat)
        async with client.messages.stream(model="tiny", max_tokens=50, messages=chat) as stream:
            streamed = await stream.get_final_message()
        counted = await client.messages.count_tokens(model="tiny", messages=chat)
    assert [block.to_dict()["text"] for block in whole.content] == [block.to_dict()["text"] for block in streamed.content]
    assert num_encoded(server) == 1
    assert streamed.usage.cache_read_input_tokens == counted.input_tokens - 1


async def test_a_socket_shows_pictures(server: FakeServer) -> None:
    async with websockets.connect(server.url.replace("http", "ws") + "/v1/ws") as socket:
        request = {"messages": ask(shown(), said("What?")), "max_tokens": 5}
        await socket.send(orjson.dumps({"type": "chat.create", "id": "a", "request": request}).decode())
        frames = []
        while not frames or frames[-1]["type"] not in ("done", "error"):
            frames.append(orjson.loads(await socket.recv()))
    assert frames[-1]["usage"]["prompt_tokens_details"]["image_tokens"] == NUM_PLACES


async def test_loading_ends_when_the_client_leaves(server: FakeServer, host: Stalled) -> None:
    part = shown("http://pictures.example/a.png")
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": ask(part)}),
        ("/v1/responses", {"input": ask({"type": "input_image", "image_url": part["image_url"]["url"]})}),
        ("/generate", {"text": "x", "image_data": part["image_url"]["url"]}),
    ]
    for path, body in bodies:
        host.asked.clear()
        host.left.clear()
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as http, asyncio.timeout(10):
            asking = asyncio.create_task(http.post(path, json=body))
            await host.asked.wait()
            asking.cancel()
            await host.left.wait()
    assert server.engine.load().running == 0


async def test_a_bad_picture_harms_nobody_else(client: AsyncOpenAI, server: FakeServer) -> None:
    good = client.chat.completions.create(model="tiny", messages=ask(shown(), said("What?")))
    bad = client.chat.completions.create(model="tiny", messages=ask(shown(), shown(RED_URL[:-30]), said("What?")))
    answers = await asyncio.gather(good, bad, return_exceptions=True)
    assert isinstance(answers[1], BadRequestError) and answers[1].param == "messages[0].content[1].image_url.url"
    assert not isinstance(answers[0], BaseException)
    assert (await client.models.retrieve("tiny")).model_extra is not None
