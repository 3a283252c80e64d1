"""Layers of a checkpoint that predict the token after the next one (multi-token prediction, DeepSeek-V3, arXiv 2412.19437), in
the layout of MiMo-7B: model.mtp_layers.N, one decoder layer behind a projection of two normed inputs.

Owns the names of these weights and the network that they make. Of several layers only the first is used, again and again for
guesses further ahead. Shape letters: see kernels/ops.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.kernels.ops import Batch, NetworkParts, rope_angles
from streamserve.models.decoder import Decoder, Layer, layer_weights
from streamserve.models.layers import Attention, GatedMLP, Loader
from streamserve.models.spec import ModelSpec


def mtp_weights(spec: ModelSpec, index: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of one such layer."""
    at, hidden = f"model.mtp_layers.{index}.", spec.hidden_size
    norms = {f"{at}{name}.weight": (hidden,) for name in ("token_layernorm", "hidden_layernorm", "final_layernorm")}
    return {**layer_weights(spec, at), **norms, f"{at}input_proj.weight": (hidden, 2 * hidden)}


class MTPHead:
    """The first such layer of a checkpoint. Implements heads.Head; embedding, last norm and head are the target's."""

    token_ids_V: Tensor | None = None

    def __init__(self, parts: NetworkParts, target: Decoder) -> None:
        shape = parts.shape
        loader = Loader(parts, "model.mtp_layers.0.")
        self.layers = (shape.num_layers,)
        self._target = target
        self._norm, self._eps, self._dtype = parts.ops["norm.rms"], shape.rms_norm_eps, parts.dtype
        freq, self._rope_factor = shape.inv_freq()
        self._inv_freq = torch.tensor(freq, dtype=torch.float32, device=parts.device)
        self._attention = parts.ops["attention.paged"](shape)
        self._token_norm_E, self._hidden_norm_E = (
            loader.tensor("token_layernorm.weight"),
            loader.tensor("hidden_layernorm.weight"),
        )
        self._join = loader.linear("input_proj", bias=False)
        self._layer = Layer(loader, Attention(loader.under("self_attn."), 0, self._attention), GatedMLP(loader.under("mlp.")))
        self._last_norm_E = loader.tensor("final_layernorm.weight")

    def features(self, shown_TX: Tensor) -> Tensor:
        """See Head."""
        return self._target.last_norm(shown_TX)

    def prepare(self, batch: Batch) -> Any:
        """See Head."""
        return self._attention.prepare(batch)

    def forward(self, features_TE: Tensor, token_ids_T: Tensor, positions_T: Tensor, prepared: Any) -> Tensor:
        """See Head."""
        embeds_TE = self._norm(self._target.embed(token_ids_T), self._token_norm_E, self._eps)
        x_TE = self._join.forward(torch.cat((self._norm(features_TE, self._hidden_norm_E, self._eps), embeds_TE), dim=-1))
        x_TE = self._layer.forward(x_TE, rope_angles(positions_T, self._inv_freq, self._rope_factor, self._dtype), prepared)
        states_TE: Tensor = self._norm(x_TE, self._last_norm_E, self._eps)
        return states_TE

    def logits(self, states_RE: Tensor) -> Tensor:
        """See Head."""
        return F.linear(states_RE, self._target.head_VE).float()
