"""A vision model's text_config as the language model's own config."""

import pytest
import transformers

from streamserve.errors import CheckpointError
from streamserve.models.vision._names import encoder_name, text_name
from streamserve.models.vision._text import DEFAULTS, text_config


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_a_silent_text_config_means_what_transformers_means(model_type: str) -> None:
    known = transformers.AutoConfig.for_model(model_type)
    ours = text_config({"text_config": {"model_type": model_type}})
    for key, value in ours.items():
        assert getattr(known, key) == value, key
    number_of_kv_heads = ours.get("num_key_value_heads") or ours["num_attention_heads"]
    assert number_of_kv_heads == known.num_key_value_heads


def test_what_text_config_says_stands() -> None:
    given = {"model_type": "mistral", "rms_norm_eps": 1e-5, "sliding_window": None, "rope_theta": 1e6, "vocab_size": 32064}
    ours = text_config({"model_type": "llava_next", "text_config": given})
    assert {key: ours[key] for key in given} == given
    assert ours["intermediate_size"] == 14336


def test_an_absent_text_config_is_the_one_the_family_means() -> None:
    assert text_config({"model_type": "llava"})["model_type"] == "llama"
    ours = text_config({"model_type": "mistral3"}, model_type="mistral", absent={"hidden_size": 5120})
    assert (ours["model_type"], ours["hidden_size"]) == ("mistral", 5120)


def test_a_tied_head_is_the_language_models_word_or_the_weights() -> None:
    def tie(text: bool | None, whole: bool | None) -> bool | None:
        config = {} if whole is None else {"tie_word_embeddings": whole}
        text_part = {} if text is None else {"tie_word_embeddings": text}
        found: bool | None = text_config({**config, "text_config": text_part}).get("tie_word_embeddings")
        return found

    assert [tie(True, False), tie(True, None), tie(True, True)] == [True] * 3
    assert [tie(False, False), tie(None, False), tie(False, None)] == [False] * 3
    assert [tie(None, None), tie(None, True), tie(False, True)] == [None] * 3


def test_a_language_model_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="model_type is 'mamba'; behind a llava encoder stands one of llama, mistral"):
        text_config({"model_type": "llava", "text_config": {"model_type": "mamba"}})


@pytest.mark.parametrize(
    ("name", "text", "encoder"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", None),
        ("language_model.lm_head.weight", "lm_head.weight", None),
        ("model.language_model.norm.weight", "model.norm.weight", None),
        ("language_model.norm.weight", "model.norm.weight", None),
        ("lm_head.weight", "lm_head.weight", None),
        ("model.vision_tower.ln_pre.weight", None, "vision_tower.ln_pre.weight"),
        ("vision_tower.vision_model.pre_layrnorm.bias", None, "vision_tower.pre_layrnorm.bias"),
        ("vision_tower.vision_model.embeddings.position_ids", None, None),
        ("model.multi_modal_projector.linear_1.bias", None, "multi_modal_projector.linear_1.bias"),
        ("image_newline", None, "image_newline"),
        ("model.image_newline", None, "image_newline"),
    ],
)
def test_names_of_every_version_are_told_apart(name: str, text: str | None, encoder: str | None) -> None:
    assert text_name(name) == text
    assert encoder_name(name) == encoder
