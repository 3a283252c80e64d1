"""How well texts fit: /v1/rerank, /v1/score and /v1/classify.

Owns the fields of their bodies, the shapes of their answers, and how scores are made: by an embedding model as the cosine of two
vectors, by a classifier with one label as its score of the pair, by the LLM as probabilities of label tokens behind a text.
"""

from asyncio import sleep
from collections.abc import Mapping, Sequence
from time import time
from typing import Any, Literal

import numpy as np
import orjson
from anyio import CapacityLimiter, create_task_group
from msgspec import Struct
from numpy.typing import NDArray

from streamserve.api.embeddings import Encoded, Usage, answer_with, check_count, cut_of, normalised
from streamserve.api.encoders import Cut, EncoderModel, Rows
from streamserve.api.prompts import INLINE_CHARS
from streamserve.api.routes import RouteSpec
from streamserve.api.schema import check_range, convert, show
from streamserve.api.service import Service
from streamserve.api.stream import TURN, Prompt, new_id
from streamserve.api.wire import Exchange, one_error
from streamserve.engine.client import collect
from streamserve.errors import InvalidRequest, StepFailed
from streamserve.messages import EncoderInput, FinishReason, GenerateRequest, SamplingParams

AT_ONCE = 64  # texts of one request that the LLM looks at together: the others' turn comes in between
MAX_LABEL_TOKENS = 256
# Of one request, since a query counts once for each text that it is put beside: a small body may ask for a lot.
MAX_TOKENS = 4 << 20
MAX_CHARS = 8 << 20  # 2,048 pairs of 512 tokens have about half of that


class RankedText(Struct, forbid_unknown_fields=True):
    """A document as Cohere and Jina wrap it."""

    text: str


class RerankRequest(Encoded, kw_only=True):
    """Body of POST /v1/rerank, as Jina, Cohere and SGLang have it. `results_only`: the answer is SGLang's bare list."""

    query: str
    documents: list[str | RankedText]
    top_n: int | None = None
    return_documents: bool = True
    results_only: bool = False


class ScoreRequest(Encoded, kw_only=True):
    """Body of POST /v1/score. `text_1` and `text_2` are compared by the embedding model or classifier, one with many or pair by
    pair (vLLM's fields); `query`, `items` and `label_token_ids` are for the LLM (SGLang's): how likely each of the tokens
    is behind query and item."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    query: str | list[int] | None = None
    items: str | list[str | int | list[int]] | None = None
    label_token_ids: list[int] | None = None
    apply_softmax: bool = False
    item_first: bool = False


class ClassifyRequest(Encoded, kw_only=True):
    """Body of POST /v1/classify."""

    input: str | list[str]


class RerankResult(Struct):
    """One document's place. `index` is where it stood in the request."""

    index: int
    relevance_score: float
    document: RankedText | None = None


class RerankAnswer(Struct):
    """Answer of POST /v1/rerank: best first."""

    id: str
    object: Literal["list"]
    model: str
    results: list[RerankResult]
    usage: Usage


class BareRerankResult(Struct):
    """One document's place in SGLang's list."""

    score: float
    index: int
    document: str | None = None


class Score(Struct):
    """How well one pair fits."""

    object: Literal["score"]
    index: int
    score: float


class ScoreList(Struct):
    """Answer of POST /v1/score for pairs of texts."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: Usage


class LabelScores(Struct):
    """Answer of POST /v1/score for items: per item the probability of each label token."""

    object: Literal["scoring"]
    model: str
    scores: list[list[float]]
    usage: Usage


class ClassOf(Struct):
    """One text's class."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyAnswer(Struct):
    """Answer of POST /v1/classify."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassOf]
    usage: Usage


class Scoring:
    """These routes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[RouteSpec]:
        """What there is here, under the names that clients of others use."""
        ranked: Any = RerankAnswer | list[BareRerankResult]
        query: dict[str, Any] = {"query": "What is a panda?", "documents": ["A bear of China.", "Hello."]}
        return [
            *(
                RouteSpec("POST", path, self.rerank, RerankRequest, ranked, example=query)
                for path in ("/v1/rerank", "/v2/rerank", "/rerank")
            ),
            RouteSpec("PUT", "/v1/rerank", self.rerank, RerankRequest, ranked, example=query),
            *(
                RouteSpec(
                    "POST",
                    path,
                    self.score,
                    ScoreRequest,
                    ScoreList | LabelScores,
                    example={"text_1": "What is a panda?", "text_2": ["A bear of China.", "Hello."]},
                )
                for path in ("/v1/score", "/score")
            ),
            *(
                RouteSpec("POST", path, self.classify, ClassifyRequest, ClassifyAnswer, example={"input": "What a good day"})
                for path in ("/v1/classify", "/classify")
            ),
        ]

    async def rerank(self, exchange: Exchange) -> None:
        """POST /v1/rerank: documents in the order in which they answer a query."""
        await answer_with(self._service, exchange, self._rerank)

    async def score(self, exchange: Exchange) -> None:
        """POST /v1/score: how well texts fit, or how likely label tokens are."""
        await answer_with(self._service, exchange, self._score)

    async def classify(self, exchange: Exchange) -> None:
        """POST /v1/classify: the class of each text."""
        await answer_with(self._service, exchange, self._classify)

    async def _rerank(self, given: Mapping[str, Any]) -> tuple[bytes, int]:
        request = convert(given, RerankRequest)
        encoder = self._comparing(request.model)
        texts = [document if isinstance(document, str) else document.text for document in request.documents]
        if not texts:
            raise InvalidRequest("documents is []; at least one is needed", param="documents")
        check_count(len(texts), "documents")
        check_range("top_n", request.top_n, 1, 10_000_000)
        names = [f"documents[{index}]" for index in range(len(texts))]
        scores, num_tokens = await _compare(encoder, [request.query], texts, ["query"], names, cut_of(encoder, request))
        order = np.argsort(-scores, kind="stable")[: request.top_n].tolist()
        if request.results_only:
            bare = [{"score": float(scores[at]), "index": at, **self._document(request, texts[at], False)} for at in order]
            return orjson.dumps(bare), num_tokens
        results = [
            {"index": at, "relevance_score": float(scores[at]), **self._document(request, texts[at], True)} for at in order
        ]
        answer = {"id": new_id("rerank"), "object": "list", "model": encoder.name, "results": results}
        return orjson.dumps({**answer, "usage": _usage(num_tokens)}), num_tokens

    def _document(self, request: RerankRequest, text: str, is_wrapped: bool) -> dict[str, Any]:
        if not request.return_documents:
            return {}
        return {"document": {"text": text} if is_wrapped else text}

    async def _score(self, given: Mapping[str, Any]) -> tuple[bytes, int]:
        request = convert(given, ScoreRequest)
        pairs = {"text_1": request.text_1, "text_2": request.text_2}
        labelled = {"query": request.query, "items": request.items, "label_token_ids": request.label_token_ids}
        has_pairs, has_labels = (any(value is not None for value in fields.values()) for fields in (pairs, labelled))
        if has_pairs == has_labels:
            raise InvalidRequest("give text_1 and text_2, or query, items and label_token_ids", param="text_1")
        missing = [name for name, value in (pairs if has_pairs else labelled).items() if value is None]
        if missing:
            raise InvalidRequest(f"{missing[0]} is missing", param=missing[0])
        return await (self._score_pairs(request) if has_pairs else self._score_labels(request))

    async def _score_pairs(self, request: ScoreRequest) -> tuple[bytes, int]:
        for name, is_given in (("apply_softmax", request.apply_softmax), ("item_first", request.item_first)):
            if is_given:
                raise InvalidRequest(f"{name} is for query and items; leave it out", param=name)
        encoder = self._comparing(request.model)
        first, names_1 = _listed(request.text_1, "text_1")
        second, names_2 = _listed(request.text_2, "text_2")
        if len(first) not in (1, len(second)):
            raise InvalidRequest(
                f"text_1 has {len(first)} entries and text_2 {len(second)}; allowed is one and many, or as many", param="text_1"
            )
        scores, num_tokens = await _compare(encoder, first, second, names_1, names_2, cut_of(encoder, request))
        data = [{"object": "score", "index": index, "score": score} for index, score in enumerate(scores.tolist())]
        return orjson.dumps({**self._head("score", encoder.name), "data": data, "usage": _usage(num_tokens)}), num_tokens

    async def _classify(self, given: Mapping[str, Any]) -> tuple[bytes, int]:
        request = convert(given, ClassifyRequest)
        encoder = self._service.encoder_named(request.model)
        labels = encoder.facts.labels
        if not labels:
            raise InvalidRequest(f"model {encoder.name!r} has no classes; it answers {encoder.routes}", param="model")
        texts, names = _listed(request.input, "input")
        inputs = await encoder.of_texts(texts, names, cut_of(encoder, request))
        probs = _probabilities(await encoder.encode(inputs), encoder)
        data = [
            {"index": index, "label": labels[int(row.argmax())], "probs": row.tolist(), "num_classes": len(labels)}
            for index, row in enumerate(probs)
        ]
        num_tokens = _count(inputs)
        return orjson.dumps({**self._head("classify", encoder.name), "data": data, "usage": _usage(num_tokens)}), num_tokens

    def _head(self, kind: str, model: str) -> dict[str, Any]:
        return {"id": new_id(kind), "object": "list", "created": int(time()), "model": model}

    def _comparing(self, name: str | None) -> EncoderModel:
        """The model that compares texts."""
        encoder = self._service.encoder_named(name)
        if len(encoder.facts.labels) > 1:
            raise InvalidRequest(
                f"model {encoder.name!r} tells {len(encoder.facts.labels)} classes apart and does not compare texts; it answers "
                f"/v1/classify",
                param="model",
            )
        return encoder

    # ---- the LLM ------------------------------------------------------------------------------------------------

    async def _score_labels(self, request: ScoreRequest) -> tuple[bytes, int]:
        """The probability of each label token as the next one behind query and item: one step per item, nothing is generated."""
        service = self._service
        service.check_model(request.model)
        for name in ("truncate", "truncate_prompt_tokens"):
            if getattr(request, name):
                raise InvalidRequest(f"{name} is for text_1 and text_2; leave it out", param=name)
        labels = service.prompts.check_ids(request.label_token_ids or [], "label_token_ids")
        if not 0 < len(labels) <= MAX_LABEL_TOKENS:
            raise InvalidRequest(
                f"label_token_ids has {len(labels)} entries; allowed is 1 to {MAX_LABEL_TOKENS}", param="label_token_ids"
            )
        prompts = await self._label_prompts(request)
        logprobs = np.array(await self._next_logprobs(prompts, labels), np.float64)
        scores = _softmax(logprobs) if request.apply_softmax else np.exp(logprobs)
        num_tokens = sum(map(len, prompts))
        answer = {"object": "scoring", "model": service.model_name, "scores": scores.tolist(), "usage": _usage(num_tokens)}
        return orjson.dumps(answer), num_tokens

    async def _label_prompts(self, request: ScoreRequest) -> list[tuple[int, ...]]:
        """Query and item one behind the other: texts are joined before they become tokens, ids as they are."""
        query, items = request.query, request.items
        assert query is not None and items is not None
        is_ids = not isinstance(query, str)
        each: Sequence[Any] = [items] if isinstance(items, str) or (is_ids and items and isinstance(items[0], int)) else items
        if not each:
            raise InvalidRequest("items is []; at least one is needed", param="items")
        check_count(len(each), "items")
        wrong = next((index for index, item in enumerate(each) if isinstance(item, str) == is_ids or isinstance(item, int)), None)
        if wrong is not None:
            kinds = "lists of token ids, as the query is" if is_ids else "texts, as the query is"
            raise InvalidRequest(f"items[{wrong}] is {show(each[wrong])}; {kinds}, are expected", param=f"items[{wrong}]")
        prompts = self._service.prompts
        head: Any = prompts.check_ids(query, "query") if is_ids else query  # type: ignore[arg-type]
        is_long = not is_ids and sum(map(len, each)) + len(query) * len(each) > INLINE_CHARS
        found: list[tuple[int, ...]] = []
        num_tokens = 0
        for index, item in enumerate(each):  # one after the other: the first that is too long is the last that is made
            where = f"items[{index}]"
            tail: Any = prompts.check_ids(item, where) if is_ids else item
            joined = tail + head if request.item_first else head + tail
            prompt = joined if is_ids else await prompts.of_text(joined, where, is_long=is_long)
            prompts.check_room(Prompt(prompt), 1, where, where)
            found.append(prompt)
            num_tokens += len(prompt)
            if num_tokens > MAX_TOKENS:
                raise InvalidRequest(
                    f"query and items have more than {MAX_TOKENS} tokens together, the query once for each of {len(each)} items; "
                    f"send fewer items in one request",
                    param="items",
                )
            await sleep(0)
        return found

    async def _next_logprobs(self, prompts: Sequence[tuple[int, ...]], labels: tuple[int, ...]) -> list[list[float]]:
        """Per prompt the log-probability of each label as its next token."""
        params = SamplingParams(max_new_tokens=1, temperature=0.0, logprobs=0, logprob_token_ids=labels, ignore_eos=True)
        found: list[list[float]] = [[] for _ in prompts]
        client, limiter, turn = self._service.client, CapacityLimiter(AT_ONCE), TURN.get()

        async def look(index: int, prompt: tuple[int, ...]) -> None:
            async with limiter:
                if turn is not None:
                    await turn()
                request = GenerateRequest(new_id("score"), prompt, params)
                try:
                    last = await collect(await client.submit(request))
                finally:
                    client.abort(request.id)
            if last.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
                raise StepFailed(last.error or "this request was aborted")
            found[index] = [logprob for _, logprob in last.logprobs[0].asked]

        with one_error():
            async with create_task_group() as tasks:
                for index, prompt in enumerate(prompts):
                    tasks.start_soon(look, index, prompt)
        return found


def _usage(num_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _count(inputs: Sequence[EncoderInput]) -> int:
    return sum(len(given.token_ids) for given in inputs)


def _listed(given: str | list[str] | None, where: str) -> tuple[list[str], list[str]]:
    """Texts, and what each is called in errors."""
    if isinstance(given, str):
        return [given], [where]
    if not given:
        raise InvalidRequest(f"{where} is []; at least one text is needed", param=where)
    check_count(len(given), where)
    return given, [f"{where}[{index}]" for index in range(len(given))]


async def _compare(
    encoder: EncoderModel, first: list[str], second: list[str], names_1: list[str], names_2: list[str], cut: Cut
) -> tuple[Rows, int]:
    """A score for each pair, of one text with many or of texts side by side, and the tokens that were computed for them."""
    if encoder.facts.labels:
        lefts = first * len(second) if len(first) == 1 else first
        num_chars = sum(map(len, lefts)) + sum(map(len, second))
        if num_chars > MAX_CHARS:
            raise InvalidRequest(
                f"{len(second)} pairs of texts have {num_chars} characters together; at most {MAX_CHARS} are allowed",
                param=names_1[0],
            )
        inputs = await encoder.of_pairs(list(zip(lefts, second, strict=True)), names_2, cut)
        return _probabilities(await encoder.encode(inputs), encoder)[:, 0], _count(inputs)
    inputs = [
        *await encoder.of_texts(first, names_1, cut, encoder.prompt_for("query")),
        *await encoder.of_texts(second, names_2, cut, encoder.prompt_for("document")),
    ]
    rows = normalised(await encoder.encode(inputs))
    return (rows[: len(first)] * rows[len(first) :]).sum(axis=1), _count(inputs)


def _probabilities(logits: Rows, encoder: EncoderModel) -> Rows:
    facts = encoder.facts
    if facts.is_squashed:
        return np.asarray(1 / (1 + np.exp(-logits.astype(np.float64))), np.float32)
    if len(facts.labels) == 1:  # a score that the model gives as it is
        return logits
    return np.asarray(_softmax(logits), np.float32)


def _softmax(rows: NDArray[Any]) -> NDArray[Any]:
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
