"""Gemma 3 against transformers: prompts, embeddings, answers, and which places of a picture see each other."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from streamserve.errors import CheckpointError
from streamserve.media.families import find
from streamserve.media.family import Family
from streamserve.models.checkpoint import open_checkpoint
from tests.models.vision.parity import asked, check_parity, drawn, greedy, loaded, randomised, same_embeddings, texts_of
from tests.models.vision.words import normalised, token_ids, tokenizer

IMAGE, BEGIN, END = 256, 257, 258
SPECIALS = ["<image_soft_token>", "<start_of_image>", "<end_of_image>"]
NAMED = {"image_token": SPECIALS[0], "boi_token": SPECIALS[1], "eoi_token": SPECIALS[2]}
# Windows of 12 tokens, in a model whose pictures take 25 places: in layers with a window the last places do not see the first.
# They are more than fit a chunk of 16, too.
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "vocab_size": 259,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,  # a tied head repeats the last token, whatever the picture
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "patch_size": 4,
    "image_size": 40,
}
SIDE = {"height": 40, "width": 40}
PIXELS = [*(drawn(*size) for size in [(24, 24), (50, 33), (37, 90), (9, 64)]), drawn(50, 33, seed=1)]


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
        return {name: made[name] for name in ("input_ids", "pixel_values", "token_type_ids")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return save(tmp_path_factory.mktemp("gemma3"))


def save(folder: Path) -> Tiny:
    """A random model, tokenizer and settings for pictures."""
    config = transformers.Gemma3Config(
        text_config=TEXT,
        vision_config={"model_type": "siglip_vision_model", **TOWER},
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
        mm_tokens_per_image=25,
        tie_word_embeddings=False,
    )
    auto: Any = transformers.AutoModelForImageTextToText
    model = randomised(auto.from_config(config, attn_implementation="eager"), seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm.weight" in name and "vision_tower" not in name:
                # Gemma's norms multiply by 1 + weight. Those of q and k make attention choose, so that it shows what it may see.
                parameter.add_(1.0 if "q_norm" in name or "k_norm" in name else -1.0)
            elif "vision_tower" in name and name.endswith("bias"):
                parameter.sub_(1.0)  # or all places would be much alike
        model.model.multi_modal_projector.mm_input_projection_weight.mul_(3.0)
    model.save_pretrained(folder)
    images: Any = transformers.Gemma3ImageProcessorPil
    made: Any = transformers.Gemma3Processor
    processor = made(images(size=SIDE), tokenizer(SPECIALS, NAMED), image_seq_length=25)
    processor.save_pretrained(folder)
    return Tiny(folder, model, processor, find("gemma3")(folder, config.to_dict()))


def test_pixels_and_prompts_are_those_of_transformers(tiny: Tiny) -> None:
    for index in ([0], [1, 2], [3, 4, 0]):
        text = "Look:" + "".join(f"<start_of_image> {at}\n" for at in index)
        theirs = tiny.processed(text, index)
        chosen = [tiny.family.prepare(PIXELS[at]) for at in index]
        assert token_ids(tiny.processor.tokenizer, text, tiny.family, chosen) == theirs["input_ids"][0].tolist()
        np.testing.assert_allclose([normalised(one) for one in chosen], theirs["pixel_values"].numpy(), atol=1e-5)


def test_embeddings_are_those_of_transformers(tiny: Tiny) -> None:
    ours = loaded(tiny.folder).encode([tiny.family.prepare(picture).inputs for picture in PIXELS])
    pixels = tiny.processed("<start_of_image>" * len(PIXELS), range(len(PIXELS)))["pixel_values"]
    with torch.inference_mode():
        same_embeddings(ours, list(tiny.model.get_image_features(pixels).pooler_output))


def test_answers_are_those_of_transformers(tiny: Tiny) -> None:
    prompts, num_blind = [], 0
    for text, index in (
        ("See <start_of_image>", [1]),
        ("See <start_of_image>", [4]),
        ("<start_of_image>!", [2]),
        ("<start_of_image><start_of_image>", [0, 3]),
        ("a<start_of_image>b<start_of_image>c", [3, 2]),
    ):
        inputs = tiny.processed(text, index)
        ids = inputs.pop("input_ids")[0].tolist()
        chosen = [tiny.family.prepare(PIXELS[at]) for at in index]
        prompts.append(asked(ids, IMAGE, chosen, greedy(tiny.model, ids, **inputs)))
        blind = greedy(tiny.model, ids, pixel_values=inputs["pixel_values"], token_type_ids=torch.zeros(1, len(ids)))
        num_blind += blind != prompts[-1].expected
    assert num_blind, "answers do not depend on what places see of those behind them: nothing would be tested"
    check_parity(tiny.folder, prompts, texts_of(tiny.model, IMAGE))


def test_the_head_is_the_embedding_as_in_published_folders(tiny: Tiny, tmp_path: Path) -> None:
    """Their configs do not say so, and they hold no head."""
    config = json.loads((tiny.folder / "config.json").read_text())
    del config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    kept = load_file(tiny.folder / "model.safetensors")
    save_file({name: tensor for name, tensor in kept.items() if "lm_head" not in name}, tmp_path / "model.safetensors")
    spec = open_checkpoint(tmp_path).spec
    assert spec.tie_embeddings and spec.model_type == "gemma3_text"


def test_a_picture_of_another_size_than_the_tower_is_refused(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 224, "width": 224}}))
    with pytest.raises(CheckpointError, match="encoder takes 896"):
        find("gemma3")(tmp_path, {"vision_config": {"image_size": 896, "patch_size": 14}})


def test_published_names_mean_the_same_weights(tiny: Tiny) -> None:
    vision = type(loaded(tiny.folder))
    assert vision.text_name("language_model.model.layers.3.self_attn.q_norm.weight") == "model.layers.3.self_attn.q_norm.weight"
    old = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
    assert vision.encoder_name(old) == "vision_tower.encoder.layers.0.mlp.fc1.bias"
    assert vision.encoder_name("multi_modal_projector.mm_input_projection_weight") is not None
