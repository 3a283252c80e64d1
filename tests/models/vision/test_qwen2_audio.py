"""Qwen2-Audio against transformers: spectrograms, embeddings, prompts and answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from transformers.models.whisper import feature_extraction_whisper

from streamserve.errors import CheckpointError, InvalidRequest
from streamserve.media.families import HEARING, find, supported_types, types_that_take
from streamserve.media.families.qwen2_audio import BEGIN, END, TOKEN, Family
from streamserve.media.family import Prepared
from streamserve.media.sound import Sound
from streamserve.messages import AUDIO, IMAGE
from streamserve.models.vision.qwen2_audio import Vision
from tests.models.vision import words
from tests.models.vision.parity import asked, check_parity, greedy, loaded, randomised, same_embeddings, texts_of

RATE, SECONDS, MELS = 16_000, 2, 16  # of a window, which is 30 s in the published models
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 512,
}
ENCODER = {
    "num_mel_bins": MELS,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "max_source_positions": SECONDS * 50,
}
LENGTHS = [SECONDS * RATE, 11_111, 321, 4_800, SECONDS * RATE - 500]


@dataclass(frozen=True)
class Tiny:
    """A saved model, its processor, and what is asked of it."""

    folder: Path
    model: Any
    processor: Any
    family: Family
    prepared: list[Prepared]


def heard(num_samples: int) -> Sound:
    """Noise that swells, with a digest of its own."""
    generator = np.random.default_rng(num_samples)
    samples = generator.normal(size=num_samples) * np.linspace(0.001, 0.3, num_samples)
    return Sound(samples.astype(np.float32), RATE, num_samples.to_bytes(32, "big"))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("qwen2_audio")
    tokenizer = words.tokenizer([TOKEN, BEGIN, END])
    extractor = transformers.WhisperFeatureExtractor(feature_size=MELS, chunk_length=SECONDS)
    processor = transformers.Qwen2AudioProcessor(extractor, tokenizer)
    token_id = tokenizer.convert_tokens_to_ids(TOKEN)
    config = transformers.Qwen2AudioConfig(audio_config=ENCODER, text_config=TEXT, audio_token_index=token_id)
    model = randomised(transformers.Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation="eager"))
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    family = find("qwen2_audio")(folder, config.to_dict())
    assert isinstance(family, Family)
    return Tiny(folder, model, processor, family, [family.prepare_sound(heard(length)) for length in LENGTHS])


def processed(case: Tiny, text: str, lengths: Sequence[int]) -> dict[str, Any]:
    """What transformers' processor makes of a text and sounds, by NumPy alone."""
    with patch.object(feature_extraction_whisper, "is_torch_available", lambda: False):
        found: dict[str, Any] = case.processor(
            text=text, audio=[heard(length).samples for length in lengths], sampling_rate=RATE, return_tensors="pt"
        )
    return found


def spectrograms(case: Tiny) -> list[NDArray[np.float32]]:
    return [one.inputs["mel_FM"] for one in case.prepared]


def test_spectrograms_are_those_of_transformers(case: Tiny) -> None:
    found = processed(case, TOKEN * len(LENGTHS), LENGTHS)
    for ours, theirs in zip(spectrograms(case), found["input_features"].numpy(), strict=True):
        assert ours.shape[1] == MELS and len(ours) <= theirs.shape[1]
        np.testing.assert_allclose(ours, theirs.T[: len(ours)], atol=1e-5)
    assert [len(one) for one in spectrograms(case)] == [200, 71, 5, 31, 199]  # none longer than its sound


def test_mel_filters_are_those_of_transformers_at_full_size(tmp_path: Path) -> None:
    extractor: Any = transformers.WhisperFeatureExtractor(feature_size=128)
    extractor.save_pretrained(tmp_path)
    family = Family(tmp_path, {"audio_config": {"num_mel_bins": 128}})
    np.testing.assert_allclose(family._filters_BM, extractor.mel_filters, atol=1e-12)
    assert (family.rate, family.max_seconds) == (16_000, 30)


def test_embeddings_are_those_of_transformers(case: Tiny) -> None:
    ours = loaded(case.folder).encode([one.inputs for one in case.prepared])
    found = processed(case, TOKEN * len(LENGTHS), LENGTHS)
    theirs = embeddings(case.model.model, found["input_features"], found["feature_attention_mask"].sum(-1))
    same_embeddings(ours, theirs)
    assert [len(one) for one in ours] == [one.layout.num_tokens for one in case.prepared] == [50, 17, 1, 7, 49]


def embeddings(model: Any, features: torch.Tensor, num_frames: torch.Tensor) -> list[torch.Tensor]:
    """transformers' model has no method of its own for them."""
    num_steps, num_places = model.audio_tower._get_feat_extract_output_lengths(num_frames)
    mask = torch.arange(features.shape[-1] // 2) < num_steps[:, None]
    with torch.inference_mode():
        states = model.audio_tower(features, attention_mask=torch.where(mask, 0.0, -1e30)[:, None, None, :]).last_hidden_state
        projected = model.multi_modal_projector(states)
    return [one[:length] for one, length in zip(projected, num_places, strict=True)]


def test_prompts_are_those_of_the_processor(case: Tiny) -> None:
    chosen = [1, 3]
    one = BEGIN + TOKEN + END
    text = f"<b>Audio 1: {one}\nhere. Audio 2: {one}\nthere"
    theirs = processed(case, text, [LENGTHS[at] for at in chosen])["input_ids"][0].tolist()
    assert words.token_ids(case.processor.tokenizer, text, case.family, [case.prepared[at] for at in chosen]) == theirs


def test_answers_are_those_of_transformers(case: Tiny) -> None:
    token_id, prompts = case.model.config.audio_token_id, []
    for chosen, text in (
        ([0], "a{}b"),
        ([1], "a{}b"),
        ([1, 3], "one {} and {}?"),
        ([4, 1], "{}{}the same"),
    ):
        found = processed(case, text.format(*[BEGIN + TOKEN + END] * len(chosen)), [LENGTHS[at] for at in chosen])
        ids = found["input_ids"][0].tolist()
        inputs = {key: found[key] for key in ("input_features", "feature_attention_mask")}
        prompts.append(asked(ids, token_id, [case.prepared[at] for at in chosen], greedy(case.model, ids, **inputs)))
    assert all(media.kind == AUDIO for prompt in prompts for media in prompt.media)
    check_parity(case.folder, prompts, texts_of(case.model, token_id))


def test_a_click_is_too_short_to_be_heard(case: Tiny) -> None:
    with pytest.raises(InvalidRequest, match=r"0\.020 s"):
        case.family.prepare_sound(heard(320))


def test_silence_is_a_sound(case: Tiny) -> None:
    mel_FM = case.family.prepare_sound(Sound(np.zeros(RATE, np.float32), RATE, bytes(32))).inputs["mel_FM"]
    assert np.isfinite(mel_FM).all() and np.ptp(mel_FM) == 0


def test_keys_tell_sounds_and_settings_apart(case: Tiny, tmp_path: Path) -> None:
    other = Family(tmp_path, {"audio_config": {**ENCODER, "max_source_positions": 1500}})
    keys = {one.key for one in case.prepared} | {other.prepare_sound(heard(LENGTHS[1])).key}
    assert len(keys) == len(LENGTHS) + 1


@pytest.mark.parametrize(
    ("audio", "says"),
    [
        ({**ENCODER, "max_source_positions": 1500}, "chunk_length"),
        ({**ENCODER, "num_mel_bins": 80}, "feature_size"),
    ],
)
def test_settings_that_the_encoder_cannot_take_stop_the_start(case: Tiny, audio: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        Family(case.folder, {"audio_config": audio})


def test_a_config_that_is_no_encoders_stops_the_start() -> None:
    for audio, says in (({"model_type": "whisper"}, "model_type"), ({"d_model": 30, "encoder_attention_heads": 4}, "no encoder")):
        with pytest.raises(CheckpointError, match=says):
            Vision.weights({"audio_config": audio})


def test_it_is_known_which_models_hear() -> None:
    assert {kind for kind in supported_types() if hasattr(find(kind), "prepare_sound")} == HEARING == set(types_that_take(AUDIO))
    assert set(types_that_take(IMAGE)) == set(supported_types()) - HEARING


def test_a_silent_config_means_what_it_means_in_transformers() -> None:
    full: Any = transformers.Qwen2AudioConfig()
    with torch.device("meta"):
        model = transformers.Qwen2AudioForConditionalGeneration(full)
    theirs = {
        name.removeprefix("model."): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if "audio_tower" in name or "projector" in name
    }
    assert Vision.weights({"model_type": "qwen2_audio"}) == theirs
