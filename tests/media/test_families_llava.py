"""LLaVA's families against transformers' processors: every byte of the pixels, and every token of the prompt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from numpy.typing import NDArray
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from streamserve.errors import CheckpointError
from streamserve.media.families import find
from streamserve.media.family import Prepared
from streamserve.media.picture import Picture
from streamserve.models.vision._towers import TowerSpec
from tests.text.toys import byte_level_folder

SIZES = [(1, 1), (60, 60), (60, 61), (333, 41), (41, 333), (97, 130), (700, 500), (8, 800)]
SPECIALS = ["<image>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CLIP = {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14, "hidden_size": 32, "num_attention_heads": 2}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
PIXTRAL = {**CLIP, "model_type": "pixtral", "image_size": 140}
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]

Settings = dict[str, Any]


def noise(height: int, width: int) -> Picture:
    pixels = np.random.default_rng((height, width)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Picture(pixels, bytes(32))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = byte_level_folder(tmp_path_factory.mktemp("toy"))
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncation": None}))
    found = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    found.add_special_tokens({"additional_special_tokens": SPECIALS})
    return found


def folder_of(path: Path, processor: Any, tokenizer: Any) -> Path:
    """As transformers 5 saves it, and the tokenizer beside it."""
    tokenizer.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def their_pixels(processor: Any, picture: Picture, **more: Any) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Bytes, and normalised."""
    plain = processor(picture.pixels, do_rescale=False, do_normalize=False, input_data_format="channels_last", **more)
    whole = processor(picture.pixels, input_data_format="channels_last", **more)
    return np.asarray(plain["pixel_values"][0]), np.asarray(whole["pixel_values"][0])


def check_pixels(prepared: Prepared, theirs: tuple[NDArray[np.uint8], NDArray[np.float64]]) -> None:
    inputs = prepared.inputs
    np.testing.assert_array_equal(inputs["pixels"], theirs[0])
    assert inputs["pixels"].dtype == np.uint8
    normalised = inputs["pixels"] * inputs["scale"][:, None, None] + inputs["shift"][:, None, None]
    np.testing.assert_allclose(normalised, theirs[1], atol=2e-6)


VARIANTS = {
    "clip": (transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}), CLIP),
    "clip_stretched": (transformers.CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False), CLIP),
    "clip_cut_larger": (transformers.CLIPImageProcessorPil(size={"shortest_edge": 41}, crop_size=56, image_std=1.0), CLIP),
    "llava_padded": (LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size=56, do_pad=True), CLIP),
    "siglip": (transformers.SiglipImageProcessorPil(size={"height": 56, "width": 56}, resample=2), SIGLIP),
}


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_llava_prepares_what_its_processor_does(variant: str, strategy: str, tokenizer: Any, tmp_path: Path) -> None:
    images, vision = VARIANTS[variant]
    config = {
        "model_type": "llava",
        "vision_config": vision,
        "text_config": TEXT,
        "vision_feature_select_strategy": strategy,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
    }
    has_class = vision is CLIP
    kind: Any = transformers.LlavaProcessor
    processor = kind(
        images, tokenizer, patch_size=14, vision_feature_select_strategy=strategy, num_additional_image_tokens=int(has_class)
    )
    family = find("llava")(folder_of(tmp_path, processor, tokenizer), config)
    assert family.marker == family.token == "<image>"
    for size in SIZES:
        picture = noise(*size)
        prepared = family.prepare(picture)
        check_pixels(prepared, their_pixels(images, picture))
        theirs = processor(images=[picture.pixels], text="Here <image> it is.", input_data_format="channels_last")["input_ids"][0]
        assert tokenizer(f"Here {prepared.layout.text} it is.")["input_ids"] == list(theirs)
        assert prepared.layout.num_tokens == list(theirs).count(config["image_token_index"])
        assert [run.num_tokens for run in prepared.layout.runs] == [TowerSpec(config).places_of(4, 4)]


def test_of_a_picture_like_a_thread_only_what_is_kept_is_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it would become 224 x 44,800 pixels. Bytes are all but those of the processor."""
    picture = noise(40, 8000)
    theirs = their_pixels(transformers.CLIPImageProcessorPil(), picture)[0]
    resize, made = Image.Image.resize, []

    def watched(image: Image.Image, size: tuple[int, int], *rest: Any) -> Image.Image:
        made.append(size)
        return resize(image, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", watched)
    family = find("llava")(tmp_path, {"vision_config": {**CLIP, "image_size": 224}, "text_config": TEXT})
    different = np.abs(family.prepare(picture).inputs["pixels"].astype(int) - theirs)
    assert made == [(224, 224)]
    assert different.max() <= 3 and (different > 0).mean() < 0.01


def test_llava_next_prepares_what_its_processor_does(tokenizer: Any, tmp_path: Path) -> None:
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
    )
    config = {
        "model_type": "llava_next",
        "vision_config": CLIP,
        "text_config": TEXT,
        "image_grid_pinpoints": PINPOINTS,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
    }
    kind: Any = transformers.LlavaNextProcessor
    processor = kind(images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    family = find("llava_next")(folder_of(tmp_path, processor, tokenizer), config)
    seen = set()
    for size in SIZES:
        picture = noise(*size)
        prepared = family.prepare(picture)
        check_pixels(prepared, their_pixels(images, picture))
        theirs = processor(images=[picture.pixels], text="A <image>\nB", input_data_format="channels_last")["input_ids"][0]
        assert tokenizer(f"A {prepared.layout.text}\nB")["input_ids"] == list(theirs)
        seen.add((prepared.inputs["tiles"], prepared.layout.num_tokens))
    assert len({tiles for tiles, _ in seen}) >= 4 and len(seen) > 5  # sizes that were cut differently


@pytest.mark.parametrize(("model_type", "merge"), [("llava", 1), ("mistral3", 1), ("mistral3", 2)])
def test_pixtral_prepares_what_its_processor_does(model_type: str, merge: int, tokenizer: Any, tmp_path: Path) -> None:
    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 140}, patch_size={"height": 14, "width": 14})
    config = {
        "model_type": model_type,
        "vision_config": PIXTRAL,
        "text_config": TEXT,
        "spatial_merge_size": merge,
        "image_token_index": tokenizer.convert_tokens_to_ids("[IMG]"),
    }
    family = find(model_type)(folder_of(tmp_path, images, tokenizer), config)
    for size in SIZES:
        picture = noise(*size)
        prepared = family.prepare(picture)
        check_pixels(prepared, their_pixels(images, picture, patch_size=14 * merge))
        # PixtralProcessor cannot be imported without torchvision. It writes a list of tokens and puts another in the last place.
        rows, columns = (edge // (14 * merge) for edge in prepared.inputs["pixels"].shape[1:])
        tokens = (["[IMG]"] * columns + ["[IMG_BREAK]"]) * rows
        tokens[-1] = "[IMG_END]"
        assert prepared.layout.text == "".join(tokens)
        ids = tokenizer(prepared.layout.text)["input_ids"]
        assert ids.count(config["image_token_index"]) == prepared.layout.num_tokens
        # Between two runs stands one token, and one behind the last.
        assert len(ids) == prepared.layout.num_tokens + len(prepared.layout.runs)


def test_a_folder_without_tokenizer_and_settings_takes_pictures_too(tmp_path: Path) -> None:
    """As the default model's: places stand alone, and the sizes are the encoder's."""
    config = {"model_type": "llava", "vision_config": SIGLIP, "text_config": TEXT, "vision_feature_select_strategy": "full"}
    family = find("llava")(tmp_path, config)
    prepared = family.prepare(noise(30, 50))
    assert (family.marker, family.token, prepared.layout.text) == (None, None, "")
    assert prepared.layout.num_tokens == 16 and prepared.inputs["pixels"].shape == (3, 56, 56)
    ours = transformers.SiglipImageProcessorPil(size={"height": 56, "width": 56})
    check_pixels(prepared, their_pixels(ours, noise(30, 50)))


def test_keys_depend_on_contents_and_settings(tmp_path: Path) -> None:
    config = {"model_type": "llava", "vision_config": CLIP, "text_config": TEXT}
    other = {**config, "vision_feature_select_strategy": "full"}
    picture = noise(30, 50)
    family = find("llava")(tmp_path, config)
    assert family.prepare(picture).key == family.prepare(Picture(picture.pixels, picture.digest)).key
    assert family.prepare(Picture(picture.pixels, bytes(31) + b"1")).key != family.prepare(picture).key
    assert find("llava")(tmp_path, other).prepare(picture).key != family.prepare(picture).key


@pytest.mark.parametrize(
    ("settings", "config", "reason"),
    [
        ({"size": {"shortest_edge": 64}, "crop_size": 64}, {}, "config.json's encoder takes"),
        ({"do_resize": False}, {}, "config.json's encoder takes"),
        ({"size": {"longest_edge": 56}}, {}, "size"),
        ({}, {"vision_config": {**CLIP, "model_type": "dinov2"}}, "'dinov2'; supported are clip_vision_model"),
        ({"image_grid_pinpoints": [[56, 56]]}, {"model_type": "llava_next"}, "they must be the same"),
    ],
)
def test_settings_that_do_not_fit_the_encoder_are_refused(
    settings: Settings, config: Settings, reason: str, tmp_path: Path
) -> None:
    whole = {"model_type": "llava", "vision_config": CLIP, "text_config": TEXT, **config}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=reason):
        find(whole["model_type"])(tmp_path, whole)


def test_a_token_that_the_tokenizer_does_not_have_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = {"model_type": "llava", "vision_config": CLIP, "text_config": TEXT, "image_token_index": 7}
    with pytest.raises(CheckpointError, match="token 7 for pictures"):
        find("llava")(tmp_path, config)
