"""Encoder models: a folder of the BERT family with what stands behind the network, which is pooling (sentence-transformers'
modules) or a classification head.

Owns where these folders are found, the meaning of their small JSON files, and the order of the parts. Knows no queue, no text
and no HTTP. Implements engine.embedder.Encoder; blocks: run it in a worker thread.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.messages import EncoderFacts, EncoderInput
from streamserve.models.bert import FAMILIES, Bert, Linear, PackedBatch, bert_weights, pack, read_bert_spec
from streamserve.models.checkpoint import locate
from streamserve.models.hf_folder import FolderSource, read_json

_POOLING = ("cls", "mean", "max", "mean_sqrt_len_tokens", "lasttoken")
_SQUASHED = "sigmoid"
_DENSE_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"Tanh": torch.tanh, "Identity": lambda x: x, "ReLU": F.relu}
# What folders hold beside the network they name: heads of the pre-training, and a pooler that pooling does not use.
_UNUSED = ("pooler.", "cls.", "lm_head.")

Step = Callable[[Tensor], Tensor]


def locate_encoder(name: str, revision: str | None = None) -> Path:
    """The folder behind a path, the name of an installed package, or a hub id (downloaded first). Raises CheckpointError."""
    if not Path(name).expanduser().exists() and (folder := _in_package(name)) is not None:
        return folder
    path = locate(name, revision=revision)
    if path.is_file():
        raise CheckpointError(f"{path} is a GGUF file; an embedding model is a folder with config.json, or a hub id")
    return path


def _in_package(name: str) -> Path | None:
    """The folder with config.json inside a package, found without running its code."""
    module = name.replace("-", "_")
    spec = find_spec(module) if module.isidentifier() else None
    for place in (spec.submodule_search_locations if spec is not None else None) or ():
        for pattern in ("config.json", "*/config.json"):
            for path in sorted(Path(place).glob(pattern)):
                if any(path.parent.glob("*.safetensors")):
                    return path.parent
    return None


class Encoder:
    """One loaded model."""

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype, threads: int = 1) -> None:
        self._source = FolderSource(folder)
        self._device, self._dtype, self._threads = device, dtype, threads
        config = self._source.config
        self._spec = read_bert_spec(config)
        self._prefix = self._find_prefix()
        is_classifier = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())
        labels, is_squashed = _labels(config) if is_classifier else ((), False)
        modules = _Modules(folder, self._spec.hidden_size) if not is_classifier else None
        self._check(
            {self._prefix + name: shape for name, shape in bert_weights(self._spec).items()}
            | (self._head_weights(len(labels)) if is_classifier else {})
        )
        self._head = self._read_head() if is_classifier else None
        self._network = Bert(self._spec, lambda name: self._read(self._prefix + name))
        self._pooling = modules.pooling if modules is not None else ""
        self._steps: list[Step] = [step(device) for step in modules.steps] if modules is not None else []
        self.facts = EncoderFacts(
            max_len=self._spec.max_len,
            vocab_size=self._spec.vocab_size,
            dimension=modules.dimension if modules is not None else 0,
            is_normalised=modules is not None and modules.is_normalised,
            labels=labels,
            is_squashed=is_squashed,
        )

    def enter_thread(self) -> None:
        """See engine.embedder.Encoder. torch takes this number for all threads that come after: who builds corrects that."""
        torch.set_num_threads(self._threads)

    @torch.inference_mode()
    def encode(self, inputs: Sequence[EncoderInput]) -> NDArray[np.float32]:
        """One row per input: its vector, or with a classification head its logits."""
        order = sorted(range(len(inputs)), key=lambda index: -len(inputs[index].token_ids))
        batch = pack([(inputs[index].token_ids, inputs[index].second_from) for index in order], self._spec, self._device)
        x_TE = self._network(batch)
        if self._head is not None:
            rows = self._head(x_TE[_starts(batch)]).float()
        else:
            rows = _pooled(self._pooling, x_TE, batch)
            for step in self._steps:
                rows = step(rows)
        found = np.empty(tuple(rows.shape), np.float32)
        found[order] = rows.cpu().numpy()
        return found

    # ---- loading ------------------------------------------------------------------------------------------------

    def _read(self, name: str) -> Tensor:
        return self._source.read(name).to(self._device, self._dtype)

    def _find_prefix(self) -> str:
        """Names begin with the family's prefix where the folder was saved with a head."""
        prefix, _ = FAMILIES[self._spec.model_type]
        return prefix if f"{prefix}embeddings.word_embeddings.weight" in self._source.sizes else ""

    def _head_names(self) -> tuple[str, str]:
        """The layers of a classification head. BERT's first one is its pooler, RoBERTa's belongs to the head."""
        if self._spec.model_type == "bert":
            return f"{self._prefix}pooler.dense", "classifier"
        return "classifier.dense", "classifier.out_proj"

    def _head_weights(self, num_labels: int) -> dict[str, tuple[int, ...]]:
        (first, last), hidden = self._head_names(), self._spec.hidden_size
        return {
            f"{first}.weight": (hidden, hidden),
            f"{first}.bias": (hidden,),
            f"{last}.weight": (num_labels, hidden),
            f"{last}.bias": (num_labels,),
        }

    def _read_head(self) -> Step:
        """Logits of the classes from the first token's state."""
        first, last = self._head_names()
        dense, out = Linear(self._read, first), Linear(self._read, last)
        return lambda x_BE: out(torch.tanh(dense(x_BE)))

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        held = self._source.sizes
        wrong = [f"{name} is missing" for name in shapes if name not in held]
        wrong += [
            f"{name} has shape {self._source.shape(name)}, config.json asks for {shape}"
            for name, shape in shapes.items()
            if name in held and self._source.shape(name) != shape
        ]
        wrong += [f"{name} is unknown" for name in held if name not in shapes and not self._is_unused(name)]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise CheckpointError(
                f"{self._source.path} does not hold the weights of a {self._spec.model_type} encoder: "
                f"{'; '.join(wrong[:4])}{more}"
            )

    def _is_unused(self, name: str) -> bool:
        return name.removeprefix(self._prefix).startswith(_UNUSED)


class _Modules:
    """modules.json of sentence-transformers: what becomes of the network's states. Without one: the mean, normalised."""

    def __init__(self, folder: Path, hidden_size: int) -> None:
        self.dimension = hidden_size
        self.pooling = "mean"
        self.is_normalised = False
        self.steps: list[Callable[[torch.device], Step]] = []
        path = folder / "modules.json"
        entries = _read_list(path) if path.is_file() else [{"type": "models.Normalize"}]
        for entry in entries:
            kind = str(entry.get("type", "")).rsplit(".", 1)[-1]
            place = folder / str(entry.get("path", ""))
            match kind:
                case "Transformer":
                    pass
                case "Pooling":
                    self.pooling = _pooling_mode(place / "config.json")
                case "Dense":
                    self._add_dense(place)
                case "Normalize":
                    self.is_normalised = True
                    self.steps.append(lambda device: _normalised)
                case _:
                    raise CheckpointError(
                        f"{path} names the module {kind!r}; supported are Transformer, Pooling, Dense, Normalize"
                    )

    def _add_dense(self, place: Path) -> None:
        config = read_json(place / "config.json")
        name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
        if name not in _DENSE_ACTIVATIONS:
            raise CheckpointError(
                f"{place}/config.json: activation_function is {name}; supported are {', '.join(_DENSE_ACTIVATIONS)}"
            )
        activation = _DENSE_ACTIVATIONS[name]
        source = FolderSource(place)
        self.dimension = int(config["out_features"])

        def step(device: torch.device) -> Step:
            weight = source.read("linear.weight").to(device, torch.float32)
            bias = source.read("linear.bias").to(device, torch.float32) if config.get("bias", True) else None
            return lambda rows: activation(F.linear(rows, weight, bias))

        self.steps.append(step)


def _read_list(path: Path) -> list[dict[str, Any]]:
    import orjson

    try:
        entries = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path} does not hold a list of modules")
    return entries


def _pooling_mode(path: Path) -> str:
    config = read_json(path)
    modes = [str(config["pooling_mode"])] if "pooling_mode" in config else []
    modes += [key.removeprefix("pooling_mode_") for key, value in config.items() if key.startswith("pooling_mode_") and value]
    modes = [mode.removesuffix("_tokens").removesuffix("_token") if mode not in _POOLING else mode for mode in modes]
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise CheckpointError(
            f"{path} asks for the pooling {' and '.join(modes) or 'none'}; supported is one of {', '.join(_POOLING)}"
        )
    return modes[0]


def _starts(batch: PackedBatch) -> Tensor:
    return batch.lengths_B.cumsum(0) - batch.lengths_B


def _pooled(mode: str, x_TE: Tensor, batch: PackedBatch) -> Tensor:
    """One float32 row per sequence."""
    match mode:
        case "cls":
            return x_TE[_starts(batch)].float()
        case "lasttoken":
            return x_TE[batch.lengths_B.cumsum(0) - 1].float()
        case "max":
            return torch.segment_reduce(x_TE.float(), "max", lengths=batch.lengths_B)
        case "mean":
            return torch.segment_reduce(x_TE.float(), "mean", lengths=batch.lengths_B)
    assert mode == "mean_sqrt_len_tokens"
    return torch.segment_reduce(x_TE.float(), "sum", lengths=batch.lengths_B) / batch.lengths_B.sqrt()[:, None]


def _normalised(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1)


def _labels(config: Mapping[str, Any]) -> tuple[tuple[str, ...], bool]:
    """Names of the classes, and whether each goes through a sigmoid by itself: where several may hold at once, and a single
    score unless the folder says else."""
    names = config.get("id2label") or {str(index): f"LABEL_{index}" for index in range(int(config.get("num_labels", 2)))}
    labels = tuple(str(names[key]) for key in sorted(names, key=int))
    given = (config.get("sentence_transformers") or {}).get("activation_fn") or config.get("sbert_ce_default_activation_function")
    if len(labels) > 1:
        return labels, config.get("problem_type") == "multi_label_classification"
    return labels, not str(given or _SQUASHED).endswith("Identity")
