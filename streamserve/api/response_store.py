"""Where finished responses of /v1/responses are kept: in memory, or in a SQLite file that outlives the server.

Owns how many are kept, how long, and in whose name. What was not used for longest goes first; using a response is also
continuing one that continues it. Knows nothing of what is in them.
"""

import sqlite3
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Protocol, TypeVar

from anyio import CapacityLimiter, to_thread

from streamserve.errors import ConfigError

MIB = 1 << 20
DAY_S = 24 * 3600.0
MAX_MEMORY_BYTES, MEMORY_TTL_S = 256 * MIB, DAY_S
MAX_FILE_BYTES, FILE_TTL_S = 4096 * MIB, 30 * DAY_S
RECORD_BYTES = 512  # what a record costs beside its texts

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Record:
    """One finished response. `owner` is a digest of the key that made it; nobody else finds it. `response` is the response
    object and `input` the list of its own input items, both as JSON; `events` is what a replay needs, b"" where there is none."""

    id: str
    owner: str
    previous_id: str | None
    response: bytes
    input: bytes
    events: bytes = b""

    @property
    def size(self) -> int:
        """What it takes, in bytes."""
        return len(self.response) + len(self.input) + len(self.events) + RECORD_BYTES


class ResponseStore(Protocol):
    """Keeps records within its limits."""

    async def put(self, record: Record) -> None:
        """Keep a record, and forget others where the limits ask for it."""
        ...

    async def get(self, id: str, owner: str) -> Record | None:
        """The record of that id, which counts as used now; None when this owner has no such record."""
        ...

    async def delete(self, id: str, owner: str) -> bool:
        """Forget a record. False when this owner has no such record."""
        ...

    def close(self) -> None:
        """Nothing is asked afterwards."""
        ...


class MemoryStore:
    """Records in memory; gone with the server."""

    def __init__(
        self, max_bytes: int = MAX_MEMORY_BYTES, ttl_s: float = MEMORY_TTL_S, *, now: Callable[[], float] = time
    ) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._now = now
        self._records: OrderedDict[str, tuple[Record, float]] = OrderedDict()  # least recently used first
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    async def put(self, record: Record) -> None:
        """See ResponseStore."""
        self._forget(record.id)
        self._records[record.id] = (record, self._now())
        self.num_bytes += record.size
        self._trim()

    async def get(self, id: str, owner: str) -> Record | None:
        """See ResponseStore."""
        self._trim()
        found = self._records.get(id)
        if found is None or found[0].owner != owner:
            return None
        self._records[id] = (found[0], self._now())
        self._records.move_to_end(id)
        return found[0]

    async def delete(self, id: str, owner: str) -> bool:
        """See ResponseStore."""
        self._trim()
        found = self._records.get(id)
        if found is None or found[0].owner != owner:
            return False
        self._forget(id)
        return True

    def close(self) -> None:
        """See ResponseStore."""

    def _forget(self, id: str) -> None:
        found = self._records.pop(id, None)
        if found is not None:
            self.num_bytes -= found[0].size

    def _trim(self) -> None:
        oldest_s = self._now() - self._ttl_s
        while self._records:
            id, (_, used_s) = next(iter(self._records.items()))
            if self.num_bytes <= self._max_bytes and used_s >= oldest_s:
                return
            self._forget(id)


SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, previous_id TEXT, response BLOB NOT NULL, input BLOB NOT NULL, events BLOB NOT NULL,
    size INTEGER NOT NULL, used_s REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_used ON responses (used_s);
"""
VERSION = 1  # of the table; a file of another version is refused


class FileStore:
    """Records in a SQLite file. All of its work is done in a worker thread, one piece at a time."""

    def __init__(
        self, path: Path, max_bytes: int = MAX_FILE_BYTES, ttl_s: float = FILE_TTL_S, *, now: Callable[[], float] = time
    ) -> None:
        """Raises ConfigError when the file cannot be used."""
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._now = now
        self._one_at_a_time = CapacityLimiter(1)
        try:
            path.touch(mode=0o600)  # conversations are nobody else's business; SQLite gives its other files the same mode
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=1.0)
            self._open(path)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"--response-store names {str(path)!r}, which cannot be used: {error}") from None

    def _open(self, path: Path) -> None:
        run = self._database.execute
        run("PRAGMA locking_mode = EXCLUSIVE")  # one server a file: sizes are counted here
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = NORMAL")
        (version,) = run("PRAGMA user_version").fetchone()
        (num_tables,) = run("SELECT count(*) FROM sqlite_master").fetchone()
        if version != VERSION and (version, num_tables) != (0, 0):
            raise ConfigError(
                f"--response-store names {str(path)!r}, which is no response store of this version; name a new file"
            )
        self._database.executescript(SCHEMA)
        run(f"PRAGMA user_version = {VERSION}")
        (self._num_bytes,) = run("SELECT coalesce(sum(size), 0) FROM responses").fetchone()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await to_thread.run_sync(work, limiter=self._one_at_a_time)

    async def put(self, record: Record) -> None:
        """See ResponseStore."""
        await self._in_thread(lambda: self._put(record))

    async def get(self, id: str, owner: str) -> Record | None:
        """See ResponseStore."""
        return await self._in_thread(lambda: self._get(id, owner))

    async def delete(self, id: str, owner: str) -> bool:
        """See ResponseStore."""
        return await self._in_thread(lambda: self._delete(id, owner))

    def close(self) -> None:
        """See ResponseStore."""
        self._database.close()

    def _put(self, record: Record) -> None:
        self._forget("id = ?", record.id)
        values = (record.id, record.owner, record.previous_id, record.response, record.input, record.events)
        self._database.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*values, record.size, self._now()))
        self._num_bytes += record.size
        self._trim()

    def _get(self, id: str, owner: str) -> Record | None:
        self._trim()
        columns = "id, owner, previous_id, response, input, events"
        found = self._database.execute(
            f"UPDATE responses SET used_s = ? WHERE id = ? AND owner = ? RETURNING {columns}", (self._now(), id, owner)
        ).fetchall()
        return Record(*found[0]) if found else None

    def _delete(self, id: str, owner: str) -> bool:
        self._trim()
        return self._forget("id = ? AND owner = ?", id, owner)

    def _forget(self, which: str, *values: object) -> bool:
        sizes = self._database.execute(f"DELETE FROM responses WHERE {which} RETURNING size", values).fetchall()
        self._num_bytes -= sum(size for (size,) in sizes)
        return bool(sizes)

    def _trim(self) -> None:
        self._forget("used_s < ?", self._now() - self._ttl_s)
        while self._num_bytes > self._max_bytes:
            if not self._forget("id = (SELECT id FROM responses ORDER BY used_s LIMIT 1)"):
                return


def open_store(path: str | None) -> ResponseStore:
    """The store of a server: in memory without a path."""
    return MemoryStore() if path is None else FileStore(Path(path))
