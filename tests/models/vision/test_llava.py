"""LLaVA 1.5 (CLIP and SigLIP towers) and Pixtral against transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from streamserve.media.families import find
from streamserve.media.family import Prepared
from tests.models.vision.parity import asked, check_parity, drawn, greedy, loaded, randomised, same_embeddings, texts_of

IMAGE, BREAK, END = 95, 96, 97
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 512,
}
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
# name: (class of the config, tower, its config, language model, of the whole)
VARIANTS: dict[str, tuple[Any, dict[str, Any], str, dict[str, Any]]] = {
    "clip": (transformers.LlavaConfig, {"model_type": "clip_vision_model", "image_size": 30, "patch_size": 7}, "llama", {}),
    "siglip": (
        transformers.LlavaConfig,
        {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7},
        "qwen2",
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "multimodal_projector_bias": False},
    ),
    "several_layers": (
        transformers.LlavaConfig,
        {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 7},
        "mistral",
        {"vision_feature_layer": [0, -1, 2], "projector_hidden_act": "silu"},
    ),
    "pixtral": (
        transformers.LlavaConfig,
        {"model_type": "pixtral", "image_size": 40, "patch_size": 4},
        "mistral",
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    ),
    "mistral3": (
        transformers.Mistral3Config,
        {"model_type": "pixtral", "image_size": 40, "patch_size": 4},
        "mistral",
        {"spatial_merge_size": 2},
    ),
    "llava_next": (
        transformers.LlavaNextConfig,
        {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 7},
        "llama",
        {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28]]},
    ),
}
SIZES = [(28, 28), (50, 33), (37, 90), (9, 64)]


@dataclass(frozen=True)
class Tiny:
    """A saved model, and what is asked of it."""

    folder: Path
    model: Any
    prepared: list[Prepared]


def tiny(variant: str, folder: Path) -> Tiny:
    """A random model of a variant, saved."""
    kind, tower, language, more = VARIANTS[variant]
    config = kind(vision_config={**TOWER, **tower}, text_config={"model_type": language, **TEXT}, image_token_index=IMAGE, **more)
    auto: Any = transformers.AutoModelForImageTextToText
    model = randomised(auto.from_config(config, attn_implementation="eager"))
    model.save_pretrained(folder)
    family = find(config.model_type)(folder, config.to_dict())
    return Tiny(folder, model, [family.prepare(drawn(*size)) for size in SIZES])


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(request.param, tmp_path_factory.mktemp(request.param))


def pixels(prepared: Prepared) -> torch.Tensor:
    """As a processor gives them."""
    inputs = prepared.inputs
    return torch.from_numpy(inputs["pixels"] * inputs["scale"][:, None, None] + inputs["shift"][:, None, None])


def features(model: Any, prepared: Sequence[Prepared], index: Sequence[int]) -> list[torch.Tensor]:
    """transformers' embeddings of some pictures."""
    with torch.inference_mode():
        return [model.get_image_features(**reference_inputs(model, [prepared[at]], [at])).pooler_output[0] for at in index]


def reference_inputs(model: Any, prepared: Sequence[Prepared], index: Sequence[int]) -> dict[str, torch.Tensor]:
    """What transformers' model takes of these pictures, one beside the other."""
    kind = model.config.model_type
    parts = [pixels(one) for one in prepared]
    sizes = torch.tensor([SIZES[at] for at in index])
    if kind == "llava_next":
        most = max(len(part) for part in parts)
        stacked = [torch.cat((part, part.new_zeros(most - len(part), *part.shape[1:]))) for part in parts]
        return {"pixel_values": torch.stack(stacked), "image_sizes": sizes}
    if model.config.vision_config.model_type == "pixtral":
        sizes = torch.tensor([part.shape[-2:] for part in parts])
        height, width = sizes.max(0).values.tolist()
        padded = [torch.nn.functional.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in parts]
        return {"pixel_values": torch.stack(padded), "image_sizes": sizes}
    return {"pixel_values": torch.stack(parts)}


def prompt(prepared: Sequence[Prepared], words: Sequence[Sequence[int]]) -> list[int]:
    """Words, a picture, words, ... as processors write them."""
    ids = list(words[0])
    for one, following in zip(prepared, words[1:], strict=True):
        runs = one.layout.runs
        for number, run in enumerate(runs, 1):
            ids += [IMAGE] * run.num_tokens
            if len(runs) > 1:
                ids.append(END if number == len(runs) else BREAK)
        ids += following
    return ids


def test_embeddings_are_those_of_transformers(case: Tiny) -> None:
    ours = loaded(case.folder).encode([one.inputs for one in case.prepared])
    same_embeddings(ours, features(case.model, case.prepared, range(len(SIZES))))
    assert [len(one) for one in ours] == [one.layout.num_tokens for one in case.prepared]


def test_answers_are_those_of_transformers(case: Tiny) -> None:
    model, prompts = case.model, []
    for index, words in (
        ([1], [[5, 6, 7], [8, 9]]),
        ([2], [[5, 6, 7], [8, 9]]),
        ([1, 3], [[5, 6, 7], [8, 9, 10], [11]]),
        ([0, 2], [[], [], [12, 13, 14, 15]]),
    ):
        chosen = [case.prepared[at] for at in index]
        ids = prompt(chosen, words)
        prompts.append(asked(ids, IMAGE, chosen, greedy(model, ids, **reference_inputs(model, chosen, index))))
    check_parity(case.folder, prompts, texts_of(model, IMAGE))
