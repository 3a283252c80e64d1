"""The default model behind a real server: it answers, it lets go at once, and the event loop stays free while it works."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import jsonschema
import openai
import pytest
from anyio import create_task_group

from streamserve.api.app import create_app
from streamserve.build import Built, build
from streamserve.config import CacheConfig, Config, ModelConfig, SchedulerConfig, ServerConfig
from streamserve.default_model import find_default_model
from streamserve.engine.client import collect
from streamserve.errors import CheckpointError
from streamserve.messages import Delta, GenerateRequest, Guidance, SamplingParams, ThoughtLimits
from tests.conftest import LoopWatch
from tests.e2e.clients import post_h1, read_events, until
from tests.e2e.serving import listening

try:
    find_default_model()
except CheckpointError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TRIES = 3  # a busy machine stalls every loop; a stall of ours would come every time


@dataclass(frozen=True)
class RealServer:
    parts: Built
    port: int

    @property
    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[RealServer]:
    config = Config(
        model=ModelConfig(context_length=4096),
        cache=CacheConfig(max_total_tokens=30_000),
        scheduler=SchedulerConfig(max_running_requests=32),
    )
    parts = build(config)
    app = create_app(parts.engine, parts.text, ServerConfig(), model_name=parts.model_name)
    async with create_task_group() as tasks:
        tasks.start_soon(parts.engine.run)
        async with listening(app) as port:
            yield RealServer(parts, port)
        tasks.cancel_scope.cancel()
    parts.close()


async def test_it_knows_the_capital_of_france(server: RealServer) -> None:
    built = server.parts
    async with server.client as client:
        ask = client.chat.completions
        whole = await ask.create(model=built.model_name, messages=QUESTION, temperature=0, max_tokens=32)  # type: ignore[arg-type]
        text = whole.choices[0].message.content or ""
        assert "Paris" in text
        assert whole.choices[0].finish_reason == "stop"
        stream = await ask.create(
            model=built.model_name,
            messages=QUESTION,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=32,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
        usage = chunks[-1].usage
        assert usage is not None and usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_chat_of_six_turns_reuses_all_earlier_tokens(server: RealServer, temperature: int) -> None:
    """Sampled answers too, whose tokens are often not those that their text would be encoded to."""
    messages = [{"role": "system", "content": f"You answer in one sentence ({temperature})."}]
    known = 0
    async with server.client as client:
        for turn in ("Name a river.", "And a lake?", "Which is longer?", "Name a city.", "In which country?", "Thanks."):
            messages.append({"role": "user", "content": turn})
            answer = await client.chat.completions.create(
                model=server.parts.model_name,
                messages=messages,  # type: ignore[arg-type]
                temperature=temperature,
                top_p=1,
                max_tokens=40,
            )
            assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
            assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= known
            known = answer.usage.total_tokens - 1  # the last token was sampled, but no step has read it
            messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})


async def test_a_seed_gives_the_same_text_alone_and_in_company(server: RealServer) -> None:
    built = server.parts
    async with server.client as client:

        async def ask(seed: int | None) -> str:
            answer = await client.completions.create(
                model=built.model_name, prompt="Once upon", max_tokens=24, temperature=0.9, seed=seed
            )
            return answer.choices[0].text

        alone = [await ask(42) for _ in range(3)]
        company = await asyncio.gather(ask(42), ask(None), ask(42), ask(None), ask(None), ask(42))
        others = [await ask(seed) for seed in range(5)]
        assert set(alone) == {company[0], company[2], company[5]}
        assert len(set(alone)) == 1
        assert set(others) != set(alone)


async def test_pages_are_free_soon_after_the_client_has_gone(server: RealServer) -> None:
    built = server.parts
    body = {"messages": QUESTION, "max_tokens": 1000, "ignore_eos": True, "stream": True}
    took = []
    for _ in range(TRIES):
        reader, writer = await post_h1(server.port, "/v1/chat/completions", body)
        await read_events(reader, 4)
        assert built.engine.load().running == 1
        started = asyncio.get_running_loop().time()
        writer.close()
        await until(lambda: built.engine.load().running == 0)
        took.append(asyncio.get_running_loop().time() - started)
        load = built.engine.load()
        assert load.free_tokens + load.evictable_tokens == load.total_tokens
    assert min(took) < 0.3, took


async def test_the_event_loop_stays_free_while_streams_decode_and_a_long_prompt_comes_in(server: RealServer) -> None:
    built = server.parts
    stalls = []
    for attempt in range(TRIES):
        watch = LoopWatch()
        streams = [
            await post_h1(
                server.port,
                "/v1/completions",
                {"prompt": f"Stream {i}:", "max_tokens": 2000, "ignore_eos": True, "stream": True},
            )
            for i in range(16)
        ]
        for reader, _ in streams:
            await read_events(reader, 2)
        watcher = asyncio.create_task(watch.run())
        long = tuple((7 * i + attempt) % 40_000 + 100 for i in range(2000))
        request = GenerateRequest(f"long{attempt}", long, SamplingParams(max_new_tokens=1, temperature=0.0))
        box = await built.engine.submit(request)
        reading = [asyncio.create_task(read_events(reader, 10_000)) for reader, _ in streams]
        assert (await box.get()).finish_reason is not None
        watcher.cancel()
        for task, (_, writer) in zip(reading, streams, strict=True):
            task.cancel()
            writer.close()
        await until(lambda: built.engine.load().running == 0)
        stalls.append(watch.longest_s)
    assert min(stalls) < 0.05, stalls


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "species": {"const": "a rather ordinary human being"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "dark blue"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "species", "age", "colours"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


async def guided(built: Built, id: str, **guidance: Any) -> tuple[Delta, str]:
    ids = tuple(built.text.encode_chat([{"role": "user", "content": "Describe Bob as JSON."}]))
    sampling = SamplingParams(max_new_tokens=200, temperature=0.8, seed=hash(id) & 0xFF)
    answer = await collect(await built.engine.submit(GenerateRequest(id, ids, sampling, guidance=Guidance(**guidance))))
    return answer, built.text.tokenizer.decode(answer.token_ids)


@pytest.mark.parametrize("may_jump", [True, False])
async def test_answers_under_a_schema_match_it_beside_free_ones(server: RealServer, may_jump: bool) -> None:
    built, grammar = server.parts, json.dumps({"grammars": [{"json_schema": PERSON}]})
    plain = SamplingParams(max_new_tokens=30, ignore_eos=True)
    beside = await built.engine.submit(GenerateRequest("free", (5, 6, 7), plain))
    answers = await asyncio.gather(*(guided(built, f"{i}", grammar=grammar, may_jump=may_jump) for i in range(3)))
    for answer, text in answers:
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(text), PERSON)
        assert (answer.num_jumped > len(answer.token_ids) / 3) is may_jump
    assert len((await collect(beside)).token_ids) == 30


async def test_a_thought_is_cut_and_the_answer_behind_it_matches(server: RealServer) -> None:
    built = server.parts
    end_ids = tuple(built.text.tokenizer.encode("</think>", add_special_tokens=False))
    thought = ThoughtLimits(b"<think>", b"</think>", end_ids, max_tokens=8)
    answer, text = await guided(built, "thinks", grammar='start: "the answer is " /[0-9]{2}/', thought=thought)
    assert text.startswith("<think>") and answer.num_thought == 8
    assert re.fullmatch("the answer is [0-9][0-9]", text.rsplit("</think>", 1)[1])
