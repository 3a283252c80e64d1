"""What clients may have fetched, and from where: nothing that only the server can reach, nothing endless, nothing repeated."""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from streamserve.errors import InvalidRequest
from streamserve.media.addresses import is_public
from streamserve.media.fetch import MAX_REDIRECTS, Fetcher, make_transport

pytestmark = pytest.mark.anyio
PARAM = "messages[0].content[0].image_url.url"
PUBLIC = "93.184.215.14"
SECRET = b"what only the server can see"
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Listener:
    """A server that counts who connects, and answers as it is told."""

    port: int = 0
    answer: bytes | Talk = b""
    asked: list[bytes] = field(default_factory=list)
    num_hits: int = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_hits += 1
        try:
            self.asked.append(await reader.readuntil(b"\r\n\r\n"))
            if isinstance(self.answer, bytes):
                writer.write(self.answer)
                await writer.drain()
            else:
                await self.answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def reply(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """An HTTP answer."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@asynccontextmanager
async def listening(answer: bytes | Talk = b"", ssl: ssl.SSLContext | None = None) -> AsyncIterator[Listener]:
    listener = Listener(answer=answer)
    server = await asyncio.start_server(listener, "127.0.0.1", 0, ssl=ssl)
    listener.port = server.sockets[0].getsockname()[1]
    async with server:
        yield listener


def fetching(*hosts: str, **options: Any) -> Fetcher:
    return Fetcher(hosts, 1000, **options)


async def refusal(fetcher: Fetcher, url: str) -> str:
    """Why a URL is not fetched."""
    async with asyncio.timeout(5):
        with pytest.raises(InvalidRequest) as found:
            await fetcher.fetch(url, PARAM)
    assert found.value.param == PARAM and str(found.value).startswith(PARAM)
    assert SECRET.decode() not in str(found.value)
    return str(found.value)


def names(**known: list[str]) -> Callable[[str, int], Awaitable[list[str]]]:
    """A resolver that knows these names, with _ for a dot; addresses are their own."""

    async def resolve(host: str, port: int) -> list[str]:
        return known.get(host.replace(".", "_"), [host] if host[0].isdigit() else [])

    return resolve


# ---- where nothing is fetched from ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1.2.3",
        "127.1",
        "0.0.0.0",
        "0",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "localhost",
        "LOCALHOST.",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
    ],
)
async def test_no_spelling_of_loopback_is_connected_to(host: str) -> None:
    fetcher = fetching("*")
    async with listening(reply(SECRET)) as listener:
        said = await refusal(fetcher, f"http://{host}:{listener.port}/x.png")
        assert "public network" in said or "URL" in said or "no address" in said
        assert listener.num_hits == 0


@pytest.mark.parametrize(
    "address",
    [
        *("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "169.254.169.254", "0.1.2.3", "192.0.0.170"),
        *("192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.9", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.88.99.1"),
        *("::", "::1", "::127.0.0.1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "2002:7f00:1::"),
        *(
            "2001::1",
            "100::1",
            "64:ff9b::10.0.0.1",
            "64:ff9b:1::1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
            "3fff::1",
            "fec0::1",
        ),
    ],
)
async def test_a_name_with_an_address_that_is_not_public_is_refused(address: str) -> None:
    assert not is_public(address)
    for addresses in ([address], [PUBLIC, address]):
        fetcher = fetching("*", resolve=names(pictures_example=addresses), transport=refusing())
        assert "not on the public network" in await refusal(fetcher, "http://pictures.example/x.png")


@pytest.mark.parametrize("address", ["1.1.1.1", PUBLIC, "172.32.0.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_public_addresses_are_told_apart(address: str) -> None:
    assert is_public(address)


def refusing() -> httpx.MockTransport:
    """A network where nothing may be asked."""

    def handle(request: httpx.Request) -> httpx.Response:
        raise AssertionError(f"{request.url} was asked")

    return httpx.MockTransport(handle)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/passwd", "'file' is not fetched"),
        ("FILE:///etc/passwd", "'file' is not fetched"),
        ("gopher://127.0.0.1:70/_x", "'gopher' is not fetched"),
        ("ftp://pictures.example/x.png", "'ftp' is not fetched"),
        ("javascript:alert(1)", "'javascript' is not fetched"),
        ("ws://pictures.example/", "'ws' is not fetched"),
        ("http:///x.png", "without a host"),
        ("http://", "without a host"),
        ("http:pictures.example", "without a host"),
        ("https://user:secret@pictures.example/x.png", "without credentials"),
        ("http://pictures.example:99999/", "without a port that there is"),
        ("http://pictures.example/\x00", "no URL that can be understood"),
        ("http://" + "a" * 70_000, "no URL that can be understood"),
        ("http://" + "a" * 300 + ".example/", "has no address"),
        ("http://nowhere.example/", "has no address"),
    ],
)
async def test_what_cannot_be_fetched_is_named(url: str, said: str) -> None:
    fetcher = fetching("*", resolve=names(pictures_example=[PUBLIC]), transport=refusing())
    message = await refusal(fetcher, url)
    assert said in message
    assert "secret" not in message and len(message) < 300


async def test_only_hosts_of_the_list_are_asked() -> None:
    known = names(a_example=[PUBLIC], b_example=[PUBLIC])
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=b"x"))
    for hosts in (("a.example",), ("A.example:80",)):
        fetcher = fetching(*hosts, resolve=known, transport=transport)
        assert await fetcher.fetch("http://a.example/", PARAM) == b"x"
        assert "'b.example' is none that files are fetched from" in await refusal(fetcher, "http://b.example/")
        if ":" in hosts[0]:
            assert "--media-hosts" in await refusal(fetcher, "http://a.example:81/")
    fetcher = fetching("none", resolve=known, transport=refusing())
    assert "--media-hosts" in await refusal(fetcher, "http://a.example/")


# ---- redirects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["http://127.0.0.1:{port}/", "//localhost:{port}/", "http://inside.example:{port}/x"])
async def test_a_redirect_to_loopback_is_not_followed(target: str) -> None:
    async with listening(reply(SECRET)) as inside, listening() as outside:
        outside.answer = reply(b"", "302 Found", location=target.format(port=inside.port))
        known = names(outside_example=["127.0.0.1"], inside_example=["127.0.0.1"], localhost=["127.0.0.1"])
        fetcher = fetching("*", f"outside.example:{outside.port}", resolve=known)
        assert "not on the public network" in await refusal(fetcher, f"http://outside.example:{outside.port}/")
        assert (outside.num_hits, inside.num_hits) == (1, 0)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "gopher://x/", "data:image/png;base64,AAAA", "http://user@x/"])
async def test_a_redirect_to_another_scheme_is_not_followed(target: str) -> None:
    fetcher = fetching("127.0.0.1")
    async with listening(reply(b"", "301 Moved", location=target)) as outside:
        said = await refusal(fetcher, f"http://127.0.0.1:{outside.port}/")
        assert "redirects to" in said or "credentials" in said


async def test_redirects_are_followed_a_few_times() -> None:
    fetcher = fetching("127.0.0.1")
    async with listening() as listener:
        left = MAX_REDIRECTS

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal left
            left -= 1
            writer.write(reply(b"found") if left < 0 else reply(b"", "307 Temporary", location=f"/next/{left}"))
            await writer.drain()

        listener.answer = answer
        url = f"http://127.0.0.1:{listener.port}/first"
        assert await fetcher.fetch(url, PARAM) == b"found"
        assert [asked.split()[1] for asked in listener.asked] == [b"/first", b"/next/2", b"/next/1", b"/next/0"]
        left = MAX_REDIRECTS + 1
        assert "more than 3 times" in await refusal(fetcher, url)


# ---- what is said to a host -------------------------------------------------------------------------------------------


async def test_the_address_that_was_checked_is_the_one_that_is_asked() -> None:
    """A name that is public when it is checked and private afterwards leads nowhere: it is not resolved again."""
    asked: list[httpx.Request] = []
    resolved: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, content=b"found")

    async def resolve(host: str, port: int) -> list[str]:
        resolved.append(host)
        return [PUBLIC] if len(resolved) == 1 else ["127.0.0.1"]

    fetcher = fetching("*", resolve=resolve, transport=httpx.MockTransport(handle))
    assert await fetcher.fetch("https://pictures.example/a/b.png?c=d", PARAM) == b"found"
    assert "public network" in await refusal(fetcher, "https://pictures.example/a/b.png")
    (request,) = asked
    assert str(request.url) == f"https://{PUBLIC}/a/b.png?c=d"
    assert request.headers["host"] == "pictures.example"
    assert request.extensions["sni_hostname"] == "pictures.example"  # whose certificate is asked for
    assert resolved == ["pictures.example"] * 2


async def test_a_host_is_asked_by_its_next_address_where_one_does_not_answer() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.host != PUBLIC:
            raise httpx.ConnectError("unreachable")
        return httpx.Response(200, content=b"found")

    known = names(both_example=["2606:4700::1111", PUBLIC], dead_example=["2606:4700::1111"])
    fetcher = fetching("*", resolve=known, transport=httpx.MockTransport(handle))
    assert await fetcher.fetch("http://both.example/", PARAM) == b"found"
    assert "cannot be connected to" in await refusal(fetcher, "http://dead.example/")


async def test_nothing_of_the_server_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    fetcher = fetching("127.0.0.1")
    async with listening(reply(b"found", set_cookie="a=b")) as listener:
        for _ in range(2):
            assert await fetcher.fetch(f"http://127.0.0.1:{listener.port}/", PARAM) == b"found"
    assert listener.num_hits == 2
    for asked in listener.asked:
        lines = asked.decode().lower().split("\r\n")
        assert not [line for line in lines if line.startswith(("cookie", "authorization", "proxy", "referer"))]
        assert f"host: 127.0.0.1:{listener.port}" in lines
        assert "accept-encoding: identity" in lines


def certificate_for(name: str, folder: Path) -> tuple[Path, Path]:
    """A certificate that says so itself, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    words = f"req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN={name} -addext subjectAltName=DNS:{name}"
    command = ["openssl", *words.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here, which makes a certificate")
async def test_a_certificate_has_to_be_vouched_for_and_of_the_name_that_was_asked_for(tmp_path: Path) -> None:
    certificate, key = certificate_for("pictures.example", tmp_path)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, key)
    known = names(pictures_example=["127.0.0.1"], other_example=["127.0.0.1"])
    hosts = ("pictures.example", "other.example")
    knowing = make_transport(ssl.create_default_context(cafile=certificate))
    async with listening(reply(b"found"), ssl=serving) as listener:
        right, wrong = (f"https://{host}:{listener.port}/" for host in hosts)
        assert "cannot be connected to" in await refusal(fetching(*hosts, resolve=known), right)
        assert listener.asked == []
        assert await fetching(*hosts, resolve=known, transport=knowing).fetch(right, PARAM) == b"found"
        assert "cannot be connected to" in await refusal(fetching(*hosts, resolve=known, transport=knowing), wrong)
        assert len(listener.asked) == 1


# ---- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (reply(SECRET, "404 Not Found"), "status 404"),
        (reply(SECRET, "500 No"), "status 500"),
        (reply(b"", "204 No Content"), "status 204"),
        (reply(b"", "304 Not Modified"), "status 304"),
        (reply(SECRET, content_encoding="gzip"), "compressed"),
        (reply(bytes(1001)), "more than 1000 bytes"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 209715200\r\n\r\n", "more than 1000 bytes"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n" + SECRET, "cannot be read"),
        (SECRET + b"\r\n\r\n", "cannot be read"),
        (b"", "cannot be read"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 2_000_000, "cannot be read"),
    ],
)
async def test_an_answer_that_is_no_file_is_refused_and_not_repeated(answer: bytes, said: str) -> None:
    fetcher = fetching("127.0.0.1")
    async with listening(answer) as listener:
        assert said in await refusal(fetcher, f"http://127.0.0.1:{listener.port}/")


async def test_an_endless_body_is_cut_off() -> None:
    ended = asyncio.Event()

    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                writer.write(SECRET)
                await writer.drain()
        finally:
            ended.set()

    fetcher = fetching("127.0.0.1")
    async with listening(endless) as listener:
        assert "more than 1000 bytes" in await refusal(fetcher, f"http://127.0.0.1:{listener.port}/")
        async with asyncio.timeout(5):
            await ended.wait()


@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nab"])
async def test_a_host_that_says_no_more_is_given_up(beginning: bytes) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(beginning)
        await reader.read()

    fetcher = fetching("127.0.0.1", limit_s=0.1)
    async with listening(silent) as listener:
        assert "within 0.1 s" in await refusal(fetcher, f"http://127.0.0.1:{listener.port}/")


async def test_drops_that_keep_coming_do_not_keep_it_alive() -> None:
    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.02)

    fetcher = fetching("127.0.0.1", limit_s=0.2)
    async with listening(drip) as listener:
        assert "within 0.2 s" in await refusal(fetcher, f"http://127.0.0.1:{listener.port}/")


async def test_many_at_once_are_all_fetched() -> None:
    fetcher = fetching("127.0.0.1")
    async with listening(reply(b"found")) as listener:
        url = f"http://127.0.0.1:{listener.port}/"
        assert await asyncio.gather(*(fetcher.fetch(url, PARAM) for _ in range(100))) == [b"found"] * 100
