"""The examples: each is whole, says what it shows, and uses nothing but what is public. `make examples` runs all of them."""

import ast
import runpy
import sys
from contextlib import nullcontext
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

FOLDER = Path(__file__).resolve().parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
WORDS = {  # of what an example shows, where a small model can be sure of it
    "classify": ("weather", "cooking"),
    "few_shot_batch": ("Paris", "Tokyo", "from the cache"),
    "image_question": ("red circle",),
    "json_extraction": ("Lisbon", "pilot"),
    "streaming_chat": ("> What is a volcano?",),
    "tool_agent": ("calc(7 * 30) = 210",),
}


def test_there_are_eight() -> None:
    assert len(EXAMPLES) == 8


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_what_it_shows_and_uses_public_names_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sgl"
    }
    assert used <= set(streamserve.__all__)
    brought = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    brought |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in brought if name not in sys.stdlib_module_names} <= {"streamserve", "PIL"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_from_any_folder(
    path: Path, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.setattr(streamserve, "Engine", lambda **_: nullcontext(engine))  # one is there already; others go on with it
    runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) >= 3
    assert all(word in shown for word in WORDS.get(path.stem, ())), shown
