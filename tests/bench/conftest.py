"""A bench has a GPU's sampler of its own: in Triton's interpreter where there is no GPU; see tests/kernels/devices.py."""

from tests.kernels import devices as devices
