"""Recordings of what comes again in the same shape; on a machine with a GPU also there."""

import pytest
import torch
from torch import Tensor

from streamserve.kernels.devices.device import Device
from streamserve.kernels.devices.recorder import Recorder
from tests.kernels.found import find


@pytest.fixture(params=["host", "cuda"])
def device(request: pytest.FixtureRequest) -> Device:
    name: str = request.param
    return find(name)


def test_results_are_those_of_the_numbers_that_went_in_and_stay_apart(device: Device) -> None:
    recorder = Recorder(device, max_kept=2)
    calls: list[tuple[int, ...]] = []

    def double(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return x * 2

    with device.beside(), torch.inference_mode():
        given = [torch.full((size,), float(i), device=device.torch_device) for i, size in enumerate((3, 3, 3, 4, 3, 3, 5, 4, 4))]
        found = [recorder(double, x, "key") for x in given]
        device.synchronize()
    for x, doubled in zip(given, found, strict=True):
        assert doubled.tolist() == (x * 2).tolist()
    if device.name == "cuda":  # each size once as it is, once recorded; the third size takes the place of the oldest
        assert calls == [(3,), (3,), (4,), (5,), (4,), (4,)]


def test_what_cannot_be_recorded_is_done_as_it_is(device: Device) -> None:
    recorder = Recorder(device)

    def stubborn(x: Tensor) -> Tensor:
        if device.name == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not this")
        return x + 1

    with device.beside():
        found = [recorder(stubborn, torch.full((2,), float(i), device=device.torch_device), 0) for i in range(4)]
        device.synchronize()
    assert [x.tolist() for x in found] == [[i + 1.0] * 2 for i in range(4)]
