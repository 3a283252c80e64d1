"""Programs' back end over HTTP: a server with a scripted text, and the default model where words matter."""

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from PIL import Image

from streamserve.errors import AuthenticationFailed, InvalidRequest, StreamServeError, Unreachable
from streamserve.lang.backend import Prompt, Sampling
from streamserve.lang.choices import greedy_token_selection, token_length_normalized, unconditional_likelihood_normalized
from streamserve.lang.endpoint import Native, RuntimeEndpoint
from streamserve.lang.templates import TEMPLATES
from streamserve.lang.transport import LANE_WIDTH, Http, Lane
from streamserve.media.fixed import FixedFamily
from tests.e2e.serving import SCRIPT, FakeServer, fake_server
from tests.lang.test_roles import written

pytestmark = pytest.mark.anyio
TEXT = SCRIPT.decode()


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with fake_server(family=FixedFamily()) as server:
        yield server


@pytest.fixture
async def native(server: FakeServer) -> AsyncIterator[RuntimeEndpoint]:
    endpoint = RuntimeEndpoint(server.url)
    yield endpoint
    await endpoint.aclose()


class Told:
    """A server that says this of its model, and takes everything."""

    def __init__(self, model_info: dict[str, Any]) -> None:
        self.model_info = model_info
        self.bodies: list[Any] = []

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        if path == "/get_model_info":
            return self.model_info
        self.bodies.append(body)
        return {"text": "done", "meta_info": {}}

    def events(self, path: str, body: Any) -> Any:
        raise NotImplementedError

    async def aclose(self) -> None: ...


async def prompt_ids(native: Native, prompt: Prompt) -> list[int]:
    """What the server makes of a program's prompt."""
    body = {**await native._given(prompt), "sampling_params": {"max_new_tokens": 0}, "return_prompt_token_ids": True}
    ids: list[int] = (await native.call("POST", "/generate", body))["prompt_token_ids"]
    return ids


async def test_answers_streams_and_choices_come_with_their_meta(native: RuntimeEndpoint) -> None:
    prompt = Prompt("hello")
    whole = await native.generate(prompt, Sampling(max_tokens=20, temperature=0))
    assert len(whole) == 1 and whole[0].meta["completion_tokens"] == 20
    pieces = [piece async for piece in native.stream(prompt, Sampling(max_tokens=20, temperature=0))]
    assert len(pieces) > 1 and "".join(piece.text for piece in pieces) == whole[0].text
    assert pieces[-1].meta["finish_reason"] == {"type": "length", "length": 20}
    several = await native.generate(prompt, Sampling(max_tokens=4, n=3))
    assert len(several) == 3
    stopped = await native.generate(prompt, Sampling(max_tokens=60, stop=("fox",)))
    assert stopped[0].meta["finish_reason"]["matched"] == "fox" and "fox" not in stopped[0].text
    stopped = await native.generate(prompt, Sampling(max_tokens=60, stop_regex=(r"f\w+",)))
    assert stopped[0].meta["finish_reason"]["matched"] == r"f\w+" and stopped[0].text.endswith("brown ")
    scored = await native.generate(prompt, Sampling(max_tokens=3, return_logprob=True, logprob_start_len=0))
    assert len(scored[0].meta["input_token_logprobs"]) == 5


async def test_a_look_at_what_may_come_appends_nothing(native: RuntimeEndpoint) -> None:
    said = Sampling(max_tokens=1, return_logprob=True, top_logprobs_num=1, return_text_in_logprobs=True)
    look = replace(said, max_tokens=0)
    (first,) = await native.generate(Prompt("look"), said)
    (piece,) = await native.generate(Prompt("look"), look)
    *_, last = [piece async for piece in native.stream(Prompt("look"), look)]
    assert (first.text, piece.text, last.text) == (first.meta["output_token_logprobs"][0][2], "", "")
    for name in ("output_token_logprobs", "output_top_logprobs"):
        assert len(first.meta[name]) == 1 and piece.meta[name] == last.meta[name] == first.meta[name]
    (nothing,) = await native.generate(Prompt("look"), Sampling(max_tokens=0))
    assert nothing.text == "" and nothing.meta["completion_tokens"] == 0


async def test_types_and_forms_are_kept_to(native: RuntimeEndpoint) -> None:
    for sampling, allowed in (
        (Sampling(dtype="int", max_tokens=9), "+-0123456789 \n"),
        (Sampling(regex="[abc]{3}", max_tokens=9), "abc"),
        (Sampling(json_schema='{"type": "boolean"}', max_tokens=9), "truefalse"),
    ):
        text = (await native.generate(Prompt("n = "), sampling))[0].text
        assert text and set(text) <= set(allowed), sampling
    with pytest.raises(InvalidRequest, match="dtype is given beside regex"):
        await native.generate(Prompt("x"), Sampling(dtype="int", regex="a"))


async def test_what_the_server_refuses_is_the_error_it_was(native: RuntimeEndpoint, server: FakeServer) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await native.generate(Prompt("x"), Sampling(top_p=7.0))
    assert refused.value.param == "sampling_params.top_p"
    with pytest.raises(InvalidRequest) as refused:
        _ = [piece async for piece in native.stream(Prompt("x"), Sampling(top_p=7.0))]
    assert refused.value.param == "sampling_params.top_p"
    nobody = RuntimeEndpoint("http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="is the server running"):
        await nobody.generate(Prompt("x"), Sampling())


async def test_key_is_sent() -> None:
    from streamserve.config import ServerConfig

    async with fake_server(ServerConfig(api_key=("s3cret",))) as server:
        stranger = RuntimeEndpoint(server.url)
        with pytest.raises(AuthenticationFailed):
            await stranger.roles()
        await stranger.aclose()
        endpoint = RuntimeEndpoint(server.url, api_key="s3cret")
        assert (await endpoint.roles()).begin((), "user") == "<|im_start|>user\n"
        await endpoint.aclose()


async def test_leaving_an_answer_ends_it_on_the_server(native: RuntimeEndpoint, server: FakeServer) -> None:
    task = asyncio.create_task(native.generate(Prompt("long"), Sampling(max_tokens=4000)))
    while not server.engine.load().running:  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    task.cancel()
    await server.until_idle()
    stream = native.stream(Prompt("long"), Sampling(max_tokens=4000))
    async for _ in stream:
        break
    await stream.aclose()
    await server.until_idle()


async def test_a_server_without_our_additions_gets_sglangs_fields_only() -> None:
    server = Told({"model_path": "m", "preferred_sampling_params": {"temperature": 0.2}})
    native = Native(server)
    assert (await native.generate(Prompt("USER:x", role="user"), Sampling()))[0].text == "done"
    assert server.bodies == [{"text": "USER:x", "sampling_params": {}}]
    assert (await native.roles()).begin((), "user") == "USER:"


async def test_sampling_that_is_left_out_is_the_models_own() -> None:
    server = Told({"model_path": "m", "chat_template": None, "preferred_sampling_params": {"temperature": 0.2, "top_k": 5}})
    native = Native(server)
    await native.generate(Prompt("x"), Sampling())
    await native.generate(Prompt("x"), Sampling(temperature=0.0))
    assert [body["sampling_params"] for body in server.bodies] == [
        {"temperature": 0.2, "top_k": 5},
        {"temperature": 0.0, "top_k": 5},
    ]


async def test_begin_token_is_the_templates_business_where_the_template_wrote() -> None:
    class Shows:
        async def call(self, method: str, path: str, body: Any = None) -> Any:
            return {
                "model_path": "m",
                "chat_template": {"source": TEMPLATES["chatml"], "special_tokens": {}, "image_marker": None},
            }

        def events(self, path: str, body: Any) -> Any:
            raise NotImplementedError

        async def aclose(self) -> None: ...

    chat = Prompt("<|im_start|>user\nHi", role="user")
    mixed = Prompt("Once. <|im_start|>user\nHi", role="user")  # words before the first turn: no template wrote the beginning
    native = Native(Shows())
    assert (await native._given(chat))["add_special_tokens"] is False
    for prompt in (mixed, Prompt("Once")):
        assert await native._given(prompt) == {"text": prompt.text}
    own = Native(Shows(), chat_template="llama-3-instruct")  # a template of the user's: the server adds what it adds
    assert await own._given(Prompt((await own.roles()).begin((), "user"), role="user")) == {
        "text": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    }


async def test_a_stream_that_repeats_its_text_is_shown_once() -> None:
    class Repeating:
        async def call(self, method: str, path: str, body: Any = None) -> Any:
            return {"model_path": "m"}

        async def events(self, path: str, body: Any) -> AsyncIterator[Any]:
            for text in ("a", "ab", "abc"):
                yield {"text": text, "meta_info": {}}

        async def aclose(self) -> None: ...

    native = Native(Repeating())  # type: ignore[arg-type]
    assert [piece.text async for piece in native.stream(Prompt("x"), Sampling())] == ["a", "b", "c"]


@pytest.mark.parametrize("method", [token_length_normalized, greedy_token_selection, unconditional_likelihood_normalized])
async def test_select_refuses_what_it_cannot_choose_from(native: RuntimeEndpoint, method: Any) -> None:
    chosen = await native.choose(Prompt("yes or no? "), ["yes", "no"], 0.0, method)
    assert chosen.decision in ("yes", "no")
    assert [len(entries) for entries in chosen.meta["input_token_logprobs"]] == [3, 2]  # bytes: nothing heals
    for choices, temperature, what in ((["a"], 0.7, "temperature is 0.7"), ([], 0, "choices is empty"), (["a", ""], 0, r"\[1\]")):
        with pytest.raises(InvalidRequest, match=what):
            await native.choose(Prompt("x"), choices, temperature, method)


async def test_a_choice_of_which_nothing_can_be_known_is_refused(native: RuntimeEndpoint) -> None:
    with pytest.raises(InvalidRequest, match=r"choices\[1\] is a token that follows none"):
        await native.choose(Prompt(""), ["yes", "n"], 0.0, token_length_normalized)


async def test_prefix_is_kept_and_forgotten(native: RuntimeEndpoint, server: FakeServer) -> None:
    prompt = Prompt("a prefix of some length, ")
    await native.cache_prefix(prompt)
    longer = await native.generate(Prompt(prompt.text + "and more"), Sampling(max_tokens=2))
    assert longer[0].meta["cached_tokens"] >= len(prompt.text) - 1
    await native.flush_cache()
    assert (await native.generate(Prompt(prompt.text + "?"), Sampling(max_tokens=2)))[0].meta["cached_tokens"] == 0
    assert (await native.model_info())["served_model_name"] == "tiny" and "version" in await native.server_info()


async def test_a_picture_stands_where_the_program_showed_it(native: RuntimeEndpoint) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    roles = await native.roles()
    text = roles.begin((), "user") + roles.image + "What is it?" + roles.end((), "user") + roles.begin(("user",), "assistant")
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    prompt = Prompt(text, ({"role": "user", "content": content},), (url,), "assistant")
    expected = (await native.call("POST", "/tokenize", {"messages": list(prompt.messages)}))["tokens"]
    assert await prompt_ids(native, prompt) == expected and expected[0] == 257
    chosen = await native.choose(prompt, ["red", "a dog"], 0, token_length_normalized)
    assert [len(entries) for entries in chosen.meta["input_token_logprobs"]] == [3, 5]
    answer = await native.generate(prompt, Sampling(max_tokens=2))
    assert answer[0].meta["image_tokens"] == 16
    for text in ("", "a", "ab", "abc"):  # a choice right behind a picture
        chosen = await native.choose(Prompt(roles.image + text, images=(url,)), ["red", "a dog"], 0, token_length_normalized)
        assert [len(entries) for entries in chosen.meta["input_token_logprobs"]] == [3, 5]


async def test_calls_at_once_share_connections_by_few(native: RuntimeEndpoint) -> None:
    num_calls = 3 * LANE_WIDTH + 1
    long = Sampling(max_tokens=100, ignore_eos=True)  # all begin before one ends
    answers = await asyncio.gather(*[native.generate(Prompt(f"{n}"), long) for n in range(num_calls)])
    assert len(answers) == num_calls
    http: Any = native._transport
    assert len(http._lanes) == 4 and not any(lane.num_calls for lane in http._lanes)


async def test_stream_that_ends_in_the_middle_is_an_error() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'data: {"text": "a"}\n\n'})

    transport = Http("http://test")
    transport._lanes = [Lane(httpx.AsyncClient(transport=httpx.ASGITransport(app)))]
    with pytest.raises(StreamServeError, match="ended in the middle"):
        assert [event async for event in transport.events("/x", {})]
    await transport.aclose()


# ---- the default model -------------------------------------------------------------------------------------------------


async def test_a_program_writes_the_tokens_of_the_chat_route(server_url: str) -> None:
    native = RuntimeEndpoint(server_url)
    turns = [("system", "You are terse."), ("user", "Name a colour."), ("assistant", "Blue."), ("user", "Another, please?")]
    roles = await native.roles()
    for shown in (turns[:2], turns[1:2], turns, turns[1:]):
        messages = tuple({"role": role, "content": content} for role, content in shown)
        whole = (await native.call("POST", "/tokenize", {"messages": list(messages)}))["tokens"]
        assert await prompt_ids(native, Prompt(written(roles, shown, opens=True), messages, role="assistant")) == whole
        closed = written(roles, shown[:1], opens=False)
        assert whole[: len(ids := await prompt_ids(native, Prompt(closed, messages[:1])))] == ids
    await native.aclose()


async def test_choices_are_scored_as_their_tokens_are_sampled(server_url: str) -> None:
    native = RuntimeEndpoint(server_url)
    prompt = Prompt("The capital of France is")
    chosen = await native.choose(prompt, [" Paris", " London", " Banana"], 0.0, token_length_normalized)
    assert chosen.decision == " Paris"
    body = {"text": prompt.text + " London", "sampling_params": {"max_new_tokens": 0}}
    scored = await native.call("POST", "/generate", {**body, "return_logprob": True, "logprob_start_len": 0})
    last = scored["meta_info"]["input_token_logprobs"][-1]
    own = chosen.meta["input_token_logprobs"][1]
    assert [entry[1] for entry in own] == [last[1]] and own[0][0] == pytest.approx(last[0], abs=1e-3)
    assert chosen.meta["normalized_prompt_logprobs"][1] == pytest.approx(last[0], abs=1e-3)

    # A prompt that ends in a space: the space is a part of the choices' first tokens, and is counted with them.
    healed = await native.choose(Prompt(prompt.text + " "), ["Paris", "London"], 0.0, greedy_token_selection)
    assert healed.decision == "Paris" and healed.meta["input_token_logprobs"][0][0][2] == " Paris"
    gain = await native.choose(prompt, [" Paris", " London"], 0.0, unconditional_likelihood_normalized)
    assert gain.decision == " Paris" and [entries[0][0] for entries in gain.meta["unconditional_token_logprobs"]] == [None, None]
    await native.aclose()
