"""Parts of vision transformers with LayerNorms before each sum and biases everywhere, as CLIP and SigLIP have them.

Owns their shape as a vision_config says it, patches as rows, and the layers. Positions are its users' (_clip.py, _siglip.py).

Shape letters: B pictures (or tiles) of equal size, P patches, C channels, H and W pixels, D hidden size.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, cat, sigmoid

from streamserve.errors import CheckpointError
from streamserve.models.vision import Read

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}

# What a vision_config means where it is silent, by its model_type.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}


@dataclass(frozen=True, slots=True)
class VitSpec:
    """The shape of a transformer over patches."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    activation: str
    eps: float

    @property
    def side(self) -> int:
        """Patches along one side of a picture of the size it was trained at."""
        return self.image_size // self.patch_size


def read_vit(config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> VitSpec:
    """A vision_config. `defaults`: what it means where it is silent; None: what its model_type means. Raises CheckpointError."""
    known = {**(DEFAULTS[config["model_type"]] if defaults is None else defaults), **config}

    def number(key: str) -> int:
        value = known.get(key)
        if isinstance(value, list) and len(set(value)) == 1:  # InternVL writes [448, 448]
            value = value[0]
        if not isinstance(value, int) or value <= 0:
            raise CheckpointError(f"config.json: vision_config's {key} is {value!r}; a positive whole number is needed")
        return value

    spec = VitSpec(
        hidden_size=number("hidden_size"),
        intermediate_size=number("intermediate_size"),
        num_layers=number("num_hidden_layers"),
        num_heads=number("num_attention_heads"),
        num_channels=number("num_channels"),
        image_size=number("image_size"),
        patch_size=number("patch_size"),
        activation=activation_name(known["hidden_act"]),
        eps=float(known["layer_norm_eps"]),
    )
    if spec.hidden_size % spec.num_heads:
        raise CheckpointError(
            f"config.json: vision_config's hidden_size {spec.hidden_size} is not a multiple of its num_attention_heads"
        )
    return spec


def activation_name(name: Any) -> str:
    """A name that ACTIVATIONS has. Raises CheckpointError."""
    if name not in ACTIVATIONS:
        raise CheckpointError(f"config.json: an activation is {name!r}; supported are {', '.join(ACTIVATIONS)}")
    return str(name)


def patch_rows(pixels_BCHW: Tensor, patch_size: int) -> Tensor:
    """Each patch's numbers as one row, [B, P, C * patch_size²]: a convolution by whole patches is then a matrix product. Pixels
    beyond the last whole patch are left out, as by such a convolution."""
    num_pictures, channels, height, width = pixels_BCHW.shape
    rows, columns = height // patch_size, width // patch_size
    whole = pixels_BCHW[:, :, : rows * patch_size, : columns * patch_size]
    cut = whole.reshape(num_pictures, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(num_pictures, rows * columns, channels * patch_size**2)


class Linear:
    """A matrix product, with a bias unless `bias` is false; several that read the same input are joined."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, read: Read, *names: str, bias: bool = True) -> None:
        self._weight = cat([read(f"{name}.weight").flatten(1) for name in names])
        self._bias = cat([read(f"{name}.bias") for name in names]) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class Norm:
    """LayerNorm."""

    __slots__ = ("_bias", "_eps", "_weight")

    def __init__(self, read: Read, name: str, eps: float) -> None:
        self._weight, self._bias, self._eps = read(f"{name}.weight"), read(f"{name}.bias"), eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)


def linear_shapes(name: str, rows: int, columns: int, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Linear's weights."""
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Norm's weights."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def layer_shapes(spec: VitSpec, prefix: str, num_layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of the first `num_layers` layers."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(num_layers):
        at = f"{prefix}encoder.layers.{index}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear_shapes(f"{at}self_attn.{part}", hidden, hidden)
        shapes |= linear_shapes(f"{at}mlp.fc1", inner, hidden) | linear_shapes(f"{at}mlp.fc2", hidden, inner)
        shapes |= norm_shapes(f"{at}layer_norm1", hidden) | norm_shapes(f"{at}layer_norm2", hidden)
    return shapes


class _Layer:
    """Attention among the patches of a picture, then a perceptron; a norm before each."""

    __slots__ = ("_activate", "_down", "_norm1", "_norm2", "_num_heads", "_out", "_qkv", "_up")

    def __init__(self, spec: VitSpec, read: Read, at: str) -> None:
        self._num_heads, self._activate = spec.num_heads, ACTIVATIONS[spec.activation]
        self._norm1, self._norm2 = Norm(read, f"{at}layer_norm1", spec.eps), Norm(read, f"{at}layer_norm2", spec.eps)
        self._qkv = Linear(read, *(f"{at}self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")))
        self._out = Linear(read, f"{at}self_attn.out_proj")
        self._up, self._down = Linear(read, f"{at}mlp.fc1"), Linear(read, f"{at}mlp.fc2")

    def __call__(self, x_BPD: Tensor, mask_B11P: Tensor | None) -> Tensor:
        num_pictures, num_patches, hidden = x_BPD.shape
        qkv = self._qkv(self._norm1(x_BPD)).view(num_pictures, num_patches, 3, self._num_heads, hidden // self._num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B11P)
        x_BPD = x_BPD + self._out(mixed.transpose(1, 2).flatten(2))
        return x_BPD + self._down(self._activate(self._up(self._norm2(x_BPD))))


class Layers:
    """The first `num_layers` layers. Each may be asked for what it gives."""

    def __init__(self, spec: VitSpec, read: Read, prefix: str, num_layers: int) -> None:
        self._layers = [_Layer(spec, read, f"{prefix}encoder.layers.{index}.") for index in range(num_layers)]

    def __call__(self, x_BPD: Tensor, mask_BP: Tensor | None = None, *, keep: Collection[int] = ()) -> dict[int, Tensor]:
        """The stream behind as many layers as each of `keep` says (0: before the first), and behind the last. `mask_BP` is true
        where a patch may be looked at."""
        mask = None if mask_BP is None else mask_BP[:, None, None, :]
        kept = {0: x_BPD} if 0 in keep else {}
        for index, layer in enumerate(self._layers, 1):
            x_BPD = layer(x_BPD, mask)
            if index in keep:
                kept[index] = x_BPD
        kept[len(self._layers)] = x_BPD
        return kept
