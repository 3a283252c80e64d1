"""Answers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL to pictures and clips against transformers, through the engine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from streamserve.media.families import find
from streamserve.media.family import Prepared
from streamserve.media.picture import Picture
from tests.models.vision import tiny_qwen
from tests.models.vision.parity import Asked, asked, check_parity, drawn, greedy, randomised, texts_of
from tests.models.vision.tiny_qwen import END, FAMILIES, IMAGE, START, VIDEO

PICTURES = (drawn(24, 40, 1), drawn(63, 33, 2), drawn(9, 60, 3), drawn(24, 40, 4))
CLIP = tuple(drawn(24, 40, seed) for seed in range(5, 11))


@dataclass(frozen=True, eq=False)
class Frames:
    """A clip of these pictures, two a second, as media.video.Clip has it."""

    pictures: tuple[Picture, ...]
    seconds_apart: float = 0.5

    @property
    def digest(self) -> bytes:
        return b"".join(one.digest for one in self.pictures)

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(range(len(self.pictures)))

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(place * self.seconds_apart for place in self.places)

    height, width = 24, 40

    def frames(self) -> Iterator[Any]:
        return iter(one.pixels for one in self.pictures)


Piece = int | Picture | Frames  # of a prompt: a word, or what is shown


@dataclass(frozen=True)
class Case:
    """A saved model, and its family here."""

    family: str
    folder: Path
    model: Any

    def prepared(self, thing: Picture | Frames) -> Prepared:
        family: Any = find(self.family)(self.folder, self.model.config.to_dict())
        prepared: Prepared = family.prepare(thing) if isinstance(thing, Picture) else family.prepare_clip(thing)
        return prepared

    def ask(self, *pieces: Piece) -> Asked:
        """Words, pictures and clips as the models' chat templates and transformers' processors write them."""
        ids: list[int] = []
        things = [piece for piece in pieces if not isinstance(piece, int)]
        shown = {thing: self.prepared(thing) for thing in things}
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
                continue
            token, is_timed = (IMAGE, False) if isinstance(piece, Picture) else (VIDEO, self.family == "qwen3_vl")
            for at, run in enumerate(shown[piece].layout.runs):
                ids += [20 + at, 21] if is_timed else []
                ids += [START, *[token] * run.num_tokens, END]
        expected = greedy(self.model, ids, **self._inputs(ids, things))
        return asked([IMAGE if id == VIDEO else id for id in ids], IMAGE, [shown[thing] for thing in things], expected)

    def _inputs(self, ids: list[int], things: Sequence[Picture | Frames]) -> dict[str, Any]:
        kinds = torch.tensor([[{IMAGE: 1, VIDEO: 2}.get(id, 0) for id in ids]])
        given: dict[str, Any] = {"mm_token_type_ids": kinds}
        if pictures := [thing.pixels for thing in things if isinstance(thing, Picture)]:
            given["pixel_values"], given["image_grid_thw"] = tiny_qwen.processed(self.family, pictures)
        if clips := [thing for thing in things if not isinstance(thing, Picture)]:
            parts = [tiny_qwen.clip_patches(self.prepared(clip).inputs) for clip in clips]
            given["pixel_values_videos"] = torch.cat([patches for patches, _ in parts])
            given["video_grid_thw"] = torch.tensor([grid for _, grid in parts])
            if self.family == "qwen2_5_vl":
                given["second_per_grid_ts"] = torch.tensor([2 * clip.seconds_apart for clip in clips])
        return given


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    model = randomised(tiny_qwen.save(request.param, folder), seed=2)
    model.save_pretrained(folder)
    return Case(request.param, folder, model)


def test_answers_to_pictures_are_transformers(case: Case) -> None:
    a, b, c, d = PICTURES
    prompts = [
        case.ask(5, a, 6, 7),
        case.ask(5, d, 6, 7),  # of the same size
        case.ask(3, 4, b, 8, 9, 10, 11, c, 12),
        case.ask(a, a, 13, 14, 15, b),
    ]
    check_parity(case.folder, prompts, texts_of(case.model, IMAGE))


def test_answers_to_clips_are_transformers(case: Case) -> None:
    clip, odd, a = Frames(CLIP[:4]), Frames(CLIP[1:]), PICTURES[0]
    prompts = [case.ask(5, clip, 6, 7), case.ask(3, odd, 8, 9), case.ask(3, a, 4, clip, 10)]
    check_parity(case.folder, prompts, [])
