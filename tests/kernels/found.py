"""Devices that a test may ask for by name."""

import pytest

from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.devices.device import Device
from streamserve.kernels.devices.host import Host


def find(name: str) -> Device:
    """The host, or the GPU: the test is skipped where there is none."""
    if name == "host":
        return Host()
    return CUDA.find() or pytest.skip("needs a GPU")
