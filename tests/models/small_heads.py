"""Small random models and heads for them, with head sizes that a GPU's kernels take; layouts as tiny_heads.py has them.

They are there to be compared, one runner with another. What a head must compute is told by tiny_heads.py.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from streamserve.models.decoder import decoder_weights, layer_weights
from streamserve.models.mimo import Model as Mimo
from streamserve.models.spec import Traits, read_spec

V, HIDDEN, INNER, DRAFT_V = 61, 32, 48, 24
CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": V,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def _save(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], seed: int, **more: Tensor) -> Path:
    """A checkpoint of random weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = dict(more)
    for name, shape in shapes.items():
        if len(shape) == 1 and not name.endswith("bias"):
            weights[name] = torch.rand(shape, generator=generator) + 0.5
        else:
            weights[name] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_target(folder: Path, kind: str) -> Path:
    if kind == "mtp":
        config = {**CONFIG, "model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
        spec = read_spec(config, Mimo.traits(config))
        return _save(folder, config, {**decoder_weights(spec), **Mimo.optional_weights(spec)}, 1)
    config = {**CONFIG, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return _save(folder, config, decoder_weights(read_spec(config, Traits())), 2)


def save_head(folder: Path, kind: str, **more: Any) -> Path:
    """An EAGLE-3 head: one as they are published, or, "eagle-own", with all the target's tokens and an embedding for them.
    `more`: of its config."""
    is_own = kind == "eagle-own"
    config = {
        **CONFIG,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
        "norm_before_residual": is_own,
        "tie_word_embeddings": is_own,
        **more,
    }
    if not is_own:
        config["draft_vocab_size"] = DRAFT_V
    spec = read_spec(config, Traits())
    shapes = {
        **layer_weights(spec, "midlayer.", input_size=2 * HIDDEN),
        "midlayer.hidden_norm.weight": (HIDDEN,),
        "fc.weight": (HIDDEN, len(config["eagle_aux_hidden_state_layer_ids"]) * HIDDEN),
        "norm.weight": (HIDDEN,),
    }
    if is_own:
        return _save(folder, config, {**shapes, "embed_tokens.weight": (spec.vocab_size, HIDDEN)}, 3)
    return _save(folder, config, {**shapes, "lm_head.weight": (DRAFT_V, HIDDEN)}, 3, d2t=torch.arange(DRAFT_V))  # token 2 i
