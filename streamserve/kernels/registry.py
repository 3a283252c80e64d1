"""Which implementation of each op runs, and why.

Implementations live in files of kernels/impl/, one kernel family per file, named `<package>_<what>.py` after the package
they need. They mark themselves with @implements; nothing is edited elsewhere. Knows no model and no device API.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

from streamserve.errors import ConfigError

_MARK = "__streamserve_implements__"
# Packages whose kernels run on one device only: on another, importing them would cost every start time and find nothing.
# Packages that are not named here run anywhere. "cuda" is torch's name for ROCm too.
_RUNS_ON = {"numba": "cpu", "triton": "cuda"}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a choice may depend on. `dtype` is the user's word ("auto" included); `weight_kinds` names how the matrices
    of the checkpoint are held: ggml types (Q4_1, ...) or float types (F32, BF16, ...)."""

    device: str
    dtype: str
    shape: Any  # kernels.ops.NetworkShape
    page_size: int
    kv_dtype: str
    weight_kinds: frozenset[str]


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to run one op. `when` returns True, or False or a reason why it cannot run."""

    op: str
    name: str
    run: Any
    device: str | None
    priority: int
    when: Callable[[Facts], bool | str] | None

    def refusal(self, facts: Facts) -> str | None:
        """Why this cannot run here; None when it can."""
        if self.device is not None and self.device != facts.device:
            return f"needs {self.device}"
        verdict = True if self.when is None else self.when(facts)
        if verdict is True:
            return None
        return verdict or "does not fit this model"


@dataclass(frozen=True, slots=True)
class Choice:
    """The outcome for one op: what runs, why, and what was passed over (name, reason)."""

    op: str
    name: str
    run: Any
    reason: str
    passed_over: tuple[tuple[str, str], ...] = ()


def implements(
    op: str,
    *,
    name: str | None = None,
    device: str | None = None,
    when: Callable[[Facts], bool | str] | None = None,
    priority: int = 0,
) -> Callable[[_T], _T]:
    """Mark a function or class as an implementation of `op`. The name defaults to the file's (`reference` for ops.py).

    `when(facts)` returns True, or False or the reason for refusing; it may be costly and runs once, at start."""

    def mark(run: _T) -> _T:
        module = run.__module__.rsplit(".", 1)[-1]
        label = name or ("reference" if module == "ops" else module)
        setattr(run, _MARK, Implementation(op, label, run, device, priority, when))
        return run

    return mark


@dataclass(frozen=True, slots=True)
class Kernels:
    """Every implementation found, and the files that could not be loaded (file name, reason)."""

    found: tuple[Implementation, ...]
    unavailable: tuple[tuple[str, str], ...] = ()

    def choose(self, facts: Facts, overrides: Mapping[str, str] | None = None) -> dict[str, Choice]:
        """Per op, the highest priority that accepts the facts; `overrides` (op to name) win. Raises ConfigError."""
        overrides = overrides or {}
        ops = {impl.op for impl in self.found}
        for op in overrides:
            if op not in ops:
                raise ConfigError(f"--op names {op!r}; known are {', '.join(sorted(ops))}")
        return {op: self._choose_one(op, facts, overrides.get(op)) for op in sorted(ops)}

    def _choose_one(self, op: str, facts: Facts, wanted: str | None) -> Choice:
        candidates = sorted((impl for impl in self.found if impl.op == op), key=lambda impl: -impl.priority)
        refusals = {impl.name: impl.refusal(facts) for impl in candidates}
        if wanted is not None:
            return _forced(op, wanted, candidates, refusals)
        usable = [impl for impl in candidates if refusals[impl.name] is None]
        if not usable:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
            raise ConfigError(f"nothing can run {op} on {facts.device} ({reasons})")
        best = usable[0]
        passed = [(name, reason or "lower priority") for name, reason in refusals.items() if name != best.name]
        reason = "highest priority that fits" if len(candidates) > 1 else "the only one"
        return Choice(op, best.name, best.run, reason, tuple(passed))


def _forced(op: str, wanted: str, candidates: list[Implementation], refusals: Mapping[str, str | None]) -> Choice:
    for impl in candidates:
        if impl.name == wanted:
            if refusals[wanted] is not None:
                raise ConfigError(f"--op {op}={wanted} cannot run here: {refusals[wanted]}")
            return Choice(op, wanted, impl.run, "asked for by --op")
    raise ConfigError(f"--op {op}={wanted}: no such implementation; known are {', '.join(impl.name for impl in candidates)}")


def load(*modules: ModuleType, device: str = "cpu") -> Kernels:
    """Import what kernels/impl/ has for `device` ("cpu", "cuda"), as far as its packages are installed; `modules` bring
    implementations of their own."""
    folder = importlib.import_module("streamserve.kernels.impl")
    found = [importlib.import_module("streamserve.kernels.ops"), *modules]
    unavailable = []
    for entry in pkgutil.iter_modules(folder.__path__):
        package = entry.name.split("_", 1)[0]
        if _RUNS_ON.get(package, device) != device:
            continue
        if find_spec(package) is None:
            unavailable.append((entry.name, f"package {package} is not installed"))
            continue
        try:
            found.append(importlib.import_module(f"{folder.__name__}.{entry.name}"))
        except ImportError as error:
            unavailable.append((entry.name, str(error)))
    return Kernels(tuple(_marked(found)), tuple(unavailable))


def _marked(modules: Iterable[ModuleType]) -> Iterable[Implementation]:
    for module in modules:
        for value in vars(module).values():
            mark = getattr(value, _MARK, None)
            if isinstance(mark, Implementation) and mark.run is value and value.__module__ == module.__name__:
                yield mark


def parse_overrides(pairs: Iterable[str]) -> dict[str, str]:
    """`("attention.paged=reference",)` as a mapping. Raises ConfigError."""
    overrides = {}
    for pair in pairs:
        op, separator, name = pair.partition("=")
        if not separator or not op or not name:
            raise ConfigError(f"--op {pair!r} is not OP=NAME, for example attention.paged=reference")
        overrides[op] = name
    return overrides
