"""Gemma 3's language model: what its config means, and who refuses it. Parity with transformers: test_families.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from streamserve.errors import CheckpointError, ConfigError
from streamserve.kernels.impl.numba_decoder import refusal as packed_refusal
from streamserve.kernels.impl.triton_decoder import refusal as gpu_refusal
from streamserve.kernels.registry import Facts
from streamserve.models import find
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.network import choose_kernels
from streamserve.models.spec import ModelSpec, read_spec

# As google/gemma-3-1b-it has it: written before transformers 5.
PUBLISHED: dict[str, Any] = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}


def spec_of(config: dict[str, Any]) -> ModelSpec:
    return read_spec(config, find("gemma3_text").traits(config))


def test_old_and_new_config_mean_the_same() -> None:
    config: dict[str, Any] = transformers.AutoConfig.for_model(**PUBLISHED).to_dict()
    assert "rope_local_base_freq" not in config and "layer_types" in config
    assert spec_of(config) == spec_of(PUBLISHED)


def test_every_sixth_layer_sees_everything_and_the_head_is_tied() -> None:
    spec = spec_of(PUBLISHED)
    assert spec.window_layers == frozenset(range(26)) - {5, 11, 17, 23}
    assert (spec.sliding_window, spec.tie_embeddings) == (512, True)
    assert spec.local_rope is not None and (spec.rope.theta, spec.local_rope.theta) == (1e6, 1e4)


def test_stretched_rope_holds_for_layers_without_a_window_only() -> None:
    spec = spec_of({**PUBLISHED, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}})
    assert spec.inv_freq()[0][0] == pytest.approx(1 / 8) and spec.local_inv_freq()[0][0] == 1.0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_packed_and_gpu_kernels_refuse_it_with_a_reason(device: str) -> None:
    facts = Facts(device, "auto", spec_of(PUBLISHED), 16, "float32", frozenset({"Q4_1"}))
    reason = (packed_refusal if device == "cpu" else gpu_refusal)(facts)
    assert reason is not None and "only torch's network computes" in reason and "without a window" in reason


def test_a_gpu_start_ends_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    checkpoint = open_checkpoint(tmp_path, load_format="dummy")
    with pytest.raises(ConfigError, match=r"nothing can run network on cuda .*only torch's network computes"):
        choose_kernels(checkpoint, device="cuda")
    assert choose_kernels(checkpoint, device="cpu")["network"].name == "torch"


@pytest.mark.parametrize(
    ("key", "value"),
    [("final_logit_softcapping", 30.0), ("attn_logit_softcapping", 50.0), ("use_bidirectional_attention", True)],
)
def test_what_is_not_computed_is_refused(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=key):
        spec_of({**PUBLISHED, key: value})


def test_another_activation_is_refused() -> None:
    with pytest.raises(CheckpointError, match="hidden_act is 'silu'; supported is gelu_pytorch_tanh"):
        spec_of({**PUBLISHED, "hidden_activation": "silu"})
