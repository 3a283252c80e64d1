"""Sequences of a batch one behind the other without padding, for networks that keep nothing between calls: products see real
tokens only, attention pads within groups of about the same length.

Owns the packing and attention over it. Knows no model family.

Shape letters: T tokens of the batch, B sequences, N sequences of a group, L length of its longest, H heads, K key/value heads,
D head size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# In a group every sequence has at least this part of the longest one's length. Attention is about a tenth of the work, and what
# is padded in vain half of a fifth of that; more groups would be more calls.
GROUP_FILL = 0.8


Read = Callable[[str], Tensor]  # a weight by its name in the folder, on the right device and in the right type


class Family(Protocol):
    """A network as config.json describes it, before its weights are read."""

    max_len: int
    vocab_size: int
    hidden_size: int
    first_position: int  # of the first token of a sequence
    default_pooling: str  # where the folder names none
    gpu_dtype: torch.dtype
    weights: Mapping[str, tuple[int, ...]]  # name in the folder and shape of all that is needed
    unused: tuple[str, ...]  # beginnings of names of what folders hold as well

    def load(self, read: Read, device: torch.device, dtype: torch.dtype) -> "Callable[[PackedBatch], Tensor]":
        """The network: a batch to the last hidden state of every token, [T, E]."""
        ...

    def load_head(self, read: Read) -> Callable[[Tensor], Tensor] | None:
        """The classification head: first tokens' states to logits; None without one."""
        ...


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


def pack(sequences: Sequence[tuple[Sequence[int], int | None]], device: torch.device, *, first_position: int = 0) -> PackedBatch:
    """A batch of (token ids, index from which they are of the second type, if they are). Longest first, none empty."""
    lengths = [len(ids) for ids, _ in sequences]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] > 0
    ids = torch.tensor([token for ids, _ in sequences for token in ids], dtype=torch.int64)
    ramp = torch.arange(lengths[0])
    positions = torch.cat([ramp[:length] for length in lengths]) + first_position
    types = None
    if any(second is not None for _, second in sequences):
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


def attend(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, groups: Sequence[Group], *, is_causal: bool) -> Tensor:
    """Attention within each sequence: [T, H, D]."""
    parts = [_attend(q_THD, k_TKD, v_TKD, group, is_causal) for group in groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, group: Group, is_causal: bool) -> Tensor:
    repeats = q_THD.shape[1] // k_TKD.shape[1]

    def spread(x_THD: Tensor) -> Tensor:
        x_THD = x_THD[group.begin : group.end]
        whole = group.index_NL is None
        x_NLHD = x_THD.view(group.num, group.max_len, *x_THD.shape[1:]) if whole else x_THD[group.index_NL]
        return x_NLHD.transpose(1, 2)

    k_NKLD, v_NKLD = spread(k_TKD), spread(v_TKD)
    if repeats > 1:
        k_NKLD, v_NKLD = k_NKLD.repeat_interleave(repeats, 1), v_NKLD.repeat_interleave(repeats, 1)
    # What stands behind a sequence in its group is behind all its tokens: looking back they do not see it.
    mask = None if is_causal or group.is_token_NL is None else group.is_token_NL[:, None, None, :]
    out_NHLD = F.scaled_dot_product_attention(spread(q_THD), k_NKLD, v_NKLD, attn_mask=mask, is_causal=is_causal)
    out_NLHD = out_NHLD.transpose(1, 2)
    return out_NLHD.flatten(0, 1) if group.is_token_NL is None else out_NLHD[group.is_token_NL]
