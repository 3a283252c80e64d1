"""`python -m streamserve.compat.sglang script.py`: a script that says `import sglang` runs on StreamServe, unchanged.

Owns the name `sglang`: which of its modules and names stand for what here. It is opt-in: nothing is put under that name unless
`install()` is called, which this command does before it runs a script the way `python script.py` and `python -m module` do.
A name of SGLang's that has no counterpart raises an ImportError that says so when it is imported, never when it is used.

    MODULES   a module's name under `sglang` -> where its names come from here, first match wins
    ABSENT    names that SGLang has and that are not to be had here -> why
"""

import importlib
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from pkgutil import get_importer
from types import ModuleType, TracebackType
from typing import Any

_LANGUAGE = ("streamserve.lang", "streamserve")

MODULES: Mapping[str, tuple[str, ...]] = {
    "sglang": ("streamserve", "streamserve.lang"),
    "sglang.api": _LANGUAGE,
    "sglang.global_config": ("streamserve.lang",),
    "sglang.lang": ("streamserve.lang",),
    "sglang.lang.api": _LANGUAGE,
    "sglang.lang.backend": (),
    "sglang.lang.backend.anthropic": ("streamserve.lang.anthropic",),
    "sglang.lang.backend.base_backend": ("streamserve.compat.names",),
    "sglang.lang.backend.openai": ("streamserve.lang.openai",),
    "sglang.lang.backend.runtime_endpoint": ("streamserve.lang.endpoint", "streamserve.lang.runtime"),
    "sglang.lang.choices": ("streamserve.lang.choices",),
    "sglang.lang.global_config": ("streamserve.lang",),
    "sglang.lang.interpreter": ("streamserve.compat.names",),
    "sglang.lang.ir": ("streamserve.lang.dtypes", "streamserve.compat.names"),
    "sglang.test": (),
    "sglang.test.doc_patch": ("streamserve.compat.scripts",),
    "sglang.test.test_utils": ("streamserve.compat.scripts",),
    "sglang.utils": ("streamserve.compat.scripts",),
    "sglang.version": ("streamserve",),
}
COMMANDS = {"sglang.launch_server": "streamserve.launch_server"}  # behind -m
SCRIPT = "STREAMSERVE_COMPAT_SCRIPT"  # in the environment: which one runs, for processes that it spawns
_PACKAGES = {name.rpartition(".")[0] for name in MODULES}

_USE_OPENAI = "StreamServe has no client of that service; one that speaks OpenAI's API is reached by OpenAI(model, base_url=...)"
ABSENT: Mapping[str, str] = {
    "Crusoe": _USE_OPENAI,
    "LiteLLM": _USE_OPENAI,
    "Shortfin": _USE_OPENAI,
    "VertexAI": _USE_OPENAI,
    "get_chat_template": "a chat template comes with the model; RuntimeEndpoint(url, chat_template=...) takes another one",
}


def install() -> None:
    """Put StreamServe under the name `sglang`, for this process. RuntimeError where SGLang itself was imported already."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if "sglang" in sys.modules:
        raise RuntimeError("sglang is imported already: call streamserve.compat.sglang.install() before that")
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Answers for `sglang` and all below it, before anything that is installed."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "sglang":
            return None
        if fullname not in MODULES:
            raise ModuleNotFoundError(
                f"{fullname} is a part of SGLang that StreamServe does not stand in for; it has {', '.join(MODULES)}",
                name=fullname,
            )
        return ModuleSpec(fullname, _Loader(), origin=__file__, is_package=fullname in _PACKAGES)


class _Loader(Loader):
    """Makes a module whose names are looked up when they are asked for, so that importing it loads nothing else."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sources = MODULES[name]
        module.__doc__ = f"StreamServe in the place of {name}."

        def find(wanted: str) -> Any:
            if wanted.startswith("__") and wanted != "__version__":
                raise AttributeError(wanted)
            for source in sources:
                try:
                    found = getattr(importlib.import_module(source), wanted)
                except AttributeError:
                    continue
                setattr(module, wanted, found)
                return found
            if wanted in ABSENT:
                raise ImportError(f"{name}.{wanted} is not there in StreamServe: {ABSENT[wanted]}", name=name)
            raise AttributeError(
                f"{name} has no attribute {wanted!r}: StreamServe stands in for SGLang here, and knows no such name"
            )

        def names() -> list[str]:
            found: set[str] = set()
            for source in sources:
                origin = importlib.import_module(source)
                found.update(getattr(origin, "__all__", None) or (n for n in dir(origin) if not n.startswith("_")))
            return sorted(found)

        module.__getattr__ = find  # type: ignore[method-assign]
        module.__dir__ = names  # type: ignore[method-assign]


def _show_error(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    """A traceback as `python script.py` shows it: it begins in the script."""
    own = {__file__, "<frozen runpy>", runpy.__file__}
    while frames is not None and frames.tb_frame.f_code.co_filename in own:
        frames = frames.tb_next
    sys.__excepthook__(kind, error.with_traceback(frames), frames)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a script, or with -m a module, as Python would."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    usage = "usage: python -m streamserve.compat.sglang SCRIPT [ARGUMENTS...]   or   -m MODULE [ARGUMENTS...]"
    if not given or given[0] in ("-h", "--help") or given == ["-m"]:
        raise SystemExit(usage if not given or given == ["-m"] else print(usage))
    if given[0].startswith("-") and given[0] != "-m":
        raise SystemExit(f"unknown option {given[0]}; {usage}")
    install()
    sys.excepthook = _show_error
    if given[0] == "-m":
        if given[1] == "sglang.bench_serving":
            raise SystemExit("sglang.bench_serving is `streamserve bench serve` here; its options have the same names")
        sys.argv = given[1:]
        sys.path[0] = str(Path.cwd())
        runpy.run_module(COMMANDS.get(given[1], given[1]), run_name="__main__", alter_sys=True)
        return
    script = Path(given[0])
    if not script.is_file():
        raise SystemExit(f"there is no file {str(script)!r}; {usage}")
    sys.argv = given
    sys.path[0] = str(script.resolve().parent)
    if get_importer(str(script)) is None:
        _run(script)
    else:  # a zip file of modules
        runpy.run_path(str(script), run_name="__main__")


def _run(script: Path) -> None:
    """As Python runs a script, but for what the main module says of where it came from: see spawned.py."""
    os.environ[SCRIPT] = str(script.resolve())
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__spec__ = ModuleSpec("streamserve.compat.spawned", None)
    main.__file__ = str(script)
    exec(compile(script.read_bytes(), main.__file__, "exec"), main.__dict__)


if __name__ == "__main__":
    main()
