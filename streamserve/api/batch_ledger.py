"""The files that a batch's answers are written to, so that a process that is killed at any moment loses none and repeats none.

A file only ever grows, by whole lines. A crash may leave the last one torn: it is cut off when the file is opened again, and its
request asked again. Owns these files while it is open: nobody else may write them. Knows nothing of how lines are answered.
"""

import os
from array import array
from asyncio import Future, TimerHandle, get_running_loop, sleep, wait
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EINVAL, ENOTSUP
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Protocol

from streamserve.api.batch_lines import START, Line, Usage, read_answer
from streamserve.api.batch_todo import Index
from streamserve.errors import ConfigError, StreamServeError

SYNC_EVERY_S = 1.0


@dataclass(slots=True)
class Tally:
    """How many lines were answered, and what that took."""

    completed: int = 0
    failed: int = 0
    usage: Usage = field(default_factory=Usage)

    def add(self, is_good: bool, usage: Usage) -> None:
        """Count one answer."""
        self.completed += is_good
        self.failed += not is_good
        self.usage.add(usage)


@dataclass(frozen=True, slots=True)
class Entry:
    """The answer of a line, as it is written."""

    line: Line
    data: bytes
    is_good: bool
    usage: Usage


class Sink(Protocol):
    """Where answers go. `answers` and `tally` are of those that are there."""

    answers: Index
    tally: Tally

    async def put(self, entry: Entry) -> None:
        """Keep an answer. Raises StreamServeError."""
        ...

    async def settled(self) -> None:
        """Until what is being written is there, where nobody puts any more."""
        ...

    def close(self) -> None:
        """Nothing is put afterwards. Blocks."""
        ...


class Ledger:
    """Answers in files. `errors`: a file of its own for those that failed."""

    def __init__(self, output: Path, errors: Path | None = None) -> None:
        """Open the files, or make them; read what they hold. Blocks. Raises ConfigError, with the files as they were."""
        self.answers = Index()
        self.tally = Tally()
        self.num_cut = 0  # torn lines
        self.failed = array("Q")  # keys of the failures that were there
        self._good = _Appended(output)
        self._bad = self._good if errors is None else None
        try:
            if errors is not None:
                self._bad = _Appended(errors)
            files = list(dict.fromkeys(file for file in (self._good, self._bad) if file is not None))
            ends = [self._read(file) for file in files]
            self._check_repeats(" or ".join(str(file.path) for file in files))
            for file, end in zip(files, ends, strict=True):
                self.num_cut += file.cut(end)
        except BaseException:
            self._close_files()
            raise
        self._waiting: deque[tuple[Entry, Future[None]]] = deque()
        # One thread does all of the files' work, so that the loop never waits for a disk.
        self._thread = ThreadPoolExecutor(1, "batch-writer")
        self._writing: Future[None] | None = None
        self._timer: TimerHandle | None = None  # until the disk is to have what was written
        self._failure: BaseException | None = None  # of the disk; nothing is written behind it
        self._is_closed = False

    def _read(self, file: "_Appended") -> int:
        """Take in a file's answers. Where its last whole line ends."""
        number = end = 0
        for data in file.whole_lines():
            number, end = number + 1, end + len(data)
            answered = read_answer(data)
            if answered is None:
                raise ConfigError(f"line {number} of {file.path} is no answer of a batch; nothing was changed, name another file")
            self.answers.add(answered, number)
            self.tally.add(answered.is_good, answered.usage)
            if not answered.is_good:
                self.failed.append(answered.key)
        if not _may_be_torn(file.tail(end)):
            raise ConfigError(f"line {number + 1} of {file.path} is no answer of a batch; nothing was changed, name another file")
        return end

    def _check_repeats(self, paths: str) -> None:
        for first, second in self.answers.repeats():
            raise ConfigError(f"lines {first} and {second} of {paths} answer the same custom_id; delete one of them")

    async def put(self, entry: Entry) -> None:
        """See Sink. Lines that come while others are written are written together. When this returns, the line outlives the
        process, and within a second the machine; when it is cancelled, it may."""
        if self._failure is not None:
            raise self._failure
        done: Future[None] = get_running_loop().create_future()
        self._waiting.append((entry, done))
        if self._writing is None:
            self._write_next()
        await done

    def _write_next(self) -> None:
        """Have the thread write all that waits; called again when it has."""
        taken = [(entry, done) for entry, done in self._waiting if not done.cancelled()]
        self._waiting.clear()
        self._writing = None
        if self._failure is not None:
            for _, done in taken:
                done.set_exception(self._failure)
        elif taken:
            entries = [entry for entry, _ in taken]
            self._writing = get_running_loop().run_in_executor(self._thread, self._write, entries)
            self._writing.add_done_callback(partial(self._written, taken))

    def _written(self, taken: list[tuple[Entry, Future[None]]], writing: Future[None]) -> None:
        failure = writing.exception()
        self._failure = self._failure or failure
        for entry, done in taken:
            if failure is None:
                self.answers.add(entry.line, len(self.answers) + 1)
                self.tally.add(entry.is_good, entry.usage)
            if done.done():
                continue
            if failure is None:
                done.set_result(None)
            else:
                done.set_exception(failure)
        if self._timer is None:
            self._timer = get_running_loop().call_later(SYNC_EVERY_S, self._sync_soon)
        self._write_next()

    def _sync_soon(self) -> None:
        self._timer = None
        if not self._is_closed:
            get_running_loop().run_in_executor(self._thread, self._sync)

    async def settled(self) -> None:
        """See Sink."""
        while self._writing is not None:
            await wait((self._writing,))
            await sleep(0)  # its callback comes behind ours

    def _write(self, entries: list[Entry]) -> None:
        assert self._bad is not None
        for file, wanted in ((self._good, True), (self._bad, False)):
            data = b"".join(entry.data for entry in entries if entry.is_good is wanted)
            if data:
                file.append(data)

    def _sync(self) -> None:
        for file in {self._good, self._bad}:
            if file is not None:
                try:
                    file.sync()
                except StreamServeError as error:
                    self._failure = self._failure or error

    def close(self) -> None:
        """See Sink. Waits for what is being written, sees that it reaches the disk, and lets go of the files. Raises what the
        disk has refused, once."""
        self._is_closed = True
        self._thread.shutdown()
        self._sync()
        self._close_files()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _close_files(self) -> None:
        for file in {self._good, self._bad}:
            if file is not None:
                file.close()


class _Appended:
    """A file that only grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_dirty = self._is_closed = False
        is_new = not path.exists()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise ConfigError(f"cannot open {path}: {error.strerror}") from None
        try:
            if not S_ISREG(os.fstat(self._fd).st_mode) and path != Path(os.devnull):
                raise ConfigError(f"{path} is no file; what is answered is read again by the next run")
            lock_file(self._fd, path)
            if is_new:
                sync_folder(path.parent)
        except BaseException:
            os.close(self._fd)
            raise

    def whole_lines(self) -> Iterator[bytes]:
        """The lines that end."""
        with open(self._fd, "rb", closefd=False) as source:
            source.seek(0)
            for data in source:
                if not data.endswith(b"\n"):
                    return
                yield data

    def tail(self, start: int) -> bytes:
        """What comes behind that place, the beginning of it."""
        os.lseek(self._fd, start, os.SEEK_SET)
        return os.read(self._fd, len(START))

    def cut(self, end: int) -> bool:
        """Forget what comes behind that place. Whether there was anything."""
        has_more = os.fstat(self._fd).st_size > end
        if has_more:
            os.ftruncate(self._fd, end)
            self._is_dirty = True
        return has_more

    def append(self, data: bytes) -> None:
        """Write at the end: all of it, or nothing. Raises StreamServeError."""
        end = os.fstat(self._fd).st_size
        rest = memoryview(data)
        self._is_dirty = True
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, end)
            raise StreamServeError(f"cannot write {self.path}: {error.strerror}; what was answered before stands in it") from None

    def sync(self) -> None:
        """Wait until the disk has it. A second try after a failure would tell of success: the kernel forgets what it lost."""
        if self._is_dirty:
            self._is_dirty = False
            try:
                os.fsync(self._fd)
            except OSError as error:
                if error.errno not in (EINVAL, ENOTSUP):  # a file system that does not know how
                    raise StreamServeError(f"cannot write {self.path}: {error.strerror}; its last lines may be lost") from None

    def close(self) -> None:
        """Let go of it, once."""
        if not self._is_closed:
            os.close(self._fd)
        self._is_closed = True


def _may_be_torn(tail: bytes) -> bool:
    """Whether a file's end, which begins like this, is what a crash leaves. After a power failure it may be zeros."""
    return START.startswith(tail) or not tail.strip(b"\0")


def lock_file(fd: int, path: Path) -> None:
    """Two writers would answer everything twice."""
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:  # Windows
        return
    with suppress(OSError):  # a file system that does not know how
        try:
            flock(fd, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{path} is being written by another process") from None


def sync_folder(folder: Path) -> None:
    """A new file's name reaches the disk with its folder."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
