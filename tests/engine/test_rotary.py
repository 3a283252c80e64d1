"""Positions of prompts with pictures as M-RoPE counts them, against transformers."""

from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch

from streamserve.engine.rotary import rotary_lead, rotary_positions
from streamserve.kernels.ops import rope_angles
from streamserve.messages import Media, Span
from streamserve.models import find
from streamserve.models.spec import ModelSpec, read_spec
from tests.models.vision import tiny_qwen

Piece = int | tuple[int, int, int]  # so many tokens of text, or a picture: frames, rows and columns of places

PROMPTS: dict[str, list[Piece]] = {
    "text": [7],
    "one picture": [4, (1, 3, 5), 6],
    "at the beginning": [(1, 2, 2), 3],
    "at the end": [3, (1, 6, 2)],
    "two with text between": [2, (1, 4, 3), 5, (1, 2, 9), 1],
    "one place": [2, (1, 1, 1), 2],
}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {family: tiny_qwen.build(family).model for family in tiny_qwen.FAMILIES}


def laid_out(pieces: list[Piece]) -> tuple[int, list[Media]]:
    counts = [piece if isinstance(piece, int) else piece[0] * piece[1] * piece[2] for piece in pieces]
    starts = [0, *accumulate(counts)]
    pictures = zip(starts, counts, pieces, strict=False)
    spans = [Span(start, count, piece) for start, count, piece in pictures if not isinstance(piece, int)]
    return starts[-1], [Media(b"", (span,), {}) for span in spans]


def by_transformers(model: Any, pieces: list[Piece], *, is_clip: bool = False) -> tuple[torch.Tensor, int]:
    num_prompt, media = laid_out(pieces)
    kinds = torch.zeros(1, num_prompt, dtype=torch.int64)
    for one in media:
        kinds[0, one.spans[0].start : one.spans[0].end] = 2 if is_clip else 1
    grids = torch.tensor([[frames, 2 * rows, 2 * columns] for frames, rows, columns in (one.spans[0].grid for one in media)])  # type: ignore[misc]
    name = "video_grid_thw" if is_clip else "image_grid_thw"
    positions, delta = model.get_rope_index(torch.zeros_like(kinds), kinds, **({name: grids} if media else {}))
    return positions[:, 0], int(delta)


@pytest.mark.parametrize("family", tiny_qwen.FAMILIES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_positions_are_transformers(family: str, prompt: str, models: dict[str, Any]) -> None:
    positions, shift = rotary_positions(*laid_out(PROMPTS[prompt]))
    expected, delta = by_transformers(models[family], PROMPTS[prompt])
    assert positions.tolist() == expected.tolist()
    assert shift == delta


def test_a_clip_counts_its_frames(models: dict[str, Any]) -> None:
    pieces: list[Piece] = [3, (3, 4, 5), 6]
    positions, shift = rotary_positions(*laid_out(pieces))
    expected, delta = by_transformers(models["qwen2_vl"], pieces, is_clip=True)
    assert positions.tolist() == expected.tolist()
    assert shift == delta


def test_frames_of_a_clip_lie_apart_as_their_times_do(models: dict[str, Any]) -> None:
    span = Span(2, 3 * 5 * 6, (3, 5, 6), frame_step=4 * 0.4)  # tokens_per_second * second_per_grid
    positions, _ = rotary_positions(95, [Media(b"", (span,), {})])
    kinds = torch.zeros(1, 95, dtype=torch.int64)
    kinds[0, span.start : span.end] = 2
    expected, _ = models["qwen2_5_vl"].get_rope_index(
        torch.zeros_like(kinds), kinds, video_grid_thw=torch.tensor([[3, 10, 12]]), second_per_grid_ts=torch.tensor([0.4])
    )
    assert positions.tolist() == expected[:, 0].tolist()


def test_text_behind_a_clip_of_many_frames_goes_on_behind_the_last_frame() -> None:
    """The paper's rule, and that of the models' authors. transformers 5 counts on from the larger side of a frame here, into the
    clip's own numbers, and from the end of the prompt on as we do."""
    positions, shift = rotary_positions(*laid_out([3, (9, 2, 2), 2]))
    assert positions[:, -2:].tolist() == [[12, 13]] * 3
    assert shift == 14 - (3 + 36 + 2)


@pytest.mark.parametrize("frame_step", [1.0, 4.0, 30.5])
def test_numbers_lead_by_as_much_as_a_clip_lasts_longer_than_its_places(frame_step: float) -> None:
    spans = (Span(2, 40, (10, 2, 2), frame_step), Span(45, 30, (1, 5, 6)), Span(80, 9, (3, 1, 3), frame_step))
    media = [Media(b"", (span,), {}) for span in spans]
    positions, shift = rotary_positions(95, media)
    assert rotary_lead(media) == max(0, shift)
    assert positions.max() <= 94 + rotary_lead(media)


def test_spans_of_one_media_may_have_text_between() -> None:
    media = Media(b"", (Span(2, 4, (1, 2, 2)), Span(9, 4, (1, 2, 2))), {})
    positions, _ = rotary_positions(15, [media])
    expected, _ = rotary_positions(15, [Media(b"", (span,), {}) for span in media.spans])
    assert np.array_equal(positions, expected)


def test_places_without_a_grid_count_like_tokens() -> None:
    positions, shift = rotary_positions(6, [Media(b"", (Span(2, 3),), {})])
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert shift == 0


def test_a_picture_right_behind_another_begins_behind_its_largest_number() -> None:
    positions, shift = rotary_positions(*laid_out([2, (1, 2, 3), (1, 1, 2), 1]))
    assert positions[0].tolist() == [0, 1] + [2] * 6 + [5] * 2 + [7]
    assert positions[2].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7]
    assert shift == 8 - 11


def spec_of(model_type: str, rope: dict[str, Any], head_dim: int) -> ModelSpec:
    config = {**tiny_qwen.TEXT, "model_type": model_type, "head_dim": head_dim, "rope_parameters": rope}
    return read_spec(config, find(model_type).traits(config))


@pytest.mark.parametrize(("family", "model_type"), [("qwen2_vl", "qwen2"), ("qwen2_5_vl", "qwen2"), ("qwen3_vl", "qwen3")])
def test_heads_turn_by_their_sections(family: str, model_type: str, models: dict[str, Any]) -> None:
    rope = tiny_qwen.TEXT_OF[family]["rope_parameters"]
    spec = spec_of(model_type, rope, 2 * sum(rope["mrope_section"]))
    positions, _ = rotary_positions(*laid_out(PROMPTS["two with text between"]))
    rope_3T = torch.from_numpy(positions.astype(np.int64))
    freq, factor = spec.inv_freq()
    ours = rope_angles(rope_3T, freq, factor, torch.float32, torch.tensor(spec.rope_axes()))
    expected = models[family].language_model.rotary_emb(torch.zeros(1), rope_3T.unsqueeze(1))
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted[0], atol=1e-6, rtol=0)


def test_published_sections_take_turns_over_the_frequencies() -> None:
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    axes = spec_of("qwen3", rope, 128).rope_axes()
    assert axes[:7] == (0, 1, 2, 0, 1, 2, 0)
    assert axes[-5:] == (2, 0, 0, 0, 0)
    assert [axes.count(axis) for axis in range(3)] == [24, 20, 20]
