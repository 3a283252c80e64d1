"""The examples: each is whole, says what it shows, and uses nothing but what is public. `make examples` runs all of them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import streamserve
from streamserve.default_model import find_default_model
from streamserve.errors import CheckpointError

FOLDER = Path(__file__).resolve().parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


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


@pytest.mark.parametrize(
    ("name", "words"), [("classify.py", ["weather", "cooking"]), ("streaming_chat.py", ["> What is a volcano?"])]
)
def test_an_example_runs_from_any_folder(name: str, words: list[str], tmp_path: Path) -> None:
    try:
        find_default_model()
    except CheckpointError as error:
        pytest.skip(str(error))
    done = subprocess.run([sys.executable, str(FOLDER / name)], capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words), done.stdout
