"""What triton_linear.py launches for the models we mean; the format is compile_targets.py's."""

from typing import Any

from streamserve.kernels.impl.triton_linear import _linear, tile_options


def _variants() -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for target, is_hip in (("cuda", False), ("hip", True)):
        for num_columns, size, dtype, out, bias in (
            (6144, 4096, "bf16", "bf16", None),
            (960, 576, "bf16", "bf16", "*bf16"),
            (151936, 1024, "bf16", "fp32", None),
            (100, 200, "fp32", "fp32", None),
        ):
            types = {"x": f"*{dtype}", "weight": f"*{dtype}", "out": f"*{out}", "num_rows": "i32"}
            options = tile_options(2 if dtype == "bf16" else 4, is_hip)
            launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
            consts = {"N": num_columns, "E": size, **options, **({} if bias else {"bias": None})}
            found.append((_linear, {**types, **({"bias": bias} if bias else {})}, consts, {**launch, "only": target}))
    return found


VARIANTS = _variants()
