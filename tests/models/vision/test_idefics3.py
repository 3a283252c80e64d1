"""Idefics 3 and SmolVLM against transformers: tiles, prompts, embeddings, answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from streamserve.errors import CheckpointError
from streamserve.media.families import find
from streamserve.media.family import Family
from streamserve.models.vision import find as find_vision
from streamserve.models.vision.idefics3 import _buckets
from tests.models.vision.parity import asked, check_parity, drawn, greedy, loaded, randomised, same_embeddings, texts_of
from tests.models.vision.words import normalised, token_ids, tokenizer

IMAGE = 256
SPECIALS = ["<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>", "<end_of_utterance>"]
TEXT = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 262,
    "max_position_embeddings": 1024,
}
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 4}
# Family: size of the tower, size of a tile, what the longer side of a picture becomes. In the second, tiles are smaller than what
# the tower's positions were made for.
VARIANTS = {"idefics3": (24, 24, 48), "smolvlm": (28, 16, 32)}
SIZES = [(24, 24), (50, 33), (37, 90), (9, 64)]
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
        images = [[PIXELS[at].pixels for at in index]]
        made = self.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
        return {name: made[name] for name in ("input_ids", "pixel_values", "pixel_attention_mask")}


@pytest.fixture(scope="module", params=VARIANTS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return save(request.param, tmp_path_factory.mktemp(request.param))


def save(variant: str, folder: Path) -> Tiny:
    """A random model, tokenizer and settings for pictures."""
    image_size, tile, longest = VARIANTS[variant]
    config = transformers.AutoConfig.for_model(
        variant,
        text_config=TEXT,
        vision_config={**TOWER, "image_size": image_size},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    auto: Any = transformers.AutoModelForImageTextToText
    model = randomised(auto.from_config(config, attn_implementation="eager"), seed=5)
    model.save_pretrained(folder)
    kind: Any = {"idefics3": transformers.Idefics3ImageProcessorPil, "smolvlm": transformers.SmolVLMImageProcessorPil}
    images = kind[variant](max_image_size={"longest_edge": tile}, size={"longest_edge": longest})
    made: Any = transformers.Idefics3Processor
    processor = made(images, tokenizer(SPECIALS), image_seq_len=(tile // 4 // 2) ** 2)
    processor.save_pretrained(folder)
    return Tiny(folder, model, processor, find(variant)(folder, config.to_dict()))


def test_tiles_and_prompts_are_those_of_transformers(tiny: Tiny) -> None:
    prepared = [tiny.family.prepare(picture) for picture in PIXELS]
    for index in ([0], [1], [2, 3], [3, 0, 1]):
        text = "Look:" + "".join(f"<image> {at}\n" for at in index)
        theirs = tiny.processed(text, index)
        chosen = [prepared[at] for at in index]
        assert token_ids(tiny.processor.tokenizer, text, tiny.family, chosen) == theirs["input_ids"][0].tolist()
        tiles = np.concatenate([normalised(one) for one in chosen])
        np.testing.assert_allclose(tiles, theirs["pixel_values"][0].numpy(), atol=1e-5)
        assert bool(theirs["pixel_attention_mask"].all())


def test_embeddings_are_those_of_transformers(tiny: Tiny) -> None:
    prepared = [tiny.family.prepare(picture) for picture in PIXELS]
    ours = loaded(tiny.folder).encode([one.inputs for one in prepared])
    theirs = tiny.processed("<image>" * len(PIXELS), range(len(PIXELS)))
    del theirs["input_ids"]
    with torch.inference_mode():
        (every,) = tiny.model.get_image_features(**theirs).pooler_output
    same_embeddings(ours, every.split([one.layout.num_tokens for one in prepared]))


def test_answers_are_those_of_transformers(tiny: Tiny) -> None:
    prompts = []
    for text, index in (
        ("See <image> it", [1]),
        ("See <image> it", [4]),
        ("See <image> it", [2]),
        ("<image><image>", [0, 3]),
        ("a<image>b<image>", [3, 2]),
    ):
        chosen = [tiny.family.prepare(PIXELS[at]) for at in index]
        inputs = tiny.processed(text, index)
        ids = inputs.pop("input_ids")[0].tolist()
        prompts.append(asked(ids, IMAGE, chosen, greedy(tiny.model, ids, **inputs)))
    check_parity(tiny.folder, prompts, texts_of(tiny.model, IMAGE))


def test_without_splitting_a_picture_is_one_tile(tiny: Tiny, tmp_path: Path) -> None:
    settings = {"do_image_splitting": False, "max_image_size": {"longest_edge": 16}, "size": {"longest_edge": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    family = find("idefics3")(tmp_path, tiny.model.config.to_dict())
    prepared = family.prepare(PIXELS[2])
    assert [run.num_tokens for run in prepared.layout.runs] == [4]
    theirs = transformers.Idefics3ImageProcessorPil(**settings)([PIXELS[2].pixels], return_tensors="np")
    np.testing.assert_allclose(normalised(prepared), theirs["pixel_values"][0], atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(5, 3000), (5000, 700), (1512, 2016), (511, 513), (97, 96)])
def test_numbers_of_tiles_are_those_of_transformers_at_the_published_sizes(height: int, width: int, tmp_path: Path) -> None:
    settings = {"max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    config = {"model_type": "smolvlm", "scale_factor": 4, "vision_config": {"patch_size": 16, "image_size": 512}}
    prepared = find("smolvlm")(tmp_path, config).prepare(drawn(height, width))
    processor = transformers.SmolVLMImageProcessorPil(**settings, return_row_col_info=True)
    theirs = processor([drawn(height, width).pixels], return_tensors="np")
    assert len(prepared.inputs["pixels"]) == theirs["pixel_values"].shape[1] == len(prepared.layout.runs)
    assert prepared.layout.text.count("\n") == theirs["rows"][0][0] + (theirs["rows"][0][0] > 0)
    assert {run.num_tokens for run in prepared.layout.runs} == {64}


def test_positions_of_a_tile_of_the_towers_size_are_its_own_but_for_rounding() -> None:
    for side in (26, 32, 70):  # Idefics 3, SmolVLM, and one whose borders float32 does not hit
        assert (_buckets(side, side) - torch.arange(side)).abs().max() <= 1
    assert _buckets(3, 6).tolist() == [0, 2, 4]


def test_weights_of_the_three_parts_are_told_apart() -> None:
    vision = find_vision("smolvlm")
    names = ["model.text_model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.vision_model.post_layernorm.bias"]
    names += ["model.connector.modality_projection.proj.weight"]
    assert [vision.text_name(name) for name in names] == ["model.layers.0.mlp.up_proj.weight", "lm_head.weight", None, None]
    assert [vision.encoder_name(name) for name in names] == [
        *(None, None),
        "vision_model.post_layernorm.bias",
        "connector.modality_projection.proj.weight",
    ]


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"max_image_size": {"longest_edge": 364}}))
    with pytest.raises(CheckpointError, match=r"26 patches of 14 on a side, which config.json's scale_factor 4 does not divide"):
        find("idefics3")(tmp_path, {"scale_factor": 4, "vision_config": {"patch_size": 14}})
