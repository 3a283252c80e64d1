"""The whole way: a PNG in a chat over HTTP, through template, tokenizer, preparation and engine, to transformers' answer."""

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import pytest
import transformers
from PIL import Image

from streamserve.api.app import create_app
from streamserve.build import build
from streamserve.config import CacheConfig, Config, DeviceConfig, ModelConfig, SchedulerConfig, ServerConfig
from tests.e2e.serving import listening
from tests.models.vision.parity import ANSWER_LEN, drawn, greedy, randomised
from tests.text.toys import byte_level_folder

IMAGE, BREAK, END = "<image>", "[IMG_BREAK]", "[IMG_END]"
# All pictures of a message before its texts, as LLaVA's template has it; then Mistral's order, as they come.
FIRST = (
    "{% for m in messages %}{{ m.role | upper }}: {% for p in m.content | selectattr('type', 'equalto', 'image') %}<image>\n"
    "{% endfor %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IN_ORDER = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}"
    "<image>{% endif %}{% endfor %}[/{{ m.role }}]{% endfor %}"
)
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 410,
    "max_position_embeddings": 1024,
    "eos_token_id": 0,
    "bos_token_id": 1,
}
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 7}
CLIP = {**TOWER, "model_type": "clip_vision_model", "image_size": 28}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]


@pytest.fixture(params=["llava_next", "mistral3"])
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def save(kind: str, folder: Path) -> tuple[Any, Any, Any]:
    """A random model with tokenizer, template and settings for pictures. Returns model, tokenizer and image processor."""
    byte_level_folder(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncation": None}))
    tokenizer: Any = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, BREAK, END]})
    tokenizer.chat_template = FIRST if kind == "llava_next" else IN_ORDER
    tokenizer.save_pretrained(folder)
    token = tokenizer.convert_tokens_to_ids(IMAGE)
    config: Any
    if kind == "llava_next":
        images: Any = transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS
        )
        config = transformers.LlavaNextConfig(
            vision_config=CLIP,
            text_config={"model_type": "llama", **TEXT},
            image_grid_pinpoints=PINPOINTS,
            image_token_index=token,
        )
    else:
        images = transformers.PixtralImageProcessorPil(size={"longest_edge": 70}, patch_size={"height": 14, "width": 14})
        tower = {**TOWER, "model_type": "pixtral", "image_size": 70}
        config = transformers.Mistral3Config(
            vision_config=tower, text_config={"model_type": "mistral", **TEXT}, image_token_index=token, tie_word_embeddings=False
        )
    images.save_pretrained(folder)
    auto: Any = transformers.AutoModelForImageTextToText
    model = randomised(auto.from_config(config, attn_implementation="eager"))
    model.save_pretrained(folder)
    return model, tokenizer, images


def expected(kind: str, model: Any, tokenizer: Any, images: Any, chat: Any, pixels: list[Any]) -> tuple[list[int], list[int]]:
    """The prompt and the answer, by transformers' processors and generate()."""
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if kind == "llava_next":
        cls: Any = transformers.LlavaNextProcessor
        processor = cls(images, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1)
        found = processor(images=pixels, text=prompt, add_special_tokens=False, return_tensors="pt")
        ids, inputs = found["input_ids"][0].tolist(), {key: found[key] for key in ("pixel_values", "image_sizes")}
    else:  # its processor cannot be imported without torchvision
        found = images(pixels, patch_size=14, return_tensors="pt")
        first, *rest = prompt.split(IMAGE)
        for (height, width), text in zip(found["image_sizes"].tolist(), rest, strict=True):
            rows = [IMAGE * (width // 14)] * (height // 14)
            first += BREAK.join(rows) + END + text
        ids = tokenizer(first, add_special_tokens=False)["input_ids"]
        inputs = {key: found[key] for key in ("pixel_values", "image_sizes")}
    return ids, greedy(model, ids, **inputs)


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    config = Config(
        model=ModelConfig(model_path=str(folder), dtype="float32"),
        cache=CacheConfig(max_total_tokens=4000),
        scheduler=SchedulerConfig(max_running_requests=8),
        device=DeviceConfig(device="cpu", threads=1),
    )
    built = build(config)
    app = create_app(built.engine, built.text, ServerConfig(), model_name="tiny", family=built.pictures)
    engine = asyncio.create_task(built.engine.run())
    async with listening(app) as port, openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        yield client
    engine.cancel()
    await asyncio.gather(engine, return_exceptions=True)
    built.close()


@pytest.mark.anyio
async def test_a_chat_about_pictures_is_answered_as_transformers_does(kind: str, tmp_path: Path) -> None:
    model, tokenizer, images = save(kind, tmp_path)
    one, other = drawn(61, 40).pixels, drawn(33, 90, seed=1).pixels
    turns: list[list[Any]] = [["What is ", one, "this?"], [other, "And this, beside ", one, "?"]]
    chat: list[Any] = []
    plain: list[Any] = []  # the same for transformers, whose pictures come by themselves
    shown: list[Any] = []
    known = 0
    async with served(tmp_path) as client:
        for turn in turns:
            chat.append({"role": "user", "content": [part_of(part) for part in turn]})
            plain.append(
                {"role": "user", "content": [said(part) if isinstance(part, str) else {"type": "image"} for part in turn]}
            )
            shown += [Image.fromarray(part) for part in turn if not isinstance(part, str)]
            prompt, answer = expected(kind, model, tokenizer, images, plain, shown)
            got = await client.chat.completions.create(
                model="tiny",
                messages=chat,
                temperature=0,
                max_tokens=ANSWER_LEN,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            assert got.choices[0].model_extra is not None and got.choices[0].model_extra["token_ids"] == answer
            assert got.usage is not None and got.usage.prompt_tokens == len(prompt)
            details = got.usage.prompt_tokens_details
            assert details is not None and (details.cached_tokens or 0) >= known
            known = len(prompt) - 1 - prompt[::-1].index(tokenizer.convert_tokens_to_ids(IMAGE))  # up to the last picture's end
            chat.append({"role": "assistant", "content": "a"})
            plain.append({"role": "assistant", "content": [said("a")]})


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def part_of(part: Any) -> dict[str, Any]:
    """A text, or a picture as a file in a URL."""
    if isinstance(part, str):
        return said(part)
    file = BytesIO()
    Image.fromarray(part).save(file, "PNG")
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + b64encode(file.getvalue()).decode()}}
