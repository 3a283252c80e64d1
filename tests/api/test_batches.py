"""/v1/batches through the openai client, on the fake engine: from an uploaded file to files of answers, whatever comes
between."""

import asyncio
import json
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from errno import ENOSPC
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch

from streamserve.api import batch_runner
from streamserve.api.app import Api, create_app
from streamserve.api.auth import OWNER
from streamserve.api.batch_lines import Line
from streamserve.api.batch_store import FolderBatches, MemorySink
from streamserve.api.batch_todo import Index, Todo, indexed
from streamserve.api.batch_work import work
from streamserve.api.inside import Reply
from streamserve.api.openai import MAX_PRIORITY
from streamserve.api.uploads import Uploads
from streamserve.config import ServerConfig
from streamserve.engine.core import Engine
from streamserve.errors import ConfigError, EngineStopped
from streamserve.text.byte_tokenizer import byte_text_model
from tests.api.conftest import client_of
from tests.api.scripted import ScriptedEngine
from tests.e2e.serving import fake_engine

pytestmark = pytest.mark.anyio
CHAT: Any = "/v1/chat/completions"
OVER = ("completed", "failed", "cancelled", "expired")


def line(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    body = body or {"messages": [{"role": "user", "content": custom_id}], "max_tokens": 3}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def wrong(custom_id: str) -> dict[str, Any]:
    return line(custom_id, messages=[], max_tokens=3)


class Server:
    """An application with an engine behind it, and clients of both."""

    def __init__(self, app: Api, engine: Engine) -> None:
        self.app = app
        self.engine = engine

    def client(self, key: str = "none") -> AsyncOpenAI:
        return AsyncOpenAI(base_url="http://127.0.0.1:30000/v1", api_key=key, http_client=client_of(self.app), max_retries=0)


@asynccontextmanager
async def serving(config: ServerConfig | None = None, *, max_running: int = 16, step_s: float = 0.0005) -> AsyncIterator[Server]:
    engine, _, _ = fake_engine(step_s=step_s, max_running=max_running)
    app = create_app(engine, byte_text_model(), config or ServerConfig(), model_name="tiny")
    running = asyncio.create_task(engine.run())
    await app.resume_batches()
    try:
        yield Server(app, engine)
    finally:
        app.close_idle_sockets()
        await app.stop_batches()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def begun(client: AsyncOpenAI, lines: list[dict[str, Any]], endpoint: Any = CHAT, **more: Any) -> Batch:
    data = "".join(json.dumps(one) + "\n" for one in lines).encode()
    kept = await client.files.create(file=("lines.jsonl", data), purpose="batch")
    assert (kept.purpose, kept.bytes) == ("batch", len(data))
    more.setdefault("completion_window", "24h")
    return await client.batches.create(input_file_id=kept.id, endpoint=endpoint, **more)


async def until(client: AsyncOpenAI, id: str, is_so: Callable[[Batch], bool]) -> Batch:
    """The batch, when it is so."""
    async with asyncio.timeout(20):
        while True:
            batch = await client.batches.retrieve(id)
            if is_so(batch):
                return batch
            await asyncio.sleep(0.002)


async def over(client: AsyncOpenAI, id: str) -> Batch:
    return await until(client, id, lambda batch: batch.status in OVER)


def answered(batch: Batch) -> int:
    counts = batch.request_counts
    return 0 if counts is None else counts.completed + counts.failed


async def content(client: AsyncOpenAI, id: str | None) -> dict[str, Any]:
    """The lines of a file, by custom_id, each there once; none where there is no file."""
    if id is None:
        return {}
    lines = [json.loads(one) for one in (await client.files.content(id)).content.splitlines()]
    found = {one["custom_id"]: one for one in lines}
    assert len(found) == len(lines)
    return found


async def test_a_batch_goes_from_a_file_of_requests_to_files_of_answers() -> None:
    async with serving() as server:
        client = server.client()
        batch = await begun(client, [line(f"r{n}") for n in range(40)] + [wrong("bad")], metadata={"for": "a test"})
        assert (batch.status, batch.object, batch.endpoint, batch.model) == ("validating", "batch", CHAT, "tiny")
        assert batch.expires_at == batch.created_at + 24 * 3600 and batch.metadata == {"for": "a test"}
        batch = await over(client, batch.id)
        assert batch.status == "completed" and batch.errors is None
        assert batch.in_progress_at and batch.finalizing_at and batch.completed_at
        counts, usage = batch.request_counts, batch.usage
        assert counts is not None and (counts.total, counts.completed, counts.failed) == (41, 40, 1)
        assert usage is not None and usage.output_tokens == 120 and usage.total_tokens == usage.input_tokens + 120
        answers, errors = await content(client, batch.output_file_id), await content(client, batch.error_file_id)
        assert answers.keys() == {f"r{n}" for n in range(40)} and errors.keys() == {"bad"}
        answer = answers["r7"]
        assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
        assert answer["response"]["body"]["usage"]["completion_tokens"] == 3
        assert answer["response"]["request_id"] == answer["response"]["body"]["id"]
        assert errors["bad"]["response"]["body"]["error"]["param"] == "messages"
        assert [kept.id async for kept in client.files.list(purpose="batch_output")] == [
            batch.error_file_id,
            batch.output_file_id,
        ]
        assert (await client.files.retrieve(batch.output_file_id or "")).filename == f"{batch.id}_output.jsonl"
        with pytest.raises(openai.ConflictError, match="is completed"):
            await client.batches.cancel(batch.id)


async def test_batches_are_listed_newest_first_in_pages() -> None:
    async with serving() as server:
        client = server.client()
        ids = [(await begun(client, [line("a")])).id for _ in range(3)]
        assert [batch.id async for batch in client.batches.list(limit=1)] == ids[::-1]
        page = await client.batches.list(limit=2, after=ids[2])
        assert [batch.id for batch in page.data] == [ids[1], ids[0]] and not page.has_more
        for id in ids:
            await over(client, id)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (b'{"custom_id": "a"}\n', "line 1: method is missing"),
        (b"\nnothing\n", "line 2: "),
        (b"", "there is no request"),
        (json.dumps(line("a")).encode() + b"\n" + json.dumps(line("a")).encode(), 'line 2: custom_id "a" stands on line 1'),
        (json.dumps(line("a", "/v1/files")).encode(), 'line 1: url is "/v1/files"'),
        (b"\n" * 50_001, "there are more than 50000 lines"),
    ],
)
async def test_a_file_that_is_no_batch_is_refused_when_it_is_sent(lines: bytes, said: str) -> None:
    async with serving() as server:
        with pytest.raises(openai.BadRequestError, match=said) as refused:
            await server.client().files.create(file=("x.jsonl", lines), purpose="batch")
        assert refused.value.param == "file"


async def test_what_is_wrong_with_a_request_for_a_batch_is_named() -> None:
    async with serving() as server:
        client = server.client()
        notes = await client.files.create(file=("notes.txt", b"notes"), purpose="user_data")
        lines = await client.files.create(file=("x.jsonl", json.dumps(line("a")).encode()), purpose="batch")
        right: Any = {"input_file_id": lines.id, "endpoint": CHAT, "completion_window": "24h"}
        for change in (
            {"input_file_id": "file-x"},
            {"input_file_id": notes.id},
            {"endpoint": "/v1/moderations"},
            {"completion_window": "24 hours"},
            {"completion_window": "0h"},
            {"metadata": {"k": "v" * 513}},
            {"output_expires_after": {"anchor": "created_at", "seconds": 5}},
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                await client.batches.create(**right | change)
            assert (refused.value.param or "").split(".")[0] == next(iter(change))
        for ask in (client.batches.retrieve, client.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await ask("batch_x")


async def test_a_line_for_another_endpoint_fails_the_batch_by_its_number() -> None:
    async with serving() as server:
        client = server.client()
        batch = await begun(client, [line("a"), line("b", "/v1/completions", prompt="x"), line("c")])
        batch = await over(client, batch.id)
        assert batch.status == "failed" and batch.failed_at and batch.errors and batch.errors.data
        (error,) = batch.errors.data
        assert (error.line, error.param) == (2, "url") and "/v1/completions" in (error.message or "")
        assert batch.output_file_id is None and batch.error_file_id is None


async def test_a_cancelled_batch_keeps_what_it_has_and_accounts_for_the_rest() -> None:
    async with serving(step_s=0.002, max_running=4) as server:
        client = server.client()
        batch = await begun(client, [line(f"r{n}") for n in range(300)])
        await until(client, batch.id, lambda batch: answered(batch) >= 5)
        cancelled = await client.batches.cancel(batch.id)
        assert cancelled.status == "cancelling" and cancelled.cancelling_at
        await client.batches.cancel(batch.id)
        batch = await over(client, batch.id)
        assert batch.status == "cancelled" and batch.cancelled_at
        answers, errors = await content(client, batch.output_file_id), await content(client, batch.error_file_id)
        assert 5 <= len(answers) < 300 and len(answers) + len(errors) == len(answers | errors) == 300
        assert all(one["response"] is None and one["error"]["code"] == "batch_cancelled" for one in errors.values())
        counts = batch.request_counts
        assert counts is not None and (counts.completed, counts.failed) == (len(answers), len(errors))
        assert server.engine.load().running + server.engine.load().waiting == 0


async def test_a_batch_whose_window_ends_is_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamserve.api.batch_schema.HOUR_S", 0)
    async with serving(step_s=0.01, max_running=1) as server:
        client = server.client()
        batch = await over(client, (await begun(client, [line(f"r{n}") for n in range(50)])).id)
        assert batch.status == "expired" and batch.expired_at
        answers, errors = await content(client, batch.output_file_id), await content(client, batch.error_file_id)
        assert len(answers | errors) == 50 and {one["error"]["code"] for one in errors.values()} == {"batch_expired"}


async def test_a_batch_and_its_files_are_its_keys_alone_and_ask_in_its_name() -> None:
    async with serving(ServerConfig(api_key=("one", "two"))) as server:
        mine, theirs = server.client("one"), server.client("two")
        batch = await begun(mine, [line("a", "/v1/responses", input="x", max_output_tokens=16)], "/v1/responses")
        for ask in (theirs.batches.retrieve, theirs.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await ask(batch.id)
        assert [one async for one in theirs.batches.list()] == []
        batch = await over(mine, batch.id)
        answers = await content(mine, batch.output_file_id)
        response = answers["a"]["response"]["body"]["id"]
        assert (await mine.responses.retrieve(response)).id == response
        with pytest.raises(openai.NotFoundError):
            await theirs.responses.retrieve(response)
        with pytest.raises(openai.NotFoundError):
            await theirs.files.content(batch.output_file_id or "")
        with pytest.raises(openai.BadRequestError, match="no file that is kept"):
            await theirs.batches.create(input_file_id=batch.input_file_id, endpoint="/v1/responses", completion_window="24h")
        with pytest.raises(openai.AuthenticationError):
            await server.client("three").batches.list(extra_headers={OWNER: ""})  # clients put nothing into a scope


MESSAGES: Any = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("url", "body", "num_each"),
    [
        (CHAT, {"messages": MESSAGES, "max_tokens": 3}, 1),
        (CHAT, {"messages": MESSAGES, "max_tokens": 3, "n": 16}, 16),
        ("/generate", {"text": ["x"] * 16, "sampling_params": {"max_new_tokens": 3}}, 16),
        ("/v1/score", {"query": "a", "items": ["b"] * 16, "label_token_ids": [65]}, 16),
    ],
)
async def test_a_batch_leaves_room_for_who_waits_for_an_answer(url: str, body: dict[str, Any], num_each: int) -> None:
    async with serving(step_s=0.002, max_running=8) as server:
        client = server.client()
        lines = [line(f"r{n}", url, **body) for n in range(200)]
        ids = [(await begun(client, lines, url)).id for _ in range(2)]
        most = 0
        for _ in range(20):
            chat = asyncio.create_task(
                client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=8)
            )
            while not chat.done():
                most = max(most, server.engine.load().running + server.engine.load().waiting)
                await asyncio.sleep(0.001)
        assert max([answered(await client.batches.retrieve(id)) for id in ids]) < 200
        assert 4 <= most <= 7
        for id in ids:  # both go on, side by side
            await until(client, id, lambda batch: answered(batch) >= 20 // num_each)
            await client.batches.cancel(id)
            await over(client, id)


async def test_where_there_is_no_room_for_answers_a_batch_ends_with_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamserve.api.app.Uploads", lambda: Uploads(30_000))
    async with serving() as server:
        client = server.client()
        batch = await over(client, (await begun(client, [line(f"r{n}") for n in range(80)])).id)
        assert batch.status == "failed" and batch.errors and batch.errors.data
        assert "no room" in (batch.errors.data[0].message or "")
        answers = await content(client, batch.output_file_id)
        assert 0 < len(answers) < 80 and batch.request_counts and batch.request_counts.completed == len(answers)
        await client.files.delete(batch.output_file_id or "")
        assert (await over(client, (await begun(client, [line("a")])).id)).status == "completed"


async def test_a_key_has_only_so_many_batches_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "MAX_OWN_UNFINISHED", 2)
    async with serving(step_s=0.01, max_running=1) as server:
        client = server.client()
        batches = [await begun(client, [line(f"r{n}") for n in range(50)]) for _ in range(2)]
        with pytest.raises(openai.ConflictError, match="a batch that is not over reads this file"):
            await client.files.delete(batches[0].input_file_id)
        ids = [batch.id for batch in batches]
        with pytest.raises(openai.RateLimitError) as refused:
            await begun(client, [line("a")])
        assert refused.value.response.headers["retry-after"] == "60"
        for id in ids:
            await client.batches.cancel(id)
            await over(client, id)
        assert (await over(client, (await begun(client, [line("a")])).id)).status == "completed"
        assert (await client.files.delete(batches[0].input_file_id)).deleted


# ---- a folder ---------------------------------------------------------------------------------------------------------


async def test_batches_in_a_folder_outlive_the_server_and_answer_every_line_once(tmp_path: Path) -> None:
    config = ServerConfig(batch_folder=str(tmp_path / "batches"), api_key=("one", "two"))
    lines = [line(f"r{n}") if n % 10 else wrong(f"r{n}") for n in range(300)]
    known, id = 0, ""

    def has_more(than: int, batch: Batch) -> bool:
        return answered(batch) > than

    for _ in range(6):
        async with serving(config, step_s=0.002, max_running=4) as server:
            client = server.client("one")
            id = id or (await begun(client, lines)).id
            known = answered(await until(client, id, partial(has_more, known)))
    async with serving(config) as server:
        client = server.client("one")
        batch = await over(client, id)
        assert batch.status == "completed"
        assert batch.request_counts and (batch.request_counts.completed, batch.request_counts.failed) == (270, 30)
        answers, errors = await content(client, batch.output_file_id), await content(client, batch.error_file_id)
        assert len(answers) == 270 and len(errors) == 30 and len(answers | errors) == 300
        assert batch.usage and batch.usage.output_tokens == 3 * 270
    async with serving(config) as server:
        client = server.client("one")
        assert await client.batches.retrieve(id) == batch
        assert await content(client, batch.output_file_id) == answers
        with pytest.raises(openai.NotFoundError):
            await server.client("two").batches.retrieve(id)
        assert (await client.files.delete(batch.output_file_id or "")).deleted
        async with asyncio.timeout(20):
            while (tmp_path / "batches" / id / "output.jsonl").exists():  # noqa: ASYNC110 (files have no events)
                await asyncio.sleep(0.002)


async def test_a_cancelled_batch_in_a_folder_is_still_cancelled_when_the_server_comes_back(tmp_path: Path) -> None:
    config = ServerConfig(batch_folder=str(tmp_path))
    async with serving(config, step_s=0.01, max_running=1) as server:
        client = server.client()
        id = (await begun(client, [line(f"r{n}") for n in range(100)])).id
        await until(client, id, lambda batch: answered(batch) > 0)
    record = tmp_path / id / "batch.json"
    record.write_bytes(record.read_bytes().replace(b'"in_progress"', b'"cancelling"'))
    async with serving(config) as server:
        batch = await over(server.client(), id)
        assert batch.status == "cancelled"
        assert batch.request_counts and batch.request_counts.completed + batch.request_counts.failed == 100


async def test_a_batch_folder_has_one_server_and_must_be_readable(tmp_path: Path) -> None:
    config = ServerConfig(batch_folder=str(tmp_path))
    async with serving(config):
        with pytest.raises(Exception, match="being written by another process"):
            create_app(fake_engine()[0], byte_text_model(), config, model_name="tiny")
    torn, bad = (tmp_path / f"batch_{digit * 32}" for digit in "ab")
    torn.mkdir()  # the server was killed before it had promised this one
    (tmp_path / "batch_photos").mkdir()  # somebody's
    async with serving(config) as server:
        assert not torn.exists() and (tmp_path / "batch_photos").exists()
        id = (await over(server.client(), (await begun(server.client(), [line("a")])).id)).id
    bad.mkdir()
    for held, said in (("{}", "cannot be read"), ((tmp_path / id / "batch.json").read_text(), f"is of '{id}'")):
        (bad / "batch.json").write_text(held)
        store = FolderBatches(tmp_path, Uploads())
        with pytest.raises(ConfigError, match=rf"batch\.json {said}"):
            store.load()
        store.close()
    (tmp_path / "file").write_text("x")
    with pytest.raises(Exception, match="--batch-folder names"):
        create_app(fake_engine()[0], byte_text_model(), ServerConfig(batch_folder=str(tmp_path / "file")), model_name="tiny")


async def test_answers_of_a_batch_that_took_long_are_kept_from_its_end_on(tmp_path: Path) -> None:
    config = ServerConfig(batch_folder=str(tmp_path))
    async with serving(config, step_s=0.01, max_running=1) as server:
        client = server.client()
        id = (await begun(client, [line(f"r{n}") for n in range(30)])).id
        await until(client, id, lambda batch: answered(batch) > 0)
    kept = tmp_path / id / "batch.json"
    record = json.loads(kept.read_bytes())
    for name in ("created_at", "in_progress_at", "expires_at"):
        record["batch"][name] -= 100 * 24 * 3600
    kept.write_text(json.dumps(record))
    for _ in range(2):
        async with serving(config) as server:
            client = server.client()
            batch = await over(client, id)
            answers, errors = await content(client, batch.output_file_id), await content(client, batch.error_file_id)
            assert batch.status == "expired" and len(answers | errors) == 30 and answers


async def test_a_full_disk_ends_a_batch_with_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, left = os.write, 3000

    def until_full(fd: int, data: memoryview) -> int:
        nonlocal left
        if left < len(data):
            raise OSError(ENOSPC, "No space left on device")
        left -= len(data)
        return write(fd, data)

    monkeypatch.setattr("streamserve.api.batch_ledger.os.write", until_full)
    async with serving(ServerConfig(batch_folder=str(tmp_path))) as server:
        client = server.client()
        batch = await over(client, (await begun(client, [line(f"r{n}") for n in range(40)])).id)
        assert batch.status == "failed" and batch.errors and batch.errors.data
        assert "No space left on device" in (batch.errors.data[0].message or "")
        answers = await content(client, batch.output_file_id)
        assert 0 < len(answers) < 40 and batch.request_counts and batch.request_counts.completed == len(answers)


async def test_batches_that_are_asked_for_at_the_same_time_are_all_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "MAX_OWN_UNFINISHED", 2)
    async with serving(ServerConfig(batch_folder=str(tmp_path)), step_s=0.01, max_running=1) as server:
        client = server.client()
        lines = [line(f"r{n}") for n in range(50)]
        results = await asyncio.gather(*(begun(client, lines) for _ in range(6)), return_exceptions=True)
        assert Counter(type(result) for result in results) == {Batch: 2, openai.RateLimitError: 4}


async def test_a_key_makes_room_for_more_batches_with_the_files_that_it_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "MAX_OWN_KEPT", 2)
    async with serving(ServerConfig(batch_folder=str(tmp_path), api_key=("one", "two"))) as server:
        client = server.client("one")
        batches = [await over(client, (await begun(client, [line("a")])).id) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="delete the files of answers that you have read"):
            await begun(client, [line("a")])
        await over(server.client("two"), (await begun(server.client("two"), [line("a")])).id)  # another's are not in the way
        await client.files.delete(batches[0].output_file_id or "")
        last = await over(client, (await begun(client, [line("a")])).id)
        assert [batch.id async for batch in client.batches.list()] == [last.id, batches[1].id]
        assert not (tmp_path / batches[0].id).exists()


# ---- large files ------------------------------------------------------------------------------------------------------


def test_of_long_lines_few_are_held_at_once() -> None:
    data = "".join(json.dumps(line(id, prompt="x" * 600_000)) + "\n" for id in "abcde").encode()
    todo = Todo(lambda: BytesIO(data), indexed(lambda: BytesIO(data), 1 << 20), Index(), 1 << 20)
    assert [len(todo.take(64)) for _ in range(4)] == [2, 2, 1, 0]


async def test_files_are_checked_beside_the_loop_and_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, most, ran = 0, 0, set[int]()

    def slowly(*given: Any, **named: Any) -> Index:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        ran.add(threading.get_ident())
        time.sleep(0.02)
        under_way -= 1
        return indexed(*given, **named)

    for place in ("files", "batch_runner"):
        monkeypatch.setattr(f"streamserve.api.{place}.indexed", slowly)
    async with serving() as server:
        client = server.client()
        batches = await asyncio.gather(*(begun(client, [line("a")]) for _ in range(3)))
        assert [(await over(client, batch.id)).status for batch in batches] == ["completed"] * 3
    assert most == 1 and threading.get_ident() not in ran


# ---- what an engine answers -------------------------------------------------------------------------------------------


class Unlimited:
    async def enter(self, line: Line) -> None: ...
    def leave(self, line: Line) -> None: ...


def todo_of(*ids: str) -> Todo:
    data = "".join(json.dumps(line(id)) + "\n" for id in ids).encode()
    return Todo(lambda: BytesIO(data), indexed(lambda: BytesIO(data), 1000), Index(), 1000)


async def test_a_line_that_finds_the_queue_full_is_asked_again() -> None:
    sink, asked = MemorySink(Uploads()), Counter[str]()

    async def ask(line: Line) -> Reply:
        asked[line.custom_id] += 1
        if line.custom_id == "b" and asked["b"] < 3:
            return Reply(429, [(b"retry-after", b"0")], b"{}")
        return Reply(200, [], b"{}")

    await work(todo_of("a", "b"), ask, sink, Unlimited())
    assert asked == {"a": 1, "b": 3}
    assert (sink.tally.completed, sink.tally.failed, sink.output.getvalue().count(b"\n")) == (2, 0, 2)


async def test_what_an_engine_that_stops_leaves_is_no_answer() -> None:
    sink = MemorySink(Uploads())

    async def ask(line: Line) -> Reply:
        return Reply(200 if line.custom_id == "a" else 503, [], b"{}")

    with pytest.raises(EngineStopped):
        await work(todo_of("a", "b"), ask, sink, Unlimited())
    assert b'"b"' not in sink.output.getvalue() and not sink.errors.getvalue()


async def test_lines_have_the_lowest_priority_where_requests_are_ordered_by_it() -> None:
    engine = ScriptedEngine()
    app = create_app(engine, byte_text_model(), ServerConfig(), model_name="tiny", settings={"schedule_policy": "priority"})
    client = AsyncOpenAI(base_url="http://127.0.0.1:30000/v1", api_key="none", http_client=client_of(app))
    own = line("b", messages=[{"role": "user", "content": "x"}], priority=5)
    assert (await over(client, (await begun(client, [line("a"), own])).id)).status == "completed"
    assert [request.priority for request in engine.requests] == [-MAX_PRIORITY, 5]


async def test_a_server_that_shuts_down_takes_no_batch() -> None:
    async with serving() as server:
        client = server.client()
        kept = await client.files.create(file=("x.jsonl", json.dumps(line("a")).encode()), purpose="batch")
        server.engine.close()
        with pytest.raises(openai.InternalServerError) as refused:
            await client.batches.create(input_file_id=kept.id, endpoint=CHAT, completion_window="24h")
        assert refused.value.status_code == 503
