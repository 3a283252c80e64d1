"""Imports go down only, and never in a circle. The table below is the architecture; a new edge is a change to it."""

import subprocess
import sys

import pytest

from tests.architecture.source import imports, modules, own_imports

# Level 0, lowest first: each may import those before it.
FOUNDATION = (
    "",
    "errors",
    "messages",
    "config",
    "speculative",
    "resolve",
    "log",
    "metrics",
    "calibration",
    "startup",
    "default_model",
    "process",
    "keys",
)

# What each part may import of ours, beside the foundation and itself. A dotted name allows that module only.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "text": (),
    "media": (),
    "kernels": (),
    "cache": ("kernels",),
    "models": ("kernels", "cache.pool"),
    "engine": ("cache", "models", "kernels"),
    "api": ("text", "media", "engine.client"),
    "lang": ("text", "sglang_flags"),
    "calibrate": ("kernels", "models", "cache.pool"),
    "facts": ("kernels", "models", "calibrate"),
    "build": ("text", "media", "kernels", "cache", "models", "engine", "facts"),
    "application": ("api", "build"),
    "serve": ("api", "application", "build", "engine"),
    "llm": ("api", "application", "build", "engine", "flags", "lang", "media", "sglang_flags"),
    "flags": (),
    "doctor": ("kernels",),
    "explain": ("flags", "facts", "kernels", "models"),
    "offline": ("api", "application", "build"),
    "batch": ("api", "application", "build"),
    "cli": ("flags", "serve", "offline", "batch", "explain", "doctor", "benchmark", "terminal"),
    "__main__": ("cli",),
    "sglang_flags": ("flags",),
    "benchmark": ("text",),
    "terminal": ("lang", "llm"),
    "launch_server": ("cli", "flags", "sglang_flags"),
    "compat": ("", "lang"),
}

# Other people's packages that only some parts may know. Whoever is not named here is free.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "torch": (
        "kernels",
        "cache.pool",
        "models",
        "engine.runner",
        "engine.batch",
        "engine.sampler",
        "engine.stages",
        "engine.device_embeddings",
        "engine.device_runner",
        "engine.device_sampler",
        "engine.device_state",
        "engine.embeddings",
        "engine.drafters.runner_drafter",
        "engine.drafters.passes",
        "engine.drafters.draft_model",
        "engine.drafters.heads",
        "engine.drafters.find",
        "engine.drafters.device_drafter",
        "engine.drafters.device_passes",
        "engine.drafters.device_draft_model",
        "engine.drafters.device_heads",
        "engine.drafters.find_on_gpu",
        "calibrate",
        "facts",
        "build",
        "doctor",
    ),
    "numba": ("kernels",),
    "triton": ("kernels",),
    "transformers": (),  # the reference in tests; nothing here needs it
    "starlette": ("api",),
    "hypercorn": ("serve", "api.connections", "api.h1", "api.h2"),
    "rich": ("startup", "llm", "lang.progress"),
    "prometheus_client": ("metrics",),
    "msgspec": ("api", "text", "messages", "engine.plan"),
    "huggingface_hub": ("models.hub",),
    "llguidance": ("engine.grammar",),
    "av": ("media.sound", "media.video"),
    "PIL": ("media",),
    "greenlet": ("lang",),
    "openai": ("lang.openai",),
    "anthropic": ("lang.anthropic",),
    "httpx": ("media", "lang.transport"),
    "python_multipart": ("api.multipart",),
}

TORCH_FREE = (
    *(f"streamserve.{name}" for name in FOUNDATION if name),
    "streamserve.text",
    "streamserve.media",
    "streamserve.api",
    "streamserve.lang",
    "streamserve.engine.client",
    "streamserve.engine.answer",
    "streamserve.engine.encode_planner",
    "streamserve.engine.encodings",
    "streamserve.engine.flight",
    "streamserve.engine.held_inputs",
    "streamserve.engine.rotary",
    "streamserve.engine.embedder",
    "streamserve.engine.pause",
    "streamserve.engine.plan",
    "streamserve.engine.prefix_groups",
    "streamserve.engine.core",
    "streamserve.engine.scheduler",
    "streamserve.engine.request",
    "streamserve.engine.policy",
    "streamserve.engine.fake",
    "streamserve.engine.grammar",
    "streamserve.engine.guide",
    "streamserve.engine.speculation",
    "streamserve.engine.step_costs",
    "streamserve.engine.drafters.chance",
    "streamserve.engine.drafters.drafter",
    "streamserve.engine.drafters.ngram",
    "streamserve.engine.drafters.page_memory",
    "streamserve.engine.drafters.places",
    "streamserve.engine.drafters.recent",
    "streamserve.engine.drafters.runner_drafts",
    "streamserve.cache.pages",
    "streamserve.cache.radix",
    "streamserve.cache.keys",
    "streamserve.cache.evict",
    "streamserve.cache.kv_cache",
    "streamserve.kernels.devices.cpu",
    "streamserve.application",
    "streamserve.llm",
    "streamserve.serve",
    "streamserve.build",
    "streamserve.cli",
    "streamserve.launch_server",
    "streamserve.benchmark",
)


def _is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _part_of(name: str) -> str:
    return name.split(".", 1)[0]


def test_every_module_has_a_place_in_the_table() -> None:
    placed = {*FOUNDATION, *MAY_IMPORT}
    assert {_part_of(module.name) for module in modules()} <= placed


def test_imports_go_down_only() -> None:
    wrong = []
    for found in own_imports(modules()):
        source, target = _part_of(found.module), _part_of(found.target)
        if source in (target, ""):  # the package names what its parts offer, for type checkers; it loads none of them
            continue
        if source in FOUNDATION:
            is_allowed = target in FOUNDATION and FOUNDATION.index(target) < FOUNDATION.index(source)
        else:
            is_allowed = target in FOUNDATION or any(_is_within(found.target, part) for part in MAY_IMPORT[source])
        if not is_allowed:
            wrong.append(f"{found.module}:{found.line} imports {found.target}")
    assert wrong == []


def test_no_import_circle_even_inside_functions() -> None:
    edges: dict[str, set[str]] = {}
    for found in own_imports(modules()):
        # The package itself is imported by all its modules and imports none; discovery has a test of its own.
        if found.target and not found.is_dynamic:
            edges.setdefault(found.module, set()).add(found.target)
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for target in sorted(edges.get(name, ())):
            if target != name:
                visit(target)
        done.add(path.pop())

    for name in sorted(edges):
        visit(name)


def test_only_discovery_imports_by_name() -> None:
    """import_module() finds plug-in files, lets the doctor look at a broken package, and the package (whose name is "") find
    its public names, under another name too (compat). Elsewhere it would hide an edge."""
    everything = modules()
    known = frozenset(module.name for module in everything)
    found = {found.module for module in everything for found in imports(module, known) if found.is_dynamic}
    assert found - {""} <= {"kernels.registry", "models", "models.vision", "media.families", "doctor", "compat.sglang"}


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_a_package_is_known_only_where_it_belongs(package: str) -> None:
    everything = modules()
    known = frozenset(module.name for module in everything)
    wrong = [
        f"{found.module}:{found.line}"
        for module in everything
        for found in imports(module, known)
        if _is_within(found.target, package) and not any(_is_within(module.name, part) for part in ONLY_IN[package])
    ]
    assert wrong == []


def _loaded_by(names: tuple[str, ...]) -> set[str]:
    """Top-level packages in memory after importing these modules (a package stands for all modules in it)."""
    everything = [f"streamserve.{module.name}" for module in modules() if module.name]
    wanted = [name for name in everything if any(_is_within(name, part) for part in names)]
    assert len(wanted) >= len(names)
    code = f"import importlib, sys\nfor name in {wanted!r}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return {name.split(".", 1)[0] for name in done.stdout.split()}


def test_torch_free_modules_load_no_torch() -> None:
    assert "torch" not in _loaded_by(TORCH_FREE)


def test_the_command_line_loads_nothing_slow() -> None:
    slow = {"torch", "numba", "transformers", "numpy", "starlette", "hypercorn", "rich", "structlog"}
    assert (
        _loaded_by(("streamserve.cli", "streamserve.launch_server", "streamserve.flags", "streamserve.resolve")) & slow == set()
    )
