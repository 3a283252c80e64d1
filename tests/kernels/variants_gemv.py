"""What triton_gemv.py launches for the models we mean; the format is compile_targets.py's."""

from typing import Any

import torch

from streamserve.kernels.impl import triton_gemv as gemv

# E, inputs of the output projection, outputs of the joined q/k/v projection, F, V
LLAMA_8B = (4096, 4096, 6144, 14336, 128256)
QWEN3_600M = (1024, 2048, 4096, 3072, 151936)
SMOLLM2_135M = (576, 576, 960, 1536, 49152)
_BF16 = "*bf16"
Variant = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]


def _variant(kernel: Any, types: dict[str, str], outputs: int, columns: int, num_rows: int, pdl: bool, **consts: Any) -> Variant:
    is_gated = kernel is gemv.norm_gate_up_kernel
    x = torch.empty(num_rows, columns, dtype=torch.bfloat16, device="meta")
    w = torch.empty(2 * outputs if is_gated else outputs, columns, dtype=torch.bfloat16, device="meta")
    _, consts_of_plan = gemv._plan(x, w, num_rows, pdl, None)
    options = {name: consts_of_plan.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in consts_of_plan}
    if is_gated:
        consts_of_plan["BLOCK_W"] = max(2, consts_of_plan["BLOCK_W"])
    signature = {"x": _BF16, "w": _BF16, "num_rows": "i32", **types}
    return kernel, signature, {**consts, **consts_of_plan, "N": outputs}, {**options, "only": "cuda90" if pdl else ""}


def _variants() -> list[Variant]:
    found = []
    normed = {"norm": _BF16, "out": _BF16}
    for (hidden, attended, joined, inner, vocab), num_rows, pdl in [
        (LLAMA_8B, 1, True),
        (LLAMA_8B, 4, False),
        (LLAMA_8B, 8, True),
        (QWEN3_600M, 1, True),
        (QWEN3_600M, 8, True),
        (QWEN3_600M, 16, True),
        (SMOLLM2_135M, 2, False),
        (SMOLLM2_135M, 8, False),
    ]:
        is_biased = hidden == SMOLLM2_135M[0]  # that model has none; Qwen2 has
        bias: dict[str, Any] = {} if is_biased else {"bias": None}
        types = {**normed, "bias": _BF16} if is_biased else normed
        found += [
            _variant(gemv.norm_linear_kernel, types, joined, hidden, num_rows, pdl, eps=1e-6, rows=None, **bias),
            _variant(gemv.linear_add_kernel, {"residual": _BF16}, hidden, attended, num_rows, pdl),
            _variant(gemv.norm_gate_up_kernel, normed, inner, hidden, num_rows, pdl, eps=1e-6),
            _variant(gemv.linear_add_kernel, {"residual": _BF16}, hidden, inner, num_rows, pdl),
        ]
        logits = {"norm": _BF16, "out": "*fp32", "rows": "*i32"}
        found.append(_variant(gemv.norm_linear_kernel, logits, vocab, hidden, num_rows, pdl, eps=1e-6, bias=None))
    return found


VARIANTS = _variants()
