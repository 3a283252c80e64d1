"""`streamserve doctor`: what was found on this machine, and for what is missing the command that brings it.

Owns the list of checks. Each looks and reports; none changes anything. Reads a broken installation without failing itself.
"""

import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from streamserve import __version__, calibration
from streamserve.config import ServerConfig
from streamserve.default_model import DEFAULT_MODEL_NAME, INSTALL_COMMAND, find_default_model
from streamserve.errors import StartError
from streamserve.kernels.devices.cpu import CPU

State = Literal["ok", "warn", "fail"]
PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "tokenizers",
    "safetensors",
    "gguf",
    "huggingface-hub",
    "starlette",
    "hypercorn",
    "anyio",
    "orjson",
    "msgspec",
    "structlog",
    "prometheus-client",
    "jinja2",
    "rich",
)
LOW_MEMORY_BYTES = 2 * 10**9


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. `fix` is a command, or what to do, when the state is not ok."""

    name: str
    state: State
    found: str
    fix: str = ""


def run(*, as_json: bool) -> int:
    """Print the report; 1 when something that is needed is missing."""
    checks = [check for look in CHECKS for check in _guarded(look)]
    if as_json:
        print(json.dumps({"streamserve": __version__, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        for check in checks:
            print(f"{check.state:<5} {check.name:<18} {check.found}")
            if check.fix:
                print(f"{'':<5} {'':<18} -> {check.fix}")
    return int(any(check.state == "fail" for check in checks))


def _guarded(look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The checks of one look. What it trips over is a finding: a doctor that crashes on a broken machine is no help."""
    try:
        yield from look()
    except Exception as error:
        yield Check(look.__name__.strip("_"), "fail", f"{type(error).__name__}: {error}", "please report this line as an issue")


def _python() -> Iterator[Check]:
    is_new = sys.version_info >= (3, 11)
    fix = "" if is_new else "install Python 3.11 or newer"
    yield Check("python", "ok" if is_new else "fail", f"{platform.python_version()} on {platform.platform()}", fix)


def _packages() -> Iterator[Check]:
    for name in PACKAGES:
        try:
            yield Check(name, "ok", version(name))
        except PackageNotFoundError:
            yield Check(name, "fail", "not installed", f"pip install {name}")
    if sys.platform != "win32":
        try:
            yield Check("uvloop", "ok", version("uvloop"))
        except PackageNotFoundError:
            yield Check("uvloop", "warn", "not installed; the slower asyncio loop is used", "pip install uvloop")


def _processor() -> Iterator[Check]:
    cpu = CPU.here()
    features = " ".join(sorted(cpu.features)) or "no noted instruction sets"
    has_avx2 = "avx2" in cpu.features or platform.machine() not in ("x86_64", "AMD64")
    fix = "" if has_avx2 else "expect a fraction of the speed; nothing to install"
    yield Check("processor", "ok" if has_avx2 else "warn", f"{cpu.model}, {cpu.num_cores} cores, {features}", fix)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    is_calm = load < cpu.num_cores * 0.5
    yield Check(
        "load", "ok" if is_calm else "warn", f"{load:.2f}", "" if is_calm else "other programs are busy: speed will suffer"
    )
    free, total = cpu.memory()
    has_room = free > LOW_MEMORY_BYTES
    fix = "" if has_room else "free some, or serve with --max-total-tokens 8k"
    yield Check("memory", "ok" if has_room else "warn", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free", fix)


def _torch() -> Iterator[Check]:
    try:
        torch = import_module("torch")
    except Exception as error:  # a broken build raises OSError, ImportError or RuntimeError
        yield Check("torch import", "fail", f"{type(error).__name__}: {error}", "pip install --force-reinstall torch")
        return
    yield Check("torch import", "ok", f"CPU capability {torch.backends.cpu.get_cpu_capability()}")


def _gpu() -> Iterator[Check]:
    cuda = import_module("streamserve.kernels.devices.cuda")
    gpu = cuda.CUDA.find()
    if gpu is None:
        what, fix = cuda.why_absent()
        if cuda.driver_version() is not None or shutil.which("nvidia-smi") or shutil.which("rocm-smi"):
            yield Check("gpu", "warn", f"{what}; this version computes on the processor", fix)
        else:
            yield Check("gpu", "ok", f"none: the processor computes ({what})")
        return
    free, total = gpu.memory()
    bf16 = "bf16" if gpu.supports_bfloat16 else "no bf16"
    launch = "kernels may overlap (PDL)" if gpu.supports_pdl else "kernels run one by one (no PDL)"
    driver = cuda.driver_version() or "driver of unknown version"
    found = f"{gpu.model}, {gpu.architecture}, {gpu.num_sms} multiprocessors, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    has_room = free > LOW_MEMORY_BYTES
    fix = "" if has_room else "end the programs that hold its memory (nvidia-smi or rocm-smi lists them)"
    yield Check("gpu", "ok" if has_room else "warn", f"{found}, {bf16}, {launch}", fix)
    yield Check("gpu driver", "ok", f"{driver}; torch is built for {cuda.runtime_version()}")
    try:
        yield Check("triton", "ok", version("triton"))
    except PackageNotFoundError:
        yield Check("triton", "fail", "not installed: no kernel for the GPU", "pip install --force-reinstall torch")
    yield _kernel_cache()


def _kernel_cache() -> Check:
    """Where Triton keeps what it compiled: as its documentation has it, without loading it."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    num_kernels = sum(1 for kind in ("cubin", "hsaco") for _ in folder.glob(f"*/*.{kind}"))
    found = f"{num_kernels} compiled kernels in {folder}" if num_kernels else f"empty; the first start compiles into {folder}"
    beside = next(path for path in (folder, *folder.parents) if path.exists())
    is_writable = os.access(beside, os.W_OK)
    fix = "" if is_writable else "every start compiles anew: set TRITON_CACHE_DIR to a folder that can be written"
    return Check("kernel cache", "ok" if is_writable else "warn", found, fix)


def _kernels() -> Iterator[Check]:
    has_gpu = import_module("streamserve.kernels.devices.cuda").CUDA.find() is not None
    kernels = import_module("streamserve.kernels.registry").load(device="cuda" if has_gpu else "cpu")
    for name, reason in kernels.unavailable:
        yield Check(f"kernel {name}", "warn", reason, f"pip install {name.split('_', 1)[0]}")
    by_op: dict[str, list[str]] = {}
    for found in sorted(kernels.found, key=lambda found: -found.priority):
        by_op.setdefault(found.op, []).append(found.name)
    for op, names in sorted(by_op.items()):
        yield Check(op, "ok", ", ".join(names))


def _default_model() -> Iterator[Check]:
    try:
        path = find_default_model()
    except StartError:
        yield Check("default model", "warn", f"{DEFAULT_MODEL_NAME} is not installed", INSTALL_COMMAND)
    else:
        yield Check("default model", "ok", f"{DEFAULT_MODEL_NAME}, {path.stat().st_size / 1e6:.0f} MB, {path}")


def _calibration() -> Iterator[Check]:
    found = calibration.stored()
    if not found:
        yield Check("calibration", "ok", f"none yet in {calibration.cache_folder()}; the first start measures")
    for path, content in found:
        if "measured" in content:
            yield Check("calibration", "ok", f"{path.name}: {json.dumps(content['measured'])}")
        else:
            yield Check("calibration", "warn", f"{path} cannot be read", f"rm {path}")


def _port() -> Iterator[Check]:
    server = ServerConfig()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((server.host, server.port))
        except OSError as error:
            yield Check("port", "warn", f"{server.port} is taken ({error.strerror})", "streamserve serve --port 0")
        else:
            yield Check("port", "ok", f"{server.port} is free")


CHECKS = (_python, _packages, _processor, _torch, _gpu, _kernels, _default_model, _calibration, _port)
