"""Where Triton kernels are tested: on the GPU if there is one, else in Triton's interpreter.

Importing this file decides it, and must come before anything imports triton: conftest.py does so. Test files of other folders
that run Triton kernels do the same in a conftest.py of their own.
"""

import os
import sys
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None
HAS_GPU = torch.cuda.is_available()

# (device, dtype). The interpreter keeps bfloat16 as integers and computes nonsense with it, so it gets float32 only.
DEVICES: list[tuple[str, torch.dtype]]
DEVICES = [("cuda", torch.bfloat16), ("cuda", torch.float32)] if HAS_GPU else [("cpu", torch.float32)]
DEVICE_IDS = [f"{device}-{str(dtype).removeprefix('torch.')}" for device, dtype in DEVICES]

if HAS_TRITON and not HAS_GPU:
    # triton reads this when its own functions are defined: setting it later leaves half of them uninterpreted.
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
        "triton was imported before tests/kernels/devices.py could choose its interpreter"
    )
    os.environ["TRITON_INTERPRET"] = "1"
