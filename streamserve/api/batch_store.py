"""Where the batches of a server are kept: in its memory, beside uploaded files, or in a folder that outlives it.

    DIR/lock                       held by the one server that uses the folder
    DIR/batch_…/batch.json         what is known of the batch, written anew whenever its state changes
    DIR/batch_…/input.jsonl        the requests; output.jsonl, errors.jsonl: the answers (batch_ledger.py)

Owns these files. Knows nothing of how a batch is run.
"""

import os
import re
from asyncio import get_running_loop
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from shutil import disk_usage, rmtree
from time import time
from typing import Protocol

import msgspec
from msgspec import Struct

from streamserve.api.batch_ledger import Entry, Ledger, Sink, Tally, lock_file, sync_folder
from streamserve.api.batch_schema import Batch
from streamserve.api.batch_todo import Index, Open
from streamserve.api.uploads import Upload, Uploads, new_file_id
from streamserve.errors import ConfigError, RequestTooLarge

MEMORY_TTL_S, FOLDER_TTL_S = 24 * 3_600, 30 * 24 * 3_600  # of answers, where the client does not say
MIN_FREE_BYTES = 1 << 30  # of a disk, that others need
OUTPUT = "batch_output"  # what files of answers are for
FOLDER_NAME = re.compile("batch_[0-9a-f]{32}")


class Record(Struct):
    """A batch, whose it is, and how long its answers are kept. `num_lines`: of its input; 0: they were not counted yet."""

    batch: Batch
    owner: str
    output_ttl_s: int
    num_lines: int = 0
    kept_until_s: int | None = None  # once its answers are files

    @property
    def is_old(self) -> bool:
        """Whether it is to be forgotten."""
        return self.kept_until_s is not None and self.kept_until_s <= time()

    @property
    def file_ids(self) -> list[str]:
        """Of its answers."""
        return [id for id in (self.batch.output_file_id, self.batch.error_file_id) if id is not None]

    def file(self, name: str, data: bytes = b"", path: Path | None = None) -> Upload:
        """Its `output` or `error` file, which has an id, as clients see it."""
        assert self.kept_until_s is not None
        id, made_s = getattr(self.batch, f"{name}_file_id"), self.kept_until_s - self.output_ttl_s
        size = 0 if path is None else path.stat().st_size
        filename = f"{self.batch.id}_{name}.jsonl"
        return Upload(id, self.owner, filename, OUTPUT, data, made_s, self.kept_until_s, path, size)


class BatchStore(Protocol):
    """Keeps batches. `blocks`: what it does takes its time, and is to be done in a thread, but where it says otherwise."""

    blocks: bool
    ttl_s: int

    def begin(self, record: Record, data: bytes) -> None:
        """Keep a new one, with its input."""
        ...

    def save(self, record: Record) -> None:
        """Keep what has changed of it."""
        ...

    def input_of(self, record: Record) -> Open:
        """Its input."""
        ...

    def sink_of(self, record: Record) -> Sink:
        """Where its answers go."""
        ...

    def finish(self, record: Record, sink: Sink | None) -> None:
        """Make files of its answers, if there are any, and name them in it. Called on the event loop."""
        ...

    def has_files(self, record: Record) -> bool:
        """Whether files of its answers are kept still. Called on the event loop."""
        ...

    def forget(self, record: Record) -> None:
        """Keep it no longer."""
        ...

    def load(self) -> list[Record]:
        """Those that were kept before the server was started, oldest first."""
        ...

    def close(self) -> None:
        """Nothing is asked afterwards."""
        ...


@dataclass(slots=True)
class MemorySink:
    """Answers in memory, counted with uploaded files."""

    uploads: Uploads
    answers: Index = field(default_factory=Index)
    tally: Tally = field(default_factory=Tally)
    output: BytesIO = field(default_factory=BytesIO)  # gives away what it holds without copying it
    errors: BytesIO = field(default_factory=BytesIO)

    async def put(self, entry: Entry) -> None:
        """See Sink. Raises RequestTooLarge when there is no room."""
        self.uploads.reserve(len(entry.data))
        (self.output if entry.is_good else self.errors).write(entry.data)
        self.answers.add(entry.line, len(self.answers) + 1)
        self.tally.add(entry.is_good, entry.usage)

    async def settled(self) -> None:
        """See Sink."""

    def close(self) -> None:
        """See Sink."""


class MemoryBatches:
    """Batches in memory; gone with the server."""

    blocks = False
    ttl_s = MEMORY_TTL_S

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self._inputs: dict[str, bytes] = {}  # of those that are not over

    def begin(self, record: Record, data: bytes) -> None:
        """See BatchStore."""
        self._inputs[record.batch.id] = data
        self._uploads.hold(record.batch.input_file_id)  # where its bytes are counted

    def save(self, record: Record) -> None:
        """See BatchStore."""

    def input_of(self, record: Record) -> Open:
        """See BatchStore."""
        data = self._inputs[record.batch.id]
        return lambda: BytesIO(data)

    def sink_of(self, record: Record) -> Sink:
        """See BatchStore."""
        return MemorySink(self._uploads)

    def finish(self, record: Record, sink: Sink | None) -> None:
        """See BatchStore. The answers' bytes are counted already."""
        self.forget(record)
        if not isinstance(sink, MemorySink):
            return
        for held, name in ((sink.output, "output"), (sink.errors, "error")):
            if data := held.getvalue():
                setattr(record.batch, f"{name}_file_id", new_file_id())
                self._uploads.add(record.file(name, data))
                get_running_loop().call_later(record.output_ttl_s + 1, self._uploads.drop_expired)

    def has_files(self, record: Record) -> bool:
        """See BatchStore."""
        return any(self._uploads.get(id, record.owner) for id in record.file_ids)

    def forget(self, record: Record) -> None:
        """See BatchStore."""
        if self._inputs.pop(record.batch.id, None) is not None:
            self._uploads.release(record.batch.input_file_id)

    def load(self) -> list[Record]:
        """See BatchStore."""
        return []

    def close(self) -> None:
        """See BatchStore."""


class FolderBatches:
    """Batches in a folder."""

    blocks = True
    ttl_s = FOLDER_TTL_S

    def __init__(self, folder: Path, uploads: Uploads) -> None:
        """Raises ConfigError when the folder cannot be used."""
        self._folder = folder
        self._uploads = uploads
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what people ask is nobody else's business
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"--batch-folder names {str(folder)!r}, which cannot be used: {error.strerror}") from None
        try:
            lock_file(self._lock, folder)
        except ConfigError:
            os.close(self._lock)
            raise

    def _place(self, record: Record) -> Path:
        return self._folder / record.batch.id

    def begin(self, record: Record, data: bytes) -> None:
        """See BatchStore. What has no batch.json yet was never promised to anybody."""
        if disk_usage(self._folder).free < MIN_FREE_BYTES + len(data):
            raise RequestTooLarge("the disk of the server's batches is nearly full; delete files of batches that are over")
        place = self._place(record)
        place.mkdir(mode=0o700)
        _write_whole(place / "input.jsonl", data)
        self.save(record)
        sync_folder(self._folder)

    def save(self, record: Record) -> None:
        """See BatchStore."""
        _write_whole(self._place(record) / "batch.json", msgspec.json.encode(record))

    def input_of(self, record: Record) -> Open:
        """See BatchStore."""
        return lambda: (self._place(record) / "input.jsonl").open("rb")

    def sink_of(self, record: Record) -> Sink:
        """See BatchStore."""
        place = self._place(record)
        return Ledger(place / "output.jsonl", place / "errors.jsonl")

    def finish(self, record: Record, sink: Sink | None) -> None:
        """See BatchStore."""
        for path, name in self._outputs(record):
            if path.exists() and path.stat().st_size:
                setattr(record.batch, f"{name}_file_id", new_file_id())
        self._show_outputs(record)
        get_running_loop().call_later(record.output_ttl_s + 1, self._uploads.drop_expired)

    def _outputs(self, record: Record) -> list[tuple[Path, str]]:
        place = self._place(record)
        return [(place / "output.jsonl", "output"), (place / "errors.jsonl", "error")]

    def _show_outputs(self, record: Record) -> None:
        """Among the files, until they expire or are deleted."""
        for path, name in self._outputs(record):
            if getattr(record.batch, f"{name}_file_id") is not None and path.exists():
                self._uploads.add(record.file(name, path=path))

    def has_files(self, record: Record) -> bool:
        """See BatchStore."""
        return any(self._uploads.get(id, record.owner) for id in record.file_ids)

    def forget(self, record: Record) -> None:
        """See BatchStore."""
        rmtree(self._place(record), ignore_errors=True)

    def load(self) -> list[Record]:
        """See BatchStore. A folder without a batch.json is what a crash left of a request that was not answered. Whatever else
        lies here is somebody's, and stays."""
        records = []
        for place in self._folder.iterdir():
            if not FOLDER_NAME.fullmatch(place.name):
                continue
            try:
                record = msgspec.json.decode((place / "batch.json").read_bytes(), type=Record)
            except FileNotFoundError:
                rmtree(place, ignore_errors=True)
                continue
            except (OSError, msgspec.MsgspecError) as error:
                raise ConfigError(f"{place / 'batch.json'} cannot be read ({error}); mend or remove it") from None
            if record.batch.id != place.name:
                raise ConfigError(f"{place / 'batch.json'} is of {record.batch.id!r}; mend or remove it")
            records.append(record)
            if record.batch.is_over:
                self._show_outputs(record)
        return sorted(records, key=lambda record: record.batch.created_at)

    def close(self) -> None:
        """See BatchStore."""
        os.close(self._lock)


def _write_whole(path: Path, data: bytes) -> None:
    """After a crash the file is the old one or the new one."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        with suppress(OSError):  # a file system that does not know how
            os.fsync(file.fileno())
    new.replace(path)
    sync_folder(path.parent)


def open_batches(folder: str | None, uploads: Uploads) -> BatchStore:
    """The store of a server: in memory without a folder."""
    if folder is None:
        return MemoryBatches(uploads)
    return FolderBatches(Path(folder), uploads)
