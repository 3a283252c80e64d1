"""InternVL against transformers: tiles, prompts, embeddings, answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers

from streamserve.errors import CheckpointError
from streamserve.media.families import find
from streamserve.media.family import Family
from tests.models.vision.parity import asked, check_parity, drawn, greedy, loaded, randomised, same_embeddings, texts_of
from tests.models.vision.words import normalised, token_ids, tokenizer

IMAGE = 256
SPECIALS = ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"]
NAMED = dict(zip(("context_image_token", "start_image_token", "end_image_token", "video_token"), SPECIALS, strict=True))
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 1024,
}
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": [4, 4]}
# Language model, tower, size of a tile. In the second, tiles are smaller than what the tower's positions were made for.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "internvl3": ({"model_type": "qwen2"}, {"image_size": [16, 16], "attention_bias": True}, 16),
    "large_tower": (
        {"model_type": "qwen3", "head_dim": 16},
        {"image_size": [24, 24], "use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False},
        16,
    ),
    "llama": ({"model_type": "llama"}, {"image_size": 16, "use_absolute_position_embeddings": False}, 16),
}
SIZES = [(16, 16), (50, 33), (37, 90), (9, 64)]
PIXELS = [*(drawn(*size) for size in SIZES), drawn(50, 33, seed=1)]


@dataclass(frozen=True)
class Tiny:
    """A saved model, and transformers' processor for it."""

    folder: Path
    model: Any
    processor: Any
    family: Family

    def processed(self, text: str, index: Sequence[int]) -> dict[str, Any]:
        """What transformers makes of a text and pictures."""
        images = [PIXELS[at].pixels for at in index]
        made = self.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
        return {name: made[name] for name in ("input_ids", "pixel_values")}


@pytest.fixture(scope="module", params=VARIANTS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return save(request.param, tmp_path_factory.mktemp(request.param))


def save(variant: str, folder: Path) -> Tiny:
    """A random model, tokenizer and settings for pictures."""
    text, tower, tile = VARIANTS[variant]
    config = transformers.InternVLConfig(
        text_config={**TEXT, **text}, vision_config={**TOWER, **tower}, image_token_id=IMAGE, tie_word_embeddings=False
    )
    auto: Any = transformers.AutoModelForImageTextToText
    model = randomised(auto.from_config(config, attn_implementation="eager"), seed=5)
    model.save_pretrained(folder)
    made: Any = transformers.GotOcr2ImageProcessorPil
    images, words = made(size={"height": tile, "width": tile}, max_patches=6), tokenizer(SPECIALS, NAMED)
    images.save_pretrained(folder)
    words.save_pretrained(folder)
    kind: Any = transformers.InternVLProcessor
    with patch.object(kind, "check_argument_for_proper_class"):  # it looks for a video processor, which needs torchvision
        processor = kind(images, words, image_seq_length=(tile // 8) ** 2)
    return Tiny(folder, model, processor, find("internvl")(folder, config.to_dict()))


def test_tiles_and_prompts_are_those_of_transformers(tiny: Tiny) -> None:
    for index in ([0], [1], [2, 3], [3, 0, 1]):
        text = "Look:" + "".join(f"<IMG_CONTEXT> {at}\n" for at in index)
        theirs = tiny.processed(text, index)
        chosen = [tiny.family.prepare(PIXELS[at]) for at in index]
        assert token_ids(tiny.processor.tokenizer, text, tiny.family, chosen) == theirs["input_ids"][0].tolist()
        tiles = np.concatenate([normalised(one) for one in chosen])
        np.testing.assert_allclose(tiles, theirs["pixel_values"].numpy(), atol=1e-5)


def test_embeddings_are_those_of_transformers(tiny: Tiny) -> None:
    prepared = [tiny.family.prepare(picture) for picture in PIXELS]
    ours = loaded(tiny.folder).encode([one.inputs for one in prepared])
    pixels = tiny.processed("<IMG_CONTEXT>" * len(PIXELS), range(len(PIXELS)))["pixel_values"]
    with torch.inference_mode():
        every = tiny.model.get_image_features(pixels).pooler_output.flatten(0, 1)
    same_embeddings(ours, every.split([one.layout.num_tokens for one in prepared]))


def test_answers_are_those_of_transformers(tiny: Tiny) -> None:
    prompts = []
    for text, index in (
        ("See <IMG_CONTEXT>", [1]),
        ("See <IMG_CONTEXT>", [4]),
        ("See <IMG_CONTEXT> it", [2]),
        ("<IMG_CONTEXT><IMG_CONTEXT>", [0, 3]),
        ("a<IMG_CONTEXT>b<IMG_CONTEXT>", [3, 2]),
    ):
        inputs = tiny.processed(text, index)
        ids = inputs.pop("input_ids")[0].tolist()
        chosen = [tiny.family.prepare(PIXELS[at]) for at in index]
        prompts.append(asked(ids, IMAGE, chosen, greedy(tiny.model, ids, **inputs)))
    check_parity(tiny.folder, prompts, texts_of(tiny.model, IMAGE))


@pytest.mark.parametrize(("least", "most"), [(1, 12), (1, 1), (4, 6)])
def test_grids_are_those_of_transformers(least: int, most: int, tmp_path: Path) -> None:
    settings = {"size": {"height": 28, "width": 28}, "min_patches": least, "max_patches": most}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    family = find("internvl")(tmp_path, {"vision_config": {"patch_size": 14}})
    images: Any = transformers.GotOcr2ImageProcessorPil
    theirs = images(**settings, crop_to_patches=True)
    for height, width in ((20, 20), (40, 40), (57, 55), (300, 200), (20, 300), (84, 56), (500, 30), (1000, 1000)):
        prepared = family.prepare(drawn(height, width))
        assert len(prepared.inputs["pixels"]) == theirs.get_number_of_image_patches(height, width)
        assert prepared.layout.num_tokens == len(prepared.inputs["pixels"])


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 448, "width": 224}}))
    with pytest.raises(CheckpointError, match="tiles must be square"):
        find("internvl")(tmp_path, {})
