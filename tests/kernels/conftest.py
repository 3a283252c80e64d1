"""Triton tests run on a GPU or in the interpreter (devices.py), and are skipped, with a reason, where triton is missing.

A test of a Triton kernel asks for `device` and `dtype` and is run for every pair there is.
"""

from pathlib import Path

import pytest

from tests.kernels.devices import DEVICE_IDS, DEVICES, HAS_TRITON


class _Untestable(pytest.Module):
    """A test file that cannot even be imported here."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        raise pytest.skip.Exception("triton is not installed (make test installs it on Linux)", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    is_untestable = module_path.name.startswith("test_triton_") and not HAS_TRITON
    return _Untestable.from_parent(parent, path=module_path) if is_untestable else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rsplit(".", 1)[-1].startswith("test_triton_") and "device" in metafunc.fixturenames:
        names = "device,dtype" if "dtype" in metafunc.fixturenames else "device"
        values = DEVICES if "dtype" in metafunc.fixturenames else sorted({device for device, _ in DEVICES})
        ids = DEVICE_IDS if "dtype" in metafunc.fixturenames else None
        metafunc.parametrize(names, values, ids=ids)
