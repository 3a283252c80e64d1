"""What a network is, in numbers: ModelSpec, read from a config.json. Torch-free.

Owns the meaning of config.json keys. A GGUF file's metadata is first translated into the same keys (gguf_file.py).
Knows no weights and no tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, floor, log, pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamserve.errors import CheckpointError

Frequencies = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: base frequency and how it is stretched to longer contexts.

    kind "default", or "linear", "llama3", "yarn" with their parameters, or "factors": one divisor per frequency.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn
    factors: tuple[float, ...] = ()
    # M-RoPE (Qwen2-VL, arXiv 2409.12191): how many of a head's frequencies turn with the frame, the row and the column. Empty:
    # all turn with the position. `is_interleaved`: the three take turns over the frequencies (Qwen3-VL) instead of following
    # one another.
    sections: tuple[int, ...] = ()
    is_interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Traits:
    """What a family of models fixes by its code, so that config.json need not say it. `activation`, `tie_embeddings` and
    `rope_theta` are what a config means that is silent about them."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    num_mtp_layers: int = 0  # layers behind the others that predict tokens further ahead
    activation: str = "silu"
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    local_rope: Rope | None = None
    window_layers: frozenset[int] | None = None
    score_scale: float | None = None
    only_torch: str | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder. Implements kernels.ops.NetworkShape."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    eos_token_ids: frozenset[int]
    num_mtp_layers: int = 0
    local_rope: Rope | None = None  # of layers with a window; None: as all others
    window_layers: frozenset[int] | None = None  # layers that the sliding window holds for; None: all
    score_scale: float | None = None  # of attention; None: by the head size
    only_torch: str | None = None  # what of the layers only the family's own network computes; None: nothing

    @property
    def has_rotary_sections(self) -> bool:
        """A token has three rope positions (M-RoPE)."""
        return bool(self.rope.sections)

    def inv_freq(self) -> tuple[tuple[float, ...], float]:
        """RoPE: one angular frequency per pair of dimensions, and the factor on cos and sin."""
        return tuple(_inv_freq(self.rope, self.head_dim).tolist()), self.rope.attention_factor

    def local_inv_freq(self) -> tuple[tuple[float, ...], float]:
        """inv_freq() of layers with a window."""
        rope = self.local_rope or self.rope
        return tuple(_inv_freq(rope, self.head_dim).tolist()), rope.attention_factor

    def rope_axes(self) -> tuple[int, ...]:
        """M-RoPE: whether each frequency turns with the frame (0), row (1) or column (2). Empty: all turn with the position."""
        sections = self.rope.sections
        if not self.rope.is_interleaved:
            return tuple(axis for axis, count in enumerate(sections) for _ in range(count))
        return tuple(i % 3 if i < 3 * sections[i % 3] else 0 for i in range(sum(sections)))


def read_spec(config: Mapping[str, Any], traits: Traits, generation: Mapping[str, Any] | None = None) -> ModelSpec:
    """ModelSpec from the keys of config.json; `generation` is generation_config.json. Raises CheckpointError."""
    hidden, heads = _int(config, "hidden_size"), _int(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise CheckpointError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    activation = config.get("hidden_activation") or config.get("hidden_act") or traits.activation
    if activation != traits.activation and (activation, traits.activation) != ("swish", "silu"):
        raise CheckpointError(f"config.json: hidden_act is {activation!r}; supported is {traits.activation}")
    max_position = _int(config, "max_position_embeddings")
    head_dim = config.get("head_dim") or hidden // heads
    return ModelSpec(
        model_type=config["model_type"],
        num_layers=_int(config, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_int(config, "intermediate_size"),
        vocab_size=_int(config, "vocab_size"),
        max_position_embeddings=max_position,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_read_rope(config, max_position, head_dim, traits.rope_theta),
        tie_embeddings=bool(config.get("tie_word_embeddings", traits.tie_embeddings)),
        qkv_bias=traits.qkv_bias,
        o_bias=traits.o_bias,
        mlp_bias=traits.mlp_bias,
        qk_norm=traits.qk_norm,
        sliding_window=traits.sliding_window,
        eos_token_ids=_token_ids(config.get("eos_token_id")) | _token_ids((generation or {}).get("eos_token_id")),
        num_mtp_layers=traits.num_mtp_layers,
        local_rope=traits.local_rope,
        window_layers=traits.window_layers,
        score_scale=traits.score_scale,
        only_torch=traits.only_torch,
    )


def _int(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"config.json: {key} is {value!r}; a positive whole number is needed")
    return value


def _token_ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset((value,))


def _read_rope(config: Mapping[str, Any], max_position: int, head_dim: int, theta: float) -> Rope:
    # transformers 5 writes rope_parameters, by kind of layer where those differ; before, rope_theta stood beside rope_scaling.
    newer = config.get("rope_parameters") or {}
    given = {
        "rope_theta": config.get("rope_theta") or theta,
        **(config.get("rope_scaling") or {}),
        **newer.get("full_attention", newer),
    }
    rope = _read_stretch(config, given, max_position)
    sections = tuple(given.get("mrope_section") or ())
    if not sections:
        return rope
    if len(sections) != 3 or 2 * sum(sections) != head_dim:
        raise CheckpointError(
            f"config.json: mrope_section is {list(sections)}; three numbers whose sum is {head_dim // 2} are needed"
        )
    return replace(rope, sections=sections, is_interleaved=bool(given.get("mrope_interleaved")))


def _read_stretch(config: Mapping[str, Any], given: Mapping[str, Any], max_position: int) -> Rope:
    kind = given.get("rope_type") or given.get("type") or "default"
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor below 1 is not supported")
    theta = float(given.get("rope_theta") or 10000.0)
    factor = float(given.get("factor") or 1.0)
    original = int(given.get("original_max_position_embeddings") or max_position)
    match kind:
        case "default" | "mrope" | "dynamic":  # the last stretches beyond max_position only, where nothing is served
            return Rope(theta)
        case "linear":
            return Rope(theta, "linear", factor)
        case "llama3":
            return Rope(
                theta,
                "llama3",
                factor,
                original,
                low_freq_factor=float(given["low_freq_factor"]),
                high_freq_factor=float(given["high_freq_factor"]),
            )
        case "yarn":
            return Rope(
                theta,
                "yarn",
                factor,
                original,
                beta_fast=float(given.get("beta_fast") or 32.0),
                beta_slow=float(given.get("beta_slow") or 1.0),
                attention_factor=_yarn_attention_factor(given, factor),
                truncate=bool(given.get("truncate", True)),
            )
        case "factors":
            return Rope(theta, "factors", factors=tuple(given["factors"]))
    raise CheckpointError(f"config.json: rope type is {kind!r}; supported are default, dynamic, linear, llama3 and yarn")


def _yarn_attention_factor(given: Mapping[str, Any], factor: float) -> float:
    """Attention gets sharper with the stretch: 0.1 ln(factor) + 1 (the YaRN paper, section 3.4), unless config says."""

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(given["mscale"]) / scale(given["mscale_all_dim"])
    return scale(1.0)


def _inv_freq(rope: Rope, head_dim: int) -> Frequencies:
    """In float32 throughout, as transformers computes it: at position 8,000 one rounding more turns a head by 5e-4."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain: Frequencies = 1 / np.power(np.float32(rope.theta), exponents)
    match rope.kind:
        case "linear":
            return np.asarray(plain / rope.factor, dtype=np.float32)
        case "llama3":
            return _llama3(plain, rope)
        case "yarn":
            return _yarn(plain, rope, head_dim)
        case "factors":
            return np.asarray(plain / np.asarray(rope.factors), dtype=np.float32)
    return plain


def _llama3(plain: Frequencies, rope: Rope) -> Frequencies:
    """High frequencies stay, low ones are divided by `factor`, those between are blended."""
    turns = rope.original_max_position * plain / (2 * pi)
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return np.asarray(keep * plain + (1 - keep) * plain / rope.factor, dtype=np.float32)


def _yarn(plain: Frequencies, rope: Rope, head_dim: int) -> Frequencies:
    """Frequencies that turn often stay, those that turn seldom are divided by `factor`, with a linear ramp between."""

    def dimension_with(turns: float) -> float:
        return head_dim * log(rope.original_max_position / (turns * 2 * pi)) / (2 * log(rope.theta))

    low, high = dimension_with(rope.beta_fast), dimension_with(rope.beta_slow)
    if rope.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    stretched = np.clip((np.arange(len(plain), dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
    return np.asarray(plain / rope.factor * stretched + plain * (1 - stretched), dtype=np.float32)
