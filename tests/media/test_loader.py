"""What clients name becomes a prepared picture, or a refusal that names the field; some at once, and none for long."""

from base64 import b64encode
from hashlib import sha256
from threading import Lock
from time import sleep
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from anyio import fail_after, sleep_forever

from streamserve.errors import InvalidRequest
from streamserve.media import data_url
from streamserve.media.fetch import Fetcher
from streamserve.media.loader import MAX_PICTURES, Loader
from streamserve.media.picture import Picture
from tests.media.pictures import file_of, image, scene

pytestmark = pytest.mark.anyio
PARAM = "messages[0].content[1].image_url.url"
MAX_BYTES = 4000
FILE = file_of(image())


def found(id: str, owner: str) -> bytes | None:
    return FILE if (id, owner) == ("file-abc", "me") else None


def loader_of(transport: httpx.AsyncBaseTransport | None = None) -> Loader:
    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.215.14"]

    return Loader(Fetcher(("*",), MAX_BYTES, resolve=resolve, transport=transport), found, MAX_BYTES)


def as_base64(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + b64encode(data).decode()


async def shape_of(source: str, owner: str = "") -> tuple[int, ...]:
    return await loader_of().load(source, PARAM, lambda picture: picture.pixels.shape, owner)


async def refusal(source: str, loader: Loader | None = None) -> str:
    with pytest.raises(InvalidRequest) as refused:
        await (loader or loader_of()).load(source, PARAM, lambda picture: None)
    assert refused.value.param == PARAM and str(refused.value).startswith(PARAM)
    assert len(str(refused.value)) < 300
    return str(refused.value)


@pytest.mark.parametrize(
    "source",
    [
        as_base64(FILE),
        as_base64(FILE, "DATA:image/png;charset=utf-8;BASE64,"),
        as_base64(FILE, "data:;base64,"),
        as_base64(FILE, "data:image/jpeg;base64,"),  # what it is its bytes say
        as_base64(FILE, "data:application/octet-stream;base64,"),
        "data:image/png;base64," + quote(b64encode(FILE).decode(), safe=""),
        "data:image/png," + quote(FILE),
    ],
)
async def test_a_data_url_is_read(source: str) -> None:
    assert await shape_of(source) == (48, 64, 3)


@pytest.mark.parametrize("num_more", [-4, -1, 0, 1, 3])
def test_a_long_data_url_is_what_it_is_as_a_whole(num_more: int) -> None:
    data = bytes(range(256)) * 700 + bytes(data_url.PART * 3 // 4 * 4 - 256 * 700 + num_more)
    text = b64encode(data).decode()
    assert data_url.bytes_of(f"data:;base64,{text}", 1 << 20, "x") == data
    for at in (data_url.PART - 2, data_url.PART, 2 * data_url.PART - 1):  # padding behind which there is more
        with pytest.raises(InvalidRequest, match="not valid base64"):
            data_url.bytes_of(f"data:;base64,{text[:at]}=={text[at + 2 :]}", 1 << 20, "x")


async def test_a_file_and_a_url_are_read() -> None:
    assert await shape_of("file-abc", "me") == (48, 64, 3)
    loader = loader_of(httpx.MockTransport(lambda request: httpx.Response(200, content=FILE)))
    assert np.array_equal(await loader.load("https://a.example/x", PARAM, lambda picture: picture.pixels), scene())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,iVBOR", "not valid base64"),
        ("data:image/png;base64,iVBO Rw0K", "not valid base64"),
        ("data:image/png;base64,AA==AA==", "not valid base64"),
        ("data:image/png;base64,aé==", "outside ASCII"),
        ("data:image/png,é", "outside ASCII"),
        ("data:image/png,%zz", "no escape"),
        ("data:image/png;base64", "without a comma"),
        ("data:" + "x" * 5000 + ",", "without a comma"),
        ("data:text/html;base64,PGh0bWw+", "of type 'text/html'"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,PGh0bWw+", "an HTML page"),
        (as_base64(bytes(MAX_BYTES + 1)), f"more than {MAX_BYTES} bytes"),
        ("data:image/png," + "%00" * (MAX_BYTES + 1), f"more than {MAX_BYTES} bytes"),
        ("data:image/png," + "a" * (MAX_BYTES + 1), f"more than {MAX_BYTES} bytes"),
        (as_base64(FILE[:100]), "broken or cut off"),
        ("", "allowed is a data: URL"),
        ("/etc/passwd", "allowed is a data: URL"),
        ("iVBORw0KGgo", "allowed is a data: URL"),
        ("x" * 9000, "allowed is a data: URL"),
        ("file-abc", "no such file"),  # somebody else's
        ("file-" + "x" * 9000, "no such file"),
        ("file:///etc/passwd", "'file' is not fetched"),
        ("gopher://a.example/", "'gopher' is not fetched"),
    ],
)
async def test_what_is_no_picture_is_refused_by_the_field_it_stands_in(source: str, said: str) -> None:
    assert said in await refusal(source)


async def test_what_a_host_sends_is_looked_at_like_anything_else() -> None:
    loader = loader_of(httpx.MockTransport(lambda request: httpx.Response(200, content=b"<html>")))
    assert "an HTML page" in await refusal("https://a.example/x.png", loader)


async def test_pictures_of_a_request_keep_their_order() -> None:
    sizes = range(4, 24)
    sources = [(as_base64(file_of(image(scene(4, width)))), f"pictures[{width}]") for width in sizes]
    assert await loader_of().load_all(sources, lambda picture: picture.width) == list(sizes)


async def test_the_first_picture_that_fails_ends_the_others() -> None:
    async def never(request: httpx.Request) -> httpx.Response:
        await sleep_forever()
        raise AssertionError

    sources = [("https://a.example/", "a"), ("data:,", "b"), ("https://a.example/", "c")]
    with fail_after(5), pytest.raises(InvalidRequest) as refused:
        await loader_of(httpx.MockTransport(never)).load_all(sources, lambda picture: None)
    assert refused.value.param == "b"


async def test_a_thousand_pictures_are_refused_before_any_is_read() -> None:
    with pytest.raises(InvalidRequest, match=f"1000 pictures; a request may have at most {MAX_PICTURES}") as refused:
        await loader_of().load_all([("data:,", f"p[{index}]") for index in range(1000)], lambda picture: None)
    assert refused.value.param == f"p[{MAX_PICTURES}]"


async def test_few_large_pictures_are_decoded_at_once() -> None:
    lock, now, most = Lock(), 0, 0

    def prepare(picture: Picture) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        sleep(0.01)
        with lock:
            now -= 1

    loader = Loader(Fetcher((), 1 << 20), found, 1 << 20)
    loader._threads.total_tokens, loader._large.total_tokens = 4, 1
    large = as_base64(file_of(image(np.zeros((2049, 2049, 3), np.uint8)).convert("1")))
    await loader.load_all([(large, "x")] * 4, prepare)
    assert most == 1
    await loader.load_all([(as_base64(FILE), "x")] * 8, prepare)
    assert most > 1


async def test_what_prepare_says_of_a_picture_is_what_the_client_hears() -> None:
    def prepare(picture: Picture) -> None:
        raise InvalidRequest("too thin for this model", param="x")

    with pytest.raises(InvalidRequest, match="too thin"):
        await loader_of().load_all([(as_base64(FILE), "x")], prepare)


async def test_a_file_that_is_known_is_not_decoded_again() -> None:
    known = {sha256(FILE).digest(): 7}
    sources = [(as_base64(FILE), "x"), (as_base64(file_of(image(), "GIF")), "y")]
    assert await loader_of().load_all(sources, lambda picture: picture.width, find=known.get) == [7, 64]
