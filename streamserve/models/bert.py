"""The BERT family of encoders: BERT, RoBERTa and XLM-RoBERTa, in torch. Absolute positions, norms after each sum, full attention.

Owns their weights and arithmetic; knows no pooling and no queue. Batches are packed (packing.py).

Shape letters: T tokens of the batch, H heads, D head size, E hidden size.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.models.packing import Group, PackedBatch, Read, attend

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
# model_type -> (prefix of names where a head stands beside the network, whether positions begin behind the padding token's id)
FAMILIES: Mapping[str, tuple[str, bool]] = {
    "bert": ("bert.", False),
    "roberta": ("roberta.", True),
    "xlm-roberta": ("roberta.", True),
}


@dataclass(frozen=True, slots=True)
class BertSpec:
    """The shape of a network of this family. `first_position`: rows of the position table that no token uses."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    num_positions: int
    num_token_types: int
    layer_norm_eps: float
    activation: str
    first_position: int

    @property
    def max_len(self) -> int:
        """Most tokens of a sequence."""
        return self.num_positions - self.first_position


def read_bert_spec(config: Mapping[str, Any]) -> BertSpec:
    """BertSpec from the keys of config.json. Raises CheckpointError."""
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise CheckpointError(f"model_type {model_type!r} is no encoder known here; supported are {', '.join(FAMILIES)}")
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise CheckpointError(f"config.json: position_embedding_type is {positions!r}; supported is absolute")
    activation = config.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"config.json: hidden_act is {activation!r}; supported are {', '.join(_ACTIVATIONS)}")
    pad = config.get("pad_token_id")
    return BertSpec(
        model_type=model_type,
        num_layers=_int(config, "num_hidden_layers"),
        hidden_size=_int(config, "hidden_size"),
        num_heads=_int(config, "num_attention_heads"),
        intermediate_size=_int(config, "intermediate_size"),
        vocab_size=_int(config, "vocab_size"),
        num_positions=_int(config, "max_position_embeddings"),
        num_token_types=_int(config, "type_vocab_size"),
        layer_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
        activation=activation,
        first_position=(1 if pad is None else int(pad)) + 1 if FAMILIES[model_type][1] else 0,
    )


def _int(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"config.json: {key} is {value!r}; a positive whole number is needed")
    return value


def bert_weights(spec: BertSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, without the prefix."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (spec.vocab_size, hidden),
        "embeddings.position_embeddings.weight": (spec.num_positions, hidden),
        "embeddings.token_type_embeddings.weight": (spec.num_token_types, hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }
    for index in range(spec.num_layers):
        at = f"encoder.layer.{index}."
        for part, rows, columns in (
            ("attention.self.query", hidden, hidden),
            ("attention.self.key", hidden, hidden),
            ("attention.self.value", hidden, hidden),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", inner, hidden),
            ("output.dense", hidden, inner),
        ):
            shapes[f"{at}{part}.weight"], shapes[f"{at}{part}.bias"] = (rows, columns), (rows,)
        for part in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{at}{part}.weight"] = shapes[f"{at}{part}.bias"] = (hidden,)
    return shapes


class Linear:
    """A matrix product with a bias; several that read the same input are joined."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, read: Read, *names: str) -> None:
        self._weight = torch.cat([read(f"{name}.weight") for name in names])
        self._bias = torch.cat([read(f"{name}.bias") for name in names])

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class Norm:
    """LayerNorm."""

    __slots__ = ("_bias", "_eps", "_weight")

    def __init__(self, read: Read, name: str, eps: float) -> None:
        self._weight, self._bias, self._eps = read(f"{name}.weight"), read(f"{name}.bias"), eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)


class Layer:
    """Attention and feed-forward, each added to its input and normed."""

    def __init__(self, read: Read, at: str, spec: BertSpec) -> None:
        self._heads = spec.num_heads
        self._qkv = Linear(read, *(f"{at}attention.self.{part}" for part in ("query", "key", "value")))
        self._out = Linear(read, f"{at}attention.output.dense")
        self._attention_norm = Norm(read, f"{at}attention.output.LayerNorm", spec.layer_norm_eps)
        self._up, self._down = Linear(read, f"{at}intermediate.dense"), Linear(read, f"{at}output.dense")
        self._norm = Norm(read, f"{at}output.LayerNorm", spec.layer_norm_eps)
        self._activation = _ACTIVATIONS[spec.activation]

    def __call__(self, x_TE: Tensor, groups: Sequence[Group]) -> Tensor:
        q_THD, k_THD, v_THD = self._qkv(x_TE).view(len(x_TE), 3, self._heads, -1).unbind(1)
        attended_TE = attend(q_THD, k_THD, v_THD, groups, is_causal=False).flatten(1)
        x_TE = self._attention_norm(x_TE + self._out(attended_TE))
        return self._norm(x_TE + self._down(self._activation(self._up(x_TE))))


class Bert:
    """The network without a head. `read` gives weights by their names without the prefix."""

    def __init__(self, spec: BertSpec, read: Read) -> None:
        self._words_VE = read("embeddings.word_embeddings.weight")
        self._positions_PE = read("embeddings.position_embeddings.weight")
        self._types_SE = read("embeddings.token_type_embeddings.weight")
        self._norm = Norm(read, "embeddings.LayerNorm", spec.layer_norm_eps)
        self._layers = [Layer(read, f"encoder.layer.{index}.", spec) for index in range(spec.num_layers)]

    def __call__(self, batch: PackedBatch) -> Tensor:
        """The last hidden state of every token."""
        x_TE = F.embedding(batch.token_ids_T, self._words_VE) + F.embedding(batch.positions_T, self._positions_PE)
        if batch.types_T is None or len(self._types_SE) == 1:
            x_TE = x_TE + self._types_SE[0]
        else:
            x_TE = x_TE + F.embedding(batch.types_T, self._types_SE)
        x_TE = self._norm(x_TE)
        for layer in self._layers:
            x_TE = layer(x_TE, batch.groups)
        return x_TE


class BertFamily:
    """A folder of this family. Implements packing.Family. `num_labels` 0: without a classification head."""

    default_pooling = "mean"
    gpu_dtype = torch.float16

    def __init__(self, config: Mapping[str, Any], names: Collection[str], num_labels: int) -> None:
        self._spec = spec = read_bert_spec(config)
        self.max_len, self.vocab_size = spec.max_len, spec.vocab_size
        self.hidden_size, self.first_position = spec.hidden_size, spec.first_position
        prefix, _ = FAMILIES[spec.model_type]  # names begin with it where the folder was saved with a head
        self._prefix = prefix if f"{prefix}embeddings.word_embeddings.weight" in names else ""
        self._has_head = num_labels > 0
        self.weights: Mapping[str, tuple[int, ...]] = {
            **{self._prefix + name: shape for name, shape in bert_weights(spec).items()},
            **(self._head_weights(num_labels) if num_labels else {}),
        }
        self.unused: tuple[str, ...] = (f"{self._prefix}pooler.", "cls.", "lm_head.")  # heads of the pre-training

    def load(self, read: Read, device: torch.device, dtype: torch.dtype) -> Bert:
        """See Family."""
        return Bert(self._spec, lambda name: read(self._prefix + name))

    def load_head(self, read: Read) -> Callable[[Tensor], Tensor] | None:
        """See Family."""
        if not self._has_head:
            return None
        first, last = (Linear(read, name) for name in self._head_names())
        return lambda x_BE: last(torch.tanh(first(x_BE)))

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
