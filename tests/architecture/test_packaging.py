"""What is declared is what is used, and the wheel carries what is no module."""

import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from typing import Any

from tests.architecture.source import ROOT, imports, modules

# triton: by torch's CUDA and ROCm builds only, and it is imported only where they are (kernels/registry.py).
BROUGHT_BY = {
    "h2": "hypercorn",
    "hyperframe": "hypercorn",
    "h11": "hypercorn",
    "wsproto": "hypercorn",
    "llvmlite": "numba",
    "triton": "torch",
}


def _project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def _declared() -> set[str]:
    """What is needed, and what only some need: extras, but for that of the tests."""
    project = _project()["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "test" for line in lines]
    return {re.split(r"[<>=!;\[ ]", line, maxsplit=1)[0].lower() for line in [*project["dependencies"], *extras]}


def _used() -> set[str]:
    known = frozenset(module.name for module in modules())
    tops = {found.target.split(".", 1)[0] for module in modules() for found in imports(module, known)}
    others = {top for top in tops if top and top != "streamserve" and top not in sys.stdlib_module_names}
    owners = packages_distributions()
    names = {BROUGHT_BY.get(top, owners.get(top, [top])[0]) for top in others}
    return {name.lower().replace("_", "-") for name in names}


def test_every_package_that_is_imported_is_declared() -> None:
    assert _used() - _declared() == set()


def test_every_package_that_is_declared_is_used() -> None:
    assert _declared() - _used() == set()


def test_the_wheel_holds_the_page_and_the_default_models_eyes() -> None:
    wheel = _project()["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"static": "streamserve/static", "demo/eyes": "streamserve/eyes"}
    assert (ROOT / "static" / "index.html").is_file()
    assert (ROOT / "demo" / "eyes" / "model.safetensors").is_file()
