"""The whole way: a sound file in a chat over HTTP, through template, tokenizer, preparation and engine, to transformers' answer;
and what is no sound, or none that this model hears."""

import json
from base64 import b64encode
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import openai
import pytest
import transformers
from transformers.models.whisper import feature_extraction_whisper

from streamserve.media.families.qwen2_audio import BEGIN, END, TOKEN
from streamserve.media.sound import decode_sound
from tests.media.test_sound import RATE, encoded, pcm16, tone, wav
from tests.models.vision.parity import ANSWER_LEN, greedy, randomised
from tests.models.vision.test_qwen2_audio import ENCODER, MELS, SECONDS
from tests.models.vision.test_served import TEXT, served
from tests.text.toys import byte_level_folder

IMAGE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
GREEDY: dict[str, Any] = {
    "model": "tiny",
    "temperature": 0,
    "max_tokens": ANSWER_LEN,
    "extra_body": {"ignore_eos": True, "return_token_ids": True},
}


def save(folder: Path) -> tuple[Any, Any]:
    """A random model with tokenizer, template and settings for sounds. Returns model and processor."""
    byte_level_folder(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncation": None}))
    tokenizer: Any = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN, BEGIN, END]})
    extractor: Any = transformers.WhisperFeatureExtractor(feature_size=MELS, chunk_length=SECONDS)
    processor: Any = transformers.Qwen2AudioProcessor(extractor, tokenizer)
    tokenizer.chat_template = processor.chat_template
    for part in (tokenizer, extractor):
        part.save_pretrained(folder)
    token = tokenizer.convert_tokens_to_ids(TOKEN)
    config: Any = transformers.Qwen2AudioConfig(
        audio_config=ENCODER, text_config={"model_type": "qwen2", **TEXT}, audio_token_index=token
    )
    kind: Any = transformers.Qwen2AudioForConditionalGeneration
    model = randomised(kind._from_config(config, attn_implementation="eager"))
    model.save_pretrained(folder)
    return model, processor


def expected(model: Any, processor: Any, chat: list[Any], files: list[bytes]) -> tuple[list[int], list[int]]:
    """The prompt and the answer, by transformers' processor and generate()."""
    prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    samples = [decode_sound(file, "", rate=RATE, max_seconds=SECONDS).samples for file in files]
    with patch.object(feature_extraction_whisper, "is_torch_available", lambda: False):
        found = processor(text=prompt, audio=samples, sampling_rate=RATE, return_tensors="pt")
    ids = found["input_ids"][0].tolist()
    return ids, greedy(model, ids, **{key: found[key] for key in ("input_features", "feature_attention_mask")})


def input_audio(file: bytes, format: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": b64encode(file).decode(), "format": format}}


def audio_url(url: str) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": {"url": url}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.mark.anyio
async def test_a_chat_about_sounds_is_answered_as_transformers_does(tmp_path: Path) -> None:
    model, processor = save(tmp_path)
    noise = np.random.default_rng(3).normal(size=(30_000, 2)) * 0.1
    one = wav(pcm16(tone(440, 0.7)))
    other = wav(pcm16(noise.astype(np.float32)), channels=2, rate=44_100)
    third = encoded("mp3", "libmp3lame", seconds=0.5)
    token, known = processor.audio_token_id, 0
    async with served(tmp_path) as client:
        upload = await client.files.create(file=("noise.wav", other), purpose="user_data")
        turns: list[list[Any]] = [
            [input_audio(one), said("What is this?")],
            [audio_url(upload.id), audio_url("data:audio/mpeg;base64," + b64encode(third).decode()), said("And these?")],
        ]
        chat: list[Any] = []
        plain: list[Any] = []  # the same for transformers, whose sounds come by themselves
        for turn, files in zip(turns, ([one], [one, other, third]), strict=True):
            chat.append({"role": "user", "content": turn})
            plain.append({"role": "user", "content": [part if part["type"] == "text" else {"type": "audio"} for part in turn]})
            prompt, answer = expected(model, processor, plain, files)
            got = await client.chat.completions.create(messages=chat, **GREEDY)
            assert got.choices[0].model_extra is not None and got.choices[0].model_extra["token_ids"] == answer
            assert got.usage is not None and got.usage.prompt_tokens == len(prompt)
            details = got.usage.prompt_tokens_details
            assert details is not None and details.audio_tokens == prompt.count(token) > 10
            assert (details.cached_tokens or 0) >= known
            known = len(prompt) - 1 - prompt[::-1].index(token)  # up to the last sound's end
            chat.append({"role": "assistant", "content": "a"})
            plain.append({"role": "assistant", "content": [said("a")]})
        await refuse_what_is_no_sound_here(client, one)
        card = (await client.models.retrieve("tiny")).model_extra
        assert card is not None and card["input_modalities"] == ["text", "audio"]


async def refuse_what_is_no_sound_here(client: openai.AsyncOpenAI, file: bytes) -> None:
    """400s, each of which names its field; and the server goes on."""
    ten_hours = wav(bytes(100), size=36_000 * 2 * RATE)
    data = "input_audio.data"
    for part, field, says in (
        (input_audio(file[:-100]), data, "cut off"),
        (input_audio(ten_hours), data, "36000.0 s; this model hears at most 2 s"),
        (input_audio(b"not a sound"), data, "no sound file that is known here"),
        (input_audio(b""), data, "is empty"),
        (input_audio(wav(bytes(600))), data, "this model hears none under 0.020 s"),
        (input_audio(file, "midi"), "input_audio.format", "allowed is wav, mp3"),
        ({"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}}, data, "is"),
        ({"type": "input_audio"}, "input_audio", "missing"),
        ({"type": "audio_url"}, "audio_url", "missing"),
        ({**input_audio(file), "text": "?"}, "text", "has none"),
        (audio_url("file-none"), "audio_url.url", "no such file"),
        (audio_url("data:text/plain,hello"), "audio_url.url", "audio/"),
        (audio_url("http://127.0.0.1:9/x.wav"), "audio_url.url", "not on the public network"),
        ({"type": "image_url", "image_url": {"url": IMAGE}}, "type", "this model takes no pictures"),
        ({"type": "video_url", "video_url": {"url": "data:,"}}, "type", "this model takes no pictures"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(messages=[{"role": "user", "content": [part, said("?")]}], **GREEDY)  # type: ignore[list-item]
        assert refused.value.param == f"messages[0].content[0].{field}", refused.value
        assert says in refused.value.message
    with pytest.raises(openai.BadRequestError, match="only messages of users"):
        await client.chat.completions.create(messages=[{"role": "system", "content": [input_audio(file)]}], **GREEDY)  # type: ignore[list-item]
    again = await client.chat.completions.create(messages=[{"role": "user", "content": "a"}], **GREEDY)
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert not again.usage.prompt_tokens_details.audio_tokens
