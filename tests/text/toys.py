"""Small tokenizers made on the spot, as files of either format."""

import json
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 2024, and they'll say we've done 12345 things!",
    "def add(a: int, b: int) -> int:\n    return a + b  # 1 + 2 == 3\n\n\n",
    "Žluťoučký kůň, naïve café — “quoted” … 世界 你好 🦙 ok?",
] * 3
WORDS = ["▁the", "▁cat", "▁sat", "th", "▁t", "he", "▁c", "at", "▁s", "▁ca", "▁▁", "s", "in", "ing", "▁in"]


def byte_level_folder(folder: Path, *, config: dict[str, Any] | None = None, has_bos: bool = False, **files: Any) -> Path:
    """A Hugging Face folder with a byte-level tokenizer that was trained on CORPUS. `files`: further JSON files by stem."""
    folder.mkdir(parents=True, exist_ok=True)
    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    rust.decoder = decoders.ByteLevel()
    specials = ["<|end|>", "<|start|>", "<|stop|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    rust.train_from_iterator(CORPUS, trainer)
    rust.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    if has_bos:
        rust.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    rust.enable_truncation(8)  # as some models' files have it; must not hold here
    rust.save(str(folder / "tokenizer.json"))
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|start|>", "eos_token": "<|end|>"}
    for stem, value in {"tokenizer_config": {**known, **(config or {})}, **files}.items():
        (folder / f"{stem}.json").write_text(json.dumps(value))
    return folder


def byte_level_gguf(path: Path, *, pre: str | None, model: str = "gpt2", temperature: float | None = None) -> Path:
    """A GGUF file with the same vocabulary and the given pre-tokenizer name."""
    folder = byte_level_folder(path.parent / "toy")
    content = json.loads((folder / "tokenizer.json").read_text())
    ordered = sorted((content["model"]["vocab"] | {"<think>": 400}).items(), key=lambda item: item[1])
    kinds = {"<|end|>": 3, "<|start|>": 3, "<|stop|>": 3, "<think>": 4}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if temperature is not None:
        writer.add_float32("general.sampling.temp", temperature)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in ordered])
    writer.add_token_types([kinds.get(token, 1) for token, _ in ordered])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    _save(writer)
    return path


def sentencepiece_gguf(path: Path, *, template: str | None = None) -> Path:
    """A GGUF file with a SentencePiece vocabulary: control tokens, one token per byte, letters and a few words."""
    letters = sorted({letter for word in WORDS for letter in word} | set("abcdefghijklmnopqrstuvwxyz/"))
    words = [word for word in WORDS if word not in letters]
    pieces = [("<unk>", 2, 0.0), ("<s>", 3, 0.0), ("</s>", 3, 0.0)]
    pieces += [(f"<0x{byte:02X}>", 6, 0.0) for byte in range(256)]
    pieces += [(word, 1, -float(n)) for n, word in enumerate([*words, "</", "s>"])]
    pieces += [(letter, 1, -1000.0 - n) for n, letter in enumerate([*letters, "<", ">"])]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in pieces])
    writer.add_token_types([kind for _, kind, _ in pieces])
    writer.add_token_scores([score for _, _, score in pieces])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    _save(writer)
    return path


def _save(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
