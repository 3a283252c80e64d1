"""Tiny random vision models of Qwen's families, made with transformers, and what its processor makes of pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from streamserve.media.picture import Picture

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IMAGE, VIDEO, START, END = 91, 92, 93, 94  # tokens
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}
TEXT_OF: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}},
    "qwen2_5_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 3, 2]}},
    "qwen3_vl": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    },
}
VISION_OF: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    "qwen2_5_vl": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_heads": 2,
        "out_hidden_size": 48,
        "patch_size": 4,
        "window_size": 24,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_heads": 2,
        "out_hidden_size": 48,
        "patch_size": 4,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
    },
}


def build(family: str, *, is_tied: bool = False) -> Any:
    """A random float32 model; norms and biases are random too, so that a forgotten one shows."""
    torch.manual_seed(3)
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    text, vision = {**TEXT, **TEXT_OF[family]}, VISION_OF[family]
    config = transformers.AutoConfig.for_model(
        family, text_config=text, vision_config=vision, tie_word_embeddings=is_tied, **tokens
    )
    auto: Any = transformers.AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


def save(family: str, folder: Path) -> Any:
    """The model, and a folder that holds it and the settings of its pictures."""
    model = build(family)
    model.save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return model


def processor(family: str) -> Any:
    """transformers' processor of pictures."""
    kind: Any = transformers.Qwen2VLImageProcessorPil
    more = {} if family != "qwen3_vl" else {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    return kind(patch_size=4, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, **more)


def picture(width: int, height: int, seed: int = 0) -> Picture:
    """Noise over a slope."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 60, (height, width, 3))
    slope = np.linspace(0, 190, width)[None, :, None] * np.array([1.0, 0.5, 0.8])
    return Picture((noise + slope).astype(np.uint8), f"{width} {height} {seed}".encode())


def processed(family: str, pixels: Sequence[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
    """What transformers makes of pictures: patches and grids."""
    made = processor(family)(images=list(pixels), return_tensors="pt")
    return made["pixel_values"], made["image_grid_thw"]


def clip_patches(inputs: Mapping[str, Any]) -> tuple[Tensor, list[int]]:
    """What transformers' processors of videos make of frames of the right size, which need torchvision: patches and grid."""
    pixels = torch.from_numpy(inputs["pixels"] * inputs["scale"] + inputs["shift"])
    frames, rows, columns = len(pixels) // 2, pixels.shape[1] // 4, pixels.shape[2] // 4
    cut = pixels.view(frames, 2, rows // 2, 2, 4, columns // 2, 2, 4, 3).permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return cut.reshape(frames * rows * columns, -1), [frames, rows, columns]


def features(model: Any, patches: Tensor, grids: Tensor) -> list[Tensor]:
    """Embeddings of each picture by transformers; those of deepstack stand behind."""
    with torch.inference_mode():
        made = model.model.get_image_features(patches, grids, return_dict=True)
    parts = [made.pooler_output, *(getattr(made, "deepstack_features", None) or ())]
    return [torch.cat(of_picture, dim=-1) for of_picture in zip(*parts, strict=True)]
