"""Tiny random networks that guess, in the layouts in which such are published, and what they must compute in plain torch.

The references know nothing of pages, chunks or joined matrices: whole sequences, one matrix after the other.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.models.tiny import SHAPE, build_reference

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, EPS = 48, 80, 97, 6, 2, 1e-5
DRAFT_VOCAB = 40
EAGLE_CONFIG: dict[str, Any] = {
    **SHAPE,
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "draft_vocab_size": DRAFT_VOCAB,
    "tie_word_embeddings": False,
    "rope_theta": 5000.0,
}


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    if len(shape) == 1:
        return torch.rand(shape, generator=generator) + 0.5
    return torch.randn(shape, generator=generator) * shape[1] ** -0.5


def _layer(generator: torch.Generator, at: str, read: int, *, has_bias: bool = False) -> dict[str, Tensor]:
    dim = HIDDEN // HEADS
    weights = {
        f"{at}self_attn.q_proj.weight": _random(generator, HEADS * dim, read),
        f"{at}self_attn.k_proj.weight": _random(generator, KV_HEADS * dim, read),
        f"{at}self_attn.v_proj.weight": _random(generator, KV_HEADS * dim, read),
        f"{at}self_attn.o_proj.weight": _random(generator, HIDDEN, HEADS * dim),
        f"{at}mlp.gate_proj.weight": _random(generator, INNER, HIDDEN),
        f"{at}mlp.up_proj.weight": _random(generator, INNER, HIDDEN),
        f"{at}mlp.down_proj.weight": _random(generator, HIDDEN, INNER),
        f"{at}input_layernorm.weight": _random(generator, HIDDEN),
        f"{at}post_attention_layernorm.weight": _random(generator, HIDDEN),
    }
    if has_bias:
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"{at}self_attn.{part}_proj.bias"] = _random(generator, heads * dim)
    return weights


def save_eagle(folder: Path, *, own_embedding: bool = False, config: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """An EAGLE-3 head for tiny.py's models, over every second and some more tokens; returns its weights."""
    generator = torch.Generator().manual_seed(11)
    weights = {
        **_layer(generator, "midlayer.", 2 * HIDDEN),
        "midlayer.hidden_norm.weight": _random(generator, HIDDEN),
        "fc.weight": _random(generator, HIDDEN, 3 * HIDDEN),
        "norm.weight": _random(generator, HIDDEN),
        "lm_head.weight": _random(generator, DRAFT_VOCAB, HIDDEN) * 4,
        "d2t": torch.arange(DRAFT_VOCAB),  # token 2 i
        "t2d": torch.arange(VOCAB) % 2 == 0,
    }
    if own_embedding:
        weights["embed_tokens.weight"] = _random(generator, VOCAB, HIDDEN)
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or EAGLE_CONFIG))
    return weights


def save_mimo(folder: Path, *, has_mtp: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """A MiMo checkpoint: Qwen2 and one layer that predicts further ahead. Returns transformers' Qwen2 and its weights."""
    model = build_reference("qwen2")
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(12)
    at = "model.mtp_layers.0."
    extra = {
        **_layer(generator, at, HIDDEN, has_bias=True),
        f"{at}token_layernorm.weight": _random(generator, HIDDEN),
        f"{at}hidden_layernorm.weight": _random(generator, HIDDEN),
        f"{at}input_proj.weight": _random(generator, HIDDEN, 2 * HIDDEN),
        f"{at}final_layernorm.weight": _random(generator, HIDDEN),
    }
    if has_mtp:
        save_file(extra, folder / "mtp.safetensors")
        (folder / "model.safetensors").rename(folder / "base.safetensors")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "mimo", "num_nextn_predict_layers": 1}))
    return model, extra


def streams(model: Any, tokens: list[int]) -> list[Tensor]:
    """The stream before every layer, and behind the last one after the last norm (as transformers gives it)."""
    with torch.inference_mode():
        found = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True).hidden_states
    return [states[0] for states in found]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def attention(x: Tensor, weights: dict[str, Tensor], at: str, theta: float) -> Tensor:
    """Causal self-attention over a whole sequence, rotated by place."""
    dim, count = HIDDEN // HEADS, len(x)

    def project(part: str, heads: int) -> Tensor:
        return F.linear(x, weights[f"{at}{part}_proj.weight"], weights.get(f"{at}{part}_proj.bias")).view(count, heads, dim)

    angles = torch.outer(torch.arange(count).float(), theta ** (-torch.arange(0, dim, 2).float() / dim))
    cos, sin = angles.cos().repeat(1, 2).unsqueeze(1), angles.sin().repeat(1, 2).unsqueeze(1)

    def turn(y: Tensor) -> Tensor:
        return y * cos + torch.cat((-y[..., dim // 2 :], y[..., : dim // 2]), -1) * sin

    q, k, v = turn(project("q", HEADS)), turn(project("k", KV_HEADS)), project("v", KV_HEADS)
    group = HEADS // KV_HEADS
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(group, 1)) * dim**-0.5
    scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), float("-inf"))
    out = torch.einsum("hts,shd->thd", scores.softmax(-1), v.repeat_interleave(group, 1))
    return F.linear(out.reshape(count, -1), weights[f"{at}o_proj.weight"])


def mlp(x: Tensor, weights: dict[str, Tensor], at: str) -> Tensor:
    gate, up = F.linear(x, weights[f"{at}gate_proj.weight"]), F.linear(x, weights[f"{at}up_proj.weight"])
    return F.linear(F.silu(gate) * up, weights[f"{at}down_proj.weight"])


def eagle_states(
    features: Tensor, tokens: list[int], weights: dict[str, Tensor], embedding: Tensor, *, is_normed_first: bool = False
) -> Tensor:
    """States of the pairs (feature i, token i), from features of E numbers."""
    normed = norm(features, weights["midlayer.hidden_norm.weight"])
    embeds = norm(embedding[tokens], weights["midlayer.input_layernorm.weight"])
    x = normed if is_normed_first else features
    x = x + attention(torch.cat((embeds, normed), -1), weights, "midlayer.self_attn.", EAGLE_CONFIG["rope_theta"])
    return x + mlp(norm(x, weights["midlayer.post_attention_layernorm.weight"]), weights, "midlayer.mlp.")


def mtp_states(hidden: Tensor, tokens: list[int], weights: dict[str, Tensor], embedding: Tensor) -> Tensor:
    """The same of a layer that predicts further ahead; `hidden` is what the head of the model reads."""
    at = "model.mtp_layers.0."
    embeds = norm(embedding[tokens], weights[f"{at}token_layernorm.weight"])
    x = F.linear(
        torch.cat((norm(hidden, weights[f"{at}hidden_layernorm.weight"]), embeds), -1), weights[f"{at}input_proj.weight"]
    )
    x = x + attention(norm(x, weights[f"{at}input_layernorm.weight"]), weights, f"{at}self_attn.", 10000.0)
    x = x + mlp(norm(x, weights[f"{at}post_attention_layernorm.weight"]), weights, f"{at}mlp.")
    return norm(x, weights[f"{at}final_layernorm.weight"])
