"""Qwen's encoders and the preparation of their pictures against transformers, float32."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streamserve.build import max_media_tokens
from streamserve.errors import CheckpointError
from streamserve.media.families import find as find_family
from streamserve.media.families._qwen import fitting_size
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.vision import Vision
from streamserve.models.vision import find as find_vision
from streamserve.models.vision._qwen import patch_places, window_order
from streamserve.resolve import MEDIA_BYTES
from tests.models.vision import tiny_qwen
from tests.models.vision.tiny_qwen import FAMILIES, picture

families = pytest.mark.parametrize("family", FAMILIES)
SIZES = (
    (40, 24),
    (57, 90),
    (24, 40),
    (8, 300),
    (40, 24),
)  # whole windows, cut off at the right, the bottom, both; too small ones


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    return {family: (tiny_qwen.save(family, folder), folder) for family, folder in folders.items()}


def family_of(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    return find_family(config["model_type"])(folder, config)


def encoder_of(folder: Path) -> Vision:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.vision is not None
    return checkpoint.vision.load(torch.device("cpu"), torch.float32)


@families
def test_embeddings_of_pictures_are_transformers(family: str, made: dict[str, tuple[Any, Path]]) -> None:
    model, folder = made[family]
    pictures = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    patches, grids = tiny_qwen.processed(family, [one.pixels for one in pictures])
    expected = tiny_qwen.features(model, patches, grids)
    prepared = [family_of(folder).prepare(one) for one in pictures]
    encoder = encoder_of(folder)
    got = encoder.encode([one.inputs for one in prepared])
    for one, embeds, wanted, grid in zip(prepared, got, expected, grids.tolist(), strict=True):
        torch.testing.assert_close(embeds, wanted, atol=1e-4, rtol=0)
        (run,) = one.layout.runs
        assert run.grid == (grid[0], grid[1] // 2, grid[2] // 2)
        assert one.layout.num_tokens == len(embeds)
    (alone,) = encoder.encode([prepared[1].inputs])
    torch.testing.assert_close(alone, got[1], atol=1e-5, rtol=0)


@families
def test_a_clip_is_encoded_as_transformers_does(family: str, made: dict[str, tuple[Any, Path]]) -> None:
    model, folder = made[family]
    frames = np.stack([picture(40, 24, seed).pixels for seed in range(6)])
    inputs = {**family_of(folder).prepare(picture(40, 24)).inputs, "pixels": frames}
    patches, grid = tiny_qwen.clip_patches(inputs)
    (expected,) = tiny_qwen.features(model, patches, torch.tensor([grid]))
    (got,) = encoder_of(folder).encode([inputs])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@families
def test_a_long_clip_is_encoded_in_several_passes(
    family: str, made: dict[str, tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = made[family]
    frames = np.stack([picture(40, 24, seed).pixels for seed in range(6)])
    inputs = {**family_of(folder).prepare(picture(40, 24)).inputs, "pixels": frames}
    encoder = encoder_of(folder)
    (whole,) = encoder.encode([inputs])
    monkeypatch.setattr("streamserve.models.vision._qwen.MAX_PATCHES", 60)
    (passes,) = encoder.encode([inputs])
    torch.testing.assert_close(passes, whole, atol=1e-5, rtol=0)


@families
@pytest.mark.parametrize("is_flat", [False, True])
def test_folders_of_older_and_newer_versions_load(
    family: str, is_flat: bool, made: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    """Names of weights with and without prefixes; the language model's numbers below text_config, or beside vision_config."""
    _, folder = made[family]
    weights = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    if not is_flat:
        weights = {
            name.replace("model.", "model.language_model.")
            if name.startswith("model.")
            else name.replace("visual.", "model.visual."): tensor
            for name, tensor in weights.items()
        }
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if is_flat and family != "qwen3_vl":
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        config = {**text, **config, "rope_theta": rope["rope_theta"]}
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    old, new = open_checkpoint(tmp_path), open_checkpoint(folder)
    assert old.spec == new.spec
    assert old.spec.rope.sections
    assert torch.equal(old.tensor("model.layers.1.self_attn.k_proj.weight"), new.tensor("model.layers.1.self_attn.k_proj.weight"))
    inputs = family_of(folder).prepare(picture(40, 24)).inputs
    assert torch.equal(encoder_of(tmp_path).encode([inputs])[0], encoder_of(folder).encode([inputs])[0])


@families
def test_random_weights_need_a_config_only(family: str, made: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((made[family][1] / "config.json").read_text())
    checkpoint = open_checkpoint(tmp_path, load_format="dummy")
    assert checkpoint.vision is not None
    encoder = checkpoint.vision.load(torch.device("cpu"), torch.float32)
    prepared = family_of(tmp_path).prepare(picture(90, 30))
    (embeds,) = encoder.encode([prepared.inputs])
    assert embeds.shape == (prepared.layout.num_tokens, 48 * (1 + checkpoint.vision.num_deepstack))
    assert embeds.isfinite().all()
    assert checkpoint.vision.num_deepstack == encoder.num_deepstack == (2 if family == "qwen3_vl" else 0)
    assert max_media_tokens(checkpoint) == MEDIA_BYTES // (4 * embeds.shape[1])


def test_a_size_fits_as_transformers_says() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    random = np.random.default_rng(5)
    for height, width in random.integers(1, 3000, (300, 2)).tolist():
        if max(height, width) <= 200 * min(height, width):
            assert fitting_size(height, width, 28, 3136, 1003520) == smart_resize(height, width, 28, 3136, 1003520)


def test_each_square_is_in_one_window() -> None:
    for rows, columns in ((8, 8), (9, 10), (3, 11), (4, 1), (1, 1)):
        order, shapes = window_order(rows, columns, 4)
        assert sorted(order.tolist()) == list(range(rows * columns))
        assert sum(count * size for count, size in shapes) == rows * columns
        start = 0
        for count, size in shapes:
            for window in order[start : start + count * size].reshape(count, size):
                assert len({(square // columns // 4, square % columns // 4) for square in window.tolist()}) == 1
            start += count * size


def test_patches_of_a_square_stand_together() -> None:
    places = patch_places(4, 6, 2).T.tolist()
    assert places[:5] == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]]


def test_settings_that_mean_other_pictures_stop_the_start(tmp_path: Path) -> None:
    config = {"model_type": "qwen2_vl", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wrong = {"resample": 2, "patch_size": 16, "do_resize": False, "size": {"height": 4}}
    for key, value in wrong.items():
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({key: value}))
        with pytest.raises(CheckpointError, match="min_pixels is None" if key == "size" else key):
            family_of(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"max_pixels": 7 * 784, "min_pixels": 784}}))
    assert family_of(tmp_path).prepare(picture(500, 500)).layout.num_tokens == 4


def test_an_encoder_whose_layers_look_further_costs_more(tmp_path: Path) -> None:
    """As tokens of the language model: of Qwen2.5-VL-7B and a picture of 1,024 x 1,024, which has 5,476 patches."""
    text = {"num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"max_pixels": 12845056}))
    costs = []
    for full_layers in ([7, 15, 23, 31], list(range(32))):
        config = {"model_type": "qwen2_5_vl", **text, "vision_config": {**vision, "fullatt_block_indexes": full_layers}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        prepared = family_of(tmp_path).prepare(picture(1024, 1024))
        assert prepared.layout.num_tokens == 1369
        costs.append(prepared.cost)
    assert costs == [526, 827]


def test_a_flat_config_is_read_like_a_nested_one() -> None:
    """As published: Qwen2-VL-2B ties its head, and says so beside vision_config."""
    kind = find_vision("qwen2_vl")
    flat = {
        "model_type": "qwen2_vl",
        "eos_token_id": 5,
        "hidden_size": 1536,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"embed_dim": 1280},
    }
    text = kind.text_config(flat)
    nested = {"model_type": "qwen2_vl", "text_config": {**flat, "tie_word_embeddings": None}, "tie_word_embeddings": True}
    assert kind.text_config(nested) == text
    assert text["model_type"] == "qwen2"
    assert text["tie_word_embeddings"] is True
    assert text["rope_parameters"]["mrope_section"] == [16, 24, 24]
    assert "vision_config" not in text
    silent = find_vision("qwen3_vl").text_config({"text_config": {"hidden_size": 8}, "eos_token_id": 7})
    assert silent["rope_parameters"] == {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
    assert (silent["eos_token_id"], silent["head_dim"]) == (7, 128)
