"""Files that clients uploaded, in memory until they expire; beside them files of the server's own, some of which lie on disk.

Owns how many are kept, how long, and in whose name. A file that has not expired is never dropped for another: a full store takes
no more. Knows nothing of HTTP, and nothing of what is in a file.
"""

from asyncio import get_running_loop
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from time import time

from streamserve.errors import Conflict, RequestTooLarge

MAX_STORE_BYTES, MAX_FILES = 256 << 20, 1024


@dataclass(frozen=True, slots=True)
class Upload:
    """One file. `owner` is a digest of the key that sent it; nobody else finds it. Times are in seconds since 1970. `path`: where
    it lies, if it is not `data`."""

    id: str
    owner: str
    filename: str
    purpose: str
    data: bytes
    created_s: int
    expires_s: int
    path: Path | None = None
    size_on_disk: int = 0

    @property
    def size(self) -> int:
        """Its bytes."""
        return len(self.data) + self.size_on_disk


class Uploads:
    """Keeps files within its limits."""

    def __init__(self, max_bytes: int = MAX_STORE_BYTES, max_files: int = MAX_FILES, *, now: Callable[[], float] = time) -> None:
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._now = now
        self._files: dict[str, Upload] = {}  # oldest first
        self._held: Counter[str] = Counter()  # files that are being read
        self._sent: set[str] = set()  # by clients
        self.num_bytes = 0  # in memory

    def __len__(self) -> int:
        return len(self._files)

    def put(self, data: bytes, *, owner: str, filename: str, purpose: str, ttl_s: int) -> Upload:
        """Keep a file. Raises RequestTooLarge when there is no room for it."""
        self.drop_expired()
        if len(self._sent) >= self._max_files:
            raise self._no_room(len(data))
        self.reserve(len(data))
        created_s = int(self._now())
        kept = Upload(new_file_id(), owner, filename, purpose, data, created_s, created_s + ttl_s)
        self._files[kept.id] = kept
        self._sent.add(kept.id)
        return kept

    def reserve(self, num_bytes: int) -> None:
        """Count bytes of a file that is still to be added. Raises RequestTooLarge when there is no room for them."""
        if self.num_bytes + num_bytes > self._max_bytes:
            self.drop_expired()
        if self.num_bytes + num_bytes > self._max_bytes:
            raise self._no_room(num_bytes)
        self.num_bytes += num_bytes

    def _no_room(self, num_bytes: int) -> RequestTooLarge:
        return RequestTooLarge(
            f"file has {num_bytes} bytes, for which there is no room: {len(self._sent)} files of {self.num_bytes} bytes are "
            f"kept, at most {self._max_files} of {self._max_bytes} may be; delete some, or wait until they expire",
            param="file",
        )

    def add(self, kept: Upload) -> None:
        """Keep a file that the server has made, whose bytes are counted already, or on disk."""
        self._files[kept.id] = kept

    def get(self, id: str, owner: str) -> Upload | None:
        """The file of that id; None when this owner has no such file."""
        found = self._files.get(id)
        if found is not None and self._has_expired(found):
            self._forget(found)
            return None
        return found if found is not None and found.owner == owner else None

    def contents(self, id: str, owner: str) -> bytes | None:
        """What is in it; None also when it lies on disk, where no picture does."""
        found = self.get(id, owner)
        return None if found is None or found.path is not None else found.data

    def listed(self, owner: str) -> list[Upload]:
        """This owner's files, oldest first."""
        self.drop_expired()
        return [kept for kept in self._files.values() if kept.owner == owner]

    def delete(self, id: str, owner: str) -> bool:
        """Forget a file. False when this owner has no such file. Raises Conflict while it is held."""
        found = self.get(id, owner)
        if found is not None and self._held[id]:
            raise Conflict("a batch that is not over reads this file; cancel the batch, or wait for its end", param="id")
        if found is not None:
            self._forget(found)
        return found is not None

    def hold(self, id: str) -> None:
        """Keep a file until it is released as often."""
        self._held[id] += 1

    def release(self, id: str) -> None:
        """See hold()."""
        self._held[id] -= 1
        self._held += Counter()  # without those at 0
        self.drop_expired()

    def drop_expired(self) -> None:
        """Forget what has expired."""
        for kept in [kept for kept in self._files.values() if self._has_expired(kept)]:
            self._forget(kept)

    def _has_expired(self, kept: Upload) -> bool:
        return kept.expires_s <= self._now() and not self._held[kept.id]

    def _forget(self, kept: Upload) -> None:
        del self._files[kept.id]
        self._sent.discard(kept.id)
        self.num_bytes -= len(kept.data)
        if kept.path is not None:
            # A disk takes a second for some GB.
            get_running_loop().run_in_executor(None, partial(kept.path.unlink, missing_ok=True))


def new_file_id() -> str:
    """An id that nobody guesses."""
    return f"file-{token_hex(16)}"
