"""Folders of LLaVA's families as they are published: configs that leave much out, names of several versions, half precision."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from streamserve.errors import CheckpointError
from streamserve.media.families import find as find_family
from streamserve.models import find as find_model
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.spec import read_spec
from streamserve.models.vision import find
from tests.models.vision.parity import drawn, loaded, same_embeddings
from tests.models.vision.test_llava import VARIANTS, tiny

# As on the hub, without keys that say nothing of the network.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {
        "model_type": "llava",
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    },
    "llava-interleave-qwen-0.5b": {
        "model_type": "llava",
        "image_token_index": 151646,
        "text_config": {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "max_window_layers": 24,
            "model_type": "qwen2",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "vocab_size": 152000,
        },
        "tie_word_embeddings": False,
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 26,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "llava-v1.6-mistral-7b": {
        "model_type": "llava_next",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "image_token_index": 32000,
        "text_config": {
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "vocab_size": 32064,
        },
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096}
        | {"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14},
    },
    "pixtral-12b": {
        "model_type": "llava",
        "image_seq_length": 1,
        "image_token_index": 10,
        "text_config": {
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "is_composition": True,
            "max_position_embeddings": 1024000,
            "model_type": "mistral",
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        "vision_config": {"head_dim": 64, "hidden_act": "silu", "image_size": 1024, "is_composition": True}
        | {"model_type": "pixtral", "patch_size": 16, "rope_theta": 10000.0, "tie_word_embeddings": False},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "mistral-small-3.1": {
        "model_type": "mistral3",
        "image_token_index": 10,
        "spatial_merge_size": 2,
        "text_config": {
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "max_position_embeddings": 131072,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        "vision_config": {"head_dim": 64, "hidden_act": "silu", "image_size": 1540, "model_type": "pixtral", "patch_size": 14},
        "vision_feature_layer": -1,
    },
    "nothing said, llava": {"model_type": "llava"},
    "nothing said, mistral3": {"model_type": "mistral3"},
}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' model, without memory for its weights."""
    known = transformers.AutoConfig.for_model(**config)
    auto: Any = transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(known)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_of_published_configs_are_those_of_transformers(name: str) -> None:
    config = PUBLISHED[name]
    kind = find(config["model_type"])
    theirs = shapes_of(config)
    ours = kind.weights(config)
    held = {canonical: shape for full, shape in theirs.items() if (canonical := kind.encoder_name(full)) is not None}
    assert ours.items() <= held.items()
    unused = {".".join(rest.split(".")[:2]) for rest in held.keys() - ours.keys()}
    # What the projector does not look at: the last layer behind vision_feature_layer -2, and norm and head behind that.
    assert unused <= {"vision_tower.encoder", "vision_tower.post_layernorm", "vision_tower.head"}
    text = kind.text_config(config)
    model = find_model(text["model_type"])
    spec = read_spec(text, model.traits(text))
    expected = {own: shape for full, shape in theirs.items() if (own := kind.text_name(full)) is not None}
    if spec.tie_embeddings:
        del expected["lm_head.weight"]
    assert model.weights(spec) == expected
    known = transformers.AutoConfig.for_model(**config).text_config
    assert spec.rope.theta == known.rope_parameters["rope_theta"]
    assert spec.sliding_window == getattr(known, "sliding_window", None)
    assert (spec.rms_norm_eps, spec.max_position_embeddings) == (known.rms_norm_eps, known.max_position_embeddings)


def test_names_of_older_versions_are_read(tmp_path: Path) -> None:
    """As the hub's folders of LLaVA have them, and as transformers 5 has them in memory."""
    case = tiny("llava_next", tmp_path / "new")
    expected = loaded(case.folder).encode([one.inputs for one in case.prepared])
    weights = safetensors.torch.load_file(case.folder / "model.safetensors")
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in weights.items()}
    older["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17.0)
    in_memory = {f"model.{name}": tensor for name, tensor in weights.items() if not name.startswith("language_model.")}
    for name, tensor in weights.items():
        if name.startswith("language_model.model."):
            in_memory[f"model.language_model.{name.removeprefix('language_model.model.')}"] = tensor
    in_memory["lm_head.weight"] = weights["language_model.lm_head.weight"]
    for number, named in enumerate((older, in_memory)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text((case.folder / "config.json").read_text())
        safetensors.torch.save_file(named, folder / "model.safetensors")
        same_embeddings(loaded(folder).encode([one.inputs for one in case.prepared]), expected)
        assert open_checkpoint(folder).tensor("lm_head.weight").shape == (99, 48)


def test_a_head_of_its_own_is_used_where_two_configs_contradict_each_other(tmp_path: Path) -> None:
    """Mistral 3's published folders have one and say nothing; transformers writes that it is tied, if it is."""
    case = tiny("mistral3", tmp_path)
    assert open_checkpoint(tmp_path).spec.tie_embeddings
    weights = safetensors.torch.load_file(case.folder / "model.safetensors")
    weights["language_model.lm_head.weight"] = torch.ones(99, 48)
    safetensors.torch.save_file(weights, case.folder / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.spec.tie_embeddings and checkpoint.tensor("lm_head.weight").eq(1).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_weights_in_half_precision_give_embeddings_near_those_in_float32(variant: str, tmp_path: Path) -> None:
    kind, tower, language, more = VARIANTS[variant]
    text = {"model_type": language, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": kind.model_type, "vision_config": {**tower, "hidden_size": 32, "num_hidden_layers": 2}, **more}
    config["vision_config"] |= {"num_attention_heads": 2, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": {**text, "num_key_value_heads": 2}}))
    vision = open_checkpoint(tmp_path, load_format="dummy").vision
    assert vision is not None
    family = find_family(kind.model_type)(tmp_path, vision.config)
    inputs = [family.prepare(drawn(*size)).inputs for size in ((40, 30), (30, 41), (40, 30))]
    exact, half = (vision.load(torch.device("cpu"), dtype).encode(inputs) for dtype in (torch.float32, torch.bfloat16))
    for one, other in zip(exact, half, strict=True):
        assert other.dtype == torch.bfloat16 and one.shape == other.shape
        assert (one - other.float()).abs().mean() < 0.03 * one.abs().mean()
    assert np.array_equal(exact[0], exact[2])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"vision_config": {"model_type": "dinov2"}}, "vision_config's model_type is 'dinov2'"),
        ({"vision_feature_layer": 99}, "vision_feature_layer is 99; allowed is -25 to 24"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy is 'cls'"),
        ({"vision_config": {"model_type": "pixtral"}}, "a pixtral tower needs 'full'"),
        ({"vision_config": {"model_type": "clip_vision_model", "hidden_act": "mish"}}, "an activation is 'mish'"),
        ({"vision_config": {"model_type": "clip_vision_model", "hidden_size": 0}}, "hidden_size is 0"),
        ({"model_type": "llava_next", "vision_feature_select_strategy": "full"}, "no square of patches"),
    ],
)
def test_configs_that_cannot_be_computed_are_refused(config: dict[str, Any], reason: str) -> None:
    whole = {"model_type": "llava", **config}
    with pytest.raises(CheckpointError, match=reason):
        find(whole["model_type"]).weights(whole)
