"""The page's modules: imports go down only, nothing is there that nobody uses, and no text is parsed as HTML or as a program."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "static"
JS = STATIC / "js"
MAX_LINES = 500

# Folders of static/js, the lowest first. Each may import those of the rows before its own, and itself; those of one row don't
# know each other. page/ holds what names them all, main.js starts it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("ui",),
    ("text", "json", "store", "wire"),
    ("settings", "composer"),
    ("chat", "nav"),
    ("structure",),
    ("tools", "raw", "tokens", "cache", "compare", "engine"),
    ("page",),
    ("main.js", "docs.js"),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}

# Each turns text into elements or code. Trusted Types would refuse most of them as well; this says it before a browser does.
FORBIDDEN = (
    r"\b(?:inner|outer)HTML\b",
    r"\binsertAdjacentHTML\b",
    r"\bsetHTMLUnsafe\b",
    r"\bcreateContextualFragment\b",
    r"\bDOMParser\b",
    r"\bsrcdoc\b",
    r"\bdocument\.write",
    r"\beval\b\s*\(",
    r"\bFunction\s*\(",
    r"""setAttribute\(\s*["']style""",
)

STATIC_IMPORT = re.compile(r'^(?:import|export)\b[^;"]*?(?:\bfrom\s*)?"(\.[^"]+)"', re.MULTILINE)
LAZY_IMPORT = re.compile(r'\bimport\(\s*"([^"]+)"')
NAMED = re.compile(
    r'^import \{(?P<static>[^}]*)\} from "(?P<path>\.[^"]+)"'
    r'|const \{(?P<lazy>[^}]*)\} = await import\("(?P<later>\.[^"]+)"\)'
    r'|import\("(?P<then>\.[^"]+)"\)\.then\(\((?:\{(?P<parts>[^}]*)\}|m\) => m\.(?P<part>\w+))',
    re.MULTILINE,
)
EXPORT = re.compile(r"^export (?:async )?(?:function\*?|const|let|class) (\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Script:
    """One of our modules: `imports` are those it needs at once, `lazy` those it may bring later."""

    path: Path
    text: str
    imports: tuple[Path, ...]
    lazy: tuple[Path, ...]

    @property
    def name(self) -> str:
        return self.path.relative_to(STATIC).as_posix()

    @property
    def part(self) -> str:
        """The folder of static/js that it lies in, or its own name where it lies in none."""
        return self.path.relative_to(JS if self.path.is_relative_to(JS) else STATIC).parts[0]


@cache
def scripts() -> dict[Path, Script]:
    found = {}
    for path in sorted(STATIC.rglob("*.js")):
        if path.is_relative_to(STATIC / "vendor"):
            continue
        text = path.read_text(encoding="utf-8")
        named = [[(path.parent / name).resolve() for name in kind.findall(text)] for kind in (STATIC_IMPORT, LAZY_IMPORT)]
        found[path] = Script(path, text, tuple(named[0]), tuple(named[1]))
    assert len(found) > 50
    return found


@cache
def entries() -> tuple[Path, ...]:
    """The modules that a page of HTML names."""
    return tuple(
        STATIC / name.removeprefix("static/")
        for page in STATIC.glob("*.html")
        for name in re.findall(r'<script type="module" src="([^"]+)"', page.read_text(encoding="utf-8"))
    )


def test_every_import_names_a_file() -> None:
    missing = [
        f"{script.name}: {path}" for script in scripts().values() for path in script.imports + script.lazy if not path.is_file()
    ]
    assert missing == []


def test_every_name_that_is_imported_is_exported() -> None:
    """A browser would say so only when it comes to that module."""
    missing = []
    for script in scripts().values():
        for found in NAMED.finditer(script.text):
            path = (script.path.parent / (found["path"] or found["later"] or found["then"])).resolve()
            names = found["static"] or found["lazy"] or found["parts"] or found["part"]
            if path not in scripts():
                continue  # another's library
            known = EXPORT.findall(scripts()[path].text)
            unknown = set(re.findall(r"(?:^|,)\s*(\w+)", names)) - set(known)
            missing += [f"{script.name} imports {name} from {scripts()[path].name}" for name in sorted(unknown)]
    assert missing == []


def test_every_folder_has_its_place_in_the_layers() -> None:
    assert {script.part for script in scripts().values()} == set(LEVELS)


def test_imports_go_down_only() -> None:
    wrong = [
        f"{script.name} imports {scripts()[path].name}"
        for script in scripts().values()
        for path in script.imports + script.lazy
        if path in scripts() and scripts()[path].part != script.part and LEVELS[scripts()[path].part] >= LEVELS[script.part]
    ]
    assert wrong == []


def test_no_module_needs_itself() -> None:
    """A module that is brought later may import the one that brings it; those needed at once may not go in a circle."""
    done: set[Path] = set()

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        assert path not in way, " -> ".join(scripts()[other].name for other in (*way[way.index(path) :], path))
        if path in done or path not in scripts():
            return
        for other in scripts()[path].imports:
            visit(other, (*way, path))
        done.add(path)

    for path in scripts():
        visit(path, ())


def test_every_module_is_reached_from_a_page() -> None:
    reached, waiting = set(entries()), list(entries())
    assert {path.name for path in reached} == set(LAYERS[-1])
    while waiting:
        script = scripts()[waiting.pop()]
        new = {path for path in script.imports + script.lazy if path in scripts()} - reached
        reached |= new
        waiting += new
    assert sorted(script.name for path, script in scripts().items() if path not in reached) == []


def test_what_is_exported_is_imported() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "e2e" / "playground").glob("*.py"))
    code = "".join(script.text for script in scripts().values())
    unused = []
    for path, script in scripts().items():
        users = [other.text for other in scripts().values() if path in other.imports + other.lazy]
        if f"/{script.name}" in tests:
            users.append(tests)
        unused += [
            f"{script.name}: {name}"
            for name in EXPORT.findall(script.text)
            if not any(re.search(rf"\b{name}\b", text) for text in users) and f'change("{name}"' not in code  # of chat/changes.js
        ]
    assert unused == []


def test_every_module_says_first_what_it_is_for() -> None:
    assert [script.name for script in scripts().values() if not re.match(r"/\*\*\n \* \S", script.text)] == []


def test_no_file_is_long() -> None:
    files = [*scripts(), *STATIC.rglob("*.css"), *STATIC.glob("*.html")]
    assert [path.name for path in files if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES] == []


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_nothing_turns_text_into_elements_or_code(pattern: str) -> None:
    code = {script.name: re.sub(r"/\*.*?\*/|(?<!:)//[^\n]*", "", script.text, flags=re.DOTALL) for script in scripts().values()}
    assert [name for name, text in code.items() if re.search(pattern, text)] == []


def test_every_sheet_is_used() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in STATIC.glob("*.html"))
    code = "".join(script.text for script in scripts().values())
    named = {f"css/{name}.css" for name in re.findall(r'(?:\bstyle: |\buseStyle\()"([\w-]+)"', code)}
    named |= set(re.findall(r'<link rel="stylesheet" href="static/([^"]+)"', pages))
    assert {path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*.css")} == named
