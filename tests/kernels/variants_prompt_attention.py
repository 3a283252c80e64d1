"""Shapes of Llama 8B, Qwen3 0.6B, SmolLM2 and others for the prompt attention; see compile_targets.py."""

from typing import Any

from streamserve.kernels.impl.triton_prompt_attention import _gather, _merge_two, _prompt_attention

_Variant = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]


def _prompt(heads: int, kv_heads: int, dim: int, block_m: int, **changes: Any) -> _Variant:
    """`changes`: constants, and dtype, num_stages, only."""
    dtype = changes.pop("dtype", "bf16")
    signature = {name: f"*{dtype}" for name in ("qkv", "out", "k_pages", "v_pages")}
    signature |= {name: "*i32" for name in ("positions_T", "slots_T", "page_table", "prompt_starts")}
    signature |= {name: "i32" for name in ("num_rows", "layer", "num_pages", "table_width", "long_len")}
    options = {
        "num_warps": 8 if block_m == 128 or dim > 128 else 4,
        "num_stages": changes.pop("num_stages", 3),
        "only": changes.pop("only", ""),
    }
    constants = {"H": heads, "K": kv_heads, "D": dim, "S": 16, "SCALE": dim**-0.5 * 1.4426950408889634, "WINDOW": 0}
    return _prompt_attention, signature, {**constants, "BLOCK_M": block_m, "BLOCK_N": 32 if dim > 128 else 64, **changes}, options


def _merge(a: str, out: str) -> _Variant:
    signature = {"a_NHD": f"*{a}", "b_NHD": "*bf16", "out_NHD": f"*{out}"}
    signature |= {name: "*fp32" for name in ("a_lse_HN", "b_lse_HN", "out_lse_HN")}
    strides = ("a_stride_n", "a_stride_h", "b_stride_n", "b_stride_h", "a_lse_stride_h", "b_lse_stride_h")
    signature |= {"num_tokens": "i32", **dict.fromkeys(strides, "i32:16")}
    constants = {"a_lse_stride_n": 1, "b_lse_stride_n": 1, "H": 32, "D": 128, "BLOCK_N": 16}
    return _merge_two, signature, constants, {"num_warps": 4}


VARIANTS = [
    *(_prompt(32, 8, 128, block, only="cuda") for block in (64, 128)),
    *(_prompt(32, 8, 128, block, only="hip", num_stages=2) for block in (64, 128)),
    *(_prompt(9, 3, 64, block, only="cuda") for block in (64, 128)),
    _prompt(9, 3, 64, 128, only="hip", num_stages=2),
    _prompt(32, 8, 128, 128, only="cuda90", WINDOW=4096),
    _prompt(8, 4, 256, 64, num_stages=2),
    _prompt(4, 4, 32, 64, only="cuda90", num_stages=2, dtype="fp32"),
    (
        _gather,
        {name: "*bf16" for name in ("k_pages", "v_pages", "k_KND", "v_KND")}
        | {"pages_P": "*i32", "layer": "i32", "num_pages": "i32", "num_tokens": "i32"},
        {"K": 8, "S": 16, "D": 128},
        {"num_warps": 4},
    ),
    _merge("bf16", "bf16"),
    _merge("bf16", "fp32"),
    _merge("fp32", "fp32"),
    _merge("fp32", "bf16"),
]
