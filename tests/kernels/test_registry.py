"""Selection of kernels: priority, refusals, overrides, and what the table says."""

from types import ModuleType
from typing import Any

import pytest

from streamserve.errors import ConfigError
from streamserve.kernels import registry
from streamserve.kernels.registry import Facts, Kernels, implements

FACTS = Facts(device="cpu", dtype="auto", shape=None, page_size=16, kv_dtype="float32", weight_kinds=frozenset({"Q4_1"}))


def kernels(**runs: dict[str, Any]) -> Kernels:
    """A table for op "sum", one implementation per keyword."""
    module = ModuleType("family")

    def build(name: str, options: dict[str, Any]) -> Any:
        def run() -> str:
            return name

        run.__module__ = "family"
        return implements("sum", name=name, **options)(run)

    for name, options in runs.items():
        setattr(module, name, build(name, options))
    # Networks look at the model's shape, and FACTS has none.
    return Kernels(tuple(impl for impl in registry.load(module).found if impl.op != "network"))


def test_the_highest_priority_that_fits_is_chosen() -> None:
    table = kernels(
        plain={},
        fast={"priority": 20, "when": lambda facts: facts.page_size == 16},
        faster={"priority": 30, "when": lambda facts: "needs pages of 64 tokens" if facts.page_size != 64 else True},
        gpu={"priority": 40, "device": "cuda"},
        never={"priority": 50, "when": lambda facts: False},
    )
    choice = table.choose(FACTS)["sum"]
    assert choice.name == "fast"
    assert choice.run() == "fast"
    assert dict(choice.passed_over) == {
        "plain": "lower priority",
        "faster": "needs pages of 64 tokens",
        "gpu": "needs cuda",
        "never": "does not fit this model",
    }


def test_an_override_wins_over_priority() -> None:
    choice = kernels(plain={}, fast={"priority": 20}).choose(FACTS, {"sum": "plain"})["sum"]
    assert (choice.name, choice.reason) == ("plain", "asked for by --op")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"product": "plain"}, "'product'; known are attention.paged"),
        ({"sum": "slow"}, "sum=slow: no such implementation; known are gpu, plain"),
        ({"sum": "gpu"}, "sum=gpu cannot run here: needs cuda"),
    ],
)
def test_an_override_that_cannot_hold_stops_the_start(overrides: dict[str, str], message: str) -> None:
    table = kernels(plain={}, gpu={"device": "cuda", "priority": 9})
    with pytest.raises(ConfigError, match=message):
        table.choose(FACTS, overrides)


def test_an_op_that_nothing_can_run_stops_the_start() -> None:
    with pytest.raises(ConfigError, match=r"nothing can run sum on cpu \(gpu: needs cuda\)"):
        kernels(gpu={"device": "cuda"}).choose(FACTS)


def test_every_op_has_a_reference() -> None:
    table = registry.load()
    names = {impl.op: [] for impl in table.found}  # type: dict[str, list[str]]
    for impl in table.found:
        names[impl.op].append(impl.name)
    assert all("reference" in found for op, found in names.items() if op != "network")


def test_a_file_whose_package_is_missing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    monkeypatch.setattr(registry.pkgutil, "iter_modules", lambda path: [registry.pkgutil.ModuleInfo(None, "abacus_sum", False)])  # type: ignore[attr-defined]
    assert registry.load().unavailable == (("abacus_sum", "package abacus is not installed"),)


@pytest.mark.parametrize(("device", "expected"), [("cpu", ["abacus_sum", "numba_sum"]), ("cuda", ["abacus_sum", "triton_sum"])])
def test_files_for_another_device_are_neither_loaded_nor_missed(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: list[str]
) -> None:
    names = ("abacus_sum", "numba_sum", "triton_sum")
    found = [registry.pkgutil.ModuleInfo(None, name, False) for name in names]  # type: ignore[attr-defined]
    monkeypatch.setattr(registry.pkgutil, "iter_modules", lambda path: found)  # type: ignore[attr-defined]
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    assert [name for name, _ in registry.load(device=device).unavailable] == expected


def test_overrides_are_parsed_or_refused() -> None:
    assert registry.parse_overrides(["a.b=c", "network=torch"]) == {"a.b": "c", "network": "torch"}
    for bad in ("a", "=c", "a="):
        with pytest.raises(ConfigError, match="is not OP=NAME"):
            registry.parse_overrides([bad])
