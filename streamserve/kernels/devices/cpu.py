"""The CPU as a device: its memory, its cores, the instruction sets that kernels care about.

Owns what is read from the operating system. Knows no kernel and no model. Torch-free.
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

# Instruction sets that decide between kernels, by the names Linux gives them.
_NOTED = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")


@dataclass(frozen=True, slots=True)
class CPU:
    """This machine's processor, as far as the process may use it."""

    model: str
    num_cores: int
    features: frozenset[str]
    name: str = "cpu"

    @classmethod
    def here(cls) -> "CPU":
        """Look at the machine. Cores are those the process is allowed to run on and its cgroup pays for."""
        model, features = _processor()
        return cls(model, _num_cores(), features)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes; a cgroup's limit counts when it is the smaller one."""
        free, total = _machine_memory()
        limit, used = _cgroup("memory.max"), _cgroup("memory.current")
        if limit is not None and used is not None and limit < total:
            return max(0, min(free, limit - used)), limit
        return free, total

    def default_threads(self) -> int:
        """All cores but one, which serves HTTP: a neighbour on the last core stalls every barrier of a step."""
        return max(1, self.num_cores - 1)


def _num_cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        return max(1, min(allowed, round(int(quota[0]) / int(quota[1]))))
    return allowed


def _processor() -> tuple[str, frozenset[str]]:
    """Model name and noted features; features are known on Linux only."""
    fields = dict(line.split(":", 1) for line in _read("/proc/cpuinfo").split("\n\n", 1)[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    features = set(named.get("flags", "").split())
    return named.get("model name") or platform.processor() or platform.machine(), frozenset(features.intersection(_NOTED))


def _machine_memory() -> tuple[int, int]:
    lines = (line.split() for line in _read("/proc/meminfo").splitlines())
    kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1}
    if "MemAvailable" in kilobytes:
        return kilobytes["MemAvailable"] * 1024, kilobytes["MemTotal"] * 1024
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // 2, total  # elsewhere the system does not say what is free: count on half


def _cgroup(name: str) -> int | None:
    text = _read(f"/sys/fs/cgroup/{name}").strip()
    return int(text) if text.isdigit() else None


def _read(path: str) -> str:
    """A file of the operating system, or nothing where it has no such file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
