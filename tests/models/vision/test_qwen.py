"""Answers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL to pictures against transformers, through the engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from streamserve.media.families import find
from streamserve.media.family import Prepared
from streamserve.media.picture import Picture
from tests.models.vision import tiny_qwen
from tests.models.vision.parity import Asked, asked, check_parity, drawn, greedy, randomised, texts_of
from tests.models.vision.tiny_qwen import END, FAMILIES, IMAGE, START

PICTURES = (drawn(24, 40, 1), drawn(63, 33, 2), drawn(9, 60, 3), drawn(24, 40, 4))


def prompt_ids(pieces: Sequence[int | Prepared]) -> list[int]:
    """Words and pictures as the models' chat templates and transformers' processors write them."""
    ids: list[int] = []
    for piece in pieces:
        ids += [piece] if isinstance(piece, int) else [START, *[IMAGE] * piece.layout.num_tokens, END]
    return ids


def ask(family: str, model: Any, made: dict[Picture, Prepared], pieces: Sequence[int | Picture]) -> Asked:
    pictures = [piece for piece in pieces if isinstance(piece, Picture)]
    ids = prompt_ids([made[piece] if isinstance(piece, Picture) else piece for piece in pieces])
    patches, grids = tiny_qwen.processed(family, [one.pixels for one in pictures])
    kinds = (torch.tensor([ids]) == IMAGE).int()
    expected = greedy(model, ids, pixel_values=patches, image_grid_thw=grids, mm_token_type_ids=kinds)
    return asked(ids, IMAGE, [made[one] for one in pictures], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_transformers(family: str, tmp_path: Path) -> None:
    model = randomised(tiny_qwen.save(family, tmp_path), seed=2)
    model.save_pretrained(tmp_path)
    prepare = find(family)(tmp_path, model.config.to_dict()).prepare
    made = {one: prepare(one) for one in PICTURES}
    a, b, c, d = PICTURES
    prompts = [
        ask(family, model, made, pieces)
        for pieces in (
            (5, a, 6, 7),
            (5, d, 6, 7),  # of the same size
            (3, 4, b, 8, 9, 10, 11, c, 12),
            (a, a, 13, 14, 15, b),
        )
    ]
    check_parity(tmp_path, prompts, texts_of(model, IMAGE))
