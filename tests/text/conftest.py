"""What the text tests share: the default model's text side, and transformers' view of the same file."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from streamserve.default_model import find_default_model
from streamserve.text.model import TextModel, load_text_model

QUESTIONS = Path(__file__).parents[2] / ".." / "shared" / "data" / "mt_bench_questions.jsonl"


@pytest.fixture(scope="session")
def smollm() -> TextModel:
    return load_text_model(find_default_model())


@cache
def load_reference() -> Any:
    """The default model's tokenizer as transformers has it."""
    # AutoTokenizer yields the same object, but reads the file a second time for a model configuration: 4 s more.
    from transformers import PreTrainedTokenizerFast

    path = find_default_model()
    return PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)


@pytest.fixture(scope="session")
def reference() -> Any:
    return load_reference()


@pytest.fixture(scope="session")
def questions() -> list[str]:
    if not QUESTIONS.exists():
        pytest.skip(f"{QUESTIONS} is not there")
    return [turn for line in QUESTIONS.read_text().splitlines() for turn in json.loads(line)["turns"]]
