"""Embedding models: a folder's network with what stands behind it, which is pooling or a classification head.

Owns where these folders are found and the order of the parts. Knows no queue, no text and no HTTP. Implements
engine.embedder.Encoder; blocks: run it in a worker thread.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.messages import EncoderFacts, EncoderInput
from streamserve.models import supported_types
from streamserve.models.bert import FAMILIES, BertFamily
from streamserve.models.causal import CausalFamily
from streamserve.models.checkpoint import locate
from streamserve.models.hf_folder import FolderSource
from streamserve.models.packing import Family, pack
from streamserve.models.pooling import Modules, Step, first_tokens, pooled

_SQUASHED = "sigmoid"


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
    """One loaded model. `dtype` None: float32 on a CPU; on a GPU the half precision that suits the network."""

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype | None = None, threads: int = 1) -> None:
        self._source = source = FolderSource(folder)
        self._device, self._threads = device, threads
        is_classifier = any(name.endswith("ForSequenceClassification") for name in source.config.get("architectures") or ())
        labels, is_squashed = _labels(source.config) if is_classifier else ((), False)
        self._family = family = _family(source, len(labels))
        self._dtype = dtype or (torch.float32 if device.type == "cpu" else family.gpu_dtype)
        self._check()
        self.num_parameters = sum(prod(shape) for shape in family.weights.values())
        self._head = family.load_head(self._read)
        self._network = family.load(self._read, device, self._dtype)
        modules = None if is_classifier else Modules(folder, family.hidden_size, family.default_pooling)
        self._pooling = modules.pooling if modules is not None else ""
        self._steps: list[Step] = [step(device) for step in modules.steps] if modules is not None else []
        self.facts = EncoderFacts(
            max_len=family.max_len,
            vocab_size=family.vocab_size,
            dimension=modules.dimension if modules is not None else 0,
            is_normalised=modules is not None and modules.is_normalised,
            labels=labels,
            is_squashed=is_squashed,
        )

    def enter_thread(self) -> None:
        """See engine.embedder.Encoder. torch takes this number for all threads that come after: who builds corrects that. On a
        GPU the thread gets a stream of its own: on the LLM's it would wait for the LLM's steps."""
        torch.set_num_threads(self._threads)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the weights
            torch.cuda.set_stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def encode(self, inputs: Sequence[EncoderInput]) -> NDArray[np.float32]:
        """One row per input: its vector, or with a classification head its logits."""
        order = sorted(range(len(inputs)), key=lambda index: -len(inputs[index].token_ids))
        sequences = [(inputs[index].token_ids, inputs[index].second_from) for index in order]
        batch = pack(sequences, self._device, first_position=self._family.first_position)
        x_TE = self._network(batch)
        if self._head is not None:
            rows = self._head(x_TE[first_tokens(batch)]).float()
        else:
            rows = pooled(self._pooling, x_TE, batch)
            for step in self._steps:
                rows = step(rows)
        found = np.empty(tuple(rows.shape), np.float32)
        found[order] = rows.cpu().numpy()
        return found

    def _read(self, name: str) -> Tensor:
        return self._source.read(name).to(self._device, self._dtype)

    def _check(self) -> None:
        held, shapes = self._source.sizes, self._family.weights
        wrong = [f"{name} is missing" for name in shapes if name not in held]
        wrong += [
            f"{name} has shape {self._source.shape(name)}, config.json asks for {shape}"
            for name, shape in shapes.items()
            if name in held and self._source.shape(name) != shape
        ]
        wrong += [f"{name} is unknown" for name in held if name not in shapes and not name.startswith(self._family.unused)]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise CheckpointError(
                f"{self._source.path} does not hold the weights of the encoder in its config: {'; '.join(wrong[:4])}{more}"
            )


def _family(source: FolderSource, num_labels: int) -> Family:
    model_type = str(source.config.get("model_type"))
    if model_type in FAMILIES:
        return BertFamily(source.config, source.sizes, num_labels)
    if model_type.replace("-", "_") not in supported_types():
        known = ", ".join((*FAMILIES, *supported_types()))
        raise CheckpointError(f"model_type {model_type!r} is not supported for vectors; supported are {known}")
    if num_labels:
        raise CheckpointError(
            f"{source.path} is a classifier on {model_type}; classifiers of {', '.join(FAMILIES)} are supported"
        )
    return CausalFamily(source.config, source.sizes)


def _labels(config: Mapping[str, Any]) -> tuple[tuple[str, ...], bool]:
    """Names of the classes, and whether each goes through a sigmoid by itself: where several may hold at once, and a single
    score unless the folder says else."""
    names = config.get("id2label") or {str(index): f"LABEL_{index}" for index in range(int(config.get("num_labels", 2)))}
    labels = tuple(str(names[key]) for key in sorted(names, key=int))
    given = (config.get("sentence_transformers") or {}).get("activation_fn") or config.get("sbert_ce_default_activation_function")
    if len(labels) > 1:
        return labels, config.get("problem_type") == "multi_label_classification"
    return labels, not str(given or _SQUASHED).endswith("Identity")
