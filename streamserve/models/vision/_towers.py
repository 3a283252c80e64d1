"""Which vision transformer stands before a projector, and which of its layers the projector reads, as config.json of the LLaVA
layout says them.

Owns vision_feature_layer and vision_feature_select_strategy. Layers behind the last one that is read are neither loaded nor run.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.models.vision import Read
from streamserve.models.vision._clip import Clip, clip_weights
from streamserve.models.vision._pixtral import DEFAULTS as PIXTRAL
from streamserve.models.vision._pixtral import Pixtral, pixtral_weights, read_pixtral
from streamserve.models.vision._siglip import Siglip, siglip_weights
from streamserve.models.vision._vit import VitSpec, read_vit

PREFIX = "vision_tower."
# What a config.json of LLaVA without a vision_config means.
ABSENT: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TYPES = ("clip_vision_model", "siglip_vision_model", "pixtral")


class Encoder(Protocol):
    """What Clip, Siglip and Pixtral are alike in."""

    def states(self, pixels_BCHW: Tensor, *, keep: Collection[int]) -> dict[int, Tensor]: ...


class TowerSpec:
    """What config.json says of the tower. Raises CheckpointError."""

    def __init__(self, config: Mapping[str, Any], *, absent: Mapping[str, Any] = ABSENT, layer: int = -2) -> None:
        """`absent`: what a config.json without vision_config means; `layer`: the layer read where none is named."""
        self._vision = {"model_type": "clip_vision_model", **(config.get("vision_config") or absent)}
        self.model_type = self._vision["model_type"]
        if self.model_type not in TYPES:
            raise CheckpointError(
                f"config.json: vision_config's model_type is {self.model_type!r}; behind model_type {config.get('model_type')} "
                f"are supported {', '.join(TYPES)}"
            )
        self.vit: VitSpec = read_vit(self._vision, PIXTRAL if self.model_type == "pixtral" else None)
        asked = config.get("vision_feature_layer", layer)
        self.depths = [self._depth(one) for one in (asked if isinstance(asked, list) else [asked])]
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy not in ("default", "full"):
            raise CheckpointError(
                f"config.json: vision_feature_select_strategy is {strategy!r}; supported are 'default' and 'full'"
            )
        self.drops_first = strategy == "default"
        if self.drops_first and self.model_type == "pixtral":
            raise CheckpointError("config.json: vision_feature_select_strategy is 'default'; a pixtral tower needs 'full'")

    @property
    def num_layers(self) -> int:
        """Layers that are run."""
        return max(self.depths)

    @property
    def width(self) -> int:
        """Numbers that the projector reads of each patch."""
        return self.vit.hidden_size * len(self.depths)

    def places_of(self, rows: int, columns: int) -> int:
        """Features of a picture of so many patches."""
        return rows * columns + int(self.model_type == "clip_vision_model") - int(self.drops_first)

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes."""
        match self.model_type:
            case "pixtral":
                return pixtral_weights(self.vit, PREFIX, num_layers=self.num_layers)
            case "siglip_vision_model":
                return siglip_weights(self.vit, PREFIX, num_layers=self.num_layers, post_norm=False)
        return clip_weights(self.vit, PREFIX, num_layers=self.num_layers)

    def load(self, read: Read, device: torch.device, dtype: torch.dtype) -> "Tower":
        """The tower with its weights."""
        encoder: Encoder
        match self.model_type:
            case "pixtral":
                theta = read_pixtral(self._vision)[1]
                encoder = Pixtral(self.vit, theta, read, PREFIX, num_layers=self.num_layers, device=device, dtype=dtype)
            case "siglip_vision_model":
                encoder = Siglip(self.vit, read, PREFIX, num_layers=self.num_layers, post_norm=False)
            case _:
                encoder = Clip(self.vit, read, PREFIX, num_layers=self.num_layers)
        return Tower(encoder, self)

    def _depth(self, asked: Any) -> int:
        """Layers behind which the stream is read. 0 is what goes into the first layer, -1 what comes out of the last."""
        count = self.vit.num_layers + 1
        if not isinstance(asked, int) or not -count <= asked < count:
            raise CheckpointError(f"config.json: vision_feature_layer is {asked!r}; allowed is {-count} to {count - 1}")
        return asked % count


class Tower:
    """An encoder of pictures, and what a projector reads of it."""

    def __init__(self, encoder: Encoder, spec: TowerSpec) -> None:
        self._encoder, self._spec = encoder, spec

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, P, width of the tower]; without the first one, CLIP's class token, if config.json says so."""
        states = self._encoder.states(pixels_BCHW, keep=frozenset(self._spec.depths))
        parts = [states[depth] for depth in self._spec.depths]
        features = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return features[:, 1:] if self._spec.drops_first else features
