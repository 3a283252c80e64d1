"""The recipe for eyes: the language model that it reads through is the one that a server runs, and what it saves is what
transformers computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from demo.lessons import NOTHING, Form
from demo.train_eyes import Eyes, Reader, Teacher
from streamserve.models.checkpoint import open_checkpoint
from tests.models.conftest import one_thread as one_thread
from tests.models.tiny import build_reference, reference_logits

FORM = Form(image_size=32, patch_size=16, num_text=20)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    build_reference("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_rows_of_several_conversations_are_read_as_each_would_be_alone(model: Path) -> None:
    torch.manual_seed(1)
    reference = build_reference("llama")
    heads = [(3, 4, 5), (3, 9)]
    reader = Reader(model, heads, FORM.length, torch.device("cpu"))
    rng = np.random.default_rng(2)
    shared, *parts = (rng.integers(3, 90, count).tolist() for count in (4, 6, 5))
    ids = torch.tensor([[*shared, *parts[0], *parts[1], 0, 0]])
    part = torch.tensor([[0] * 4 + [1] * 6 + [2] * 5 + [NOTHING] * 2])
    for system, head in enumerate(heads):
        start = len(head)
        position = torch.tensor([[*range(start, start + 10), *range(start + 4, start + 9), 0, 0]])
        with torch.no_grad():
            states = reader.states(torch.nn.functional.embedding(ids, reader.embedding_VE), position, part, system)
            logits = reader.logits(states)[0]
        for first, words in ((4, parts[0]), (10, parts[1])):
            wanted = reference_logits(reference, [*head, *shared, *words])[start + 4 :]
            torch.testing.assert_close(logits[first : first + len(words)], wanted, rtol=0, atol=1e-3)


def test_saved_eyes_are_what_transformers_computes(model: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    spec = open_checkpoint(model).spec
    eyes = Eyes(FORM, spec.hidden_size, width=32, num_layers=3, num_heads=2)
    eyes.save(tmp_path / "eyes", spec, 5)
    weights = load_file(tmp_path / "eyes" / "model.safetensors")
    assert all(weight.dtype == torch.float16 for weight in weights.values())
    eyes.load_state_dict(weights)
    config = LlavaConfig(**json.loads((tmp_path / "eyes" / "config.json").read_text()))
    llava = LlavaForConditionalGeneration(config).eval()
    missing = llava.model.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
    assert not missing.unexpected_keys and all(name.startswith("language_model.") for name in missing.missing_keys)
    pictures = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    pixels = pictures.permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        wanted = llava.model.get_image_features((pixels - 0.5) / 0.5).pooler_output
        torch.testing.assert_close(eyes.tell(eyes.see(pictures)), torch.stack(list(wanted)), rtol=1e-3, atol=1e-4)


def test_patches_are_labelled_with_what_they_show() -> None:
    teacher = Teacher.__new__(Teacher)
    torch.nn.Module.__init__(teacher)
    teacher._form = Form(image_size=64, patch_size=16, num_text=1)
    things = torch.full((1, 6, 5), float(NOTHING))
    things[0, 0] = torch.tensor([3, 7, 0.1, 0.1, 0.05])  # small, in the first patch
    things[0, 1] = torch.tensor([1, 2, 0.72, 0.75, 0.3])  # over the last four
    shape, colour, centre = teacher._on_patches({"things": things, "ground": torch.tensor([4])})
    assert shape.view(4, 4)[0].tolist() == [3, 11, 11, 11] and colour.view(4, 4)[0].tolist() == [7, 4, 4, 4]
    assert shape.view(4, 4)[2:, 2:].tolist() == [[1, 1], [1, 1]] and int(centre[0, 0]) == 0
