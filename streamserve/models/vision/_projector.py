"""LLaVA's projector: two matrix products with an activation between, from a tower's features to the language model's stream."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from streamserve.models.vision import Read
from streamserve.models.vision._vit import ACTIVATIONS, Linear, activation_name, linear_shapes

PREFIX = "multi_modal_projector."


def projector_weights(config: Mapping[str, Any], width: int, text_width: int, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes. `bias`: whether there are biases where config.json does not say."""
    bias = config.get("multimodal_projector_bias", bias)
    return linear_shapes(f"{PREFIX}linear_1", text_width, width, bias=bias) | linear_shapes(
        f"{PREFIX}linear_2", text_width, text_width, bias=bias
    )


class Projector:
    """The two products."""

    def __init__(self, config: Mapping[str, Any], read: Read, *, bias: bool = True) -> None:
        bias = config.get("multimodal_projector_bias", bias)
        self._activate = ACTIVATIONS[activation_name(config.get("projector_hidden_act", "gelu"))]
        self._first, self._second = Linear(read, f"{PREFIX}linear_1", bias=bias), Linear(read, f"{PREFIX}linear_2", bias=bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._second(self._activate(self._first(x)))
