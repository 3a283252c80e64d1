"""silu(gate) * up against torch in float64."""

import pytest
import torch
import torch.nn.functional as F

from streamserve.kernels.impl.triton_mlp import silu_mul


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 1536), (7, 200), (2, 1025), (0, 64)])
def test_silu_mul(rows: int, size: int, device: str, dtype: torch.dtype) -> None:
    x = (torch.randn((rows, 2 * size), generator=torch.Generator().manual_seed(rows)) * 4).to(device, dtype)
    found = silu_mul(x)
    assert found.dtype == dtype and found.shape == (rows, size)
    gate, up = x.double().chunk(2, dim=-1)
    rtol = 5e-3 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=rtol, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, in the interpreter; infinity is what is meant
def test_extreme_gates_stay_finite(device: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 2.0, 2.0, 2.0, 2.0]], device=device, dtype=dtype)
    assert silu_mul(x).tolist() == [[0.0, 0.0, 0.0, 200.0]]
