"""The two stores of finished responses: what they keep, for whom and for how long."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamserve.api.response_store import RECORD_BYTES, FileStore, MemoryStore, Record, ResponseStore
from streamserve.errors import ConfigError

pytestmark = pytest.mark.anyio


class Clock:
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[ResponseStore]:
    """Room for three records of `record`, for ten seconds."""
    size = 3 * record("x").size
    made: ResponseStore = (
        MemoryStore(size, 10.0, now=clock)
        if request.param == "memory"
        else FileStore(tmp_path / "responses.db", size, 10.0, now=clock)
    )
    yield made
    made.close()


def record(id: str, owner: str = "me", size: int = 100) -> Record:
    return Record(id, owner, None, b"r" * size, b"i" * size, b"e" * size)


async def test_a_record_comes_back_whole_and_can_be_forgotten(store: ResponseStore) -> None:
    kept = Record("a", "me", "before", b'{"id":"a"}', b"[]", b"\x00\xff")
    await store.put(kept)
    assert await store.get("a", "me") == kept
    assert await store.delete("a", "me")
    assert await store.get("a", "me") is None
    assert not await store.delete("a", "me")


async def test_a_record_is_its_owners_alone(store: ResponseStore) -> None:
    await store.put(record("a"))
    assert await store.get("a", "somebody else") is None
    assert not await store.delete("a", "somebody else")
    assert await store.get("a", "me") is not None


async def test_what_was_not_used_for_longest_makes_room(store: ResponseStore, clock: Clock) -> None:
    for id in "abc":
        clock.now_s += 0.1
        await store.put(record(id))
    clock.now_s += 0.1
    await store.get("a", "me")
    clock.now_s += 0.1
    await store.put(record("d"))
    assert [id for id in "abcd" if await store.get(id, "me") is not None] == ["a", "c", "d"]


async def test_a_record_that_alone_is_too_large_is_not_kept(store: ResponseStore) -> None:
    await store.put(record("a", size=1000))
    assert await store.get("a", "me") is None
    await store.put(record("b"))
    assert await store.get("b", "me") is not None


async def test_records_go_after_their_time_and_use_prolongs_it(store: ResponseStore, clock: Clock) -> None:
    await store.put(record("a"))
    await store.put(record("b"))
    clock.now_s += 8
    assert await store.get("a", "me") is not None
    clock.now_s += 8
    assert await store.get("a", "me") is not None
    assert await store.get("b", "me") is None


async def test_memory_counts_what_it_holds(clock: Clock) -> None:
    store = MemoryStore(10_000, 10.0, now=clock)
    for id in ("a", "b", "a"):
        await store.put(record(id))
    assert store.num_bytes == 2 * (300 + RECORD_BYTES) and len(store) == 2
    await store.delete("a", "me")
    await store.delete("b", "me")
    assert store.num_bytes == 0


async def test_a_file_outlives_its_server_and_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "responses.db"
    store = FileStore(path)
    await store.put(record("a"))
    store.close()
    assert path.stat().st_mode & 0o077 == 0
    again = FileStore(path)
    assert await again.get("a", "me") == record("a")
    again.close()


async def test_a_file_that_cannot_be_the_store_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database, but long enough to be looked at as if it were one " * 20)
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t (x)")
    other.close()
    held = FileStore(tmp_path / "held.db")
    for name in ("text", "other.db", "held.db", "missing/folder.db"):
        with pytest.raises(ConfigError, match="--response-store"):
            FileStore(tmp_path / name)
    held.close()
