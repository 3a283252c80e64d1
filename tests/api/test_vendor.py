"""The libraries that the page brings along are the files that vendor.json says, each with its licence."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest

STATIC = Path(__file__).resolve().parents[2] / "static"
VENDOR = STATIC / "vendor"
LIBRARIES = json.loads((VENDOR / "vendor.json").read_text())["libraries"]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library["name"])
def test_library_is_the_file_that_was_taken_from_its_package(library: dict[str, dict[str, str]]) -> None:
    found = {name: hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() for name in library["sha256"]}
    assert found == library["sha256"]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library["name"])
def test_library_comes_with_its_version_and_licence(library: dict[str, str]) -> None:
    licences = [name for name in library["sha256"] if name.endswith(".LICENSE.txt")]
    assert len(licences) == 1 and library["version"] in licences[0]
    assert "ermission is hereby granted" in (text := (VENDOR / licences[0]).read_text()) or "edistribution and use" in text
    assert library["licence"] in ("MIT", "BSD-3-Clause")
    assert library["package"].endswith("@" + library["version"])


def test_no_file_of_the_folder_is_unaccounted_for() -> None:
    known = {name for library in LIBRARIES for name in library["sha256"]} | {"vendor.json", "refresh.py"}
    found = {path.relative_to(VENDOR).as_posix() for path in VENDOR.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert found == known


def test_every_library_that_the_page_names_is_there() -> None:
    named = {
        name for path in (STATIC / "js").rglob("*.js") for name in re.findall(r"\.\./vendor/([\w./-]+\.js)", path.read_text())
    }
    assert named
    assert [name for name in named if not (VENDOR / name).is_file()] == []


def test_script_that_the_page_needs_before_first_use_is_small() -> None:
    start = STATIC / "js" / "main.js"
    eager, waiting = {start}, [start]
    while waiting:
        path = waiting.pop()
        for name in re.findall(r'^(?:import|export)\b[^;]*?from "(\.[^"]+)"|^import "(\.[^"]+)"', path.read_text(), re.MULTILINE):
            found = (path.parent / (name[0] or name[1])).resolve()
            if found not in eager:
                eager.add(found)
                waiting.append(found)
    sizes = {path.relative_to(STATIC).as_posix(): len(gzip.compress(path.read_bytes())) for path in eager}
    assert [name for name in sizes if name.startswith("vendor/")] == ["vendor/marked-18.2.1.js"]
    assert sum(sizes.values()) <= 60_000, sizes
