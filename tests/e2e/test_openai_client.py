"""The real openai client over a real server."""

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from streamserve.config import ServerConfig
from tests.e2e.serving import SCRIPT, FakeServer, fake_server

pytestmark = pytest.mark.anyio
HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Count to five"}]


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with fake_server(answer_len=30) as running:
        yield running


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as openai_client:
        yield openai_client


async def test_plain_and_streamed_answers_agree(client: AsyncOpenAI) -> None:
    for n in (1, 3):
        plain = await client.chat.completions.create(model="tiny", messages=HI, temperature=0, n=n)
        texts = [""] * n
        reasons: list[list[str | None]] = [[] for _ in range(n)]
        usage = None
        stream = await client.chat.completions.create(
            model="tiny", messages=HI, temperature=0, n=n, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index].append(choice.finish_reason)
        assert texts == [choice.message.content for choice in plain.choices]
        assert all(given[-1] == "stop" and not any(given[:-1]) for given in reasons)
        assert usage is not None and plain.usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (plain.usage.prompt_tokens, plain.usage.completion_tokens)
        assert usage.completion_tokens == 31 * n


async def test_the_helper_for_streams_accepts_ours(client: AsyncOpenAI) -> None:
    kinds = []
    async with client.chat.completions.stream(model="tiny", messages=HI, n=2, logprobs=True, top_logprobs=1) as stream:
        async for event in stream:
            kinds.append(event.type)
        final = await stream.get_final_completion()
    assert kinds.count("content.done") == 2
    assert "logprobs.content.delta" in kinds
    assert len(final.choices[1].message.content or "") == 30


async def test_text_completions(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=8, logprobs=1, echo=True)
    assert [choice.text[0] for choice in answer.choices] == ["a", "a", "b", "b"]
    stream = await client.completions.create(model="tiny", prompt="a", max_tokens=8, stream=True)
    text = "".join([chunk.choices[0].text async for chunk in stream])
    assert len(text) == 8 and text in (SCRIPT * 2).decode()


async def test_models(client: AsyncOpenAI) -> None:
    (model,) = [model async for model in client.models.list()]
    assert (await client.models.retrieve(model.id)).id == "tiny"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.models.retrieve("other")
    assert missing.value.code == "model_not_found"


async def test_errors_arrive_as_the_clients_own(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="tiny", messages=HI, temperature=-1)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.BadRequestError) as long:
        await client.chat.completions.create(model="tiny", messages=HI, max_tokens=9000, stream=True)
    assert long.value.code == "context_length_exceeded"
    assert "8192" in long.value.message


async def test_a_key_is_asked_for() -> None:
    async with fake_server(ServerConfig(api_key=("sesame",))) as server:
        for key, works in (("sesame", True), ("open", False)):
            async with AsyncOpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0) as client:
                if works:
                    assert (await client.models.list()).data
                else:
                    with pytest.raises(openai.AuthenticationError):
                        await client.models.list()


async def test_one_client_id_for_two_live_requests_mixes_nothing(server: FakeServer, client: AsyncOpenAI) -> None:
    async def ask(content: str, **extra: str) -> str:
        answer = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": content}],
            extra_body=extra,
            extra_headers={"x-request-id": "same"},
        )
        return answer.choices[0].message.content or ""

    alone = [await ask("one"), await ask("two")]
    assert alone[0] != alone[1]
    together = await asyncio.gather(ask("one", rid="same"), ask("two", rid="same"), ask("one", request_id="same"))
    assert list(together) == [*alone, alone[0]]


async def test_a_draining_server_refuses_with_503_and_finishes_what_runs(server: FakeServer, client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="tiny", messages=HI, stream=True)
    first = await anext(aiter(stream))
    assert first.choices[0].delta.role == "assistant"
    server.engine.close()
    with pytest.raises(openai.InternalServerError) as refused:
        await client.chat.completions.create(model="tiny", messages=HI)
    assert refused.value.status_code == 503
    reasons = [chunk.choices[0].finish_reason async for chunk in stream]
    assert reasons[-1] == "stop"
