"""Devices: the host stands in for a GPU; on a machine with one, the same checks run there."""

from pathlib import Path

import pytest
import torch

from streamserve.kernels.devices import cuda
from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.devices.device import Device
from tests.kernels.found import find


@pytest.fixture(params=["host", "cuda"])
def device(request: pytest.FixtureRequest) -> Device:
    name: str = request.param
    return find(name)


def test_a_replay_does_the_work_again_on_what_its_inputs_hold_then(device: Device) -> None:
    x = torch.arange(4.0, device=device.torch_device)
    y = torch.zeros(4, device=device.torch_device)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        y.add_(x)
        return y, x * 2

    replay = device.capture(run)
    device.synchronize()
    address = replay.out[1].data_ptr()
    y.zero_()
    x.fill_(3)
    replay.replay()
    replay.replay()
    device.synchronize()
    assert y.tolist() == [6.0] * 4
    assert replay.out[1].tolist() == [6.0] * 4
    assert replay.out[1].data_ptr() == address


def test_several_recordings_keep_their_results_apart(device: Device) -> None:
    x = torch.ones(3, device=device.torch_device)
    first = device.capture(lambda: x + 1)
    second = device.capture(lambda: x + 2)
    first.replay()
    second.replay()
    device.synchronize()
    assert (first.out.tolist(), second.out.tolist()) == ([2.0] * 3, [3.0] * 3)


def test_an_event_is_done_after_the_work_before_it(device: Device) -> None:
    host = device.pinned((5,), torch.int32)
    event = device.event()
    assert event.query()  # not recorded: nothing to wait for
    host.copy_(torch.arange(5, dtype=torch.int32, device=device.torch_device), non_blocking=True)
    event.record()
    event.synchronize()
    assert event.query()
    assert host.tolist() == [0, 1, 2, 3, 4]
    assert host.is_pinned() == (device.name == "cuda")


def test_memory_is_within_what_there_is(device: Device) -> None:
    free, total = device.memory()
    assert 0 < free <= total


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_reason_names_the_build_and_says_what_to_do() -> None:
    assert CUDA.find() is None
    what, fix = cuda.why_absent()
    assert f"torch {torch.__version__}" in what
    assert "install" in fix or "nvidia-smi" in fix


def test_the_driver_is_read_from_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing, nvidia = tmp_path / "none", tmp_path / "version"
    nvidia.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug 27\nGCC version: 13.3.0\n")
    monkeypatch.setattr(cuda, "_NVIDIA_DRIVER", missing)
    monkeypatch.setattr(cuda, "_AMD_DRIVER", missing)
    assert cuda.driver_version() is None
    monkeypatch.setattr(cuda, "_NVIDIA_DRIVER", nvidia)
    assert cuda.driver_version() == "NVIDIA 580.82.07"
    if torch.version.cuda is None and torch.version.hip is None:
        what, fix = cuda.why_absent()
        assert "build for CPUs" in what and "580.82.07" in what
        assert "pip" in fix
