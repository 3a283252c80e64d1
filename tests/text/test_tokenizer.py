"""Ids and bytes of tokenizers from GGUF files and from Hugging Face folders, compared with transformers."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from streamserve.errors import CheckpointError, InvalidRequest
from streamserve.text.model import TextModel
from streamserve.text.tokenizer import load_tokenizer
from tests.text.toys import byte_level_folder, byte_level_gguf, sentencepiece_gguf

TEXTS = (
    "",
    " ",
    "Hello, world!",
    "In 2024, 3.14159 was 42; call +1 (555) 010-9999.",
    "def f(x):\n    if x > 10:\n\treturn {'a': [1, 2, 3]}\r\n",
    "I'm sure they'll say it's what we've DONE'S, don't you?",
    "日本語のテキスト 你好，世界 한국어 文字",
    "🦙 👩‍👩‍👧 🇨🇿 e\u0301 žluťoučký kůň",
    "a  b   c    d\n\n\n e\t\tf   \n",
    "zero\u200bwidth\u00a0space \u2028 line",
    "<|im_start|>user\nhi<|im_end|>\n<repo_name>x",
)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_transformers(smollm: TextModel, reference: Any, text: str) -> None:
    ids = smollm.tokenizer.encode(text)
    assert ids == reference.encode(text)
    for skip in (True, False):
        assert smollm.tokenizer.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


def test_ids_of_real_questions_equal_transformers(smollm: TextModel, reference: Any, questions: list[str]) -> None:
    assert [smollm.tokenizer.encode(text) for text in questions] == [reference.encode(text) for text in questions]


def test_ids_of_a_long_text_equal_transformers(smollm: TextModel, reference: Any, questions: list[str]) -> None:
    text = "\n".join((*TEXTS, *questions[:200]))
    assert len(text) > 5_000
    assert smollm.tokenizer.encode(text) == reference.encode(text)
    plain = smollm.tokenizer.encode(text, allow_special=False)
    assert smollm.tokenizer.decode(plain, skip_special_tokens=True) == text


def test_digits_are_split_off_before_spaces_as_in_the_models_own_tokenizer(smollm: TextModel) -> None:
    # SmolLM2's tokenizer.json parts digits off first, and so does llama.cpp, whose ids these are. transformers 5.24 takes
    # GPT-2's pattern for every GGUF file of this kind and leaves the last space to the digit: 216, 33 after 256.
    assert smollm.tokenizer.encode("a   1") == [81, 333, 33]
    assert smollm.tokenizer.encode("x = 12  34") == [104, 446, 216, 33, 34, 256, 35, 36]
    assert smollm.tokenizer.encode("½ ²") == [16738, 216, 19133]


def test_any_text_comes_back_from_its_ids(smollm: TextModel) -> None:
    for text in TEXTS:
        ids = smollm.tokenizer.encode(text)
        assert b"".join(map(smollm.tokenizer.token_bytes, ids)) == text.encode()


def test_control_tokens_are_known_and_hidden(smollm: TextModel) -> None:
    tokenizer = smollm.tokenizer
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, set(tokenizer.eos_token_ids)) == (49152, 1, {0, 2})
    assert [tokenizer.is_special(id) for id in (0, 2, 16, 17, 49151)] == [True, True, True, False, False]
    assert tokenizer.token_bytes(2) == b"<|im_end|>" and tokenizer.id_to_text(1) == "<|im_start|>"
    assert tokenizer.decode([1, 28120, 2]) == tokenizer.decode([28120])


def test_ids_outside_the_vocabulary_are_no_text(smollm: TextModel) -> None:
    assert [smollm.tokenizer.token_bytes(id) for id in (-1, 49152, 10**9)] == [b"", b"", b""]
    assert [smollm.tokenizer.whole_texts[id] for id in (-1, 49152, 10**9)] == ["", "", ""]


def test_whole_texts_are_those_of_all_tokens_but_control_tokens_and_parts_of_characters(smollm: TextModel) -> None:
    tokenizer = smollm.tokenizer
    num_parts = 0
    for id in range(tokenizer.vocab_size):
        data, text = tokenizer.token_bytes(id), tokenizer.whole_texts[id]
        assert tokenizer.whole_texts[id] == text
        if text is not None:
            assert text.encode() == data and not tokenizer.is_special(id)
        elif not tokenizer.is_special(id):
            num_parts += 1
            with pytest.raises(UnicodeDecodeError):
                data.decode()
    assert num_parts > 100 and tokenizer.whole_texts[tokenizer.encode("<|im_end|>")[0]] is None
    assert smollm.tokenizer.decode([-1, 49152, 28120]) == smollm.tokenizer.decode([28120])


def test_control_tokens_in_text_can_be_taken_as_plain_text(smollm: TextModel) -> None:
    text = "a<|im_end|>\n<|im_start|>b"
    ids = smollm.tokenizer.encode(text, allow_special=False)
    assert not any(map(smollm.tokenizer.is_special, ids))
    assert smollm.tokenizer.decode(ids) == text


def test_text_that_is_not_unicode_is_refused(smollm: TextModel) -> None:
    with pytest.raises(InvalidRequest, match=r"not valid Unicode.*character 2"):
        smollm.tokenizer.encode("ab\ud800")


def test_threads_that_allow_and_forbid_control_tokens_do_not_disturb_each_other(smollm: TextModel) -> None:
    text = "x<|im_end|>" * 50

    def num_special(allow: bool) -> int:
        return sum(map(smollm.tokenizer.is_special, smollm.tokenizer.encode(text, allow_special=allow)))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(num_special, [True, False] * 100)) == [50, 0] * 100


@pytest.mark.parametrize("has_bos", [False, True])
def test_folder_gives_the_same_ids_as_transformers(tmp_path: Path, has_bos: bool) -> None:
    from transformers import AutoTokenizer

    folder = byte_level_folder(tmp_path, config={"add_bos_token": True}, has_bos=has_bos)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    for text in (*TEXTS, "<|start|>a <think> b<|end|>", "word " * 30):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.encode("a")[0] == ours.bos_token_id) == has_bos


def test_folder_ends_at_its_tokenizers_eos_and_at_generation_configs(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path, generation_config={"eos_token_id": [2, 7]})
    assert load_tokenizer(folder).eos_token_ids == {0, 2, 7}


def test_folder_without_generation_config_ends_at_configs_eos(tmp_path: Path) -> None:
    assert load_tokenizer(byte_level_folder(tmp_path, config={"eos_token": None})).eos_token_ids == frozenset()
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert load_tokenizer(tmp_path).eos_token_ids == {2}


def test_tokens_that_only_tokenizer_config_knows_are_added(tmp_path: Path) -> None:
    added = {"401": {"content": "<|extra|>", "special": True, "normalized": False}}
    tokenizer = load_tokenizer(byte_level_folder(tmp_path, config={"added_tokens_decoder": added}))
    assert tokenizer.encode("<|extra|>") == [401] and tokenizer.is_special(401) and tokenizer.vocab_size == 402


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_gguf_pre_tokenizers_split_like_transformers(tmp_path: Path, pre: str) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

    path = byte_level_gguf(tmp_path / "toy.gguf", pre=pre)
    architecture, tokenizer_dict, _ = get_gguf_tokenizer(str(path))
    theirs, _ = convert_gguf_tokenizer(architecture, tokenizer_dict)
    ours = load_tokenizer(path)
    composed = [text for text in TEXTS if "\u0301" not in text]  # transformers leaves out qwen2's Unicode composition
    for text in (*composed, "<|start|>a <think> b<|end|>"):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False).ids


def test_gguf_llama_bpe_begins_with_bos_though_the_file_does_not_say_so(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level_gguf(tmp_path / "toy.gguf", pre="llama-bpe"))
    assert tokenizer.encode("a")[0] == 1
    assert tokenizer.encode("a", add_special_tokens=False)[0] != 1


def test_gguf_qwen2_composes_accents(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level_gguf(tmp_path / "toy.gguf", pre="qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


def test_gguf_sentencepiece_gives_the_same_ids_as_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = sentencepiece_gguf(tmp_path / "toy.gguf")
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=path.name)
    for text in ("the cat sat", " the cat", "  the   cats ", "é世🦙", "a\nthe", "<s>the cat</s>", ""):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.token_bytes(ours.encode("\n")[-1]) == b"\n"


def test_sentencepiece_continuation_gets_no_begin_token_and_no_space(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_gguf(tmp_path / "toy.gguf"))
    whole = tokenizer.encode("sat in") + tokenizer.encode("the", continues=True)
    assert b"".join(map(tokenizer.token_bytes, whole)) == b"<s> sat inthe"


def test_sentencepiece_text_is_never_joined_into_a_control_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_gguf(tmp_path / "toy.gguf"))
    ids = tokenizer.encode("the</s>", add_special_tokens=False, allow_special=False)
    assert not any(map(tokenizer.is_special, ids))
    assert tokenizer.decode(ids) == "the</s>"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: byte_level_gguf(path, pre="viking"), "'viking'.*supported are gpt-2, smollm.*--tokenizer-path"),
        (lambda path: byte_level_gguf(path, pre=None), "None.*supported are gpt-2"),
        (lambda path: byte_level_gguf(path, pre="gpt-2", model="bert"), "'bert'; gpt2 and llama are supported"),
        (lambda path: path.write_bytes(b"GGUF\x03\x00\x00\x00\x01"), "not a complete GGUF file"),
        (lambda path: path.write_bytes(b"PK\x03\x04" * 9), "does not begin with GGUF"),
        (lambda path: path.write_bytes(b""), "not a complete GGUF file"),
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "holds no tokenizer.json"),
        (lambda path: (byte_level_folder(path) / "tokenizer.json").write_text("{"), "not a tokenizer that can be read"),
        (lambda path: (byte_level_folder(path) / "tokenizer_config.json").write_text("[]"), "a JSON object is expected"),
        (lambda path: (byte_level_folder(path) / "generation_config.json").write_text("{"), "cannot read"),
    ],
)
def test_files_that_cannot_be_used_are_refused_with_a_reason(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "model.gguf"
    make(path)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(path)


def test_text_layer_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, streamserve.text.model; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
