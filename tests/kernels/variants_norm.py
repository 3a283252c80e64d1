"""What triton_norm.py launches for the models we mean; the format is compile_targets.py's."""

from typing import Any

from streamserve.kernels.impl import triton_norm

_BF16 = "*bf16"


def _variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    found: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]] = []
    for size, pdl in ((576, False), (4096, False), (4096, True), (8192, False)):
        options = triton_norm.row_options(size, pdl)
        consts = {"E": size, "BLOCK": options.pop("BLOCK"), "PDL": options.pop("PDL")}
        options = {**options, "only": "cuda90" if pdl else ""}
        x = {"x_ptr": _BF16, "weight_ptr": _BF16, "out_ptr": _BF16, "eps": "fp32"}
        found.append((triton_norm._rms_norm, x, {**consts, "rows": None}, options))
        found.append((triton_norm._rms_norm, {**x, "rows": "*i32"}, consts, options))
        found.append((triton_norm._add_rms_norm, {**x, "delta_ptr": _BF16}, consts, options))
        if size == 4096:
            embed = {"tokens": "*i32", "table": _BF16, "out": _BF16}
            plain = {**consts, "BLOCK": 1024, "media": None, "X": 0}
            found.append((triton_norm._embed, embed, plain, {**options, "num_warps": 4}))
            with_media = {**consts, "BLOCK": 1024, "X": 4 * size}
            found.append((triton_norm._embed, {**embed, "media": _BF16}, with_media, {**options, "num_warps": 4}))
            added = {"tokens": "*i32", "media": _BF16, "x_ptr": _BF16}
            if not pdl:
                found.append(
                    (triton_norm._add_media, added, {"PART": 1, "E": size, "X": 4 * size, "BLOCK": 1024}, {"num_warps": 4})
                )
    return found


VARIANTS = _variants()
