"""Fetches the libraries of the playground again: run by hand after a version below was changed, with Node's npm at hand.

    python static/vendor/refresh.py

Owns which files are taken from which package, and vendor.json, which says where each came from and what is in it. Nothing
here runs at build time or in a server; users need no Node. A test recomputes the hashes.
"""

import hashlib
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
LANGUAGES = (
    *("bash", "c", "cpp", "csharp", "css", "diff", "dockerfile", "go", "ini", "java", "javascript", "json", "kotlin"),
    *("markdown", "php", "python", "ruby", "rust", "sql", "typescript", "xml", "yaml"),
)


MIT = """The package says "license": "MIT" and holds no text of it. This is that licence, with the author that the package names.

MIT License

Copyright (c) {author}

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""
VALIDATOR = ("deep-compare-strict", "dereference", "format", "pointer", "ucs2-length", "validate", "validator")


def unmapped(text: str) -> str:
    """Without the last line, which names a map of the source that is not shipped."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("//# sourceMappingURL="))


def exported(text: str) -> str:
    """As a module: the package publishes its small form as a script that sets one global name."""
    return text.rstrip("\n") + "\nexport default temml;\n"


@dataclass(frozen=True, slots=True)
class Library:
    """One package: `files` are {path in the package: name here}; `edit` is the only change made to them."""

    name: str
    package: str
    version: str
    licence: str
    use: str
    files: dict[str, str]
    edit: Callable[[str], str] | None = None
    edited: dict[str, str] = field(default_factory=dict)  # said in vendor.json
    added: tuple[str, str] | None = None  # name and text of a licence that the package names but does not hold


LIBRARIES = (
    Library(
        name="marked",
        package="marked",
        version="18.2.1",
        licence="MIT",
        use="Markdown to tokens (its lexer alone), loaded with the page",
        files={"lib/marked.esm.js": "marked-18.2.1.js", "LICENSE": "marked-18.2.1.LICENSE.txt"},
        edit=unmapped,
        edited={"marked-18.2.1.js": "the line that names a source map is left out"},
    ),
    Library(
        name="highlight.js",
        package="@highlightjs/cdn-assets",
        version="11.12.0",
        licence="BSD-3-Clause",
        use="colours of code, loaded with the first block of a known language",
        files={
            "es/core.min.js": "highlight-11.12.0/core.js",
            **{f"es/languages/{name}.min.js": f"highlight-11.12.0/{name}.js" for name in LANGUAGES},
            "LICENSE": "highlight-11.12.0.LICENSE.txt",
        },
    ),
    Library(
        name="Temml",
        package="temml",
        version="0.13.5",
        licence="MIT",
        use="TeX to MathML, loaded with the first formula",
        files={"dist/temml.min.js": "temml-0.13.5.js", "LICENSE": "temml-0.13.5.LICENSE.txt"},
        edit=exported,
        edited={"temml-0.13.5.js": "a last line exports the name that the script sets"},
    ),
    Library(
        name="@cfworker/json-schema",
        package="@cfworker/json-schema",
        version="4.1.6",
        licence="MIT",
        use="whether an answer matches its JSON schema, loaded by the worker that checks the first one",
        files={f"dist/esm/{name}.js": f"json-schema-4.1.6/{name}.js" for name in VALIDATOR},
        edit=unmapped,
        edited={f"json-schema-4.1.6/{name}.js": "the line that names a source map is left out" for name in VALIDATOR},
        added=("json-schema-4.1.6.LICENSE.txt", MIT.format(author="Jeremy Danyow")),
    ),
)


def take(library: Library, folder: Path) -> dict[str, object]:
    """Copies the files of one library, and says what vendor.json keeps of it."""
    spec = f"{library.package}@{library.version}"
    packed = json.loads(subprocess.run(["npm", "pack", "--json", spec], cwd=folder, check=True, capture_output=True).stdout)[0]
    hashes = {}
    with tarfile.open(folder / packed["filename"]) as archive:
        for path, name in library.files.items():
            member = archive.extractfile(f"package/{path}")
            assert member is not None, path
            body = member.read()
            if library.edit and name.endswith(".js"):
                body = library.edit(body.decode()).encode()
            target = HERE / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(body)
            hashes[name] = hashlib.sha256(body).hexdigest()
    if library.added:
        name, text = library.added
        (HERE / name).write_text(text)
        hashes[name] = hashlib.sha256(text.encode()).hexdigest()
    return {
        "name": library.name,
        "version": library.version,
        "licence": library.licence,
        "package": spec,
        "package_integrity": packed["integrity"],
        "use": library.use,
        "changed": library.edited,
        "sha256": hashes,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        taken = [take(library, Path(folder)) for library in LIBRARIES]
    (HERE / "vendor.json").write_text(json.dumps({"libraries": taken}, indent=2) + "\n")
    known = {name for library in LIBRARIES for name in library.files.values()} | {"vendor.json", "refresh.py"}
    known |= {library.added[0] for library in LIBRARIES if library.added}
    for path in sorted(HERE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.relative_to(HERE).as_posix() not in known:
            print(f"of no library any more, delete it: {path}")


if __name__ == "__main__":
    main()
