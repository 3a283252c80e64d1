"""The blocks of docs/programs.md run, one after the other, as a reader would paste them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from streamserve.default_model import find_default_model
from streamserve.errors import CheckpointError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "programs.md"


def test_the_page_runs_when_pasted(tmp_path: Path) -> None:
    try:
        find_default_model()
    except CheckpointError as error:
        pytest.skip(str(error))
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=110, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 7, done.stdout
