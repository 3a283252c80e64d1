"""Every field of api/fields.py through the real openai client, on a model that samples: what is supported shows its effect, what
is accepted its warning, what is refused its 400. A field without a case fails.
"""

import base64
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from anyio import create_task_group, sleep, to_thread
from openai import AsyncOpenAI, OpenAI
from openai.resources import AsyncCompletions, AsyncEmbeddings
from openai.resources.chat import AsyncCompletions as AsyncChatCompletions
from openai.resources.responses import AsyncResponses
from openai.resources.responses.responses import AsyncResponsesConnection

from streamserve.api.encoders import EncoderModel
from streamserve.api.fields import TABLES, Decision, Field
from streamserve.messages import EncoderInput
from streamserve.text.byte_tokenizer import END_OF_TURN, START_OF_TURN
from streamserve.text.encoder_text import EncoderText
from tests.api.test_embeddings import MadeUpEncoder
from tests.e2e.clients import until
from tests.e2e.random_model import MAX_RUNNING, RandomServer, random_server
from tests.models.encoders import WORDS, tokenizer

pytestmark = pytest.mark.anyio
CHAT, COMPLETION, RESPONSE, EMBEDDING = "chat", "completion", "response", "embedding"
ROUTES = {
    CHAT: "POST /v1/chat/completions",
    COMPLETION: "POST /v1/completions",
    RESPONSE: "POST /v1/responses",
    EMBEDDING: "POST /v1/embeddings",
}
GENERATING = (CHAT, COMPLETION, RESPONSE)
LIMITS = {CHAT: "max_completion_tokens", COMPLETION: "max_tokens", RESPONSE: "max_output_tokens"}
BLUE = WORDS.index("blue")
LEN = 12  # tokens of an answer that nothing else ends; each is a byte
ENDS = {str(END_OF_TURN): 100}  # a bias that makes the model end its answer

RESOURCES = {CHAT: AsyncChatCompletions, COMPLETION: AsyncCompletions, RESPONSE: AsyncResponses, EMBEDDING: AsyncEmbeddings}


def arguments_of(route: str) -> set[str]:
    """What the client knows of a body. The others of its arguments are its own."""
    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    return set(inspect.signature(RESOURCES[route].create).parameters) - own


class SometimesSlow(MadeUpEncoder):
    """Takes a minute for texts about blue things."""

    async def encode(self, inputs: Sequence[EncoderInput]) -> Any:
        await sleep(60 if any(BLUE in given.token_ids for given in inputs) else 0)
        return await super().encode(inputs)


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RandomServer]:
    encoder = EncoderModel("vectors", SometimesSlow(), EncoderText(tokenizer(), {"query": "red ", "document": ""}))
    async with random_server(tmp_path_factory.mktemp("model"), encoder=encoder) as running:
        yield running


@pytest.fixture(scope="module")
async def client(server: RandomServer) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as openai_client:
        yield openai_client


@pytest.fixture(scope="module")
def plain_client(server: RandomServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as openai_client:
        yield openai_client


@dataclass(frozen=True)
class Answer:
    """What came back, in one shape for every route. `body`: the object, or the last one of a stream."""

    body: dict[str, Any]
    warnings: str = ""
    pieces: tuple[str, ...] = ()

    @property
    def choice(self) -> dict[str, Any]:
        found: dict[str, Any] = self.body["choices"][0]
        return found

    @property
    def text(self) -> str:
        if "output" in self.body:
            parts = [part["text"] for item in self.body["output"] if item["type"] == "message" for part in item["content"]]
            return "".join(parts)
        return str(self.choice["text"] if "text" in self.choice else self.choice["message"]["content"] or "")

    @property
    def thought(self) -> str:
        if "output" in self.body:
            return "".join(
                part["text"] for item in self.body["output"] for part in item["content"] if item["type"] == "reasoning"
            )
        return str(self.choice["message"]["reasoning_content"] or "")

    @property
    def calls(self) -> list[tuple[str, str]]:
        if "output" in self.body:
            return [(item["name"], item["arguments"]) for item in self.body["output"] if item["type"] == "function_call"]
        made = self.choice["message"].get("tool_calls") or ()
        return [(call["function"]["name"], call["function"]["arguments"]) for call in made]

    @property
    def reason(self) -> str:
        """Why it ended: "stop", "length", "tool_calls", "abort"."""
        if "output" in self.body:
            return {"completed": "stop", "incomplete": "length", "cancelled": "abort"}[self.body["status"]]
        return str(self.choice["finish_reason"])

    @property
    def num_tokens(self) -> int:
        usage = self.body["usage"]
        return int(usage["output_tokens"] if "output" in self.body else usage["completion_tokens"])

    @property
    def num_cached(self) -> int:
        usage = self.body["usage"]
        return int(usage["input_tokens_details" if "output" in self.body else "prompt_tokens_details"]["cached_tokens"])


@dataclass(frozen=True)
class Refusal:
    """Why a request was not answered."""

    status: int
    code: str | None
    param: str | None
    message: str


class Asker:
    """Sends bodies of one route with the openai client, asynchronous or plain: typed arguments where it has them, else its
    extra_body."""

    def __init__(self, route: str, server: RandomServer, client: AsyncOpenAI | OpenAI) -> None:
        self.route = route
        self.server = server
        self.client = client
        self._resource: Any = {
            CHAT: client.chat.completions,
            COMPLETION: client.completions,
            RESPONSE: client.responses,
            EMBEDDING: client.embeddings,
        }[route]
        self._typed = arguments_of(route)

    @property
    def prompt(self) -> str:
        """The prompt of the request before, control tokens as their text."""
        ids = self.server.engine.requests[-1].token_ids
        return self.server.text.tokenizer.decode(ids, skip_special_tokens=False)

    def _arguments(self, fields: dict[str, Any]) -> dict[str, Any]:
        base: dict[str, Any] = {
            CHAT: {"model": "tiny", "messages": said("Hello")},
            COMPLETION: {"model": "tiny", "prompt": "Hello"},
            RESPONSE: {"model": "tiny", "input": "Hello", "store": False},
            EMBEDDING: {"model": "vectors", "input": "red fox"},
        }[self.route]
        if "limit" in fields:
            fields[LIMITS[self.route]] = fields.pop("limit")
        elif self.route in LIMITS and not (self.route == CHAT and "max_tokens" in fields):
            base[LIMITS[self.route]] = LEN
        given = {**base, **fields}
        made = {name: value for name, value in given.items() if name in self._typed}
        return {**made, "extra_body": {name: value for name, value in given.items() if name not in self._typed}}

    async def _run(self, method: Any, arguments: dict[str, Any]) -> Any:
        if isinstance(self.client, AsyncOpenAI):
            return await method(**arguments)
        return await to_thread.run_sync(partial(method, **arguments))

    async def __call__(self, **fields: Any) -> Answer:
        raw = await self._run(self._resource.with_raw_response.create, self._arguments(fields))
        return Answer(raw.parse().to_dict(mode="json", warnings=False), raw.headers.get("x-streamserve-warning", ""))

    async def lines(self, **fields: Any) -> list[str]:
        """The lines of a stream as they are on the wire."""
        arguments = self._arguments({**fields, "stream": True})
        method = self._resource.with_streaming_response.create
        if isinstance(self.client, AsyncOpenAI):
            async with method(**arguments) as response:
                return [line async for line in response.iter_lines()]

        def read() -> list[str]:
            with method(**arguments) as response:
                return list(response.iter_lines())

        return await to_thread.run_sync(read)

    async def events(self, **fields: Any) -> tuple[list[dict[str, Any]], str]:
        """The events of a stream as the client gives them, and the warnings at its head."""
        raw = await self._run(self._resource.with_raw_response.create, self._arguments({**fields, "stream": True}))
        stream, warnings = raw.parse(), raw.headers.get("x-streamserve-warning", "")
        if isinstance(self.client, AsyncOpenAI):
            return [event.to_dict(mode="json") async for event in stream], warnings
        return [event.to_dict(mode="json") for event in await to_thread.run_sync(lambda: list(stream))], warnings

    async def streamed(self, **fields: Any) -> Answer:
        """The same answer out of a stream: its text in pieces, and how it ended."""
        events, warnings = await self.events(**fields)
        if self.route == RESPONSE:
            pieces = tuple(event["delta"] for event in events if event["type"] == "response.output_text.delta")
            return Answer(events[-1]["response"], warnings, pieces)
        choices = [choice for event in events for choice in event["choices"] if choice["index"] == 0]
        key = "text" if self.route == COMPLETION else "delta"
        texts = [choice[key] if key == "text" else choice[key].get("content") or "" for choice in choices]
        last = {**choices[-1], "text": "".join(texts)}
        return Answer({**events[-1], "choices": [last]}, warnings, tuple(filter(None, texts)))

    async def both(self, **fields: Any) -> Answer:
        """A whole answer, after making sure that its stream says the same."""
        whole, stream = await self(**fields), await self.streamed(**fields)
        assert (stream.text, stream.reason) == (whole.text, whole.reason)
        assert "".join(stream.pieces) == whole.text
        assert stream.warnings == whole.warnings
        return whole

    async def refusal(self, **fields: Any) -> Refusal:
        with pytest.raises(openai.APIStatusError) as refused:
            await self(**fields)
        error = refused.value
        assert isinstance(error.body, dict)
        return Refusal(error.status_code, error.code, error.param, error.body["message"])


class SocketAsker(Asker):
    """Sends bodies of responses over the client's WebSocket."""

    def __init__(self, server: RandomServer, client: AsyncOpenAI, connection: AsyncResponsesConnection) -> None:
        super().__init__(RESPONSE, server, client)
        self.connection = connection

    async def _answer(self, **fields: Any) -> list[dict[str, Any]]:
        arguments = self._arguments(fields)
        more = arguments.pop("extra_body")
        if more:
            await self.connection.send_raw(json.dumps({"type": "response.create", **arguments, **more}))
        else:
            await self.connection.response.create(**arguments)
        events: list[dict[str, Any]] = []
        while not events or events[-1]["type"] not in ("response.completed", "response.incomplete", "error"):
            events.append((await self.connection.recv()).to_dict(mode="json"))
        return events

    async def __call__(self, **fields: Any) -> Answer:
        return await self.streamed(**fields)

    async def streamed(self, **fields: Any) -> Answer:
        events, warnings = await self.events(**fields)
        pieces = tuple(event["delta"] for event in events if event["type"] == "response.output_text.delta")
        return Answer(events[-1]["response"], warnings, pieces)

    async def events(self, **fields: Any) -> tuple[list[dict[str, Any]], str]:
        events = await self._answer(**fields)
        assert events[-1]["type"] != "error", events[-1]
        return events, "; ".join(events[-1]["response"].get("warnings", ()))

    async def refusal(self, **fields: Any) -> Refusal:
        (error,) = await self._answer(**fields)
        return Refusal(error["status"], error["code"], error["param"], error["message"])


def said(text: str, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": text}]


Check = Callable[[Asker], Awaitable[None]]
CASES: dict[tuple[str, str], Check] = {}


def shows(*routes: str, field: str | None = None) -> Callable[[Check], Check]:
    """The check that follows shows the effect of the field it is named after, on these routes."""

    def register(check: Check) -> Check:
        for route in routes:
            key = (route, field or check.__name__.rstrip("_"))
            assert key not in CASES, key
            CASES[key] = check
        return check

    return register


# ---- sampling ----------------------------------------------------------------------------------------------------


async def texts_of(ask: Asker, **fields: Any) -> set[str]:
    return {(await ask(seed=seed, **fields)).text for seed in range(3)}


@shows(*GENERATING)
async def temperature(ask: Asker) -> None:
    assert len(await texts_of(ask, temperature=0)) == 1
    assert len(await texts_of(ask, temperature=1)) == 3


@shows(*GENERATING)
async def top_p(ask: Asker) -> None:
    assert await texts_of(ask, top_p=1e-6) == {(await ask(temperature=0)).text}


@shows(*GENERATING)
async def top_k(ask: Asker) -> None:
    assert await texts_of(ask, top_k=1) == {(await ask(temperature=0)).text}
    assert len(await texts_of(ask, top_k=-1)) == 3


@shows(*GENERATING)
async def min_p(ask: Asker) -> None:
    assert await texts_of(ask, min_p=1) == {(await ask(temperature=0)).text}


@shows(*GENERATING)
async def frequency_penalty(ask: Asker) -> None:
    often: dict[str, Any] = {"temperature": 0, "logit_bias": {"65": 100, "66": 90}}  # B is better after a few A
    assert (await ask(**often)).text == "A" * LEN
    assert "AAB" in (await ask(**often, frequency_penalty=2)).text
    assert (await ask(**often, presence_penalty=2)).text == "A" * LEN


@shows(*GENERATING)
async def presence_penalty(ask: Asker) -> None:
    letters: dict[str, Any] = {"temperature": 0, "limit": 24, "logit_bias": {str(token): 100 for token in range(65, 75)}}
    plain, penalised = await ask(**letters), await ask(**letters, presence_penalty=2)
    assert len(set(penalised.text)) > len(set(plain.text))


@shows(*GENERATING)
async def repetition_penalty(ask: Asker) -> None:
    plain, penalised = await ask(temperature=0, limit=24), await ask(temperature=0, limit=24, repetition_penalty=2)
    assert len(set(penalised.text)) > len(set(plain.text))


@shows(*GENERATING)
async def logit_bias(ask: Asker) -> None:
    assert (await ask.both(logit_bias={"65": 100})).text == "A" * LEN
    assert (await ask.refusal(logit_bias={"9999": 1})).param == "logit_bias"


@shows(*GENERATING)
async def seed(ask: Asker) -> None:
    assert (await ask.both(seed=5)).text == (await ask(seed=5)).text != (await ask(seed=6)).text
    async with create_task_group() as company:
        company.start_soon(partial(ask, seed=7))
        assert (await ask(seed=5)).text == (await ask(seed=5, temperature=1)).text


@shows(CHAT, COMPLETION)
async def n(ask: Asker) -> None:
    answer = await ask(n=3, seed=1)
    texts = [choice.get("text") or choice["message"]["content"] for choice in answer.body["choices"]]
    assert len(set(texts)) == 3 and answer.num_tokens == 3 * LEN
    events, _ = await ask.events(n=3, seed=1)
    assert {choice["index"] for event in events for choice in event["choices"]} == {0, 1, 2}


# ---- where an answer ends ----------------------------------------------------------------------------------------


@shows(CHAT, COMPLETION)
async def max_tokens(ask: Asker) -> None:
    answer = await ask.both(max_tokens=5, seed=1)
    assert (answer.num_tokens, len(answer.text), answer.reason) == (5, 5, "length")
    if ask.route == COMPLETION:
        assert (await ask(max_tokens=None)).num_tokens == 16


@shows(CHAT, field="max_completion_tokens")
@shows(RESPONSE, field="max_output_tokens")
async def longest(ask: Asker) -> None:
    answer = await ask.both(limit=5, seed=1)
    assert (answer.num_tokens, len(answer.text), answer.reason) == (5, 5, "length")


@shows(*GENERATING)
async def min_tokens(ask: Asker) -> None:
    assert (await ask.both(logit_bias=ENDS)).text == ""
    answer = await ask.both(logit_bias=ENDS, min_tokens=4, seed=1)
    assert (len(answer.text), answer.num_tokens, answer.reason) == (4, 5, "stop")


@shows(*GENERATING)
async def ignore_eos(ask: Asker) -> None:
    answer = await ask.both(logit_bias=ENDS, ignore_eos=True)
    assert (answer.num_tokens, answer.reason) == (LEN, "length")


@shows(*GENERATING)
async def stop(ask: Asker) -> None:
    plain = (await ask(temperature=0)).text
    for given in (plain[5:7], ["§", plain[5:7]]):
        answer = await ask.both(temperature=0, stop=given)
        assert (answer.text, answer.reason) == (plain[: plain.index(plain[5:7])], "stop")


@shows(CHAT, COMPLETION)
async def stop_regex(ask: Asker) -> None:
    plain = (await ask(temperature=0)).text
    pattern = "".join(f"\\x{ord(letter):02x}{{1}}" for letter in plain[5:7])
    for given in (pattern, ["§", pattern]):
        answer = await ask.both(temperature=0, stop_regex=given)
        assert (answer.text, answer.reason) == (plain[: plain.index(plain[5:7])], "stop")


@shows(*GENERATING)
async def stop_token_ids(ask: Asker) -> None:
    plain = (await ask(temperature=0)).text
    answer = await ask.both(temperature=0, stop_token_ids=[ord(plain[5])])
    assert (answer.text, answer.reason) == (plain[: plain.index(plain[5])], "stop")


@shows(*GENERATING)
async def no_stop_trim(ask: Asker) -> None:
    plain = (await ask(temperature=0)).text
    end = plain[5:7]
    assert (await ask.both(temperature=0, stop=end, no_stop_trim=True)).text == plain[: plain.index(end) + 2]


@shows(*GENERATING)
async def skip_special_tokens(ask: Asker) -> None:
    control = {str(START_OF_TURN): 100}
    assert (await ask.both(logit_bias=control)).text == ""
    assert (await ask.both(logit_bias=control, skip_special_tokens=False)).text == "<|im_start|>" * LEN


@shows(*GENERATING)
async def timeout(ask: Asker) -> None:
    late = await ask.refusal(timeout=0.02, limit=3000, ignore_eos=True)
    assert (late.status, late.code) == (504, "deadline_exceeded")


async def aborted_by(ask: Asker, field: str) -> None:
    found: list[Answer] = []

    async def wait() -> None:
        found.append(await ask(limit=3000, ignore_eos=True, **{field: f"mine-{ask.route}"}))

    async with create_task_group() as tasks, httpx.AsyncClient(base_url=ask.server.url) as http:
        tasks.start_soon(wait)
        await until(lambda: ask.server.engine.load().running)
        body = (await http.post("/abort_request", json={"rid": f"mine-{ask.route}"})).json()
        assert body == {"aborted": 1}
    assert found[0].reason == "abort" and found[0].num_tokens < 3000


@shows(*GENERATING)
async def rid(ask: Asker) -> None:
    await aborted_by(ask, "rid")


@shows(*GENERATING)
async def request_id(ask: Asker) -> None:
    await aborted_by(ask, "request_id")


async def await_in_order(server: RandomServer, ask: Callable[[int], Awaitable[Any]]) -> None:
    """Requests of several priorities, sent while no more can run, come back highest first."""
    engine, order = server.engine, []

    async def wait(level: int) -> None:
        await ask(level)
        order.append(level)

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http, create_task_group() as tasks:
        body = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "rid": "filling"}
        for _ in range(MAX_RUNNING):
            tasks.start_soon(partial(http.post, "/v1/completions", json=body))
        await until(lambda: engine.load().running == MAX_RUNNING)
        for count, level in enumerate((-1, 0, 5), 1):
            tasks.start_soon(wait, level)
            await until(lambda count=count: engine.load().waiting == count)
        assert next(request.id for request in engine.requests if engine.abort(request.id))
        await until(lambda: len(order) == 3)
        await http.post("/abort_request", json={"rid": "filling"})
    assert order == [5, 0, -1]


@shows(*GENERATING)
async def priority(ask: Asker) -> None:
    await await_in_order(ask.server, lambda level: ask(priority=level, limit=2))


# ---- what an answer looks like -----------------------------------------------------------------------------------


@shows(*GENERATING)
async def regex(ask: Asker) -> None:
    answer = await ask.both(regex="[ab]{3}-end", seed=1)
    assert set(answer.text[:3]) <= {"a", "b"} and answer.text[3:] == "-end" and answer.reason == "stop"


@shows(*GENERATING)
async def ebnf(ask: Asker) -> None:
    assert (await ask.both(ebnf='root ::= "yes" | "no"', seed=1)).text in ("yes", "no")
    assert (await ask.both(ebnf='start: "x" | "y"', seed=1)).text in ("x", "y")


async def chosen(ask: Asker, field: str) -> None:
    assert (await ask.both(**{field: ["red", "blue"]}, seed=1)).text in ("red", "blue")


@shows(*GENERATING)
async def choice(ask: Asker) -> None:
    await chosen(ask, "choice")


@shows(CHAT, COMPLETION)
async def guided_choice(ask: Asker) -> None:
    await chosen(ask, "guided_choice")


@shows(CHAT, COMPLETION)
async def json_schema(ask: Asker) -> None:
    for schema in ({"enum": [True, None]}, '{"enum": [true, null]}'):
        assert (await ask.both(json_schema=schema, seed=1)).text in ("true", "null")


@shows(CHAT, COMPLETION)
async def response_format(ask: Asker) -> None:
    assert (await ask.both(response_format={"type": "text"}, seed=1)).text == (await ask(seed=1)).text
    assert (await ask.both(response_format={"type": "json_object"}, seed=1)).text[0] == "{"
    for strict in (True, False):
        described = {"name": "x", "strict": strict, "schema": {"enum": [10, 20]}}
        form = {"type": "json_schema", "json_schema": described}
        assert (await ask.both(response_format=form, seed=1)).text in ("10", "20")
    tag = {"type": "structural_tag", "format": {"type": "const_string", "value": "Hello!"}}
    assert (await ask.both(response_format=tag)).text == "Hello!"


@shows(*GENERATING)
async def json_whitespace(ask: Asker) -> None:
    as_json: dict[str, Any] = {"json_schema": {"const": [1, 2]}}
    if ask.route == RESPONSE:
        as_json = {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"const": [1, 2]}}}}
    assert (await ask(**as_json)).text == "[1,2]"
    assert (await ask.both(**as_json, json_whitespace="spaced")).text == "[1, 2]"
    spaces = {"32": 100}
    assert "  " in (await ask(**as_json, json_whitespace="flexible", logit_bias=spaces)).text
    assert "  " not in (await ask(**as_json, json_whitespace="compact", logit_bias=spaces)).text
    assert "json_whitespace" in (await ask(json_whitespace="compact")).warnings


@shows(*GENERATING)
async def jump_forward(ask: Asker) -> None:
    scheduler = ask.server.scheduler
    before = scheduler.num_jumped
    jumping = await ask.both(regex="a{10}", limit=20)
    assert scheduler.num_jumped == before + 20 and jumping.text == "a" * 10
    stepping = await ask.both(regex="a{10}", limit=20, jump_forward=False)
    assert scheduler.num_jumped == before + 20 and stepping.text == jumping.text


# ---- streams, and what else comes with an answer -----------------------------------------------------------------


@shows(*GENERATING)
async def stream(ask: Asker) -> None:
    await ask.both(seed=1)
    assert len((await ask.streamed(seed=1)).pieces) > 3
    if isinstance(ask, SocketAsker):
        assert (await ask.refusal(stream=False)).param == "stream"
    else:
        assert (await ask(stream=False)).text


@shows(CHAT, COMPLETION)
async def stream_options(ask: Asker) -> None:
    plain, _ = await ask.events()
    assert all(not event.get("usage") for event in plain)
    counted, _ = await ask.events(stream_options={"include_usage": True})
    assert [bool(event.get("usage")) for event in counted] == [False] * (len(counted) - 1) + [True]
    assert counted[-1]["usage"]["completion_tokens"] == LEN and counted[-1]["choices"] == []
    running, _ = await ask.events(stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert all(event["usage"] for event in running)
    _, warnings = await ask.events(stream_options={"include_obfuscation": True})
    assert warnings.startswith("stream_options.include_obfuscation has no effect")
    assert (await ask.refusal(stream_options={"include_usage": True})).param == "stream_options"


@shows(RESPONSE, field="stream_options")
async def obfuscation(ask: Asker) -> None:
    for wanted in (False, True):
        events, _ = await ask.events(stream_options={"include_obfuscation": wanted})
        deltas = [event for event in events if event["type"] == "response.output_text.delta"]
        assert all(bool(event.get("obfuscation")) is wanted for event in deltas) and deltas


@shows(*GENERATING)
async def resumable(ask: Asker) -> None:
    plain = await ask.lines(seed=1)
    assert not any(line.startswith("id: ") for line in plain)
    kept = await ask.lines(seed=1, resumable=True)
    ids = [line.removeprefix("id: ") for line in kept if line.startswith("id: ")]
    name, half = ids[0].rpartition(":")[0], len(ids) // 2
    async with httpx.AsyncClient(base_url=ask.server.url) as http:  # the openai client does not come back by itself
        rest = (await http.get(f"/v1/streams/{name}", headers={"last-event-id": ids[half]})).text.splitlines()
    assert [line.removeprefix("id: ") for line in rest if line.startswith("id: ")] == ids[half + 1 :]


@shows(*GENERATING)
async def return_progress(ask: Asker) -> None:
    long = "word " * 200 + ask.route
    body = {CHAT: {"messages": said(long)}, COMPLETION: {"prompt": long}, RESPONSE: {"input": long}}[ask.route]
    for wanted in (True, False):
        lines = await ask.lines(**body, return_progress=wanted, cache_salt=f"{ask.route} {wanted}")
        assert any(line.startswith(": prompt_progress {") for line in lines) is wanted


@shows(CHAT, COMPLETION)
async def return_token_ids(ask: Asker) -> None:
    answer = await ask(return_token_ids=True, seed=1)
    assert bytes(answer.choice["token_ids"]).decode() == answer.text
    prompt = answer.body["prompt_token_ids"] if ask.route == CHAT else answer.choice["prompt_token_ids"]
    assert tuple(prompt) == ask.server.engine.requests[-1].token_ids
    events, _ = await ask.events(return_token_ids=True, seed=1)
    ids = [token for event in events for choice in event["choices"] for token in choice.get("token_ids", ())]
    assert ids == answer.choice["token_ids"]


@shows(CHAT, COMPLETION)
async def return_timings(ask: Asker) -> None:
    answer = await ask(return_timings=True, seed=1)
    usage, timings = answer.body["usage"], answer.body["timings"]
    assert timings["cache_n"] + timings["prompt_n"] == usage["prompt_tokens"]
    assert timings["predicted_n"] == usage["completion_tokens"]
    events, _ = await ask.events(return_timings=True, seed=1)
    assert [event["timings"]["predicted_n"] for event in events if "timings" in event] == [timings["predicted_n"]]
    events, _ = await ask.events(seed=1)
    assert not any("timings" in event for event in events)


@shows(CHAT, COMPLETION)
async def return_draft_marks(ask: Asker) -> None:
    answer = await ask(return_draft_marks=True, seed=1)
    assert "".join(mark["text"] for mark in answer.choice["draft_marks"]) == answer.text
    events, _ = await ask.events(return_draft_marks=True, seed=1)
    marks = [mark for event in events for choice in event["choices"] for mark in choice.get("draft_marks", ())]
    assert "".join(mark["text"] for mark in marks) == answer.text


@shows(CHAT)
async def prediction(ask: Asker) -> None:
    plain = await ask.both(seed=1)
    for content in (plain.text, "quite another text", [{"type": "text", "text": plain.text}]):
        predicted = await ask.both(seed=1, prediction={"type": "content", "content": content})
        assert predicted.text == plain.text and predicted.num_tokens == plain.num_tokens and not predicted.warnings
        details = predicted.body["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] > 0
        if content != "quite another text":
            assert details["accepted_prediction_tokens"] > predicted.num_tokens / 2
        text = content if isinstance(content, str) else plain.text
        assert bytes(ask.server.engine.requests[-1].prediction).decode() == text
    assert (await ask.refusal(prediction={"type": "file", "content": "x"})).param == "prediction.type"


@shows(CHAT, COMPLETION)
async def prompt_logprobs(ask: Asker) -> None:
    answer = await ask(prompt_logprobs=2)
    scored = answer.body["prompt_logprobs"] if ask.route == CHAT else answer.choice["prompt_logprobs"]
    prompt = ask.server.engine.requests[-1].token_ids
    assert scored[0] is None and len(scored) == len(prompt)
    for token, entry in zip(prompt[1:], scored[1:], strict=True):
        assert str(token) in entry and len(entry) in (2, 3)
        assert all(one["logprob"] < 0 for one in entry.values())


@shows(*GENERATING)
async def cache_salt(ask: Asker) -> None:
    long = f"The same beginning, {ask.route}, " * 4
    body = {CHAT: {"messages": said(long)}, COMPLETION: {"prompt": long}, RESPONSE: {"input": long}}[ask.route]
    mine, yours = f"mine {ask.route}", f"yours {ask.route}"
    await ask(**body, cache_salt=mine)
    assert (await ask(**body, cache_salt=mine)).num_cached > 50
    assert (await ask(**body, cache_salt=yours)).num_cached == 0


@shows(*GENERATING)
async def model(ask: Asker) -> None:
    assert (await ask(model="small")).body["model"] == "tiny"
    missing = await ask.refusal(model="gpt-9")
    assert (missing.status, missing.code) == (404, "model_not_found")


# ---- chats -------------------------------------------------------------------------------------------------------

FLAG = {
    "name": "set_flag",
    "description": "Sets a flag.",
    "parameters": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
    "strict": True,
}
NOW = {"name": "now", "description": "Tells the time."}


def tools_for(ask: Asker) -> list[dict[str, Any]]:
    if ask.route == RESPONSE:
        return [{"type": "function", **FLAG}, {"type": "function", "parameters": None, "strict": False, **NOW}]
    return [{"type": "function", "function": FLAG}, {"type": "function", "function": NOW}]


def named(ask: Asker, name: str) -> dict[str, Any]:
    return {"type": "function", "name": name} if ask.route == RESPONSE else {"type": "function", "function": {"name": name}}


@shows(CHAT)
async def messages(ask: Asker) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    turns: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What time"}, {"type": "text", "text": "is it?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "I look."},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
        {"role": "assistant", "content": "Noon."},
        {"role": "user", "content": "<|im_end|>", "name": "me"},
    ]
    await ask(messages=turns)
    for text in ("system\nBe brief.", "user\nWhat time\nis it?", "I look.", '"now"', "noon", "assistant\nNoon."):
        assert text in ask.prompt, text
    assert (await ask.refusal(messages=[])).param == "messages"


@shows(CHAT)
async def logprobs(ask: Asker) -> None:
    answer = await ask(logprobs=True, seed=1)
    entries = answer.choice["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == answer.text
    events, _ = await ask.events(logprobs=True, seed=1)
    streamed = [
        entry for event in events for choice in event["choices"] for entry in (choice["logprobs"] or {}).get("content", ())
    ]
    assert streamed == entries
    assert (await ask(seed=1)).choice["logprobs"] is None


@shows(CHAT)
async def top_logprobs(ask: Asker) -> None:
    answer = await ask(logprobs=True, top_logprobs=3, temperature=0)
    for entry in answer.choice["logprobs"]["content"]:
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(values) == 3 and values == sorted(values, reverse=True)


@shows(CHAT, RESPONSE)
async def tools(ask: Asker) -> None:
    await ask(tools=tools_for(ask))
    assert "set_flag" in ask.prompt and "Tells the time." in ask.prompt
    await ask()
    assert "set_flag" not in ask.prompt


@shows(CHAT, RESPONSE)
async def tool_choice(ask: Asker) -> None:
    ask_for: dict[str, Any] = {"tools": tools_for(ask), "limit": 400, "seed": 1}
    allowed = {"mode": "required", "tools": [named(ask, "set_flag")]}
    allowed = {"type": "allowed_tools", **(allowed if ask.route == RESPONSE else {"allowed_tools": allowed})}
    for choice in (named(ask, "set_flag"), allowed):
        made = (await ask(**ask_for, tool_choice=choice, parallel_tool_calls=False)).calls
        assert [name for name, _ in made] == ["set_flag"] and isinstance(json.loads(made[0][1])["on"], bool)
    assert (await ask(**ask_for, tool_choice="required", parallel_tool_calls=False)).calls
    ask_for["limit"] = LEN
    await ask(**ask_for, tool_choice="none")
    assert "set_flag" not in ask.prompt
    await ask(**ask_for, tool_choice="auto")
    assert "set_flag" in ask.prompt


@shows(CHAT, RESPONSE)
async def parallel_tool_calls(ask: Asker) -> None:
    ask_for: dict[str, Any] = {"tools": tools_for(ask)[:1], "tool_choice": "required", "limit": 400}
    single = [await ask(**ask_for, seed=seed, parallel_tool_calls=False) for seed in range(3)]
    assert [len(answer.calls) for answer in single] == [1, 1, 1]
    # A bias to what begins the next call, against what ends the answer.
    more = await ask(**ask_for, seed=1, parallel_tool_calls=True, logit_bias={"10": 100, "60": 90, str(END_OF_TURN): -100})
    assert len(more.calls) > 1


@shows(CHAT)
async def functions(ask: Asker) -> None:
    await ask(functions=[NOW])
    assert "Tells the time." in ask.prompt


@shows(CHAT)
async def function_call(ask: Asker) -> None:
    answer = await ask(
        functions=[{k: v for k, v in FLAG.items() if k != "strict"}], function_call={"name": "set_flag"}, limit=400
    )
    assert answer.reason == "function_call"
    made = answer.choice["message"]["function_call"]
    assert made["name"] == "set_flag" and isinstance(json.loads(made["arguments"])["on"], bool)
    await ask(functions=[NOW], function_call="none")
    assert "Tells the time." not in ask.prompt


@shows(CHAT)
async def reasoning_effort(ask: Asker) -> None:
    assert (await ask(reasoning_effort="high")).warnings == "" and ask.prompt.startswith("effort=high\n")
    await ask(reasoning_effort="none", chat_template_kwargs={})
    assert ask.prompt.endswith("</think>\n\n")


@shows(CHAT)
async def verbosity(ask: Asker) -> None:
    assert (await ask(verbosity="low")).warnings == "" and "verbosity=low\n" in ask.prompt


THINKING: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": True}, "limit": 40, "seed": 1}


@shows(CHAT, RESPONSE)
async def chat_template_kwargs(ask: Asker) -> None:
    await ask(chat_template_kwargs={"enable_thinking": True})
    assert ask.prompt.endswith("<think>\n")
    await ask(chat_template_kwargs={"enable_thinking": False})
    assert ask.prompt.endswith("</think>\n\n")
    assert "chat_template_kwargs.mood has no effect" in (await ask(chat_template_kwargs={"mood": "good"})).warnings
    for call in (ask, ask.streamed):  # names are the client's own, and stand in a header
        assert "chat_template_kwargs.a??b: ? has no effect" in (await call(chat_template_kwargs={"a\r\nb: \0": 1})).warnings


async def thought_of(ask: Asker, field: str) -> None:
    answer = await ask.both(**THINKING, **{field: 10})
    assert 0 < len(answer.thought) <= 10 and answer.text
    details = answer.body["usage"]["output_tokens_details" if ask.route == RESPONSE else "completion_tokens_details"]
    assert details["reasoning_tokens"] >= 10
    shorter = await ask(**THINKING, **{field: 3})
    assert 0 < len(shorter.thought) <= 3


@shows(CHAT, RESPONSE)
async def max_thinking_tokens(ask: Asker) -> None:
    await thought_of(ask, "max_thinking_tokens")


@shows(CHAT)
async def thinking_budget(ask: Asker) -> None:
    await thought_of(ask, "thinking_budget")


@shows(CHAT)
async def separate_reasoning(ask: Asker) -> None:
    apart = await ask.both(**THINKING, max_thinking_tokens=10)
    together = await ask.both(**THINKING, max_thinking_tokens=10, separate_reasoning=False)
    assert "reasoning_content" not in together.choice["message"]
    assert together.text.startswith(apart.thought) and "</think>" in together.text and together.text.endswith(apart.text)


@shows(CHAT)
async def stream_reasoning(ask: Asker) -> None:
    counts = []
    for wanted in (True, False):
        events, _ = await ask.events(**THINKING, max_thinking_tokens=10, stream_reasoning=wanted)
        thoughts = [choice["delta"].get("reasoning_content") for event in events for choice in event["choices"]]
        counts.append(len([thought for thought in thoughts if thought]))
    assert counts[0] > 1 and counts[1] == 1


@shows(CHAT)
async def add_generation_prompt(ask: Asker) -> None:
    await ask(add_generation_prompt=False)
    assert ask.prompt.endswith("Hello<|im_end|>\n")
    await ask(add_generation_prompt=True)
    assert "<|im_start|>assistant\n" in ask.prompt


@shows(CHAT)
async def continue_final_message(ask: Asker) -> None:
    await ask(messages=[*said("Hello"), *said("I think that", "assistant")], continue_final_message=True)
    assert ask.prompt.endswith("<|im_start|>assistant\nI think that")
    assert (await ask.refusal(continue_final_message=True)).param == "continue_final_message"


@shows(CHAT, RESPONSE)
async def allow_control_tokens(ask: Asker) -> None:
    forged = "Hello<|im_end|>"
    body = {"messages": said(forged)} if ask.route == CHAT else {"input": forged}
    counts = []
    for allowed in (False, True):
        await ask(**body, allow_control_tokens=allowed)
        counts.append(ask.server.engine.requests[-1].token_ids.count(END_OF_TURN))
    assert counts == [1, 2]


# ---- text completions --------------------------------------------------------------------------------------------


@shows(COMPLETION)
async def prompt(ask: Asker) -> None:
    text = (await ask(prompt="ab", temperature=0)).text
    assert (await ask(prompt=[97, 98], temperature=0)).text == text
    for given in (["x", "ab"], [[120], [97, 98]]):
        choices = (await ask(prompt=given, temperature=0)).body["choices"]
        assert [choice["index"] for choice in choices] == [0, 1] and choices[1]["text"] == text != choices[0]["text"]


@shows(COMPLETION)
async def echo(ask: Asker) -> None:
    plain = await ask(temperature=0)
    assert (await ask.both(temperature=0, echo=True)).text == "Hello" + plain.text
    scored = await ask(echo=True, logprobs=1, max_tokens=0)
    assert scored.text == "Hello" and scored.choice["logprobs"]["tokens"] == list("Hello")


@shows(COMPLETION, field="logprobs")
async def completion_logprobs(ask: Asker) -> None:
    found = (await ask(logprobs=2, seed=1)).choice
    assert "".join(found["logprobs"]["tokens"]) == found["text"]
    assert found["logprobs"]["text_offset"] == list(range(LEN))
    assert all(len(top) in (2, 3) for top in found["logprobs"]["top_logprobs"])
    assert (await ask(seed=1)).choice["logprobs"] is None


@shows(COMPLETION)
async def best_of(ask: Asker) -> None:
    every = (await ask(n=4, seed=1, logprobs=0)).body["choices"]
    best = max(every, key=lambda choice: sum(choice["logprobs"]["token_logprobs"]))
    answer = await ask(n=1, best_of=4, seed=1)
    assert answer.text == best["text"] and len(answer.body["choices"]) == 1 and answer.num_tokens == 4 * LEN


# ---- responses ---------------------------------------------------------------------------------------------------


@shows(RESPONSE, field="input")
async def response_input(ask: Asker) -> None:
    items: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "What time is it?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "noon"},
        {"type": "message", "role": "user", "content": "Thanks"},
    ]
    await ask(input=items)
    for text in ("What time is it?", "I look.", '"now"', "noon", "</tool_response>\n\nThanks"):  # a template that shows no tools
        assert text in ask.prompt, text


@shows(RESPONSE)
async def instructions(ask: Asker) -> None:
    assert (await ask(instructions="Be kind.")).body["instructions"] == "Be kind."
    assert "system\nBe kind.<|im_end|>" in ask.prompt


@shows(RESPONSE)
async def previous_response_id(ask: Asker) -> None:
    first = await ask(input="A first question", store=True, seed=1)
    second = await ask(input="Go on", previous_response_id=first.body["id"])
    assert second.body["previous_response_id"] == first.body["id"]
    assert ask.prompt.index("A first question") < ask.prompt.index(first.text) < ask.prompt.index("Go on")


@shows(RESPONSE)
async def store(ask: Asker) -> None:
    retrieve = ask.client.responses.retrieve
    kept = (await ask(store=True)).body["id"]
    assert (await ask._run(retrieve, {"response_id": kept})).id == kept
    gone = (await ask(store=False)).body["id"]
    with pytest.raises(openai.NotFoundError):
        await ask._run(retrieve, {"response_id": gone})


@shows(RESPONSE)
async def background(ask: Asker) -> None:
    if isinstance(ask, SocketAsker):
        assert (await ask.refusal(background=True)).param == "background"
        return
    begun = (await ask(background=True, store=True, seed=1)).body
    assert (begun["status"], begun["background"]) == ("queued", True)
    body = begun
    while body["status"] in ("queued", "in_progress"):
        await sleep(0.01)
        body = (await ask._run(ask.client.responses.retrieve, {"response_id": begun["id"]})).to_dict(mode="json")
    assert Answer(body).text == (await ask(seed=1)).text


@shows(RESPONSE)
async def include(ask: Asker) -> None:
    answer = await ask(include=["message.output_text.logprobs"], seed=1)
    (part,) = answer.body["output"][0]["content"]
    assert "".join(entry["token"] for entry in part["logprobs"]) == answer.text
    assert not (await ask(seed=1)).body["output"][0]["content"][0]["logprobs"]
    assert "reasoning.encrypted_content" in (await ask(include=["reasoning.encrypted_content"])).warnings


@shows(RESPONSE, field="top_logprobs")
async def response_top_logprobs(ask: Asker) -> None:
    answer = await ask(top_logprobs=3)
    assert answer.body["top_logprobs"] == 3
    assert all(len(entry["top_logprobs"]) == 3 for entry in answer.body["output"][0]["content"][0]["logprobs"])


@shows(RESPONSE)
async def text(ask: Asker) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"enum": [10, 20]}, "strict": True}
    answer = await ask.both(text={"format": form, "verbosity": "low"}, seed=1)
    assert answer.text in ("10", "20") and "verbosity=low\n" in ask.prompt
    assert answer.body["text"]["format"]["name"] == "x" and answer.warnings == ""
    assert (await ask.both(text={"format": {"type": "json_object"}}, seed=1)).text[0] == "{"


@shows(RESPONSE)
async def reasoning(ask: Asker) -> None:
    assert (await ask(reasoning={"effort": "high"})).body["reasoning"]["effort"] == "high"
    assert ask.prompt.startswith("effort=high\n")
    assert "reasoning.summary has no effect" in (await ask(reasoning={"summary": "auto"})).warnings


@shows(RESPONSE)
async def truncation(ask: Asker) -> None:
    turns = [item for n in range(8) for item in (*said(f"<{n}>" + "x" * 700), *said("Yes.", "assistant"))]
    turns += said("And now?")
    refused = await ask.refusal(input=turns)
    assert (refused.status, refused.code) == (400, "context_length_exceeded")
    assert (await ask(input=turns, truncation="auto")).body["truncation"] == "auto"
    assert "<0>" not in ask.prompt and "<7>" in ask.prompt and "And now?" in ask.prompt


@shows(RESPONSE)
async def metadata(ask: Asker) -> None:
    assert (await ask(metadata={"a": "b"})).body["metadata"] == {"a": "b"}


# ---- vectors -----------------------------------------------------------------------------------------------------


def vectors(answer: Answer) -> list[list[float]]:
    return [entry["embedding"] for entry in answer.body["data"]]


@shows(EMBEDDING, field="input")
async def texts(ask: Asker) -> None:
    (one,) = vectors(await ask(input="red fox"))
    many = vectors(await ask(input=["red fox", "a"]))
    assert many[0] == one != many[1]
    assert vectors(await ask(input=[2, 8, 11, 3])) == [one] == vectors(await ask(input=[[2, 8, 11, 3]]))


@shows(EMBEDDING)
async def encoding_format(ask: Asker) -> None:
    (plain,) = vectors(await ask(encoding_format="float"))
    (coded,) = vectors(await ask(encoding_format="base64"))
    assert np.array_equal(np.frombuffer(base64.b64decode(coded), "<f4"), np.float32(plain))  # type: ignore[arg-type]
    (decoded,) = vectors(await ask())  # the client asks for base64 by itself
    assert np.allclose(decoded, plain)


@shows(EMBEDDING)
async def dimensions(ask: Asker) -> None:
    (cut,) = vectors(await ask(dimensions=2))
    assert len(cut) == 2 and np.isclose(np.linalg.norm(cut), 1)


@shows(EMBEDDING)
async def prompt_name(ask: Asker) -> None:
    assert vectors(await ask(input="fox", prompt_name="query")) == vectors(await ask(input="red fox"))


@shows(EMBEDDING, field="model")
async def embedding_model(ask: Asker) -> None:
    assert (await ask()).body["model"] == "vectors"
    assert (await ask.refusal(model="gpt-9")).code == "model_not_found"
    assert (await ask.refusal(model="tiny")).status == 400


@shows(EMBEDDING)
async def truncate(ask: Asker) -> None:
    refused = await ask.refusal(input="a " * 30)
    assert refused.code == "context_length_exceeded"
    assert (await ask(input="a " * 30, truncate=True)).body["usage"]["prompt_tokens"] == 12


@shows(EMBEDDING)
async def truncate_prompt_tokens(ask: Asker) -> None:
    assert (await ask(input="a " * 30, truncate_prompt_tokens=5)).body["usage"]["prompt_tokens"] == 5


@shows(EMBEDDING, field="timeout")
async def embedding_timeout(ask: Asker) -> None:
    late = await ask.refusal(input="blue fox", timeout=0.05)
    assert (late.status, late.code) == (504, "deadline_exceeded")


# ---- the table ---------------------------------------------------------------------------------------------------

# Values of what is accepted without effect, or refused: something that asks for an effect.
VALUES: dict[str, Any] = {
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "flex",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "implicit"},
    "max_tool_calls": 3,
    "modalities": ["text", "audio"],
    "audio": {"voice": "x", "format": "wav"},
    "web_search_options": {},
    "moderation": {"model": "x"},
    "input_ids": [1],
    "return_hidden_states": True,
    "bad_words": ["x"],
    "structured_outputs": {"json": {}},
    "guided_json": {},
    "custom_params": {"a": 1},
    "session_params": {"id": "x"},
    "prompt": {"id": "p"},
    "context_management": [{"type": "compaction"}],
    "messages": [],
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "response_format": {"type": "json_object"},
    "logprobs": True,
    "n": 2,
}


async def check_warned(ask: Asker, field: Field) -> None:
    value = VALUES.get(field.name, "x")
    calls = (ask, ask.streamed) if ask.route in GENERATING else (ask,)
    for call in calls:
        assert (await call(**{field.name: value})).warnings == f"{field.name} has no effect: {field.note}"
    for harmless in (None, *field.harmless):
        assert (await ask(**{field.name: harmless})).warnings == ""


async def check_refused(ask: Asker, field: Field) -> None:
    error = await ask.refusal(**{field.name: VALUES.get(field.name, "x")})
    assert (error.status, error.param) == (400, field.name)
    assert field.note in error.message
    for harmless in (None, *field.harmless):
        assert (await ask(**{field.name: harmless})).warnings == ""


FIELDS = [(route, field) for route, page in ROUTES.items() for field in TABLES[page]]


def test_every_field_has_a_case_and_every_case_a_field() -> None:
    supported = {(route, field.name) for route, field in FIELDS if field.decision is Decision.SUPPORTED}
    assert set(CASES) == supported


@pytest.mark.parametrize("route", ROUTES)
def test_every_argument_of_the_client_is_in_the_table(route: str) -> None:
    assert len(arguments_of(route)) > 4
    assert arguments_of(route) <= {field.name for field in TABLES[ROUTES[route]]}


def id_of(pair: tuple[str, Field]) -> str:
    return f"{pair[0]}-{pair[1].name}"


async def check_field(ask: Asker, field: Field) -> None:
    check = {
        Decision.SUPPORTED: CASES.get((ask.route, field.name)),
        Decision.WARNED: partial(check_warned, field=field),
        Decision.REFUSED: partial(check_refused, field=field),
    }[field.decision]
    assert check is not None, "this field has no case"
    await check(ask)


@pytest.mark.parametrize("pair", FIELDS, ids=id_of)
async def test_a_field_does_what_the_table_says(server: RandomServer, client: AsyncOpenAI, pair: tuple[str, Field]) -> None:
    await check_field(Asker(pair[0], server, client), pair[1])


DOCUMENTED = [pair for pair in FIELDS if pair[1].name in arguments_of(pair[0])]


@pytest.mark.parametrize("pair", DOCUMENTED, ids=id_of)
async def test_a_documented_field_does_so_through_the_plain_client(
    server: RandomServer, plain_client: OpenAI, pair: tuple[str, Field]
) -> None:
    await check_field(Asker(pair[0], server, plain_client), pair[1])


@pytest.mark.parametrize("field", [pytest.param(field, id=field.name) for route, field in DOCUMENTED if route == RESPONSE])
async def test_a_documented_field_does_so_on_a_socket(server: RandomServer, client: AsyncOpenAI, field: Field) -> None:
    async with client.responses.connect() as connection:
        await check_field(SocketAsker(server, client, connection), field)
