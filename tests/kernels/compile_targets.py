"""Compiles the Triton kernels for real GPUs, which needs no GPU: type errors, shared memory, what a target cannot do.

    python -m tests.kernels.compile_targets [--report] [family ...]

Every file variants_<family>.py beside this one holds `VARIANTS`, a list of tuples

    (kernel, signature, constexprs, options)

kernel      the @triton.jit function
signature   name to type of every parameter that is no constant: "*bf16", "*fp32", "*i32", "*i64", "i32", "fp32", ...
            Pointers count as aligned to 16 bytes, as a launch finds torch's memory, unless the kernel says
            do_not_specialize_on_alignment. "i32:16" is an integer that a launch would find to be a multiple of 16.
constexprs  name to value of the rest: tl.constexpr parameters, and parameters that are given None
options     launch options: num_warps, num_stages, launch_pdl, ...; "only" names a target if not all are meant: "cuda90",
            "cuda80", "hip", or "cuda" for both of NVIDIA's

Exits with 1 if any does not compile or needs more shared memory than its target has, and if a kernel in streamserve has no
variant. --report prints registers and spilled bytes per thread of what NVIDIA's assembler made, and shared memory.
Runs without TRITON_INTERPRET, so in a process of its own. Knows no kernel by name.
"""

import argparse
import ast
import importlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
IMPL = HERE.parents[1] / "streamserve" / "kernels" / "impl"
# Name: backend, architecture, threads per warp, bytes of shared memory a block may have.
TARGETS: dict[str, tuple[str, int | str, int, int]] = {
    "cuda80": ("cuda", 80, 32, 163 * 1024),
    "cuda90": ("cuda", 90, 32, 227 * 1024),
    "hip": ("hip", "gfx942", 64, 64 * 1024),
}


def families() -> list[str]:
    """All that have a file of variants."""
    return sorted(path.stem.removeprefix("variants_") for path in HERE.glob("variants_*.py"))


def variants(family: str) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """What one file asks for."""
    found: list[Any] = list(importlib.import_module(f"tests.kernels.variants_{family}").VARIANTS)
    return found


def source_of(kernel: Any, signature: dict[str, str], constexprs: dict[str, Any]) -> Any:
    """An ASTSource with what a real launch would know: which arguments are constants, which are multiples of 16."""
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    missing = [name for name in names if name not in signature and name not in constexprs]
    unknown = [name for name in (*signature, *constexprs) if name not in names]
    assert not missing and not unknown, f"parameters without a type or value: {missing}, not the kernel's: {unknown}"
    types = {name: "constexpr" if name in constexprs else signature[name].split(":")[0] for name in names}
    attrs = {}
    for i, param in enumerate(kernel.params):
        is_pointer = types[param.name].startswith("*") and not param.do_not_specialize_on_alignment
        if (is_pointer and not param.do_not_specialize) or signature.get(param.name, "").endswith(":16"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, types, constexprs, attrs)


def compile_one(job: tuple[str, int, str]) -> tuple[str, str | None, str]:
    """Compile variant `index` of a family for a target. Returns what it was, what went wrong, and the resources."""
    import triton
    from triton.backends.compiler import GPUTarget

    family, index, target = job
    backend, arch, warp, max_shared = TARGETS[target]
    kernel, signature, constexprs, options = variants(family)[index]
    label = f"{family}[{index}] {kernel.__name__} {target} {constexprs} {options}"
    try:
        options = {name: value for name, value in options.items() if name != "only"}
        binary = triton.compile(source_of(kernel, signature, constexprs), GPUTarget(backend, arch, warp), options)
    except Exception as error:  # whatever a compiler throws is the finding
        return label, f"{type(error).__name__}: {error}", ""
    shared = binary.metadata.shared
    failure = f"needs {shared} bytes of shared memory of {max_shared}" if shared > max_shared else None
    resources = f"{shared} B shared"
    if backend == "cuda" and os.environ.get("COMPILE_REPORT"):
        resources = f"{_registers(binary.asm['cubin'])}, {resources}"
    return label, failure, resources


def _registers(cubin: bytes) -> str:
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    return f"{usage['REG']} registers, {int(usage['STACK']) + int(usage['LOCAL'])} B spilled"


def without_variants() -> list[str]:
    """Kernels that nothing here compiles. A jit function that another one calls is part of that one."""
    kernels: dict[str, str] = {}
    called: set[str] = set()
    for path in sorted(IMPL.glob("triton_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list):
                kernels[node.name] = path.name
                calls = (sub.func for sub in ast.walk(node) if isinstance(sub, ast.Call))
                called |= {func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in calls}
    compiled = {kernel.__name__ for family in families() for kernel, *_ in variants(family)}
    return [f"{file}: {name} has no variant" for name, file in kernels.items() if name not in compiled | called]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--report", action="store_true")
    parser.add_argument("family", nargs="*")
    args = parser.parse_args()
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    if args.report:
        os.environ["COMPILE_REPORT"] = "1"
    jobs = [
        (family, index, target)
        for family in args.family or families()
        for index, (*_, options) in enumerate(variants(family))
        for target in TARGETS
        if target.startswith(options.get("only", ""))
    ]
    failures = [] if args.family else without_variants()
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for label, failure, resources in pool.map(compile_one, jobs):
            if args.report:
                print(f"{label}: {resources or 'failed'}", flush=True)
            if failure:
                failures.append(f"{label}\n    {failure}")
    print("\n".join([*failures, f"{len(jobs)} compiled, {len(failures)} failures"]))
    return 1 if failures or not jobs else 0


if __name__ == "__main__":
    sys.exit(main())
