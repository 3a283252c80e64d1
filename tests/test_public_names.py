"""`import streamserve`: every public name is there, and nothing is loaded before it is used."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import streamserve

SLOW = {"torch", "numba", "numpy", "transformers", "httpx", "starlette", "hypercorn", "structlog", "rich", "asyncio", "greenlet"}


def test_the_package_loads_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import streamserve; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert {name for name in loaded if name.startswith("streamserve")} == {"streamserve"}
    assert SLOW.isdisjoint(loaded)


@pytest.mark.parametrize("name", streamserve.__all__)
def test_a_public_name_is_there(name: str) -> None:
    assert getattr(streamserve, name) is not None
    assert name in dir(streamserve)


def test_every_name_is_known_to_tools_that_run_nothing() -> None:
    """What is imported for type checkers is what is looked up on first use, from the same places."""
    tree = ast.parse(Path(streamserve.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {(alias.name, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    names = set(streamserve.__all__) - {"__version__"}
    assert shown == {(name, streamserve._HOME_OF.get(name, "streamserve.lang")) for name in names}


def test_no_public_name_is_a_part_of_the_package() -> None:
    """A module that is imported becomes an attribute of its package, and would take the name's place."""
    parts = {part.name for part in pkgutil.iter_modules(streamserve.__path__)}
    assert "llm" in parts and parts.isdisjoint(streamserve.__all__)


def test_an_unknown_name_says_so() -> None:
    with pytest.raises(AttributeError, match="'streamserve' has no attribute 'Nothing'"):
        streamserve.Nothing  # noqa: B018
