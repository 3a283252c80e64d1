"""Which device is taken, and what is decided for a GPU: with a card that is described, not there."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from streamserve import facts
from streamserve.config import Config, DeviceConfig, ModelConfig
from streamserve.errors import ConfigError
from streamserve.kernels import registry
from streamserve.kernels.devices.cpu import CPU
from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.registry import implements
from streamserve.models.checkpoint import open_checkpoint
from streamserve.resolve import GIB
from tests.models.tiny import build_reference


class Card(CUDA):
    """A GPU as decisions see it."""

    def __init__(self, index: int = 0) -> None:
        self.model = "a card"
        self.is_hip = False
        self.capability = (9, 0)
        self.num_sms = 132
        self.architecture = "sm_90"
        self.free_bytes = 70 * GIB

    def memory(self) -> tuple[int, int]:
        return self.free_bytes, 80 * GIB


def _asking(device: str, **more: object) -> Config:
    return Config(device=DeviceConfig(device=device, **more))  # type: ignore[arg-type]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    found = Card()
    monkeypatch.setattr(CUDA, "find", lambda index=0: found)
    return found


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDA, "find", lambda index=0: None)
    monkeypatch.setattr(facts, "why_absent", lambda: ("torch is a build for CPUs", "install another"))


def test_auto_takes_the_gpu_and_cpu_is_obeyed(card: Card) -> None:
    assert facts.find_device(Config()) is card
    assert facts.find_device(_asking("cuda")) is card
    assert isinstance(facts.find_device(_asking("cpu")), CPU)


def test_without_a_gpu_auto_takes_the_cpu_and_cuda_is_refused_with_the_way_out(no_card: None) -> None:
    assert isinstance(facts.find_device(Config()), CPU)
    with pytest.raises(ConfigError, match=r"--device cuda: torch is a build for CPUs; install another; or .*--device cpu"):
        facts.find_device(_asking("cuda"))


def test_a_gpu_is_described_to_resolve() -> None:
    described = facts.device_facts(Card())
    assert (described.kind, described.name, described.total_bytes) == ("cuda", "a card", 80 * GIB)
    assert described.features == {"sm_90", "bf16", "pdl"}
    assert described.cores == CPU.here().num_cores


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_reference("llama").save_pretrained(tmp_path)
    return tmp_path


def _kernels_for_the_card(monkeypatch: pytest.MonkeyPatch, seen: list[registry.Facts], verdict: bool | str) -> None:
    def when(asked: registry.Facts) -> bool | str:
        seen.append(asked)
        return verdict

    @implements("network", name="ours", device="cuda", when=when)
    def run() -> None: ...

    module = ModuleType("impl")
    run.__module__ = "impl"
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setattr(registry, "load", lambda *modules, device: registry.Kernels(tuple(registry._marked([module]))))
    monkeypatch.setitem(sys.modules, "impl", module)


def test_kernels_for_a_gpu_are_asked_with_the_decided_types(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[registry.Facts] = []
    _kernels_for_the_card(monkeypatch, seen, True)
    config = Config(model=ModelConfig(model_path=str(folder)))
    resolved, choices = facts.decide(config, open_checkpoint(folder), Card())
    assert choices["network"].name == "ours"
    assert [(asked.device, asked.dtype, asked.kv_dtype) for asked in seen] == [("cuda", "bfloat16", "bfloat16")]
    assert resolved.dtype == "bfloat16"


def test_a_model_that_the_gpu_cannot_run_is_refused_with_the_way_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _kernels_for_the_card(monkeypatch, [], "head size 8 is not supported")
    with pytest.raises(ConfigError, match=r"network on cuda \(ours: head size 8 is not supported\); --device cpu may serve it"):
        facts.decide(Config(), open_checkpoint(folder), Card())


def test_measured_work_is_taken_from_what_was_free_before_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _kernels_for_the_card(monkeypatch, [], True)
    card, checkpoint = Card(), open_checkpoint(folder)
    before, _ = facts.decide(Config(), checkpoint, card)
    card.free_bytes = 10 * GIB  # weights and more are there now
    after = facts.measured(Config(), checkpoint, card, before, 2 * GIB)
    assert (after.free_bytes, after.reserve_bytes) == (70 * GIB, 2 * GIB)
    assert 0.9 * 70 * GIB < after.weight_bytes + after.kv_bytes + after.reserve_bytes < 0.92 * 70 * GIB
