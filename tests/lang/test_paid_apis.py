"""OpenAI's and Anthropic's interfaces as back ends, through their own clients: a scripted server, and the default model."""

import base64
import io
from collections.abc import AsyncIterator
from typing import Any

import pytest
from PIL import Image

from streamserve.errors import InvalidRequest, ModelNotFound, NotFound, Unreachable
from streamserve.lang.anthropic import Anthropic
from streamserve.lang.backend import Prompt, Sampling
from streamserve.lang.choices import greedy_token_selection, token_length_normalized, unconditional_likelihood_normalized
from streamserve.lang.endpoint import RuntimeEndpoint
from streamserve.lang.openai import OpenAI
from streamserve.media.fixed import FixedFamily
from tests.e2e.serving import FakeServer, fake_server

pytestmark = pytest.mark.anyio
TURNS = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"})
ANSWER = Prompt("...", TURNS, role="assistant")


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with fake_server(family=FixedFamily()) as server:
        yield server


def openai_of(url: str, model: str = "tiny", **options: Any) -> OpenAI:
    return OpenAI(model, base_url=f"{url}/v1", max_retries=0, **options)


def anthropic_of(url: str, model: str = "tiny") -> Anthropic:
    return Anthropic(model, base_url=url, api_key="none", max_retries=0)


async def test_chat_answers_streams_and_counts(server: FakeServer) -> None:
    for backend in (openai_of(server.url), anthropic_of(server.url)):
        sampling = Sampling(max_tokens=24, temperature=0)
        (whole,) = await backend.generate(ANSWER, sampling)
        assert whole.text and whole.meta["finish_reason"] == {"type": "length"} and whole.meta["completion_tokens"] == 24
        assert backend.token_usage.prompt_tokens == whole.meta["prompt_tokens"] > 0
        pieces = [piece async for piece in backend.stream(ANSWER, sampling)]
        assert len(pieces) > 1 and "".join(piece.text for piece in pieces) == whole.text
        assert pieces[-1].meta["completion_tokens"] == 24 and pieces[-1].meta["finish_reason"] == {"type": "length"}
        assert backend.token_usage.completion_tokens == 48
        backend.token_usage.reset()
        assert len(await backend.generate(ANSWER, Sampling(max_tokens=2, n=3))) == 3
        if isinstance(backend, OpenAI):
            (stopped,) = await backend.generate(ANSWER, Sampling(max_tokens=60, stop_regex=(" f.x",)))
            assert "fox" not in stopped.text and stopped.meta["finish_reason"]["type"] == "stop"
            backend.token_usage.reset()
            await backend.generate(ANSWER, Sampling(max_tokens=6, ignore_eos=True))
        assert backend.token_usage.completion_tokens == 6
        (stopped,) = await backend.generate(ANSWER, Sampling(max_tokens=60, stop=("fox", " ")))
        assert " " not in stopped.text and stopped.meta["finish_reason"]["type"] == "stop"
        assert " " not in "".join([piece.text async for piece in backend.stream(ANSWER, Sampling(max_tokens=60, stop=(" ",)))])
        (going_on,) = await backend.generate(Prompt("...", TURNS, role="assistant", opened="Well"), Sampling(max_tokens=4))
        assert going_on.text
        await backend.aclose()


async def test_completion_answers_and_chooses(server: FakeServer) -> None:
    backend = openai_of(server.url, is_chat_model=False)
    (whole,) = await backend.generate(Prompt("Once"), Sampling(max_tokens=8, temperature=0, return_logprob=True))
    assert len(whole.meta["output_token_logprobs"]) == 8
    pieces = [piece async for piece in backend.stream(Prompt("Once"), Sampling(max_tokens=8, temperature=0))]
    assert "".join(piece.text for piece in pieces) == whole.text
    for method in (token_length_normalized, greedy_token_selection):
        chosen = await backend.choose(Prompt("yes or no? "), ["yes", "no"], 0, method)
        assert [len(entries) for entries in chosen.meta["input_token_logprobs"]] == [3, 2]
    with pytest.raises(InvalidRequest, match="needs log-probabilities"):
        await backend.choose(Prompt("x"), ["a"], 0, unconditional_likelihood_normalized)
    await backend.aclose()


async def test_types_choices_and_schemas_hold_in_chats(server: FakeServer) -> None:
    own = openai_of(server.url)
    own.is_openais = True  # as its own API is spoken to: schemas only
    for backend in (openai_of(server.url), own, anthropic_of(server.url)):
        (number,) = await backend.generate(ANSWER, Sampling(dtype="bool", max_tokens=40))
        assert number.text in ("True", "False")
        (shaped,) = await backend.generate(ANSWER, Sampling(json_schema='{"type": "boolean"}', max_tokens=40))
        assert shaped.text in ("true", "false")
        assert (await backend.choose(ANSWER, ["red", "green"], 0, token_length_normalized)).decision in ("red", "green")
        with pytest.raises(InvalidRequest, match="needs log-probabilities"):
            await backend.choose(ANSWER, ["red", "green"], 0, greedy_token_selection)
        await backend.aclose()


async def test_types_of_a_completion_api_without_forms(server: FakeServer) -> None:
    backend = openai_of(server.url, is_chat_model=False)
    backend.is_openais = True
    (text,) = await backend.generate(Prompt("say "), Sampling(dtype="str", max_tokens=9))
    assert text.text[0] == text.text[-1] == '"'
    await backend.aclose()


async def test_what_an_api_has_nothing_for_is_refused(server: FakeServer) -> None:
    own = openai_of(server.url)
    own.is_openais = True
    for backend, sampling, what in (
        (own, Sampling(regex="a+"), "regex is 'a\\+'; OpenAI's chat API has nothing for it"),
        (own, Sampling(top_k=5), "top_k is 5"),
        (anthropic_of(server.url), Sampling(presence_penalty=0.5), "presence_penalty is 0.5; Anthropic's API"),
        (anthropic_of(server.url), Sampling(stop_regex=("a",)), "stop_regex"),
    ):
        with pytest.raises(InvalidRequest, match=what):
            await backend.generate(ANSWER, sampling)
        await backend.generate(ANSWER, Sampling(max_tokens=1, top_k=-1, min_tokens=0, ignore_eos=False))
        with pytest.raises(
            InvalidRequest, match=r"an answer is asked for in a turn of 'user'; .* answers in an assistant's turn"
        ):
            await backend.generate(Prompt("x", role="user"), Sampling())
        await backend.aclose()
    with pytest.raises(InvalidRequest, match="begins turns only"):
        await own.generate(Prompt("x", TURNS, role="assistant", opened="Well, "), Sampling())
    await own.aclose()


async def test_their_errors_are_ours(server: FakeServer) -> None:
    # Anthropic's errors do not say what was not found.
    for backend, kind in ((openai_of(server.url, "nobody"), ModelNotFound), (anthropic_of(server.url, "nobody"), NotFound)):
        with pytest.raises(kind, match="nobody"):
            await backend.generate(ANSWER, Sampling())
        with pytest.raises(kind, match="nobody"):
            _ = [piece async for piece in backend.stream(ANSWER, Sampling())]
        await backend.aclose()
    for backend in (openai_of("http://127.0.0.1:9"), anthropic_of("http://127.0.0.1:9")):
        with pytest.raises(Unreachable):
            await backend.generate(ANSWER, Sampling())
        await backend.aclose()


async def test_pictures_go_along(server: FakeServer) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    prompt = Prompt("", ({"role": "user", "content": content},), (url,), role="assistant")
    numbers = []
    for backend in (openai_of(server.url), anthropic_of(server.url)):
        numbers.append((await backend.generate(prompt, Sampling(max_tokens=2)))[0].meta["prompt_tokens"])
        await backend.aclose()
    assert numbers[0] == numbers[1] > 16


async def test_the_default_model_chooses_and_counts(server_url: str) -> None:
    native = RuntimeEndpoint(server_url)
    model = (await native.model_info())["served_model_name"]
    await native.aclose()
    question = Prompt("", ({"role": "user", "content": "Is Paris in France or in Japan?"},), role="assistant")
    for backend in (openai_of(server_url, model), anthropic_of(server_url, model)):
        chosen = await backend.choose(question, ["in Japan", "in France"], 0, token_length_normalized)
        assert chosen.decision == "in France"
        await backend.aclose()
    completion = openai_of(server_url, model, is_chat_model=False)
    chosen = await completion.choose(Prompt("The capital of France is "), ["Berlin", "Paris"], 0, token_length_normalized)
    assert chosen.decision == "Paris" and chosen.meta["input_token_logprobs"][1][0][2] == " Paris"  # healed
    await completion.aclose()
