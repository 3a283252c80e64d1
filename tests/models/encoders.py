"""Small random encoders as transformers saves them, with sentence-transformers' modules beside them where wanted."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 120,
    "max_position_embeddings": 66,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "red", "green", "blue", "fox", "##es", "jump", "##s", "."]


def save_encoder(folder: Path, kind: str = "bert", *, labels: int = 0, has_head: bool = False, **more: Any) -> Any:
    """A model of that type with random weights, saved with a tokenizer; returns transformers' own. `labels`: a classifier;
    `has_head`: a decoder that generates."""
    torch.manual_seed(3)
    if labels:
        more["id2label"] = {index: f"class {index}" for index in range(labels)}
        more["label2id"] = {name: index for index, name in more["id2label"].items()}
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **more})
    auto: Any = transformers.AutoModelForSequenceClassification if labels else transformers.AutoModel
    if has_head:
        auto = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    return model


def tokenizer() -> Tokenizer:
    """WordPiece over WORDS."""
    found = Tokenizer(tokenizers.models.WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    found.normalizer, found.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return found


def add_modules(folder: Path, **pooling: Any) -> None:
    """modules.json with this pooling, and without normalising."""
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    (folder / "modules.json").write_text(json.dumps(modules))


def add_dense(folder: Path, rows: int, columns: int = 32, **config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A dense layer behind the pooling, then normalising; returns weight and bias."""
    place = folder / "2_Dense"
    place.mkdir()
    weight, bias = torch.randn(rows, columns), torch.randn(rows)
    safetensors.torch.save_file({"linear.weight": weight, "linear.bias": bias}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({"in_features": columns, "out_features": rows, "bias": True, **config}))
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    modules.append({"idx": 3, "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"})
    (folder / "modules.json").write_text(json.dumps(modules))
    return weight, bias
