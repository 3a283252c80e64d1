"""Shapes of Llama 8B, Qwen3 0.6B, SmolLM2 and others for the decode attention; see compile_targets.py."""

from typing import Any

from streamserve.kernels.impl.triton_decode_attention import _decode_attention, _grouped_decode_attention, _write_decode


def _variant(heads: int, kv_heads: int, dim: int, **changes: Any) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    """`changes`: constants, and dtype, pdl, num_stages, only."""
    dtype, pdl = changes.pop("dtype", "bf16"), changes.pop("pdl", False)
    norm = changes.pop("NORM", False)
    group = heads // kv_heads
    signature = {name: f"*{dtype}" for name in ("qkv", "out", "k_pages", "v_pages", *(("q_norm_D", "k_norm_D") if norm else ()))}
    signature |= {name: "*fp32" for name in ("cos_sin", "part_acc", "part_sum")}
    signature |= {name: "*i32" for name in ("positions_T", "slots_T", "page_table", "arrivals")}
    signature |= {name: "i32" for name in ("layer", "num_pages", "table_width")}
    options = {"num_warps": 4, "num_stages": changes.pop("num_stages", 3), "only": changes.pop("only", "")}
    constants = {
        **({} if norm else {"q_norm_D": None, "k_norm_D": None}),
        "H": heads,
        "K": kv_heads,
        "D": dim,
        "S": 16,
        "G": group,
        "G_DOT": max(1 << (group - 1).bit_length(), 16),
        "G_MERGE": 1 << (group - 1).bit_length(),
        "SCALE": dim**-0.5 * 1.4426950408889634,
        "EPS": 1e-6,
        "NORM": norm,
        "WINDOW": 0,
        "MIN_TILES": 1,
        "MAX_SPLITS": 64,
        "BLOCK_N": 64,
        "IS_WRITTEN": False,
        "BY_TOKEN": False,
        "PDL": pdl,
        **changes,
    }
    return _decode_attention, signature, constants, options | ({"launch_pdl": True} if pdl else {})


def _grouped(heads: int, kv_heads: int, dim: int, **changes: Any) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    """The same for rows in groups."""
    _, signature, constants, options = _variant(heads, kv_heads, dim, **changes)
    constants["M"] = constants.pop("G_DOT")
    constants["R"] = constants["M"] // constants["G"]
    constants["R_PAD"] = 1 << (constants["R"] - 1).bit_length()
    constants = {name: value for name, value in constants.items() if name not in ("G_MERGE", "WINDOW", "MIN_TILES", "IS_WRITTEN")}
    return _grouped_decode_attention, signature | {"parts": "*i32"}, constants, options


def _written(heads: int, kv_heads: int, dim: int, **changes: Any) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    """What goes before a drafted step's attention."""
    _, signature, constants, options = _variant(heads, kv_heads, dim, **changes)
    signature = {name: kind for name, kind in signature.items() if name in _write_decode.arg_names}
    return (
        _write_decode,
        signature,
        {name: value for name, value in constants.items() if name in _write_decode.arg_names},
        options,
    )


VARIANTS = [
    _variant(32, 8, 128, only="cuda"),
    _variant(32, 8, 128, only="hip", num_stages=2),
    _variant(32, 8, 128, only="cuda90", pdl=True),
    _variant(16, 8, 128, only="cuda", NORM=True),
    _variant(16, 8, 128, only="hip", NORM=True, num_stages=2),
    _variant(16, 8, 128, only="cuda90", NORM=True, pdl=True),
    _variant(9, 3, 64, only="cuda"),
    _variant(9, 3, 64, only="hip", num_stages=2),
    _variant(32, 8, 128, only="cuda90", WINDOW=4096, MIN_TILES=4),
    _variant(8, 4, 256, num_stages=2),
    _variant(4, 4, 32, only="cuda90", dtype="fp32"),
    _variant(32, 8, 128, only="cuda90", IS_WRITTEN=True, pdl=True),
    _variant(16, 8, 128, only="hip", NORM=True, IS_WRITTEN=True, num_stages=2),
    _variant(28, 4, 128, only="cuda90", BY_TOKEN=True, pdl=True),
    _variant(28, 4, 128, only="hip", BY_TOKEN=True, num_stages=2),
    _written(28, 4, 128, BY_TOKEN=True),
    _written(32, 8, 128),
    _written(32, 8, 128, only="cuda90", pdl=True),
    _written(16, 8, 128, NORM=True),
    _written(16, 8, 128, only="cuda90", NORM=True, pdl=True),
    _written(9, 3, 64),
    _grouped(28, 4, 128, only="cuda", BY_TOKEN=True),
    _grouped(28, 4, 128, only="hip", BY_TOKEN=True, num_stages=2),
    _grouped(32, 8, 128, only="cuda"),
    _grouped(32, 8, 128, only="hip", num_stages=2),
    _grouped(32, 8, 128, only="cuda90", num_stages=2, pdl=True),
    _grouped(16, 8, 128, only="cuda", NORM=True),
    _grouped(16, 8, 128, only="hip", NORM=True, num_stages=2),
    _grouped(16, 8, 128, only="cuda90", NORM=True, num_stages=4, pdl=True),
    _grouped(9, 3, 64, only="cuda"),
    _grouped(9, 3, 64, only="hip", num_stages=2),
    _grouped(8, 4, 256, num_stages=2),
    _grouped(4, 4, 32, only="cuda90", dtype="fp32"),
]
