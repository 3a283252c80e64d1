"""The package's source as data: modules, their syntax trees, and who imports whom."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "streamserve"


@dataclass(frozen=True)
class Module:
    """One file: `name` without the package's own, "" for its __init__ (api.ws, cache, ...)."""

    name: str
    path: Path
    tree: ast.Module


@dataclass(frozen=True)
class Import:
    """One import, wherever in the file it stands. `target` is a full dotted name."""

    module: str
    target: str
    line: int
    is_dynamic: bool = False  # import_module("...")


@cache
def modules() -> tuple[Module, ...]:
    """Every file of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"))))
    assert len(found) > 20
    return tuple(found)


def imports(module: Module, known: frozenset[str]) -> Iterator[Import]:
    """All imports of a module, those inside functions too. `known`: names of all our modules."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module.name, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.path}:{node.lineno}: relative imports hide the layer"
            base = node.module or ""
            for alias in node.names:  # `from streamserve.cache import pages` names a module, `... import KVCache` a class
                full = f"{base}.{alias.name}"
                yield Import(module.name, full if full.removeprefix("streamserve.") in known else base, node.lineno)
        elif isinstance(node, ast.Call) and _is_dynamic_import(node):
            target = node.args[0]
            name = str(target.value) if isinstance(target, ast.Constant) else ""
            yield Import(module.name, name, node.lineno, is_dynamic=True)


def _is_dynamic_import(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name == "import_module" and len(call.args) >= 1


def own_imports(all_modules: tuple[Module, ...]) -> list[Import]:
    """Imports of our own modules, targets without the package's name."""
    known = frozenset(module.name for module in all_modules)
    return [
        Import(found.module, found.target.removeprefix("streamserve").lstrip("."), found.line, found.is_dynamic)
        for module in all_modules
        for found in imports(module, known)
        if found.target == "streamserve" or found.target.startswith("streamserve.")
    ]
