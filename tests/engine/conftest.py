"""Sampling on a GPU is tested in Triton's interpreter where there is no GPU; see tests/kernels/devices.py."""

from tests.kernels import devices as devices
