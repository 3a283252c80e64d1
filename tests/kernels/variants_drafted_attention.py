"""Shapes of Llama 8B, Qwen3 0.6B, Qwen2.5 7B, SmolLM2 and others for attention in steps with guesses; see compile_targets.py."""

from typing import Any

from streamserve.kernels.impl.triton_drafted_attention import _drafted_attention


def _variant(heads: int, kv_heads: int, dim: int, **changes: Any) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    """`changes`: constants, and dtype, pdl, only."""
    dtype, pdl = changes.pop("dtype", "bf16"), changes.pop("pdl", False)
    norm = changes.pop("NORM", False)
    group = heads // kv_heads
    tokens = max(16 // group, 4)
    signature = {name: f"*{dtype}" for name in ("qkv", "out", "k_pages", "v_pages", *(("q_norm_D", "k_norm_D") if norm else ()))}
    signature |= {name: "*fp32" for name in ("cos_sin", "part_acc", "part_sum")}
    signature |= {name: "*i32" for name in ("positions_T", "slots_T", "page_table", "arrivals")}
    signature |= {name: "i32" for name in ("num_rows", "layer", "num_pages", "table_width")}
    options = {"num_warps": 4, "num_stages": 2, "only": changes.pop("only", "")}
    constants = {
        **({} if norm else {"q_norm_D": None, "k_norm_D": None}),
        "H": heads,
        "K": kv_heads,
        "D": dim,
        "S": 16,
        "G": group,
        "R": tokens,
        "M": 1 << (tokens * group - 1).bit_length(),
        "SCALE": dim**-0.5 * 1.4426950408889634,
        "EPS": 1e-6,
        "NORM": norm,
        "MAX_SPLITS": 64,
        "BLOCK_N": 64,
        "BY_TOKEN": False,
        "PDL": pdl,
        **changes,
    }
    return _drafted_attention, signature, constants, options | ({"launch_pdl": True} if pdl else {})


VARIANTS = [
    _variant(32, 8, 128),
    _variant(32, 8, 128, only="cuda90", pdl=True),
    _variant(16, 8, 128, NORM=True),
    _variant(16, 8, 128, only="cuda90", NORM=True, pdl=True),
    _variant(28, 4, 128),
    _variant(28, 4, 128, BY_TOKEN=True),
    _variant(9, 3, 64),
    _variant(8, 4, 256),
    _variant(4, 4, 32, only="cuda90", dtype="fp32"),
]
