"""The blocks of docs/programs.md run, one after the other, as a reader would paste them."""

import re
from pathlib import Path
from typing import Any

import pytest

import streamserve
from streamserve.default_model import find_default_model
from streamserve.errors import CheckpointError

try:
    find_default_model()
except CheckpointError as error:
    pytest.skip(str(error), allow_module_level=True)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "programs.md"


def test_the_page_runs_when_pasted(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streamserve, "Engine", lambda: engine)  # one is there already; others go on with it
    monkeypatch.setattr(engine, "shutdown", lambda: None)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    script = tmp_path / "page.py"  # programs are read from their file
    script.write_text("\n".join(blocks), encoding="utf-8")
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), {"__name__": "page"})
    assert len(capsys.readouterr().out.splitlines()) >= 7
