"""Pictures in the bodies of every dialect: what reaches the engine, what is refused by which name, what is counted."""

from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from streamserve.api.app import create_app
from streamserve.api.pictures import Pictures
from streamserve.api.schema import PictureRef
from streamserve.config import ServerConfig
from streamserve.errors import ContextOverflow
from streamserve.media.family import Prepared
from streamserve.media.fetch import Fetcher
from streamserve.media.loader import MAX_PICTURES, Loader
from streamserve.media.picture import Picture
from streamserve.messages import MEDIA_BASE, GenerateRequest, Layout, Run, media_token_ids
from streamserve.metrics import Metrics
from streamserve.text.byte_tokenizer import ByteTokenizer, byte_text_model
from streamserve.text.template import ChatTemplate
from tests.api.conftest import client_of
from tests.api.pictures import BLUE_URL, RED, RED_URL, CountingFamily, data_url, png, said, shown
from tests.api.scripted import CONTEXT_LEN, ScriptedEngine

pytestmark = pytest.mark.anyio
CHAT, RESPONSES, MESSAGES, GENERATE = "/v1/chat/completions", "/v1/responses", "/v1/messages", "/generate"
PLACES = 16
BAD_URL = "data:image/png;base64,!!!"


@pytest.fixture
def family() -> CountingFamily:
    return CountingFamily()


@pytest.fixture
async def http(engine: ScriptedEngine, family: CountingFamily) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(engine, byte_text_model(), ServerConfig(), model_name="tiny", family=family, metrics=Metrics())
    async with client_of(app) as client:
        yield client


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [said(part) if isinstance(part, str) else part for part in parts]}


def base64(url: str = RED_URL) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}}


def prompt_of(request: GenerateRequest) -> str:
    """The prompt as text, each place of a picture as a dot. Checks that places and media fit together."""
    tokenizer = ByteTokenizer()
    text = "".join(["." if id >= MEDIA_BASE else tokenizer.id_to_text(id) for id in request.token_ids])
    places = [place for media in request.media for span in media.spans for place in range(span.start, span.end)]
    assert places == [place for place, id in enumerate(request.token_ids) if id >= MEDIA_BASE]
    for media in request.media:
        ids = [id for span in media.spans for id in request.token_ids[span.start : span.end]]
        assert tuple(ids) == media_token_ids(media.key, media.num_tokens)
        assert media.inputs["mean_C"].shape == (3,)
    return text


async def ok(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refused(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> tuple[str, str]:
    answer = await http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error.get("param"), error["message"]


ASKED = "<|im_start|>user\n" + "." * PLACES + "\nWhat?<|im_end|>\n<|im_start|>assistant\n"
CALL = {"type": "function", "id": "c", "function": {"name": "look", "arguments": "{}"}}
ITEM = {"role": "user", "content": [{"type": "input_image", "image_url": RED_URL}, {"type": "input_text", "text": "What?"}]}
BY_URL = {"type": "image", "source": {"type": "url", "url": RED_URL}}
DIALECTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": [user(shown(), "What?")]}),
    (CHAT, {"messages": [user({"type": "image_url", "image_url": RED_URL}, "What?")]}),
    (CHAT, {"messages": [user({"type": "input_image", "image_url": RED_URL}, "What?")]}),
    (RESPONSES, {"input": [ITEM]}),
    (MESSAGES, {"model": "tiny", "max_tokens": 9, "messages": [user(base64(), "What?")]}),
    (MESSAGES, {"model": "tiny", "max_tokens": 9, "messages": [user(BY_URL, "What?")]}),
    (GENERATE, {"text": ASKED.split(".")[0], "image_data": RED_URL}),
]


@pytest.mark.parametrize(("path", "body"), DIALECTS)
async def test_a_picture_reaches_the_engine_from_every_dialect(
    http: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, Any]
) -> None:
    await ok(http, path, body)
    (request,) = engine.requests
    prompt = prompt_of(request)
    assert prompt == (ASKED if path != GENERATE else "." * PLACES + "\n<|im_start|>user\n")
    (media,) = request.media
    assert [span.num_tokens for span in media.spans] == [PLACES] and media.kind == "image"


async def test_pictures_in_any_turn_have_ids_of_their_contents(
    http: httpx.AsyncClient, engine: ScriptedEngine, family: CountingFamily
) -> None:
    chat = [
        user("One:", shown(), "and two:", shown(BLUE_URL)),
        {"role": "assistant", "content": "Seen."},
        user("Again", shown()),
    ]
    await ok(http, CHAT, {"messages": chat, "n": 2})
    first, second = engine.requests
    assert first.media is second.media and len(family.prepared) == 2
    one, two, again = first.media
    assert one.key == again.key != two.key
    ids = [first.token_ids[media.spans[0].start : media.spans[0].end] for media in first.media]
    assert ids[0] == ids[2] and ids[0][0] != ids[1][0]
    dots = "." * PLACES
    said_so = "<|im_start|>assistant\nSeen.<|im_end|>\n<|im_start|>user\n"
    expected = f"user\nOne:\n{dots}\nand two:\n{dots}<|im_end|>\n{said_so}{dots}\nAgain<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(first) == f"<|im_start|>{expected}"


async def test_the_next_turn_of_a_chat_begins_like_the_one_before(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await ok(http, CHAT, {"messages": [user(shown(), "What?")]})
    await ok(http, CHAT, {"messages": [user(shown(), "What?"), {"role": "assistant", "content": "Hello!"}, user("And?")]})
    before, after = (request.token_ids for request in engine.requests)
    assert after[: len(before)] == before


async def test_pictures_that_were_shown_before_are_not_prepared_again(
    http: httpx.AsyncClient, family: CountingFamily, engine: ScriptedEngine
) -> None:
    for turns in ([user(shown())], [user(shown(), shown(BLUE_URL))], [user(shown(BLUE_URL), shown())]):
        await ok(http, CHAT, {"messages": turns})
    assert len(family.prepared) == 2
    assert [len(request.media) for request in engine.requests] == [1, 2, 2]


async def test_what_was_not_shown_for_longest_is_prepared_again(family: CountingFamily) -> None:
    loader = Loader(Fetcher((), 1 << 20), lambda id, owner: None, 1 << 20)
    pictures = Pictures(family, loader, lambda: 1000, max_cache_bytes=2 * 12)  # an encoder's input has three numbers
    refs = [PictureRef(data_url(png(shade)), "image") for shade in range(3)]
    for shade in (0, 1, 0, 2, 0, 1):
        await pictures.prepared([refs[shade]])
    assert len(family.prepared) == 4 and family.prepared[1] == family.prepared[3]


async def test_no_more_pictures_are_prepared_than_the_context_has_room_for(family: CountingFamily) -> None:
    loader = Loader(Fetcher((), 1 << 20), lambda id, owner: None, 1 << 20)
    pictures = Pictures(family, loader, lambda: 3 * PLACES)
    refs = [PictureRef(data_url(png(shade)), f"messages[{shade}]") for shade in range(40)]
    assert len(await pictures.prepared(refs[:3])) == 3
    with pytest.raises(ContextOverflow, match="of 40 pictures") as refused:
        await pictures.prepared(refs)
    assert refused.value.param == "messages[0]" and len(family.prepared) < 3 + 12


async def test_pictures_of_results_reach_the_model(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    chat = [
        user("Look."),
        {"role": "assistant", "tool_calls": [CALL]},
        {**user("Here:", shown()), "role": "tool", "tool_call_id": "c"},
    ]
    await ok(http, CHAT, {"messages": chat})
    output = [{"type": "input_text", "text": "Here:"}, {"type": "input_image", "image_url": RED_URL}]
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    items = [{"role": "user", "content": "Look."}, call, {"type": "function_call_output", "call_id": "c", "output": output}]
    await ok(http, RESPONSES, {"input": items})
    result = {"type": "tool_result", "tool_use_id": "c", "content": [said("Here:"), base64()]}
    turns = [
        user("Look."),
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "look", "input": {}}]},
        {"role": "user", "content": [result]},
    ]
    await ok(http, MESSAGES, {"model": "tiny", "max_tokens": 9, "messages": turns})
    prompts = {prompt_of(request) for request in engine.requests}
    assert len(prompts) == 1 and f"<tool_response>\nHere:\n{'.' * PLACES}\n</tool_response><|im_end|>" in prompts.pop()
    result["is_error"] = True
    await ok(http, MESSAGES, {"model": "tiny", "max_tokens": 9, "messages": turns})
    assert "<tool_response>\nError: Here:\n." in prompt_of(engine.requests[-1])
    result["content"] = [base64()]
    await ok(http, MESSAGES, {"model": "tiny", "max_tokens": 9, "messages": turns})
    assert "<tool_response>\nError\n." in prompt_of(engine.requests[-1])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [user("x"), user("x", shown(BAD_URL))]}, "messages[1].content[1].image_url.url"),
        (CHAT, {"messages": [user({"type": "image_url", "image_url": BAD_URL})]}, "messages[0].content[0].image_url"),
        (CHAT, {"messages": [user({"type": "input_image", "image_url": BAD_URL})]}, "messages[0].content[0].image_url"),
        (CHAT, {"messages": [user({"type": "input_image", "file_id": "file-0"})]}, "messages[0].content[0].file_id"),
        (CHAT, {"messages": [user({"type": "image_url", "file_id": "file-0"})]}, "messages[0].content[0].file_id"),
        (CHAT, {"messages": [user({"type": "image_url"})]}, "messages[0].content[0].image_url"),
        (CHAT, {"messages": [user({"type": "image_url", "image_url": {}})]}, "messages[0].content[0].image_url.url"),
        (CHAT, {"messages": [user({"type": "image_url", "image_url": 7})]}, "messages[0].content[0].image_url"),
        (CHAT, {"messages": [user(shown(detail="most"))]}, "messages[0].content[0].image_url.detail"),
        (CHAT, {"messages": [user({"type": "video_url", "video_url": {"url": "x"}})]}, "messages[0].content[0].type"),
        (CHAT, {"messages": [{**user(shown()), "role": "system"}, user("x")]}, "messages[0].content[0].type"),
        (CHAT, {"messages": [user("x"), {**user("a", shown()), "role": "assistant"}]}, "messages[1].content[1].type"),
        (CHAT, {"messages": [user(shown())], "prompt_logprobs": 1}, "prompt_logprobs"),
        (CHAT, {"messages": [user(shown())], "prediction": {"content": [shown()]}}, "prediction.content[0].type"),
        (
            RESPONSES,
            {"input": [{"role": "user", "content": [said("a"), {"type": "input_image", "image_url": BAD_URL}]}]},
            "input[0].content[1].image_url",
        ),
        (
            RESPONSES,
            {"instructions": "x", "input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file-0"}]}]},
            "input[0].content[0].file_id",
        ),
        (
            RESPONSES,
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": RED_URL, "file_id": "file-0"}]}]},
            "input[0].content[0].file_id",
        ),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].image_url"),
        (
            RESPONSES,
            {"input": [{"role": "system", "content": [{"type": "input_image", "image_url": RED_URL}]}]},
            "input[0].content[0].type",
        ),
        (
            RESPONSES,
            {
                "input": [
                    {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": BAD_URL}]},
                ]
            },
            "input[1].output[0].image_url",
        ),
        (GENERATE, {"text": "x", "image_data": ["file-0"]}, "image_data[0]"),
        (GENERATE, {"text": "x", "image_data": BAD_URL}, "image_data"),
        (GENERATE, {"text": ["x", "y"], "image_data": [None, [RED_URL, BAD_URL]]}, "image_data[1][1]"),
        (GENERATE, {"text": ["x", "y"], "image_data": [RED_URL]}, "image_data"),
        (GENERATE, {"input_ids": [1], "image_data": RED_URL}, "image_data"),
        (GENERATE, {"text": "a <p> b", "image_data": RED_URL, "image_marker": "<q>"}, "image_marker"),
        (GENERATE, {"text": ["<p>", "b"], "image_data": RED_URL, "image_marker": "<p>"}, "image_marker"),
        (GENERATE, {"text": "a <p> <p> b", "image_data": RED_URL, "image_marker": "<p>"}, "text"),
        (GENERATE, {"text": "a <p> b", "image_marker": "<p>"}, "image_marker"),
        (GENERATE, {"text": "b", "image_data": RED_URL, "image_marker": ""}, "image_marker"),
        (GENERATE, {"text": "x", "image_data": RED_URL, "return_logprob": True, "logprob_start_len": 0}, "logprob_start_len"),
        ("/tokenize", {"messages": [user(shown(BAD_URL))]}, "messages[0].content[0].image_url.url"),
    ],
)  # fmt: skip
async def test_what_is_wrong_with_a_picture_names_its_field(
    http: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, Any], param: str
) -> None:
    found, message = await refused(http, path, body)
    assert found == param and param.split(".")[0] in message
    assert engine.requests == []


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([user("a"), user("b", base64(BAD_URL))], "messages[1].content[1].source"),
        ([user({"type": "image", "source": {"type": "file", "file_id": "file-0"}})], "messages[0].content[0].source"),
        ([user({"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}})], "messages[0].content[0].source"),
        ([user({**base64(), "transformations": {"a": 1}})], "messages[0].content[0].transformations"),
        ([{"role": "assistant", "content": [base64()]}], "messages[0].content[0].type is image; a message of role assistant"),
        (
            [
                user("x"),
                {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
                user({"type": "tool_result", "tool_use_id": "c", "content": [said("a"), base64(BAD_URL)]}),
            ],
            "messages[2].content[0].content[1].source",
        ),
    ],
)
async def test_what_is_wrong_with_a_block_names_the_block(
    http: httpx.AsyncClient, messages: list[dict[str, Any]], where: str
) -> None:
    _, message = await refused(http, MESSAGES, {"model": "tiny", "max_tokens": 9, "messages": messages})
    assert message.startswith(where)


@pytest.mark.parametrize(("path", "body"), [*DIALECTS, ("/tokenize", {"messages": [user(shown(BAD_URL))]})])
async def test_a_model_that_takes_no_pictures_says_so_and_looks_at_none(
    engine: ScriptedEngine, path: str, body: dict[str, Any]
) -> None:
    app = create_app(engine, byte_text_model(), ServerConfig(), model_name="tiny")
    async with client_of(app) as http:
        _, message = await refused(http, path, body)
        assert "this model takes no pictures; those of type" in message and "qwen2_vl" in message
        info = (await http.get("/get_model_info")).json()
        assert info["has_image_understanding"] is False and info["image_limits"] is None


async def test_who_asks_is_told_what_the_model_takes(http: httpx.AsyncClient) -> None:
    info = (await http.get("/get_model_info")).json()
    assert info["has_image_understanding"] is True and info["image_limits"]["max_images"] == MAX_PICTURES
    (card,) = (await http.get("/v1/models")).json()["data"]
    assert card["input_modalities"] == ["text", "image"]


async def test_more_pictures_than_are_allowed_are_refused_before_any_is_looked_at(
    http: httpx.AsyncClient, family: CountingFamily
) -> None:
    param, message = await refused(http, CHAT, {"messages": [user(*[shown()] * 1000)]})
    assert param == f"messages[0].content[{MAX_PICTURES}].image_url.url"
    assert f"1000 pictures; a request may have at most {MAX_PICTURES}" in message and family.prepared == []


async def test_pictures_that_do_not_fit_are_refused_with_the_numbers(http: httpx.AsyncClient) -> None:
    count = CONTEXT_LEN // PLACES
    param, message = await refused(http, CHAT, {"messages": [user(*[shown()] * count)]})
    assert param == "messages"
    assert f"({CONTEXT_LEN} of them for pictures: {count}), but the context holds {CONTEXT_LEN}" in message
    for path, more in ((CHAT, {}), (f"{MESSAGES}/count_tokens", {"model": "tiny"})):
        body = {"messages": [user(*[base64() if more else shown()] * (count + 1))], **more}
        message = (await refused(http, path, body))[1]
        assert f"{count + 1} pictures, which take {CONTEXT_LEN + PLACES} tokens, but the context holds {CONTEXT_LEN}" in message


async def test_tokens_of_pictures_are_counted(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    usage = (await ok(http, CHAT, {"messages": [user(shown(), shown(BLUE_URL))]}))["usage"]
    assert usage["prompt_tokens"] == len(engine.requests[0].token_ids)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": 2 * PLACES}
    usage = (await ok(http, RESPONSES, DIALECTS[3][1]))["usage"]
    assert usage["input_tokens_details"]["image_tokens"] == PLACES
    meta = (await ok(http, GENERATE, DIALECTS[-1][1]))["meta_info"]
    assert meta["image_tokens"] == PLACES
    usage = (await ok(http, CHAT, {"messages": [user("x")]}))["usage"]
    assert "image_tokens" not in usage["prompt_tokens_details"]
    counted = await ok(http, f"{MESSAGES}/count_tokens", {"model": "tiny", "messages": [user(base64(), "What?")]})
    assert counted["input_tokens"] == len(ASKED.encode()) - 2 * len("<|im_start|>") - len("<|im_end|>") + 3
    counted = await ok(http, f"{RESPONSES}/input_tokens", DIALECTS[3][1])
    assert counted["input_tokens"] == len(ASKED.encode()) - 2 * len("<|im_start|>") - len("<|im_end|>") + 3
    assert "streamserve_images_total 4.0" in (await http.get("/metrics")).text


async def test_tokens_of_a_chat_can_be_looked_at_but_places_have_no_text(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = {"messages": [user(shown(), "What?")]}
    await ok(http, CHAT, body)
    found = await ok(http, "/tokenize", body)
    assert tuple(found["tokens"]) == engine.requests[0].token_ids and found["count"] == len(found["tokens"])
    for path, name in (("/detokenize", "tokens"), (GENERATE, "input_ids"), ("/v1/completions", "prompt")):
        param, message = await refused(http, path, {name: found["tokens"]})
        place = next(place for place, id in enumerate(found["tokens"]) if id >= MEDIA_BASE)
        assert param == f"{name}[{place}]" and "stands for a place of a picture" in message


async def test_detail_is_taken_and_said_to_have_no_effect(http: httpx.AsyncClient) -> None:
    for detail, is_warned in (("auto", False), ("low", True), ("high", True)):
        answer = await http.post(CHAT, json={"messages": [user(shown(detail=detail), shown(detail=detail))]})
        warning = answer.headers.get("x-streamserve-warning", "")
        assert warning.count("detail of pictures has no effect") == is_warned
    answer = await http.post(CHAT, json={"messages": [user(shown(fps=2))]})
    assert "messages[0].content[0].image_url.fps has no effect" in answer.headers["x-streamserve-warning"]


async def test_files_are_meant_by_their_ids_by_their_owner(engine: ScriptedEngine, family: CountingFamily) -> None:
    app = create_app(engine, byte_text_model(), ServerConfig(api_key=("one", "two")), model_name="tiny", family=family)
    async with client_of(app, headers={"authorization": "Bearer one"}) as http:
        file = await http.post("/v1/files", files={"file": ("a.png", RED, "image/png")}, data={"purpose": "vision"})
        id = file.json()["id"]
        bodies: list[tuple[str, dict[str, Any]]] = [
            (CHAT, {"messages": [user(shown(id), "What?")]}),
            (CHAT, {"messages": [user({"type": "input_image", "file_id": id}, "What?")]}),
            (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": id}, said("What?")]}]}),
            (
                MESSAGES,
                {
                    "model": "tiny",
                    "max_tokens": 9,
                    "messages": [user({"type": "image", "source": {"type": "file", "file_id": id}}, "What?")],
                },
            ),
            (GENERATE, {"text": "What?", "image_data": [id]}),
        ]
        for path, body in bodies:
            await ok(http, path, body)
        assert {request.media[0].key for request in engine.requests} == {engine.requests[0].media[0].key}
        http.headers["authorization"] = "Bearer two"
        for path, body in bodies:
            assert "there is no such file" in (await refused(http, path, body))[1]


async def test_a_response_is_continued_with_the_pictures_that_it_was_shown(
    http: httpx.AsyncClient, engine: ScriptedEngine, family: CountingFamily
) -> None:
    first = await ok(http, RESPONSES, DIALECTS[3][1])
    await ok(http, RESPONSES, {"input": "And?", "previous_response_id": first["id"]})
    before, after = engine.requests
    assert after.media[0].key == before.media[0].key and len(family.prepared) == 1
    assert after.token_ids[: len(before.token_ids)] == before.token_ids
    (item,) = (await http.get(f"{RESPONSES}/{first['id']}/input_items")).json()["data"]
    assert item["content"][0] == {"type": "input_image", "image_url": RED_URL, "detail": "auto"}
    again = [{"type": "item_reference", "id": item["id"]}]
    await ok(http, RESPONSES, {"input": again})
    assert engine.requests[-1].token_ids == before.token_ids


async def test_turns_that_do_not_fit_take_their_pictures_along(
    http: httpx.AsyncClient, engine: ScriptedEngine, family: CountingFamily
) -> None:
    def turn(url: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "input_image", "image_url": url}, said("x" * 200)]}

    urls = [data_url(png(shade)) for shade in range(5)]
    await ok(http, RESPONSES, {"input": [turn(url) for url in urls], "truncation": "auto", "max_output_tokens": 9})
    assert len(engine.requests[0].media) == 2 and len(family.prepared) == 5
    last = engine.requests[0].media[-1]
    await ok(http, RESPONSES, {"input": [turn(urls[-1])], "max_output_tokens": 9})
    assert engine.requests[1].media[0].key == last.key


async def test_plain_prompts_have_pictures_of_their_own(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = {"text": ["a", "b", "c"], "image_data": [RED_URL, None, [RED_URL, BLUE_URL]]}
    answers = (await http.post(GENERATE, json=body)).json()
    assert len(answers) == 3
    dots = "." * PLACES
    assert [prompt_of(request) for request in engine.requests] == [f"{dots}\na", "b", f"{dots}{dots}\nc"]
    await ok(http, GENERATE, {"text": "a", "image_data": [[RED_URL], BLUE_URL]})
    assert prompt_of(engine.requests[-1]) == f"{dots}{dots}\na"
    await http.post(GENERATE, json={"text": ["a", "b"], "image_data": RED_URL})
    assert [len(request.media) for request in engine.requests[-2:]] == [1, 1]
    await ok(http, GENERATE, {"text": "a<p>b", "image_data": RED_URL, "image_marker": "<p>"})
    assert prompt_of(engine.requests[-1]) == f"a{dots}b"


async def test_a_template_with_markers_shows_pictures_where_it_wants_them(engine: ScriptedEngine) -> None:
    """As of a vision model: a marker in the template, an image token in the vocabulary."""
    token = "<|endoftext|>"
    source = (
        "{% for m in messages %}[{% for p in m.content %}{% if p.type == 'image' %}(<image>){% else %}{{ p.text }}{% endif %}"
        "{% endfor %}]{% endfor %}"
    )
    text = replace(byte_text_model(), template=ChatTemplate(source))
    family = CountingFamily(num_places=3, marker="<image>", token=token)
    app = create_app(engine, text, ServerConfig(), model_name="tiny", family=family)
    async with client_of(app) as http:
        await ok(http, CHAT, {"messages": [user(f"a <image>{token}", shown(), "b")]})
        assert prompt_of(engine.requests[-1]) == f"[a <image>{token}(...)b]"
        assert 256 not in engine.requests[-1].token_ids
        await ok(http, GENERATE, {"text": "a <image> b", "image_data": RED_URL})
        assert prompt_of(engine.requests[-1]) == "a ... b"
        param, message = await refused(http, GENERATE, {"text": "a <image> b", "image_data": [RED_URL, BLUE_URL]})
        assert param == "text" and "1 of 2 pictures" in message


class RowsFamily(CountingFamily):
    """Two rows of places with a text between them, as Pixtral's; positions of three numbers, as Qwen's."""

    def prepare(self, picture: Picture) -> Prepared:
        made = super().prepare(picture)
        text = f"<{self.token}>|{(self.token or '') * 2}"
        return replace(made, layout=Layout(text, (Run(1, (1, 1, 1)), Run(2, (1, 1, 2)))))


async def test_runs_of_a_picture_are_spans_with_their_grids(engine: ScriptedEngine) -> None:
    family = RowsFamily(marker="<image>", token="<|endoftext|>")
    app = create_app(engine, byte_text_model(), ServerConfig(), model_name="tiny", family=family)
    async with client_of(app) as http:
        await ok(http, CHAT, {"messages": [user("a", shown(), shown())]})
    (request,) = engine.requests
    assert prompt_of(request).startswith("<|im_start|>user\na\n<.>|..\n<.>|..<|im_end|>")
    assert [[(span.num_tokens, span.grid) for span in media.spans] for media in request.media] == [
        [(1, (1, 1, 1)), (2, (1, 1, 2))]
    ] * 2


async def test_base64_of_a_block_may_be_long(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    large = b64encode(png(width=3000, height=1000)).decode()
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": large}}
    await ok(http, MESSAGES, {"model": "tiny", "max_tokens": 9, "messages": [user(block)]})
    assert len(engine.requests[0].media) == 1
