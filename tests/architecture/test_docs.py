"""The documents agree with the tree."""

import re

import pytest

from streamserve.cli import VERBS
from streamserve.flags import ALIASES, Parser, settings
from streamserve.sglang_flags import THEIR_FLAGS
from tests.architecture.source import PACKAGE, ROOT, modules

DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/batches.md",
    "docs/benchmark.md",
    "docs/embeddings.md",
    "docs/inspection.md",
    "docs/offline.md",
    "docs/playground.md",
    "docs/programs.md",
    "docs/speculation.md",
    "docs/websocket.md",
)


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_that_is_named_exists(name: str) -> None:
    paths = set(re.findall(r"`([a-z0-9_/.]+(?:\.(?:py|md|js|toml)|/))`", _text(name)))
    links = {link for link in re.findall(r"\]\(([^)#:]+)\)", _text(name))}
    here = (ROOT / name).parent
    missing = [path for path in paths if not any((folder / path).exists() for folder in (PACKAGE, ROOT))]
    assert missing + [link for link in links if not (here / link).exists()] == []


def test_the_map_shows_every_module() -> None:
    text = _text("ARCHITECTURE.md")
    drawing = text[text.index("## Map") : text.index("## The life of a request")]
    words = set(re.findall(r"\w+", drawing))
    names = {module.name.rsplit(".", 1)[-1] for module in modules()} - {""}
    missing = {name for name in names if name not in words and not name.startswith("numba_") and name != "impl"}
    assert missing == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flag_that_is_named_exists(name: str) -> None:
    others = {"--errors", "--help", "--help-all", "--explain", "--json", "--fake", "--input", "--output", "--no-deps"}
    known = {setting.flag for setting in settings()} | {alias for alias, _ in ALIASES} | others | THEIR_FLAGS
    for verb in VERBS:
        parser = Parser(verb.name)
        verb.add_arguments(parser, True)
        known |= set(parser._option_string_actions)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", _text(name))) - known == set()


def test_the_architecture_fits_on_five_pages() -> None:
    assert len(_text("ARCHITECTURE.md").splitlines()) <= 5 * 60
