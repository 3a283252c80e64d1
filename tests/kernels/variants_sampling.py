"""Sampling kernels as they are launched for three vocabularies."""

from typing import Any

from streamserve.kernels.impl import triton_sampling as sampling

BLOCK = 4096
_ROWS = {"logits": "*fp32", "slots_R": "*i32", "params_SP": "*i32"}
_SEARCH = _ROWS | {"stats": "*fp32", "floors_R": "*fp32", "counts": "*i32", "listed": "*fp32"}
_BEST = {"best_values": "*fp32", "best_tokens": "*i32"}


def _up(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _of(vocab_size: int) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    parts, blocks = -(-vocab_size // 2048), -(-vocab_size // BLOCK)
    search = {"V": vocab_size, "BLOCKS": blocks, "BLOCKS_UP": _up(blocks), "BLOCK": BLOCK, "LISTED": 128}
    survey = {"V": vocab_size, "BLOCKS": blocks, "BLOCK": BLOCK}
    chosen = {"slots_R": "*i32", "params_SP": "*i32", "out_tokens_R": "*i32", "last_token_S": "*i32"}
    found: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]] = []
    for pdl, options in ((False, {}), (True, {"only": "cuda90", "launch_pdl": True})):
        first = {"V": vocab_size, "PARTS": parts, "PDL": pdl}
        second = {"V": vocab_size, "PARTS": parts, "PARTS_UP": _up(parts), "PDL": pdl}
        scored = _ROWS | {"thresholds_R": "*fp32"} | _BEST
        only_out = {name: kind for name, kind in chosen.items() if name != "last_token_S"}
        found += [
            (sampling.choose_parts, scored, first | {"offsets_R": None}, {"num_warps": 4, **options}),
            (sampling.choose_best, _BEST | chosen, second, {"num_warps": 1, **options}),
            (sampling.choose_parts, scored | {"offsets_R": "*i32"}, first, {"num_warps": 4, **options}),
            (sampling.choose_best, _BEST | only_out, second | {"last_token_S": None}, {"num_warps": 1, **options}),
        ]
    lines = {"lines_LV": "*i32", "penalties_L4": "*fp32"}
    drafted, no_drafts = {"offsets_R": "*i32", "fed_R": "*i32"}, {"offsets_R": None, "fed_R": None}
    accept = chosen | drafted
    return [
        *found,
        (sampling.survey, _ROWS | {"stats": "*fp32"}, survey, {"num_warps": 8}),
        (sampling.gather, _SEARCH, search, {"num_warps": 8}),
        (sampling.find_thresholds, _SEARCH | {"thresholds_R": "*fp32"}, search, {"num_warps": 16}),
        (sampling.add_penalties, _ROWS | lines, {"V": vocab_size, "BLOCK": BLOCK} | no_drafts, {"num_warps": 8}),
        (sampling.add_penalties, _ROWS | lines | drafted, {"V": vocab_size, "BLOCK": BLOCK}, {"num_warps": 8}),
        (sampling.accept, accept, {"V": vocab_size, "lines_LV": None}, {"num_warps": 1}),
        (sampling.accept, accept | {"lines_LV": "*i32"}, {"V": vocab_size}, {"num_warps": 1}),
        (
            sampling.apply_masks,
            {"logits": "*fp32", "rows_G": "*i32", "masks_GW": "*i32"},
            {"V": vocab_size, "WORDS": -(-vocab_size // 32), "BLOCK": BLOCK},
            {"num_warps": 8},
        ),
        (
            sampling.count_tokens,
            {"out_tokens_R": "*i32", "slots_R": "*i32", "params_SP": "*i32", "lines_LV": "*i32"},
            {"V": vocab_size},
            {"num_warps": 1},
        ),
    ]


VARIANTS = [variant for vocab_size in (128256, 151936, 49152) for variant in _of(vocab_size)]
