"""Every Triton kernel compiles for the GPUs we mean, and what surrounds the kernels is typed."""

import ast
import os
import subprocess
import sys

import pytest

from tests.kernels.compile_targets import HERE, IMPL


@pytest.mark.slow
@pytest.mark.timeout(400)  # seconds when Triton's cache is warm
def test_every_kernel_compiles_for_every_target() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_targets"]
    done = subprocess.run(command, cwd=HERE.parents[1], env=env, capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("name", sorted(path.name for path in IMPL.glob("triton_*.py")))
def test_functions_that_are_no_kernels_are_annotated(name: str) -> None:
    """mypy lets kernels, and with them whole files, have unannotated parameters."""
    bare = []
    for node in ast.walk(ast.parse((IMPL / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(mark) for mark in node.decorator_list):
            args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if node.returns is None or any(arg.annotation is None and arg.arg not in ("self", "cls") for arg in args):
                bare.append(f"{node.name}:{node.lineno}")
    assert bare == []
