"""What the doctor says of a GPU: with a card that is described, not there, and without one."""

from pathlib import Path

import pytest

from streamserve import doctor
from streamserve.doctor import Check
from streamserve.kernels.devices import cuda
from streamserve.kernels.devices.cuda import CUDA
from streamserve.resolve import GIB
from tests.test_facts import Card


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Card:
    found = Card()
    monkeypatch.setattr(CUDA, "find", lambda index=0: found)
    monkeypatch.setattr(cuda, "driver_version", lambda: "NVIDIA 580.82.07")
    monkeypatch.setattr(doctor, "version", lambda name: "3.6.0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return found


def _checks() -> dict[str, Check]:
    return {check.name: check for check in doctor._gpu()}


def test_a_gpu_is_named_with_memory_driver_and_what_it_can_do(card: Card) -> None:
    checks = _checks()
    assert [check.state for check in checks.values()] == ["ok"] * 4
    for words in ("a card", "sm_90", "132", "75.2 of 85.9 GB free", "PDL"):
        assert words in checks["gpu"].found
    assert "580.82.07" in checks["gpu driver"].found
    assert checks["triton"].found == "3.6.0"


def test_a_full_gpu_is_a_warning_with_a_way_out(card: Card) -> None:
    card.free_bytes = GIB
    assert _checks()["gpu"].state == "warn"
    assert _checks()["gpu"].fix


def test_compiled_kernels_are_counted_where_triton_keeps_them(card: Card, tmp_path: Path) -> None:
    assert "the first start compiles" in _checks()["kernel cache"].found
    (tmp_path / "cache" / "key").mkdir(parents=True)
    for name in ("kernel.cubin", "kernel.json", "__grp__kernel.json"):
        (tmp_path / "cache" / "key" / name).touch()
    assert _checks()["kernel cache"].found == f"1 compiled kernels in {tmp_path / 'cache'}"


def test_a_cache_that_cannot_be_written_is_a_warning(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert _checks()["kernel cache"].state == "warn"
    assert "TRITON_CACHE_DIR" in _checks()["kernel cache"].fix


@pytest.mark.parametrize("driver, state", [("NVIDIA 580.82.07", "warn"), (None, "ok")])
def test_without_a_usable_gpu_a_card_that_is_there_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, state: str
) -> None:
    monkeypatch.setattr(CUDA, "find", lambda index=0: None)
    monkeypatch.setattr(cuda, "driver_version", lambda: driver)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    [check] = doctor._gpu()
    assert (check.name, check.state) == ("gpu", state)
    assert bool(check.fix) == (state == "warn")
