"""Heads on a GPU: EAGLE-3 heads and layers that predict several tokens, as eagle.py and mtp.py have them on a CPU, over the layer
of kernels/impl/triton_head.py.

Owns the protocol that drafters of a GPU see. Which weights there are is said by eagle.py and mtp.py. Imports triton: only those
who load a head onto a GPU import this.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.kernels.impl.triton_decoder import TritonDecoder, head_product
from streamserve.kernels.impl.triton_head import TritonHead
from streamserve.kernels.impl.triton_norm import embed, rms_norm
from streamserve.kernels.ops import NetworkParts, StepInputs
from streamserve.models.eagle import EagleFile, token_table


class DeviceHead(Protocol):
    """A head on a GPU. Every call only launches, so that it can be captured. See heads.Head."""

    @property
    def layers(self) -> tuple[int, ...]:
        """What it reads of the target: ops.Shown."""
        ...

    @property
    def hidden_size(self) -> int:
        """Of the target's stream."""
        ...

    @property
    def num_choices(self) -> int:
        """Tokens that it may guess."""
        ...

    @property
    def token_ids_V(self) -> Tensor | None:
        """The target's token (int32) for each of those; None: they are the same."""
        ...

    def features(self, shown_TX: Tensor) -> Tensor:
        """What stands for the target's stream in a pair: [T, E]."""
        ...

    def remember(self, features_TE: Tensor, inputs: StepInputs) -> None:
        """Keys and values of pairs, one for each token of `inputs`, which is the one behind the position."""
        ...

    def guess(self, features_RE: Tensor, inputs: StepInputs) -> Tensor:
        """The same of one pair per row, and their states: [R, E]."""
        ...

    def logits(self, states_RE: Tensor, out_RV: Tensor) -> None:
        """Float32, over the tokens that it may guess."""
        ...


class DeviceEagle(TritonHead):
    """Implements DeviceHead. `parts.shape` and `parts.weights` are the file's."""

    def __init__(self, parts: NetworkParts, file: EagleFile, target: TritonDecoder) -> None:
        spec = file.spec
        hidden, vocab = spec.hidden_size, spec.vocab_size
        super().__init__(parts, "midlayer.", input_size=2 * hidden)
        load = self._load
        self.layers, self.hidden_size, self.num_choices = file.layers, file.shown_size, file.draft_vocab_size
        self._is_normed_first = file.is_normed_first
        has_own = file.has("embed_tokens.weight")
        self._embedding_VE = load.joined([("embed_tokens", vocab)], hidden) if has_own else target.embedding_VE
        if file.has("lm_head.weight"):
            self._head_VE = load.joined([("lm_head", file.draft_vocab_size)], hidden)
        elif spec.tie_embeddings:
            self._head_VE = self._embedding_VE
        else:
            self._head_VE = target.head_VE
        self._join_EX = load.joined([("fc", hidden)], len(file.layers) * file.shown_size)
        self._hidden_norm_E = load.vector("midlayer.hidden_norm.weight", hidden)
        self._last_norm_E = load.vector("norm.weight", hidden)
        table = token_table(file)
        self.token_ids_V = None if table is None else table.to(parts.device, torch.int32)

    def features(self, shown_TX: Tensor) -> Tensor:
        """See DeviceHead."""
        return F.linear(shown_TX, self._join_EX)

    def join(self, features_TE: Tensor, tokens_T: Tensor) -> tuple[Tensor, Tensor]:
        """See TritonHead. The layer's first norm is that of the token."""
        embeds_TE = rms_norm(embed(tokens_T, self._embedding_VE), self._layer.attention_norm, self._eps)
        normed_TE = rms_norm(features_TE, self._hidden_norm_E, self._eps)
        return normed_TE if self._is_normed_first else features_TE, torch.cat((embeds_TE, normed_TE), dim=-1)

    def logits(self, states_RE: Tensor, out_RV: Tensor) -> None:
        """See DeviceHead."""
        self._logits(states_RE, self._last_norm_E, self._head_VE, out_RV)


class DeviceMTP(TritonHead):
    """Implements DeviceHead; embedding, last norm and head are the target's."""

    token_ids_V: Tensor | None = None

    def __init__(self, parts: NetworkParts, target: TritonDecoder) -> None:
        shape, at = parts.shape, "model.mtp_layers.0."
        super().__init__(parts, at)
        hidden = self.hidden_size = shape.hidden_size
        self.layers, self.num_choices = (shape.num_layers,), shape.vocab_size
        self._target = target
        self._token_norm_E = self._load.vector(f"{at}token_layernorm.weight", hidden)
        self._hidden_norm_E = self._load.vector(f"{at}hidden_layernorm.weight", hidden)
        self._join_EX = self._load.joined([(f"{at}input_proj", hidden)], 2 * hidden)
        self._last_norm_E = self._load.vector(f"{at}final_layernorm.weight", hidden)

    def features(self, shown_TX: Tensor) -> Tensor:
        """See DeviceHead."""
        return rms_norm(shown_TX, self._target.norm_E, self._eps)

    def join(self, features_TE: Tensor, tokens_T: Tensor) -> tuple[Tensor, Tensor]:
        """See TritonHead."""
        embeds_TE = rms_norm(embed(tokens_T, self._target.embedding_VE), self._token_norm_E, self._eps)
        normed_TE = rms_norm(features_TE, self._hidden_norm_E, self._eps)
        x_TE = F.linear(torch.cat((normed_TE, embeds_TE), dim=-1), self._join_EX)
        return x_TE, rms_norm(x_TE, self._layer.attention_norm, self._eps)

    def guess(self, features_RE: Tensor, inputs: StepInputs) -> Tensor:
        """See DeviceHead."""
        return rms_norm(super().guess(features_RE, inputs), self._last_norm_E, self._eps)

    def logits(self, states_RE: Tensor, out_RV: Tensor) -> None:
        """See DeviceHead."""
        head_product(states_RE, self._target.head_VE, out_RV)
