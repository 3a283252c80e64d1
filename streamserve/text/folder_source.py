"""Text parts of a Hugging Face folder: tokenizer.json and the small JSON files beside it.

Owns those files' names and the order in which they overrule each other. Knows nothing of requests.

Which tokens go around a text is tokenizer.json's word alone: like transformers 5, it overrules `add_bos_token` and
`add_eos_token` of tokenizer_config.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import tokenizers
from tokenizers import AddedToken

from streamserve.errors import CheckpointError
from streamserve.text.source import SAMPLING_DEFAULTS, TextSource

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_folder(folder: Path) -> TextSource:
    """Tokenizer, templates and defaults of a folder. CheckpointError when it holds no tokenizer.json."""
    config = _json(folder / "tokenizer_config.json")
    special = _special_tokens(folder, config)
    rust = _tokenizer(folder, config, special)
    eos = rust.token_to_id(special["eos_token"]) if "eos_token" in special else None
    defaults, ends = read_generation(folder)
    return TextSource(
        rust=rust,
        special_tokens=special,
        eos_token_ids=ends if eos is None else ends | {eos},
        templates=_templates(folder, config),
        sampling_defaults=defaults,
    )


def read_generation(folder: Path) -> tuple[dict[str, float], frozenset[int]]:
    """Sampling defaults and end-of-sequence ids that generation_config.json sets; without that file config.json's ids."""
    path = folder / "generation_config.json"
    generation = _json(path if path.exists() else folder / "config.json")
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = ()
    defaults = {name: generation[name] for name in SAMPLING_DEFAULTS if generation.get(name) is not None}
    return defaults if path.exists() else {}, frozenset([eos] if isinstance(eos, int) else eos)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    try:
        value = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; a JSON object is expected")
    return value


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    given = {**_json(folder / "special_tokens_map.json"), **config}
    texts = {name: given[name]["content"] if isinstance(given[name], dict) else given[name] for name in _NAMED if given.get(name)}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _tokenizer(folder: Path, config: Mapping[str, Any], special: Mapping[str, str]) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no tokenizer.json; give --tokenizer-path a folder that does "
            "(transformers' `AutoTokenizer.from_pretrained(...).save_pretrained(...)` writes one)"
        )
    try:
        rust = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every fault of the file
        raise CheckpointError(f"{path} is not a tokenizer that can be read: {error}") from error
    rust.no_truncation()
    rust.no_padding()
    _add_missing_tokens(rust, config, special)
    return rust


def _add_missing_tokens(rust: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Tokens that only tokenizer_config.json knows; and the named special tokens count as special whatever the files say."""
    for _, entry in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if rust.token_to_id(entry["content"]) is None:
            flags = {name: entry[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in entry}
            rust.add_tokens([AddedToken(entry["content"], **flags)])
    already = {token.content for token in rust.get_added_tokens_decoder().values() if token.special}
    rust.add_special_tokens([AddedToken(text, normalized=False) for text in special.values() if text not in already])


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; a file of their own overrules tokenizer_config.json."""
    inline = _json(folder / "chat_template.json").get("chat_template") or config.get("chat_template") or {}
    if isinstance(inline, str):
        inline = {"default": inline}
    templates = dict(inline) if isinstance(inline, dict) else {entry["name"]: entry["template"] for entry in inline}
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    return templates | {name: path.read_text("utf-8") for name, path in files.items()}
