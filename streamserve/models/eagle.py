"""EAGLE-3 heads (arXiv 2503.01840) in the layout in which they are published: a folder whose config.json says
LlamaForCausalLMEagle3. One decoder layer that reads the target's stream at three depths and the token behind it.

Owns that layout and the network that it makes. The layout (as the authors' code and SGLang's llama_eagle3.py have it):

    fc                     [E, 3 * target's hidden size]: the three streams to one feature
    midlayer               a decoder layer whose q, k and v read 2E: the normed embedding, then the normed feature
                           (input_layernorm, hidden_norm); the feature itself is what attention is added to
    norm, lm_head          [draft_vocab_size, E]; without lm_head the target's
    d2t                    for each of the head's tokens: the target's token, minus the head's; t2d is not needed
    embed_tokens           only where it is not the target's

The streams are those before layers 2, N / 2 and N - 3 of the target's N. A config may name others as
eagle_aux_hidden_state_layer_ids: at its top as vLLM counts (before this layer), under eagle_config as SGLang does (behind it).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.kernels.ops import Batch, NetworkParts, Packed, rope_angles
from streamserve.models import llama
from streamserve.models.decoder import Decoder, layer_weights
from streamserve.models.heads import FeatureNetwork
from streamserve.models.hf_folder import FolderSource
from streamserve.models.layers import Attention, GatedMLP, Loader
from streamserve.models.spec import ModelSpec, read_spec

ARCHITECTURE = "LlamaForCausalLMEagle3"
_TABLES = ("d2t", "t2d")


class EagleFile:
    """An open head, known to fit the target. Implements kernels.ops.Weights. Raises CheckpointError."""

    def __init__(self, folder: Path, target: ModelSpec) -> None:
        self._source = FolderSource(folder, tables=_TABLES)
        config = self._source.config
        _refuse_others(folder, config, self._source.sizes)
        spec = read_spec(config, llama.Model.traits(config))
        self.spec = replace(spec, num_layers=1)
        self.target = target
        self.is_normed_first = bool(config.get("norm_before_residual", False))
        self.layers = _layers(folder, config, target.num_layers)
        self.draft_vocab_size = int(config.get("draft_vocab_size") or spec.vocab_size)
        self.shown_size = int(config.get("target_hidden_size") or spec.hidden_size)
        self._shapes = self._wanted()
        self._check(folder)

    @property
    def path(self) -> Path:
        return self._source.path

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights that are loaded."""
        return sum(prod(shape) for name, shape in self._shapes.items() if name not in _TABLES)

    @property
    def borrows_head(self) -> bool:
        """Whether the head's last matrix is one of the target's."""
        has_own = self.has("embed_tokens.weight") and self.spec.tie_embeddings
        return not (self.has("lm_head.weight") or has_own)

    def has(self, name: str) -> bool:
        """Whether the folder holds this one of its own."""
        return name in self._shapes

    def tensor(self, name: str) -> Tensor:
        """See Weights."""
        return self._source.read(name)

    def load(self, name: str, out: Tensor) -> None:
        """See Weights."""
        self._source.load(name, out)

    def packed(self, name: str) -> Packed | None:
        """See Weights."""
        return None

    def finish(self) -> None:
        """All weights are loaded: give back the memory and threads that loading took."""
        self._source.finish()

    def _wanted(self) -> dict[str, tuple[int, ...]]:
        spec, held, hidden = self.spec, self._source.sizes, self.spec.hidden_size
        names = {
            **layer_weights(spec, "midlayer.", input_size=2 * hidden),
            "midlayer.hidden_norm.weight": (hidden,),
            "fc.weight": (hidden, len(self.layers) * self.shown_size),
            "norm.weight": (hidden,),
        }
        for name, shape in (
            ("embed_tokens.weight", (spec.vocab_size, hidden)),
            ("lm_head.weight", (self.draft_vocab_size, hidden)),
            ("d2t", (self.draft_vocab_size,)),
        ):
            if name in held:
                names[name] = shape
        return names

    def _check(self, folder: Path) -> None:
        held, target = self._source.sizes, self.target
        if self.spec.vocab_size != target.vocab_size or self.shown_size != target.hidden_size:
            raise CheckpointError(
                f"{folder} was trained for a model with {self.spec.vocab_size} tokens and hidden size {self.shown_size}; "
                f"the model served has {target.vocab_size} and {target.hidden_size}"
            )
        missing = sorted(set(self._shapes) - set(held))
        extra = sorted(set(held) - set(self._shapes) - {"t2d"})
        if missing or extra:
            parts = [f"{', '.join(names[:8])} {word}" for names, word in ((missing, "missing"), (extra, "unknown")) if names]
            raise CheckpointError(f"{folder} does not hold the weights of an EAGLE-3 head with its config: {'; '.join(parts)}")
        for name, shape in self._shapes.items():
            if self._source.shape(name) != shape:
                raise CheckpointError(f"{name} in {folder} has shape {self._source.shape(name)}; config asks for {shape}")
        if self.draft_vocab_size != target.vocab_size and not ("lm_head.weight" in held and "d2t" in held):
            raise CheckpointError(
                f"{folder} guesses {self.draft_vocab_size} of {target.vocab_size} tokens; it must hold lm_head.weight and d2t"
            )
        needs_target = [name for name in ("embed_tokens.weight", "lm_head.weight") if name not in held]
        if needs_target and self.spec.hidden_size != target.hidden_size:
            raise CheckpointError(
                f"{folder} lacks {', '.join(needs_target)}, and its hidden size {self.spec.hidden_size} is not the model's "
                f"{target.hidden_size}, so that the model's cannot take their place"
            )


def _refuse_others(folder: Path, config: Mapping[str, Any], held: Mapping[str, int]) -> None:
    architectures = config.get("architectures") or []
    if ARCHITECTURE not in architectures or "fc.weight" not in held:
        raise CheckpointError(
            f"{folder} is no EAGLE-3 head: its config.json says architectures {architectures}; supported is {ARCHITECTURE}, "
            "with weights fc, midlayer, norm and lm_head"
        )
    if config.get("num_hidden_layers", 1) != 1:
        raise CheckpointError(f"{folder} has {config['num_hidden_layers']} layers; EAGLE-3 heads of one layer are supported")
    for key in ("norm_before_fc", "fc_norm", "norm_output"):
        if config.get(key):
            raise CheckpointError(f"{folder}/config.json: {key} is {config[key]!r}; supported is false")


def _layers(folder: Path, config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if ids := config.get("eagle_aux_hidden_state_layer_ids"):
        layers = tuple(int(i) for i in ids)
    elif nested:
        layers = tuple(int(i) + 1 for i in nested)
    else:
        layers = (2, num_layers // 2, num_layers - 3)
    if list(layers) != sorted(set(layers)) or not all(0 <= layer <= num_layers for layer in layers):
        raise CheckpointError(
            f"{folder} reads the stream before layers {', '.join(map(str, layers))}; the model served has {num_layers} layers, "
            "and they must ascend"
        )
    return layers


def token_table(file: EagleFile) -> Tensor | None:
    """The target's token for each of the head's; None: they are the same. Raises CheckpointError."""
    if not file.has("d2t"):
        return None
    token_ids_V = torch.arange(file.draft_vocab_size) + file.tensor("d2t").long()
    if int(token_ids_V.min()) < 0 or int(token_ids_V.max()) >= file.spec.vocab_size:
        raise CheckpointError(f"d2t in {file.path} names tokens outside the vocabulary of {file.spec.vocab_size}")
    return token_ids_V


class EagleHead:
    """Implements heads.Head. `parts.shape` and `parts.weights` are the file's."""

    def __init__(self, parts: NetworkParts, file: EagleFile, target: FeatureNetwork) -> None:
        spec, loader = file.spec, Loader(parts, "")
        layer = loader.under("midlayer.")
        self.layers = file.layers
        self._is_normed_first = file.is_normed_first
        self._norm, self._eps, self._dtype = parts.ops["norm.rms"], spec.rms_norm_eps, parts.dtype
        freq, self._rope_factor = spec.inv_freq()
        self._inv_freq = torch.tensor(freq, dtype=torch.float32, device=parts.device)
        self._paged = parts.ops["attention.paged"](spec)
        self._embed: Callable[[Tensor], Tensor] = target.embed
        own_VE: Tensor | None = None
        if file.has("embed_tokens.weight"):
            own_VE = loader.tensor("embed_tokens.weight")
            self._embed = partial(F.embedding, weight=own_VE)
        if file.has("lm_head.weight"):
            self._head_VE = loader.tensor("lm_head.weight")
        elif own_VE is not None and spec.tie_embeddings:
            self._head_VE = own_VE
        else:
            assert isinstance(target, Decoder)  # OpenHead.needs has seen to it
            self._head_VE = target.embedding_VE if spec.tie_embeddings else target.head_VE
        self._join = loader.linear("fc", bias=False)
        self._token_norm_E, self._hidden_norm_E = layer.tensor("input_layernorm.weight"), layer.tensor("hidden_norm.weight")
        self._mlp_norm_E, self._last_norm_E = layer.tensor("post_attention_layernorm.weight"), loader.tensor("norm.weight")
        self._attention = Attention(layer.under("self_attn."), 0, self._paged)
        self._mlp = GatedMLP(layer.under("mlp."))
        self.token_ids_V = token_table(file)

    def features(self, shown_TX: Tensor) -> Tensor:
        """See Head."""
        return self._join.forward(shown_TX)

    def prepare(self, batch: Batch) -> Any:
        """See Head."""
        return self._paged.prepare(batch)

    def forward(self, features_TE: Tensor, token_ids_T: Tensor, positions_T: Tensor, prepared: Any) -> Tensor:
        """See Head."""
        angles = rope_angles(positions_T, self._inv_freq, self._rope_factor, self._dtype)
        embeds_TE = self._norm(self._embed(token_ids_T), self._token_norm_E, self._eps)
        normed_TE = self._norm(features_TE, self._hidden_norm_E, self._eps)
        x_TE = normed_TE if self._is_normed_first else features_TE
        x_TE = x_TE + self._attention.forward(torch.cat((embeds_TE, normed_TE), dim=-1), angles, prepared)
        return x_TE + self._mlp.forward(self._norm(x_TE, self._mlp_norm_E, self._eps))

    def logits(self, states_RE: Tensor) -> Tensor:
        """See Head."""
        return F.linear(self._norm(states_RE, self._last_norm_E, self._eps), self._head_VE).float()
