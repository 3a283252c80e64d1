"""The gate of a feed-forward block on a GPU: silu(gate) * up.

Owns one kernel; knows no weight. T tokens of the step, F feed-forward size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamserve.kernels.impl.triton_norm import pdl_options

# Eight elements a thread of each half: 16 bytes in 16 bits. Small, so that few rows still fill the device.
_BLOCK = 1024


@triton.jit
def _silu_mul(x, out, F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Parts of a row run side by side: programs in flight read whole pages of memory.
    NUM_BLOCKS: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    col = tl.program_id(0) % NUM_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * (2 * F) + col, mask=col < F, other=0.0).to(tl.float32)
    up = tl.load(x + row * (2 * F) + F + col, mask=col < F, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out + row * F + col, y.to(out.dtype.element_ty), mask=col < F)


def silu_mul(x_T2F: Tensor, *, pdl: bool = False) -> Tensor:
    """silu(first half) * second half, in float32, rounded once: [T, F]."""
    assert x_T2F.is_contiguous()
    num_rows, size = x_T2F.shape[0], x_T2F.shape[1] // 2
    out_TF = torch.empty((num_rows, size), dtype=x_T2F.dtype, device=x_T2F.device)
    _silu_mul[(num_rows * triton.cdiv(size, _BLOCK),)](x_T2F, out_TF, F=size, BLOCK=_BLOCK, num_warps=4, **pdl_options(pdl))
    return out_TF
