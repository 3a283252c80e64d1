"""The BERT family of encoders: BERT, RoBERTa and XLM-RoBERTa, in torch. Absolute positions, norms after each sum, full attention.

Owns their weights and arithmetic; knows no pooling and no queue. Sequences of a batch stand one behind the other without
padding, so that all products see real tokens only; attention pads within groups of about the same length.

Shape letters: T tokens of the batch, B sequences, N sequences of a group, L length of its longest, H heads, D head size,
E hidden size, F feed-forward size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.errors import CheckpointError

# In a group every sequence has at least this part of the longest one's length. Attention is about a tenth of the work, and what
# is padded in vain half of a fifth of that; more groups would be more calls.
GROUP_FILL = 0.8
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

Read = Callable[[str], Tensor]  # a weight by its name, on the right device and in the right type


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


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring sequences that attention computes together. Without `index` they are all of one length."""

    begin: int
    end: int
    num: int
    max_len: int
    index_NL: Tensor | None = None  # the token at each place; anything where there is none
    is_token_NL: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences one behind the other, longest first."""

    token_ids_T: Tensor
    positions_T: Tensor
    types_T: Tensor | None  # None: all of type 0
    lengths_B: Tensor
    groups: tuple[Group, ...]


def pack(sequences: Sequence[tuple[Sequence[int], int | None]], spec: BertSpec, device: torch.device) -> PackedBatch:
    """A batch of (token ids, index from which they are of the second type, if they are). Longest first, none empty."""
    lengths = [len(ids) for ids, _ in sequences]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] > 0
    ids = torch.tensor([token for ids, _ in sequences for token in ids], dtype=torch.int64)
    ramp = torch.arange(lengths[0])
    positions = torch.cat([ramp[:length] for length in lengths]) + spec.first_position
    types = None
    if spec.num_token_types > 1 and any(second is not None for _, second in sequences):
        types = torch.cat([(ramp[:n] >= (n if s is None else s)).long() for n, (_, s) in zip(lengths, sequences, strict=True)])
        types = types.to(device)
    return PackedBatch(
        ids.to(device), positions.to(device), types, torch.tensor(lengths).to(device), tuple(_groups(lengths, device))
    )


def _groups(lengths: list[int], device: torch.device) -> list[Group]:
    starts = [0, *accumulate(lengths)]
    groups, first = [], 0
    for at in range(1, len(lengths) + 1):
        if at < len(lengths) and lengths[at] >= GROUP_FILL * lengths[first]:
            continue
        begin, end, longest = starts[first], starts[at], lengths[first]
        if lengths[at - 1] == longest:
            groups.append(Group(begin, end, at - first, longest))
        else:
            ramp = torch.arange(longest)
            is_token = ramp < torch.tensor(lengths[first:at])[:, None]
            index = ((torch.tensor(starts[first:at]) - begin)[:, None] + ramp).clamp_(max=end - begin - 1)
            groups.append(Group(begin, end, at - first, longest, index.to(device), is_token.to(device)))
        first = at
    return groups


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
        qkv_T3E = self._qkv(x_TE)
        parts = [self._attend(qkv_T3E[group.begin : group.end], group) for group in groups]
        x_TE = self._attention_norm(x_TE + self._out(parts[0] if len(parts) == 1 else torch.cat(parts)))
        return self._norm(x_TE + self._down(self._activation(self._up(x_TE))))

    def _attend(self, qkv: Tensor, group: Group) -> Tensor:
        if group.index_NL is not None:
            qkv = qkv[group.index_NL]
        q_NHLD, k_NHLD, v_NHLD = qkv.view(group.num, group.max_len, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        mask = None if group.is_token_NL is None else group.is_token_NL[:, None, None, :]
        out_NHLD = F.scaled_dot_product_attention(q_NHLD, k_NHLD, v_NHLD, attn_mask=mask)
        out_NLE = out_NHLD.transpose(1, 2).flatten(2)
        return out_NLE.flatten(0, 1) if group.is_token_NL is None else out_NLE[group.is_token_NL]


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
        x_TE = x_TE + (self._types_SE[0] if batch.types_T is None else F.embedding(batch.types_T, self._types_SE))
        x_TE = self._norm(x_TE)
        for layer in self._layers:
            x_TE = layer(x_TE, batch.groups)
        return x_TE
