"""Reports about pictures that other servers had, asked of a small vision model over HTTP; those without a picture are in
test_bug_reports.py, those about addresses in test_hostile_media.py."""

from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
from openai import AsyncOpenAI

from tests.api.pictures import said, shown
from tests.media.pictures import exif, file_of, image, scene
from tests.models.vision.test_served import save, served

pytestmark = pytest.mark.anyio


async def asked(client: AsyncOpenAI, file: bytes, kind: str = "image/png") -> tuple[str, int]:
    """A greedy answer about a picture, and the prompt's tokens."""
    url = f"data:{kind};base64,{b64encode(file).decode()}"
    answer = await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [shown(url), said("What is this?")]}],  # type: ignore[list-item]
        temperature=0,
        max_tokens=12,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert answer.usage is not None and answer.choices[0].model_extra is not None
    return str(answer.choices[0].model_extra["token_ids"]), answer.usage.prompt_tokens


async def test_a_turned_picture_is_seen_upright(tmp_path: Path) -> None:
    """sgl-project/sglang#33464, ollama/ollama#18418, ggml-org/llama.cpp#20870: a phone's picture reached the model sideways"""
    save("mistral3", tmp_path)
    upright = scene(320, 640)
    async with served(tmp_path) as client:
        plain = await asked(client, file_of(image(upright)))
        stored = image(np.rot90(upright))
        assert await asked(client, file_of(stored, exif=b"Exif\0\0" + exif(6))) == plain
        assert (await asked(client, file_of(stored)))[1] != plain[1]
        for turn in range(9):  # 0 says nothing
            text, num_tokens = await asked(client, file_of(image(upright), "JPEG", exif=b"Exif\0\0" + exif(turn)), "image/jpeg")
            assert text and (num_tokens == plain[1]) == (turn < 5)
        assert (await asked(client, file_of(image(upright), "JPEG", exif=b"Exif\0\0II*\0\xff\xff"), "image/jpeg"))[1] == plain[1]
