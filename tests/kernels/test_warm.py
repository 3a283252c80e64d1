"""The rehearsal compiles each kernel once, launches nothing, and leaves Triton as it was."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_rehearsal_compiles_every_variant_once_and_launches_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.warm_without_gpu"], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "told": [[1, 3], [2, 3], [3, 3]],
        "binaries": 3,
        "kernels": 3,
        "restored": True,
        "untouched": True,
        "threads": True,
        "error": "CompilationError",
    }
    assert len(list(tmp_path.glob("*/*.cubin"))) == 3
