"""What triton_rope.py launches for the models we mean; the format is compile_targets.py's."""

from typing import Any

from streamserve.kernels.impl.triton_rope import _BLOCK_HEADS, _pick_angles, _write_prompt


def _variant(
    num_heads: int, num_kv_heads: int, head_dim: int, has_norm: bool, pdl: bool = False, by_token: bool = False
) -> tuple[Any, ...]:
    types = {
        **dict.fromkeys(("qkv", "k_pages", "v_pages"), "*bf16"),
        **dict.fromkeys(("positions", "slots", "page_table"), "*i32"),
        **dict.fromkeys(("num_decode", "layer", "num_pages", "table_width"), "i32"),
        **({"q_norm": "*bf16", "k_norm": "*bf16"} if has_norm else {}),
        "cos_sin": "*fp32",
        "eps": "fp32",
    }
    consts = {"H": num_heads, "K": num_kv_heads, "D": head_dim, "S": 16, "BLOCK_HEADS": _BLOCK_HEADS, "BLOCK_HALF": head_dim // 2}
    consts |= {"BY_TOKEN": by_token, "PDL": pdl, **({} if has_norm else {"q_norm": None, "k_norm": None})}
    return _write_prompt, types, consts, {"num_warps": 4, **({"launch_pdl": True, "only": "cuda90"} if pdl else {})}


VARIANTS = [
    _variant(9, 3, 64, has_norm=False),
    _variant(32, 8, 128, has_norm=False),
    _variant(32, 8, 128, has_norm=False, pdl=True),
    _variant(16, 8, 128, has_norm=True),
    _variant(8, 4, 256, has_norm=True),
    _variant(0, 8, 128, has_norm=False),  # keys and values of a head
    _variant(0, 8, 128, has_norm=True),
    _variant(28, 4, 128, has_norm=False, by_token=True),
    _variant(32, 8, 128, has_norm=True, by_token=True),
    (
        _pick_angles,
        {"rope_3T": "*i32", "axes_d": "*i32", "cos_sin": "*fp32", "out_TD": "*fp32", "stride": "i32"},
        {"D": 128, "BLOCK_HALF": 64},
        {"num_warps": 1},
    ),
]
