"""What triton_inputs.py launches; the format is compile_targets.py's."""

from streamserve.kernels.impl import triton_inputs

_POINTERS = ("ints", "last_token_S", "page_table", "params_SP")
_NUMBERS = ("num_tokens", "slots_at", "pages_at", "num_pages", "params_at", "num_params", "table_width")

VARIANTS = [
    (
        triton_inputs._apply,
        {**dict.fromkeys(_POINTERS, "*i32"), **dict.fromkeys(_NUMBERS, "i32")},
        {"PARAMS": triton_inputs.PARAMS, "BLOCK": triton_inputs._BLOCK},
        {"num_warps": 4},
    )
]
