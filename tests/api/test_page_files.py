"""How the page's files are sent: compressed, kept for good where their address says what they are, and while the model loads."""

import gzip
import re
from pathlib import Path

import httpx
import pytest

from streamserve.api.app import create_app
from streamserve.api.gate import Gate
from streamserve.api.playground import Playground, static_folder
from streamserve.config import ServerConfig
from streamserve.text.byte_tokenizer import byte_text_model
from tests.api.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio
MAIN = "static/js/main.js"


def client_of(gate: Gate) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://test")


def page_of(folder: Path, script: str) -> Playground:
    folder.mkdir()
    (folder / "index.html").write_text('<link href="static/a.css"><script src="static/a.js"></script>')
    (folder / "a.css").write_text("p { color: red }\n" * 100)
    (folder / "a.js").write_text(script)
    return Playground(folder)


async def test_files_are_compressed_for_those_who_take_it(tmp_path: Path) -> None:
    async with client_of(Gate(page_of(tmp_path / "static", "let a = 1;\n" * 100))) as http:
        for accepted, is_zipped in (
            ("gzip, br", True),
            ("br;q=1.0, GZIP;q=0.5", True),
            ("gzip;q=0, br", False),
            ("identity", False),
        ):
            answer = await http.get("/static/a.js", headers={"accept-encoding": accepted})
            assert (answer.headers.get("content-encoding") == "gzip", answer.text) == (is_zipped, "let a = 1;\n" * 100), accepted
            assert answer.headers["vary"] == "accept-encoding"
            seen = {"accept-encoding": accepted, "if-none-match": answer.headers["etag"]}
            assert (await http.get("/static/a.js", headers=seen)).status_code == 304
        plain = await http.get("/static/a.js", headers={"accept-encoding": "identity"})
        zipped = await http.get("/static/a.js", headers={"accept-encoding": "gzip"})
        assert plain.headers["etag"] != zipped.headers["etag"], "two bodies never share a tag"


async def test_a_page_names_files_that_stay_the_same_for_good(tmp_path: Path) -> None:
    versions = []
    for name, script in (("first", "1"), ("same", "1"), ("other", "2")):
        async with client_of(Gate(page_of(tmp_path / name, script))) as http:
            page = await http.get("/")
            assert page.headers["cache-control"] == "no-cache"
            css, js = re.findall(r'(?:href|src)="(static/\w+/a\.\w+)"', page.text)
            for path in (css, js):
                assert "immutable" in (await http.get("/" + path)).headers["cache-control"]
            assert (await http.get("/static/a.js")).headers["cache-control"] == "no-cache"
            assert (await http.get("/static/0123456789abcdef/a.js")).status_code == 404, "never a file of another version"
            versions.append(js)
    assert versions[0] == versions[1] != versions[2]


async def test_first_load_is_small() -> None:
    """All that the page brings before its first use, compressed."""
    folder = static_folder()
    assert folder is not None
    async with client_of(Gate(Playground(folder))) as http:
        page = await http.get("/")
        paths = re.findall(r'(?:href|src)="(static/[^"]+)"', page.text)
        assert any(path.endswith(MAIN.removeprefix("static/")) for path in paths)
        sizes = {path: len(gzip.compress((await http.get("/" + path)).content)) for path in paths}
    assert sum(sizes.values()) < 100_000, sizes


async def test_the_page_is_there_while_the_model_loads_and_is_told_how_far_it_is() -> None:
    told: dict[str, object] = {"phase": "weights", "done": 12, "total": 28}
    gate = Gate(Playground(static_folder()), lambda: told)
    async with client_of(gate) as http:
        assert "<title>StreamServe" in (await http.get("/")).text
        assert (await http.get("/" + MAIN)).status_code == 200
        assert (await http.get("/static/nope.js")).status_code == 404
        for path, status in (("/ready", 503), ("/health", 200)):
            answer = await http.get(path)
            assert (answer.status_code, answer.json()["progress"]) == (status, told)
        assert (await http.post("/")).status_code == 503


@pytest.mark.parametrize("given", ["/llm", "llm/", "/a/llm"])
async def test_below_a_prefix_everything_is_served_with_it_and_without(given: str) -> None:
    root = "/" + given.strip("/")
    gate = Gate(Playground(static_folder()), root_path=given)
    for is_open in (False, True):
        if is_open:
            gate.open(create_app(ScriptedEngine(), byte_text_model(), ServerConfig(), model_name="tiny"))
        async with client_of(gate) as http:
            for prefix in ("", root):
                assert "<title>StreamServe" in (await http.get(prefix + "/")).text
                assert (await http.get(f"{prefix}/{MAIN}")).status_code == 200
                assert (await http.get(prefix + "/v1/models")).status_code == (200 if is_open else 503)
            moved = await http.get(root)
            assert (moved.status_code, moved.headers["location"]) == (308, root + "/")
            if is_open:
                assert (await http.get(root + "x/v1/models")).status_code == 404
