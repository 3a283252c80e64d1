"""What triton_mlp.py launches for the models we mean; the format is compile_targets.py's."""

from streamserve.kernels.impl.triton_mlp import _silu_mul

_TYPES = {"x": "*bf16", "out": "*bf16"}

VARIANTS = [(_silu_mul, _TYPES, {"F": size, "BLOCK": 1024, "PDL": False}, {"num_warps": 4}) for size in (1536, 3072, 14336)] + [
    (_silu_mul, _TYPES, {"F": 14336, "BLOCK": 1024, "PDL": True}, {"num_warps": 4, "launch_pdl": True, "only": "cuda90"})
]
