"""Pictures that are meant to hurt, against a real server: each is a 4xx that names the field, the server's memory grows by less
than 100 MiB over all of them, nothing inside is asked, and others are answered meanwhile.

Each takes milliseconds, and two seconds are the most that it may; a machine that is busy gets ten here.
"""

import asyncio
import json
import re
import sys
import time
import zlib
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from struct import pack
from typing import Any

import httpx
import pytest

from tests.e2e.playground.browser import serve
from tests.media.pictures import file_of, image, png_chunk, png_header
from tests.media.test_fetch import Listener, listening, reply

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform != "linux", reason="memory of another process is read from /proc"),
]
CHAT = "/v1/chat/completions"
PARAM = "messages[0].content[1].image_url.url"
LIMIT_S, LIMIT_MIB = 10.0, 100
SECRET = b"what only the server can see"
PNG = file_of(image())


@dataclass
class Target:
    """A server, and its process."""

    url: str
    pid: int

    def peak_mib(self) -> float:
        """The most memory it has had since forget_peak()."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@dataclass
class Network:
    """What the server can reach: a host that may be asked, and one that may not."""

    outside: Listener
    inside: Listener


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def network() -> AsyncIterator[Network]:
    async with listening() as outside, listening(reply(SECRET)) as inside:
        yield Network(outside, inside)


@pytest.fixture(scope="module")
async def target(network: Network, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Target]:
    flags = ("--media-hosts", "*", "--media-hosts", f"localhost:{network.outside.port}")
    log = tmp_path_factory.mktemp("server") / "log.txt"
    started = serve(log, *flags)
    url = await asyncio.to_thread(started.__enter__)
    try:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            for _ in range(3):  # the first picture loads what decodes it
                assert (await ask(http, as_url(PNG))).status_code == 200
        yield Target(url, _pid_at(url))
    finally:
        await asyncio.to_thread(started.__exit__, None, None, None)


@pytest.fixture
async def http(target: Target) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=target.url, trust_env=False, timeout=20) as client:
        yield client


def _pid_at(url: str) -> int:
    """The process that was started with this port."""
    port = url.rstrip("/").rpartition(":")[2]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"streamserve" in words and port.encode() in words:
            return int(folder.name)
    raise AssertionError("no server")


def as_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{b64encode(data).decode()}"


def chat(*urls: str) -> dict[str, Any]:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, *pictures]}], "max_tokens": 4}


async def ask(http: httpx.AsyncClient, *urls: str) -> httpx.Response:
    return await http.post(CHAT, json=chat(*urls))


def bomb() -> bytes:
    """A PNG of 400 million pixels, in 50 kB."""
    header = png_chunk(b"IHDR", pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(20_000 * 2_501))
    return PNG[:8] + header + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def texts_bomb() -> bytes:
    """A PNG whose small picture is broken, with texts that would take a gigabyte."""
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 24), 9))
    return PNG[:33] + text * 64 + png_chunk(b"IDAT", b"no pixels") + png_chunk(b"IEND", b"")


CASES: dict[str, tuple[str, str]] = {
    "bad base64": ("data:image/png;base64,@@not base64@@", "base64"),
    "half base64": (as_url(PNG)[:-3], "base64"),
    "truncated": (as_url(PNG[:90]), "cut off"),
    "truncated JPEG": (as_url(file_of(image(), "JPEG")[:500]), "cut off"),
    "50,000 x 50,000 header": (as_url(png_header(50_000, 50_000)), "50000 x 50000"),
    "50,000 x 50,000 GIF": (
        as_url(b"GIF89a" + pack("<HHBBB", 50_000, 50_000, 0, 0, 0) + b"," + pack("<HHHHB", 0, 0, 9, 9, 0)),
        "50000",
    ),
    "bomb": (as_url(bomb()), "20000 x 20000"),
    "bomb of texts": (as_url(texts_bomb()), "cut off"),
    "SVG": (as_url(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "image/svg+xml"), "SVG"),
    "HTML as PNG": (as_url(b"<!doctype html><script>alert(1)</script>"), "HTML"),
    "wrong type": ("data:text/html;base64,PGh0bWw+", "text/html"),
    "file:": ("file:///etc/passwd", "'file'"),
    "gopher:": ("gopher://127.0.0.1:{inside}/_GET", "'gopher'"),
    "ftp:": ("ftp://127.0.0.1:{inside}/x.png", "'ftp'"),
    "loopback": ("http://127.0.0.1:{inside}/x.png", "public network"),
    "loopback by IPv6": ("http://[::1]:{inside}/x.png", "public network"),
    "every address": ("http://0.0.0.0:{inside}/x.png", "public network"),
    "loopback as a number": ("http://2130706433:{inside}/x.png", "public network"),
    "loopback as a mapped address": ("http://[::ffff:127.0.0.1]:{inside}/x.png", "public network"),
    "a name of a private address": ("http://localhost:{inside}/x.png", "public network"),
    "metadata of a cloud": ("http://169.254.169.254/latest/meta-data/", "public network"),
    "redirect to loopback": ("http://localhost:{outside}/redirect", "public network"),
    "redirect to a file": ("http://localhost:{outside}/to-file", "'file'"),
    "endless body": ("http://localhost:{outside}/endless", "more than"),
    "announced 200 MB": ("http://localhost:{outside}/announced", "more than"),
    "HTML from a host": ("http://localhost:{outside}/html", "HTML"),
    "no such file": ("file-" + "0" * 32, "no such file"),
}


def answers(network: Network) -> Any:
    """How the host outside answers, by path."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = network.outside.asked[-1].split()[1]
        if path == b"/redirect":
            writer.write(reply(b"", "302 Found", location=f"http://127.0.0.1:{network.inside.port}/"))
        elif path == b"/to-file":
            writer.write(reply(b"", "302 Found", location="file:///etc/passwd"))
        elif path == b"/announced":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 209715200\r\n\r\n")
        elif path == b"/html":
            writer.write(reply(b"<html>" + SECRET))
        elif path == b"/endless":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                writer.write(SECRET * 4096)
                await writer.drain()
        await writer.drain()

    return answer


async def test_each_hostile_picture_is_refused_in_time_and_within_memory(
    target: Target, network: Network, http: httpx.AsyncClient
) -> None:
    network.outside.answer = answers(network)
    ports = {"{inside}": str(network.inside.port), "{outside}": str(network.outside.port)}
    target.forget_peak()
    before_mib = target.peak_mib()
    for name, (source, said) in CASES.items():
        for mark, port in ports.items():
            source = source.replace(mark, port)
        started = time.monotonic()
        answer = await ask(http, source)
        took_s = time.monotonic() - started
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, PARAM), (name, answer.text)
        assert said in error["message"] and SECRET.decode() not in answer.text, (name, error["message"])
        assert took_s < LIMIT_S, (name, took_s)
    assert target.peak_mib() - before_mib < LIMIT_MIB
    assert network.inside.num_hits == 0
    assert (await ask(http, as_url(PNG))).status_code == 200


async def test_bodies_and_numbers_over_the_limits_are_refused_in_time_and_within_memory(
    target: Target, http: httpx.AsyncClient
) -> None:
    async def upload(num_bytes: int) -> AsyncIterator[bytes]:
        yield b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,'
        for _ in range(num_bytes // 65_536):
            yield b"A" * 65_536

    target.forget_peak()
    before_mib = target.peak_mib()
    started = time.monotonic()
    answer = await http.post(CHAT, content=upload(200 << 20), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and time.monotonic() - started < LIMIT_S
    for tiny, said in ((as_url(PNG), "at most"), ("http://127.0.0.1:1/", "at most")):
        started = time.monotonic()
        answer = await ask(http, *[tiny] * 1000)
        assert answer.status_code == 400 and time.monotonic() - started < LIMIT_S
        assert said in answer.json()["error"]["message"] and "1000 pictures" in answer.json()["error"]["message"]
    assert target.peak_mib() - before_mib < LIMIT_MIB
    assert (await ask(http, as_url(PNG))).status_code == 200


async def test_others_are_answered_while_hostile_pictures_come(target: Target, network: Network, http: httpx.AsyncClient) -> None:
    network.outside.answer = answers(network)
    expected = (
        await http.post(CHAT, json={"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200, "seed": 1})
    ).json()
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200, "seed": 1, "stream": True}
    hostile = [source.replace("{outside}", str(network.outside.port)) for source, _ in CASES.values() if "{inside}" not in source]
    tasks = [asyncio.create_task(ask(http, source)) for source in hostile * 3]
    text, waits_s, last_s = "", [], time.monotonic()
    async with http.stream("POST", CHAT, json=body) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                text += "".join(choice["delta"].get("content") or "" for choice in choices)
                waits_s.append(time.monotonic() - last_s)
                last_s = time.monotonic()
    assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {400}
    assert text == expected["choices"][0]["message"]["content"]
    assert max(waits_s) < LIMIT_S
    assert network.inside.num_hits == 0
