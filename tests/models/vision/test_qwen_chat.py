"""Qwen's vision models behind the chat route: pictures and videos in a conversation, as their templates show them."""

import json
from base64 import b64encode
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError
from PIL import Image

from streamserve.media.families import find
from streamserve.messages import MEDIA_BASE, GenerateRequest
from streamserve.text.model import load_text_model
from tests.e2e.serving import fake_server
from tests.media.test_video import filmed
from tests.models.vision import tiny_qwen
from tests.models.vision.parity import drawn
from tests.models.vision.words import tokenizer

pytestmark = pytest.mark.anyio
SPECIALS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]  # as many as the fake engine has beside bytes
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Asked:
    """A server on an engine that makes up tokens, with the text and pictures of a family; and what reached the engine."""

    def __init__(self, client: AsyncOpenAI, words: Any) -> None:
        self.client = client
        self.words = words
        self.requests: list[GenerateRequest] = []

    async def prompt(self, *parts: dict[str, Any]) -> tuple[str, GenerateRequest]:
        """The prompt as a text in which each place of a picture is a dot; and the request."""
        messages: Any = [{"role": "user", "content": list(parts)}]
        await self.client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
        request = self.requests[-1]
        pieces = ["." if id >= MEDIA_BASE else self.words.decode([id]) for id in request.token_ids]
        return "".join(pieces), request


@pytest.fixture(params=tiny_qwen.FAMILIES)
async def asked(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Asked]:
    words = tokenizer(SPECIALS)
    words.chat_template = TEMPLATE
    words.save_pretrained(tmp_path)
    tiny_qwen.processor(request.param).save_pretrained(tmp_path)
    config = {
        "model_type": request.param,
        "text_config": tiny_qwen.TEXT,
        "vision_config": {**tiny_qwen.VISION_OF[request.param], "tokens_per_second": 2},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    family = find(request.param)(tmp_path, config)
    async with (
        fake_server(text=load_text_model(tmp_path), family=family, answer_len=2) as server,
        AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        found = Asked(client, words)
        submit = server.engine.submit

        async def watched(given: GenerateRequest) -> Any:
            found.requests.append(given)
            return await submit(given)

        monkeypatch.setattr(server.engine, "submit", watched)
        yield found


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def picture(height: int, width: int) -> dict[str, Any]:
    data = BytesIO()
    Image.fromarray(drawn(height, width).pixels).save(data, "PNG")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64encode(data.getvalue()).decode()}"}}


def video(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{b64encode(data).decode()}"}}


async def test_pictures_stand_where_the_template_shows_them(asked: Asked) -> None:
    text, request = await asked.prompt(picture(24, 40), said("What is <|image_pad|>?"), picture(16, 16), said("And this?"))
    shown = ["<|vision_start|>" + "." * count + "<|vision_end|>" for count in (15, 4)]
    assert text == (f"<|im_start|>user\n{shown[0]}What is <|image_pad|>?{shown[1]}And this?<|im_end|>\n<|im_start|>assistant\n")
    assert asked.words.convert_tokens_to_ids("<|image_pad|>") not in request.token_ids  # what a user writes stays letters
    assert [[span.grid for span in media.spans] for media in request.media] == [[(1, 3, 5)], [(1, 2, 2)]]


async def test_a_video_is_shown_as_a_picture_of_several_frames(asked: Asked, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("av")
    text, asked_for = await asked.prompt(video(filmed()), said("What happens?"))
    head, tail = "<|im_start|>user\n", "What happens?<|im_end|>\n<|im_start|>assistant\n"
    (media,) = asked_for.media
    if "qwen3_vl" in request.node.name:
        frame = "<|vision_start|>" + "." * 140 + "<|vision_end|>"
        assert text == f"{head}<0.3 seconds>{frame}<1.4 seconds>{frame}<2.6 seconds>{frame}{tail}"
        assert [span.grid for span in media.spans] == [(1, 10, 14)] * 3
    else:
        assert text == f"{head}<|vision_start|>{'.' * 420}<|vision_end|>{tail}"
        assert [(span.grid, span.frame_step) for span in media.spans] == [
            ((3, 10, 14), 2.0 if "qwen2_5_vl" in request.node.name else 1.0)
        ]


async def test_a_video_that_cannot_be_read_is_refused(asked: Asked) -> None:
    pytest.importorskip("av")
    for part, says in (
        (video(filmed()[:1000]), "broken or cut off"),
        ({"type": "video_url"}, "video_url is missing"),
        ({"type": "video_url", "video_url": {"url": "x"}, "file_id": "file-1"}, "has none"),
        ({"type": "image_url", "image_url": {"url": "x"}, "video_url": {"url": "x"}}, "has none"),
    ):
        with pytest.raises(BadRequestError, match=says) as refused:
            await asked.prompt(part)
        assert str(refused.value.param).startswith("messages[0].content[0].")
    assert asked.requests == []
