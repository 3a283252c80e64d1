"""The machine that figures come from: its card and versions, and what the card can do at most, measured in the same run.

    python bench/machine.py

The ceilings are measured in a process that ends, so that no memory of the card stays taken:

    copy     a copy of 4 GB inside device memory, bytes read and bytes written
    product  8192 x 8192 x 8192 in bfloat16, random numbers
    read     the weights of a matrix-vector product that fills the card (16384 x 16384 in bfloat16, four of them in turn)
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.server import ROOT


def machine() -> dict[str, Any]:
    """Everything that a figure should be read with."""
    return {**versions(), **_measured()}


def versions() -> dict[str, Any]:
    """Versions and processor; asks no device."""
    from streamserve import __version__

    found: dict[str, Any] = {
        "streamserve": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
    }
    for package in ("torch", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def processor() -> str:
    """Its name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _measured() -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--measure"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit("the ceilings could not be measured:\n" + done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def used_mib() -> float | None:
    """Memory in use on the first card, all processes together; None without a card."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return float(done.stdout.split()[0])


def measure() -> dict[str, Any]:
    """Card and ceilings, in this process. `card` is None where torch sees none."""
    try:
        import torch
    except ImportError:  # the fake server needs none
        return {"card": None}
    if not torch.cuda.is_available():
        return {"card": None}
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "card": properties.name,
        "memory_mib": properties.total_memory >> 20,
        "multiprocessors": properties.multi_processor_count,
        "runtime": torch.version.cuda or torch.version.hip,
    }
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    found["product_tflop_s"] = round(2 * 8192**3 / _seconds(lambda: a @ b) / 1e12, 1)
    source = torch.empty(2**31, device="cuda", dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    found["copy_tb_s"] = round(2 * source.nbytes / _seconds(lambda: target.copy_(source)) / 1e12, 3)
    matrices = [torch.randn(16384, 16384, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    x = torch.randn(16384, 1, device="cuda", dtype=torch.bfloat16)
    seconds = _seconds(lambda: [matrix @ x for matrix in matrices])
    found["read_tb_s"] = round(sum(matrix.nbytes for matrix in matrices) / seconds / 1e12, 3)
    return found


def _seconds(run: Callable[[], object], rounds: int = 20) -> float:
    """Median, on the device's own clock."""
    import torch

    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        run()
        after.record()
        after.synchronize()
        times.append(float(before.elapsed_time(after)) / 1e3)
    return statistics.median(times)


def shown(found: dict[str, Any]) -> str:
    """One or two lines for people."""
    text = (
        f"streamserve {found['streamserve']} ({found['commit'] or 'no commit'}), Python {found['python']}, "
        f"torch {found['torch']}, triton {found['triton']}; {found['processor']}, {found['cores']} cores"
    )
    if found.get("card"):
        text += (
            f"\n{found['card']}, {found['memory_mib']:,} MiB, runtime {found['runtime']}; measured now: copy "
            f"{found['copy_tb_s']:.2f} TB/s, product {found['product_tflop_s']:.0f} TFLOP/s, read {found['read_tb_s']:.2f} TB/s"
        )
    return text + ("" if found.get("card") else "; no card")


if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        print(json.dumps(measure()))
    else:
        print(shown(machine()))
