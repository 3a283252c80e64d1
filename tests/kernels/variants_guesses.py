"""What triton_guesses.py launches; the format is compile_targets.py's."""

from streamserve.kernels.impl import triton_guesses

_PASS = ("tokens_T", "positions_T", "lines_T")
_TOKENS = ("tokens_T", "positions_T", "slots_T", "texts_SL")
_ROWS = ("slots_R", "prompt_lens_R", "from_R", "params_SP", "last_token_S", "texts_SL", "newest_R")
_V, _BLOCK = {"V": 128256}, {"BLOCK": triton_guesses._BLOCK}

VARIANTS = [
    (
        triton_guesses._note,
        {**dict.fromkeys(_TOKENS, "*i32"), "num_tokens": "i32", "max_len": "i32"},
        {**_BLOCK},
        {"num_warps": 4},
    ),
    (
        triton_guesses._read,
        {**dict.fromkeys(_TOKENS, "*i32"), "num_tokens": "i32", "max_len": "i32"},
        {**_V, **_BLOCK},
        {"num_warps": 4},
    ),
    (
        triton_guesses._last_tokens,
        {**dict.fromkeys((*_ROWS, *_PASS), "*i32"), "max_len": "i32"},
        {"W": 6, "W_UP": 8, **_V},
        {"num_warps": 1},
    ),
    (
        triton_guesses._newest_pairs,
        {
            **dict.fromkeys(("slots_R", "prompt_lens_R", "from_R", "params_SP", "last_token_S"), "*i32"),
            **dict.fromkeys(("newest_R", "shown_R", "tokens_R", "positions_R", "lines_R"), "*i32"),
            "num_rows": "i32",
            "num_shown": "i32",
        },
        {**_V, **_BLOCK},
        {"num_warps": 1},
    ),
    (
        triton_guesses._own_pages,
        {
            **dict.fromkeys(("slots_R", "num_pages_R", "page_table", "out_RP"), "*i32"),
            **dict.fromkeys(("width", "own_width", "num_own", "first_own"), "i32"),
        },
        {"BLOCK": triton_guesses._TABLE_BLOCK},
        {"num_warps": 4},
    ),
    (
        triton_guesses._next_tokens,
        {
            **dict.fromkeys(("slots_R", "newest_R", "guesses_R", *_PASS), "*i32"),
            "num_rows": "i32",
            "ahead": "i32",
            "max_len": "i32",
        },
        {**_V, **_BLOCK},
        {"num_warps": 1},
    ),
]
