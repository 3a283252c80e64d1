"""Uploads: what is kept, for whom and how long, and what is refused, through the openai client and by hand."""

import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from streamserve.api.app import create_app
from streamserve.api.files import MAX_TTL_S, MIN_TTL_S, TTL_S
from streamserve.api.uploads import Upload, Uploads
from streamserve.config import ServerConfig
from streamserve.errors import RequestTooLarge
from streamserve.media.fixed import NUM_PLACES, FixedFamily
from streamserve.text.byte_tokenizer import byte_text_model
from tests.api.conftest import client_of
from tests.api.scripted import ScriptedEngine
from tests.media.pictures import file_of, image, png_header

pytestmark = pytest.mark.anyio
PNG = file_of(image())
SECONDS, ANCHOR = "expires_after[seconds]", "expires_after[anchor]"


def client_with(http: httpx.AsyncClient, key: str = "none") -> AsyncOpenAI:
    return AsyncOpenAI(base_url="http://127.0.0.1:30000/v1", api_key=key, http_client=http, max_retries=0)


@pytest.fixture
def client(http: httpx.AsyncClient) -> AsyncOpenAI:
    return client_with(http)


async def upload(http: httpx.AsyncClient, data: bytes = PNG, name: str = "a.png", **fields: str) -> httpx.Response:
    return await http.post("/v1/files", files={"file": (name, data)}, data={"purpose": "vision", **fields})


# ---- through the client -----------------------------------------------------------------------------------------------


async def test_a_file_is_sent_shown_listed_read_and_deleted(client: AsyncOpenAI) -> None:
    made = await client.files.create(file=("fox.png", PNG), purpose="vision")
    assert (made.object, made.bytes, made.filename, made.purpose, made.status) == (
        *("file", len(PNG), "fox.png", "vision"),
        "processed",
    )
    assert made.id.startswith("file-")
    assert made.expires_at == made.created_at + TTL_S
    assert await client.files.retrieve(made.id) == made
    assert (await client.files.content(made.id)).content == PNG
    assert [kept async for kept in client.files.list()] == [made]
    assert (await client.files.wait_for_processing(made.id)) == made
    assert (await client.files.delete(made.id)).deleted
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as refused:
            await ask(made.id)
        assert refused.value.param == "id"
    assert [kept async for kept in client.files.list()] == []


async def test_a_client_says_how_long_a_file_is_kept(client: AsyncOpenAI) -> None:
    for seconds in (MIN_TTL_S, MAX_TTL_S):
        made = await client.files.create(
            file=PNG, purpose="user_data", expires_after={"anchor": "created_at", "seconds": seconds}
        )
        assert made.expires_at == made.created_at + seconds


async def test_lists_come_in_pages(client: AsyncOpenAI) -> None:
    purposes: Any = ["vision", "user_data", "vision"]
    ids = [(await client.files.create(file=PNG, purpose=purpose)).id for purpose in purposes]
    assert [kept.id async for kept in client.files.list(limit=1)] == ids[::-1]
    assert [kept.id async for kept in client.files.list(limit=2, order="asc")] == ids
    assert [kept.id async for kept in client.files.list(purpose="vision")] == [ids[2], ids[0]]
    page = await client.files.list(limit=1, after=ids[1])
    assert [kept.id for kept in page.data] == [ids[0]] and not page.has_more
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}, {"after": "file-x"}):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.files.list(**wrong)
        assert refused.value.param == next(iter(wrong))


async def test_a_file_is_its_keys_alone(engine: ScriptedEngine) -> None:
    app = create_app(engine, byte_text_model(), ServerConfig(api_key=("one", "two")), model_name="tiny")
    async with client_of(app) as http:
        mine, theirs = client_with(http, "one"), client_with(http, "two")
        made = await mine.files.create(file=PNG, purpose="vision")
        for ask in (theirs.files.retrieve, theirs.files.content, theirs.files.delete):
            with pytest.raises(openai.NotFoundError):
                await ask(made.id)
        assert [kept async for kept in theirs.files.list()] == []
        assert [kept.id async for kept in mine.files.list()] == [made.id]
        assert (await upload(http)).status_code == 401


async def test_a_request_shows_a_file_by_its_id_to_the_key_that_sent_it(engine: ScriptedEngine) -> None:
    config = ServerConfig(api_key=("one", "two"))
    app = create_app(engine, byte_text_model(), config, model_name="tiny", family=FixedFamily())
    async with client_of(app) as http:
        mine, theirs = client_with(http, "one"), client_with(http, "two")
        made = await mine.files.create(file=PNG, purpose="vision")
        seen: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": made.id}}]}]
        item: Any = [{"role": "user", "content": [{"type": "input_image", "file_id": made.id, "detail": "auto"}]}]
        chat = await mine.chat.completions.create(model="tiny", messages=seen, max_tokens=4)
        response = await mine.responses.create(model="tiny", input=item, max_output_tokens=16)
        assert chat.usage is not None and response.usage is not None
        assert min(chat.usage.prompt_tokens, response.usage.input_tokens) > NUM_PLACES
        for ask in (
            theirs.chat.completions.create(model="tiny", messages=seen),
            theirs.responses.create(model="tiny", input=item),
        ):
            with pytest.raises(openai.BadRequestError, match="no such file") as refused:
                await ask
            assert refused.value.param is not None and "content[0]" in refused.value.param


# ---- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({"purpose": "x" * 1000}, "purpose"),
        ({"porpoise": "vision"}, "porpoise"),
        ({SECONDS: "3600"}, ANCHOR),
        ({ANCHOR: "created_at"}, SECONDS),
        ({ANCHOR: "last_active_at", SECONDS: "3600"}, ANCHOR),
        ({ANCHOR: "created_at", SECONDS: "3599"}, SECONDS),
        ({ANCHOR: "created_at", SECONDS: str(MAX_TTL_S + 1)}, SECONDS),
        ({ANCHOR: "created_at", SECONDS: "9" * 200}, SECONDS),
        ({ANCHOR: "created_at", SECONDS: "-1"}, SECONDS),
        ({ANCHOR: "created_at", SECONDS: "²"}, SECONDS),
    ],
)
async def test_a_field_that_is_wrong_is_named(http: httpx.AsyncClient, fields: dict[str, str], param: str) -> None:
    answer = await upload(http, PNG, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert (await http.get("/v1/files")).json()["data"] == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"<html>hello</html>", "an HTML page"),
        (b"<svg/>", "an SVG file"),
        (png_header(50_000, 50_000), "50000 x 50000"),
    ],
)
async def test_for_vision_only_pictures_are_kept(http: httpx.AsyncClient, data: bytes, said: str) -> None:
    answer = await upload(http, data, "x.png")
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"] and answer.json()["error"]["param"] == "file"


def form(*parts: bytes, boundary: bytes = b"b") -> bytes:
    """A body out of its parts, headers and all."""
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


PURPOSE = b'content-disposition: form-data; name="purpose"\r\n\r\nuser_data'
FILE = b'content-disposition: form-data; name="file"; filename="x"\r\n\r\nhello'


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        (form(PURPOSE, FILE), "application/json", "content-type"),
        (form(PURPOSE, FILE), "multipart/form-data", "content-type"),
        (form(PURPOSE, FILE), "multipart/form-data; boundary=" + "b" * 400, "body"),
        (form(PURPOSE, FILE)[:-6], "multipart/form-data; boundary=b", "body"),
        (form(PURPOSE, FILE), "multipart/form-data; boundary=c", "body"),
        (b"", "multipart/form-data; boundary=b", "body"),
        (b"hello", "multipart/form-data; boundary=b", "body"),
        (form(FILE), "multipart/form-data; boundary=b", "purpose"),
        (form(PURPOSE), "multipart/form-data; boundary=b", "file"),
        (form(PURPOSE, FILE.replace(b'; filename="x"', b"")), "multipart/form-data; boundary=b", "file"),
        (form(PURPOSE, FILE, FILE), "multipart/form-data; boundary=b", "file"),
        (form(*[PURPOSE.replace(b"purpose", b"p%d" % n) for n in range(33)]), "multipart/form-data; boundary=b", "body"),
        (form(b"content-type: text/plain\r\n\r\nx"), "multipart/form-data; boundary=b", "body"),
        (form(b'content-disposition: form-data; name="\xff"\r\n\r\nx'), "multipart/form-data; boundary=b", "body"),
        (form(b"content-transfer-encoding: base64\r\n" + FILE, PURPOSE), "multipart/form-data; boundary=b", "file"),
        (form(b"x: y\r\n" * 100 + FILE, PURPOSE), "multipart/form-data; boundary=b", "body"),
    ],
)
async def test_a_form_that_cannot_be_read_is_refused(http: httpx.AsyncClient, body: bytes, kind: str, param: str) -> None:
    answer = await http.post("/v1/files", content=body, headers={"content-type": kind})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


async def test_the_order_of_fields_and_the_cuts_of_the_body_make_no_difference(http: httpx.AsyncClient) -> None:
    async def cut(body: bytes, length: int) -> AsyncIterator[bytes]:
        for start in range(0, len(body), length):
            yield body[start : start + length]

    content = b"\r\n--b\n--b\r-" + bytes(range(256)) + b"\r\n--"
    for parts in ((PURPOSE, FILE.replace(b"hello", content)), (FILE.replace(b"hello", content), PURPOSE)):
        for length in (1, 7, 1000):
            answer = await http.post(
                "/v1/files",
                content=cut(form(*parts, boundary=b"bb"), length),
                headers={"content-type": 'multipart/form-data; boundary="bb"'},
            )
            assert answer.status_code == 200, answer.text
            assert (await http.get(f"/v1/files/{answer.json()['id']}/content")).content == content


async def test_what_was_sent_is_never_shown_as_a_page(http: httpx.AsyncClient) -> None:
    made = (await upload(http, b"<script>alert(1)</script>", purpose="user_data")).json()
    answer = await http.get(f"/v1/files/{made['id']}/content")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == "attachment"
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_a_body_over_the_limit_is_cut_off_and_memory_stays_bounded(engine: ScriptedEngine) -> None:
    app = create_app(engine, byte_text_model(), ServerConfig(max_body_mb=1), model_name="tiny")
    chunk = b"x" * 65_536

    async def endless() -> AsyncIterator[bytes]:
        yield b"--b\r\n" + FILE
        for _ in range(3200):  # 200 MB
            yield chunk

    async with client_of(app) as http:
        tracemalloc.start()
        try:
            answer = await http.post("/v1/files", content=endless(), headers={"content-type": "multipart/form-data; boundary=b"})
            assert answer.status_code == 413 and answer.json()["error"]["param"] == "body"
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()
        assert (await upload(http)).status_code == 200


# ---- the store --------------------------------------------------------------------------------------------------------


class Clock:
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def put(uploads: Uploads, data: bytes = b"x" * 10, ttl_s: int = 60, owner: str = "me") -> Upload:
    return uploads.put(data, owner=owner, filename="a", purpose="vision", ttl_s=ttl_s)


def test_a_full_store_takes_no_more_until_something_expires_or_is_deleted() -> None:
    clock = Clock()
    uploads = Uploads(30, 10, now=clock)
    short, long, other = put(uploads, ttl_s=10), put(uploads), put(uploads, owner="other")
    for data in (b"x", b"x" * 10):
        with pytest.raises(RequestTooLarge, match="3 files of 30 bytes are kept, at most 10 of 30 may be"):
            put(uploads, data)
    assert [kept.id for kept in uploads.listed("me")] == [short.id, long.id]
    clock.now_s += 10
    again = put(uploads)
    assert uploads.contents(short.id, "me") is None
    assert uploads.contents(other.id, "me") is None and uploads.contents(other.id, "other") == b"x" * 10
    assert not uploads.delete(other.id, "me") and uploads.delete(other.id, "other")
    assert [kept.id for kept in uploads.listed("me")] == [long.id, again.id]
    assert (len(uploads), uploads.num_bytes) == (2, 20)


def test_a_store_holds_only_so_many_files_however_small() -> None:
    uploads = Uploads(1000, 3)
    for _ in range(3):
        put(uploads, b"x")
    with pytest.raises(RequestTooLarge):
        put(uploads, b"x")


def test_files_that_the_server_makes_take_no_places_of_those_that_are_sent() -> None:
    uploads = Uploads(1000, 2)
    for number in range(5):
        uploads.add(Upload(f"file-{number}", "me", "x", "batch_output", b"", 0, 1 << 40))
    put(uploads), put(uploads)
    with pytest.raises(RequestTooLarge, match="2 files of 20 bytes"):
        put(uploads)


def test_room_that_is_reserved_may_be_what_expired_files_had() -> None:
    clock = Clock()
    uploads = Uploads(30, 10, now=clock)
    put(uploads, b"x" * 30, ttl_s=10)
    with pytest.raises(RequestTooLarge):
        uploads.reserve(1)
    clock.now_s += 10
    uploads.reserve(30)
    assert uploads.num_bytes == 30


def test_what_has_expired_is_dropped_without_being_asked_for() -> None:
    clock = Clock()
    uploads = Uploads(now=clock)
    put(uploads, ttl_s=10)
    clock.now_s += 10
    uploads.drop_expired()
    assert (len(uploads), uploads.num_bytes) == (0, 0)
