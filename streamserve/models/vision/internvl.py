"""InternVL 2.5 and later in transformers' own layout (InternVL3-hf): a transformer over tiles, patches joined by squares, and
LLaVA's projector behind a norm.

Owns that transformer: a class token, positions interpolated to other sizes, and factors on what attention and perceptron give.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.models.vision import Read
from streamserve.models.vision import Vision as Base
from streamserve.models.vision._names import encoder_name, text_name
from streamserve.models.vision._pixels import normalised
from streamserve.models.vision._pixtral import RMSNorm
from streamserve.models.vision._projector import Projector, projector_weights
from streamserve.models.vision._text import text_config
from streamserve.models.vision._tiles import check_squares, joined_squares, of_pictures
from streamserve.models.vision._vit import ACTIVATIONS, Linear, Norm, VitSpec, linear_shapes, norm_shapes, patch_rows, read_vit

TOWER, PROJECTOR = "vision_tower.", "multi_modal_projector."
# What a vision_config means where it is silent.
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}


class _Spec:
    """What config.json says of the tower. Raises CheckpointError."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        vision = config.get("vision_config") or {}
        self.vit: VitSpec = read_vit(vision, DEFAULTS)
        self.qkv_bias = bool(vision.get("attention_bias", False))
        self.has_qk_norm = bool(vision.get("use_qk_norm", False))
        self.is_rms = vision.get("norm_type", "layer_norm") == "rms_norm"
        self.has_positions = bool(vision.get("use_absolute_position_embeddings", True))
        self.has_last_norm = not vision.get("use_mean_pooling", True)
        ratio = config.get("downsample_ratio", 0.5)
        self.side: int = round(1 / ratio)
        check_squares(self.vit.image_size, self.vit.patch_size, self.side)
        if config.get("vision_feature_layer", -1) != -1 or config.get("vision_feature_select_strategy", "default") != "default":
            raise CheckpointError(
                "config.json: vision_feature_layer and vision_feature_select_strategy are supported as -1 and 'default'"
            )

    @property
    def width(self) -> int:
        """Numbers that the projector reads of each place."""
        return self.vit.hidden_size * self.side**2

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes."""
        vit, hidden = self.vit, self.vit.hidden_size
        norm = _rms_shapes if self.is_rms else norm_shapes
        shapes: dict[str, tuple[int, ...]] = {
            f"{TOWER}embeddings.cls_token": (1, 1, hidden),
            f"{TOWER}embeddings.patch_embeddings.projection.weight": (hidden, vit.num_channels, vit.patch_size, vit.patch_size),
            f"{TOWER}embeddings.patch_embeddings.projection.bias": (hidden,),
        }
        if self.has_positions:
            shapes[f"{TOWER}embeddings.position_embeddings"] = (1, vit.side**2 + 1, hidden)
        if self.has_last_norm:
            shapes |= norm_shapes(f"{TOWER}layernorm", hidden)
        for index in range(vit.num_layers):
            at = f"{TOWER}encoder.layer.{index}."
            for part in ("q_proj", "k_proj", "v_proj"):
                shapes |= linear_shapes(f"{at}attention.{part}", hidden, hidden, bias=self.qkv_bias)
            if self.has_qk_norm:
                shapes |= _rms_shapes(f"{at}attention.q_norm", hidden) | _rms_shapes(f"{at}attention.k_norm", hidden)
            shapes |= linear_shapes(f"{at}attention.projection_layer", hidden, hidden)
            shapes |= norm(f"{at}layernorm_before", hidden) | norm(f"{at}layernorm_after", hidden)
            shapes |= linear_shapes(f"{at}mlp.fc1", vit.intermediate_size, hidden)
            shapes |= linear_shapes(f"{at}mlp.fc2", hidden, vit.intermediate_size)
            shapes |= {f"{at}lambda_1": (hidden,), f"{at}lambda_2": (hidden,)}
        return shapes


class Vision(Base):
    """Tower, joined squares, norm, projector."""

    text_name = staticmethod(text_name)
    encoder_name = staticmethod(encoder_name)

    @staticmethod
    def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
        return text_config(config, model_type="qwen2")

    @classmethod
    def weights(cls, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        spec = _Spec(config)
        norm = norm_shapes(f"{PROJECTOR}layer_norm", spec.width)
        return spec.weights() | norm | projector_weights({}, spec.width, cls.text_config(config)["hidden_size"])

    def __init__(self, config: Mapping[str, Any], read: Read, *, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        spec = _Spec(config)
        self._tower, self._side = _Tower(spec, read), spec.side
        self._norm = Norm(read, f"{PROJECTOR}layer_norm", 1e-5)
        self._projector = Projector({"projector_hidden_act": config.get("projector_hidden_act", "gelu")}, read)

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        states_NPD = self._tower(normalised(inputs, self._device, self._dtype))
        return of_pictures(self._projector(self._norm(joined_squares(states_NPD, self._side))), inputs)


class _Tower:
    """Tiles to the states of their patches."""

    def __init__(self, spec: _Spec, read: Read) -> None:
        self._vit = spec.vit
        self._patches = Linear(read, f"{TOWER}embeddings.patch_embeddings.projection")
        self._class_11D = read(f"{TOWER}embeddings.cls_token")
        self._positions_1PD = read(f"{TOWER}embeddings.position_embeddings") if spec.has_positions else None
        self._layers = [_Layer(spec, read, f"{TOWER}encoder.layer.{index}.") for index in range(spec.vit.num_layers)]
        self._last_norm = Norm(read, f"{TOWER}layernorm", spec.vit.eps) if spec.has_last_norm else None

    def __call__(self, pixels_NCHW: Tensor) -> Tensor:
        x_NPD = self._patches(patch_rows(pixels_NCHW, self._vit.patch_size))
        x_NPD = torch.cat((self._class_11D.expand(len(x_NPD), -1, -1), x_NPD), dim=1)
        if self._positions_1PD is not None:
            x_NPD = x_NPD + self._positions_of(*pixels_NCHW.shape[2:])
        for layer in self._layers:
            x_NPD = layer(x_NPD)
        return (x_NPD if self._last_norm is None else self._last_norm(x_NPD))[:, 1:]

    def _positions_of(self, height: int, width: int) -> Tensor:
        assert self._positions_1PD is not None
        side, rows, columns = self._vit.side, height // self._vit.patch_size, width // self._vit.patch_size
        if (rows, columns) == (side, side):
            return self._positions_1PD
        grid_1DRC = self._positions_1PD[:, 1:].transpose(1, 2).reshape(1, -1, side, side)
        other = F.interpolate(grid_1DRC, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat((self._positions_1PD[:, :1], other.flatten(2).transpose(1, 2)), dim=1)


class _Layer:
    """Attention, then a perceptron; a norm before each and a factor per number behind it."""

    def __init__(self, spec: _Spec, read: Read, at: str) -> None:
        vit = spec.vit
        norm: Callable[[Read, str, float], Callable[[Tensor], Tensor]] = RMSNorm if spec.is_rms else Norm
        self._num_heads, self._activate = vit.num_heads, ACTIVATIONS[vit.activation]
        self._before, self._after = norm(read, f"{at}layernorm_before", vit.eps), norm(read, f"{at}layernorm_after", vit.eps)
        self._qkv = Linear(read, *(f"{at}attention.{part}" for part in ("q_proj", "k_proj", "v_proj")), bias=spec.qkv_bias)
        self._qk_norm = (
            (RMSNorm(read, f"{at}attention.q_norm", 1e-6), RMSNorm(read, f"{at}attention.k_norm", 1e-6))
            if spec.has_qk_norm
            else None
        )
        self._out = Linear(read, f"{at}attention.projection_layer")
        self._up, self._down = Linear(read, f"{at}mlp.fc1"), Linear(read, f"{at}mlp.fc2")
        self._factor1_D, self._factor2_D = read(f"{at}lambda_1"), read(f"{at}lambda_2")

    def __call__(self, x_NPD: Tensor) -> Tensor:
        x_NPD = torch.addcmul(x_NPD, self._factor1_D, self._attend(self._before(x_NPD)))
        return torch.addcmul(x_NPD, self._factor2_D, self._down(self._activate(self._up(self._after(x_NPD)))))

    def _attend(self, x_NPD: Tensor) -> Tensor:
        q, k, v = self._qkv(x_NPD).chunk(3, dim=-1)
        if self._qk_norm is not None:
            q, k = self._qk_norm[0](q), self._qk_norm[1](k)
        q, k, v = (part.reshape(*part.shape[:2], self._num_heads, -1).transpose(1, 2) for part in (q, k, v))
        return self._out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _rms_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,)}
