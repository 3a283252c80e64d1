"""Qwen2-Audio (arXiv 2407.10759): Whisper's encoder, means of pairs of what it gives, and a projector of one product.

Owns its layers and what its config.json leaves out. It hears and sees nothing; what an encoder is, is the same.

Shape letters: F frames of the spectrogram, M mel filters, T steps, D hidden size, N places, X width of the language model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.models.vision import Read
from streamserve.models.vision import Vision as Base
from streamserve.models.vision._names import text_name
from streamserve.models.vision._pixels import to_device
from streamserve.models.vision._text import text_config
from streamserve.models.vision._vit import ACTIVATIONS, Linear, Norm, activation_name, linear_shapes, norm_shapes

TOWER, PROJECTOR = "audio_tower.", "multi_modal_projector.linear"
EPS = 1e-5
# What an audio_config means where it is silent.
DEFAULTS: Mapping[str, Any] = {
    "num_mel_bins": 128,
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "max_source_positions": 1500,
    "activation_function": "gelu",
}
KIND = "qwen2_audio_encoder"


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """The encoder's numbers."""

    num_filters: int
    hidden_size: int
    num_layers: int
    num_heads: int
    inner_size: int
    max_steps: int
    activation: str


def read_encoder(config: Mapping[str, Any]) -> EncoderSpec:
    """An audio_config. Raises CheckpointError."""
    known = {**DEFAULTS, **(config.get("audio_config") or {})}
    if known.get("model_type", KIND) != KIND:
        raise CheckpointError(f"config.json: audio_config's model_type is {known['model_type']!r}; supported is {KIND!r}")
    numbers = [known[key] for key in DEFAULTS if key != "activation_function"]
    if (
        not all(isinstance(number, int) and number > 0 for number in numbers)
        or known["d_model"] % known["encoder_attention_heads"]
    ):
        raise CheckpointError(f"config.json: audio_config's numbers are {numbers}, which are no encoder's")
    return EncoderSpec(
        num_filters=known["num_mel_bins"],
        hidden_size=known["d_model"],
        num_layers=known["encoder_layers"],
        num_heads=known["encoder_attention_heads"],
        inner_size=known["encoder_ffn_dim"],
        max_steps=known["max_source_positions"],
        activation=activation_name(known["activation_function"]),
    )


class _Layer:
    """Attention among all steps, then a perceptron; a norm before each. Keys have no bias."""

    def __init__(self, spec: EncoderSpec, read: Read, at: str, no_bias: Tensor) -> None:
        self._num_heads, self._activate = spec.num_heads, ACTIVATIONS[spec.activation]
        self._norm1, self._norm2 = Norm(read, f"{at}self_attn_layer_norm", EPS), Norm(read, f"{at}final_layer_norm", EPS)
        keyed: Read = lambda name: no_bias if name.endswith("k_proj.bias") else read(name)  # noqa: E731
        self._qkv = Linear(keyed, *(f"{at}self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")))
        self._out = Linear(read, f"{at}self_attn.out_proj")
        self._up, self._down = Linear(read, f"{at}fc1"), Linear(read, f"{at}fc2")

    def __call__(self, x_TD: Tensor) -> Tensor:
        num_steps, hidden = x_TD.shape
        q, k, v = (
            self._qkv(self._norm1(x_TD)).view(1, num_steps, 3, self._num_heads, hidden // self._num_heads).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        x_TD = x_TD + self._out(mixed[0].transpose(0, 1).flatten(1))
        return x_TD + self._down(self._activate(self._up(self._norm2(x_TD))))


class Vision(Base):
    """A Vision that hears."""

    text_name = staticmethod(text_name)

    @staticmethod
    def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
        return text_config(config, model_type="qwen2")

    @staticmethod
    def encoder_name(name: str) -> str | None:
        own = name.removeprefix("model.")
        return own if own.startswith((TOWER, PROJECTOR)) else None

    @classmethod
    def weights(cls, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        spec = read_encoder(config)
        hidden, inner = spec.hidden_size, spec.inner_size
        shapes: dict[str, tuple[int, ...]] = {
            f"{TOWER}conv1.weight": (hidden, spec.num_filters, 3),
            f"{TOWER}conv1.bias": (hidden,),
            f"{TOWER}conv2.weight": (hidden, hidden, 3),
            f"{TOWER}conv2.bias": (hidden,),
            f"{TOWER}embed_positions.weight": (spec.max_steps, hidden),
        }
        for index in range(spec.num_layers):
            at = f"{TOWER}layers.{index}."
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= linear_shapes(f"{at}self_attn.{part}", hidden, hidden, bias=part != "k_proj")
            shapes |= linear_shapes(f"{at}fc1", inner, hidden) | linear_shapes(f"{at}fc2", hidden, inner)
            shapes |= norm_shapes(f"{at}self_attn_layer_norm", hidden) | norm_shapes(f"{at}final_layer_norm", hidden)
        shapes |= norm_shapes(f"{TOWER}layer_norm", hidden)
        return shapes | linear_shapes(PROJECTOR, cls.text_config(config)["hidden_size"], hidden)

    def __init__(self, config: Mapping[str, Any], read: Read, *, device: torch.device, dtype: torch.dtype) -> None:
        spec = read_encoder(config)
        self._device, self._dtype = device, dtype
        self._conv1, self._conv2 = ((read(f"{TOWER}{name}.weight"), read(f"{TOWER}{name}.bias")) for name in ("conv1", "conv2"))
        self._positions_TD = read(f"{TOWER}embed_positions.weight")
        no_bias = torch.zeros(spec.hidden_size, dtype=dtype, device=device)
        self._layers = [_Layer(spec, read, f"{TOWER}layers.{index}.", no_bias) for index in range(spec.num_layers)]
        self._norm = Norm(read, f"{TOWER}layer_norm", EPS)
        self._project = Linear(read, PROJECTOR)

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """One by one: they have many lengths, and each is work enough."""
        return [self._embeddings(to_device(one["mel_FM"], self._device).to(self._dtype)) for one in inputs]

    def _embeddings(self, mel_FM: Tensor) -> Tensor:
        num_steps = len(mel_FM) // 2  # behind them is a frame for the last step to look at, where the window has one
        x_DF = F.gelu(F.conv1d(mel_FM.T[None], *self._conv1, padding=1))
        x_DT = F.gelu(F.conv1d(x_DF, *self._conv2, stride=2, padding=1))[0, :, :num_steps]
        x_TD = x_DT.T + self._positions_TD[:num_steps]
        for layer in self._layers:
            x_TD = layer(x_TD)
        pairs_ND = x_TD[: num_steps // 2 * 2].view(num_steps // 2, 2, -1).mean(dim=1)
        return self._project(self._norm(pairs_ND))
