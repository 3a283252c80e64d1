"""From what a client names (a data: URL, an http or https URL, the id of an uploaded file) to a decoded, prepared picture,
video or sound.

Owns where that runs, and how much of it at once: reading and decoding happen in two worker threads, one on a small machine, large
pictures in one of them, and of a request's pictures a few at a time. Knows nothing of requests or of models.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from hashlib import sha256
from typing import TypeVar

from anyio import CapacityLimiter, create_task_group, from_thread, to_thread

from streamserve.errors import InvalidRequest
from streamserve.media import data_url
from streamserve.media.decode import MEGAPIXELS, decode, num_pixels_of
from streamserve.media.fetch import Fetcher
from streamserve.media.picture import Picture
from streamserve.media.video import Clip, demuxer_of, open_clip

MAX_PICTURES = 64  # of a request
MAX_VIDEOS = 4  # among them: each may take seconds
FILE_ID = "file-"  # how ids of uploaded files begin
LARGE_PIXELS = 4 * MEGAPIXELS
AT_ONCE = 4  # of one request
# The event loop, and the threads that launch steps, wait for the interpreter behind each of these in turn. On 16 cores, answers
# beside 64 pictures of a megapixel had gaps of 38 ms (p99) with eight of them, 26 with three, and as many pictures a second.
MAX_THREADS = 2
SHOWN_CHARS = 60

T = TypeVar("T")
Find = Callable[[str, str], bytes | None]


def _nothing(given: object) -> None:
    """Where nothing is known from before, and nothing is too much."""


class Loader:
    """Loads pictures. `find`: the contents of an uploaded file by its id and owner, None where there is no such file."""

    def __init__(self, fetcher: Fetcher, find: Find, max_bytes: int) -> None:
        self._fetcher = fetcher
        self._find = find
        self._max_bytes = max_bytes
        num_threads = max(1, min(MAX_THREADS, (os.cpu_count() or 2) // 2))
        self._threads = CapacityLimiter(num_threads)
        self._large = CapacityLimiter(max(1, num_threads // 2))  # what bounds memory: each may take 300 MiB while it is decoded

    async def load_all(
        self,
        sources: Sequence[tuple[str, str]],
        prepare: Callable[[Picture], T],
        owner: str = "",
        find: Callable[[bytes], T | None] = _nothing,
        prepare_clip: Callable[[Clip], T] | None = None,
        prepare_sound: Callable[[bytes, str], T] | None = None,
        check: Callable[[Sequence[T]], None] = _nothing,
    ) -> list[T]:
        """What `prepare` makes of each of a request's pictures, given as (source, the field it stands in). `check` is told, after
        each, what is done so far, and raises if that is too much. Raises what the first that failed raised; the others are given
        up then."""
        if len(sources) > MAX_PICTURES:
            param = sources[MAX_PICTURES][1]
            raise InvalidRequest(
                f"{param} is one of {len(sources)} pictures; a request may have at most {MAX_PICTURES}", param=param
            )
        done: dict[int, T] = {}
        failed: list[Exception] = []
        at_once = CapacityLimiter(AT_ONCE)
        videos: list[Clip] = []

        def prepare_one(clip: Clip) -> T:
            videos.append(clip)
            if len(videos) > MAX_VIDEOS:
                raise InvalidRequest(f"{clip.param} is one video too many; a request may have {MAX_VIDEOS}", param=clip.param)
            assert prepare_clip is not None
            return prepare_clip(clip)

        async def load(index: int, source: str, param: str) -> None:
            async with at_once:
                try:
                    done[index] = await self.load(
                        source, param, prepare, owner, find, prepare_clip and prepare_one, prepare_sound
                    )
                    check(list(done.values()))
                except Exception as error:
                    failed.append(error)
                    tasks.cancel_scope.cancel()

        async with create_task_group() as tasks:
            for index, (source, param) in enumerate(sources):
                tasks.start_soon(load, index, source, param)
        if failed:
            raise failed[0]
        return [done[index] for index in range(len(sources))]

    async def load(
        self,
        source: str,
        param: str,
        prepare: Callable[[Picture], T],
        owner: str = "",
        find: Callable[[bytes], T | None] = _nothing,
        prepare_clip: Callable[[Clip], T] | None = None,
        prepare_sound: Callable[[bytes, str], T] | None = None,
    ) -> T:
        """What `prepare` makes of a picture, in the thread that decodes it, so that its pixels are gone when this returns; or
        `prepare_clip` of a video, where it is given. With `prepare_sound` it is a sound, and that has its bytes. `find` gives,
        in a thread too, what was made before of a file with that digest, or None. Raises InvalidRequest, saying of `param`, the
        field that `source` stands in, what is wrong."""
        read = await self._reader(source, param, owner)

        def look() -> tuple[bytes, bool, T | None]:
            data = read()
            if (known := find(sha256(data).digest())) is not None:
                return data, False, known
            if prepare_sound is not None:
                return data, False, None
            is_video = prepare_clip is not None and demuxer_of(data) is not None
            return data, is_video or num_pixels_of(data, param) > LARGE_PIXELS, None

        def make() -> T:
            if prepare_sound is not None:
                return prepare_sound(data, param)
            if prepare_clip is not None and demuxer_of(data) is not None:
                return prepare_clip(open_clip(data, param, from_thread.check_cancelled))
            return prepare(decode(data, param))

        data, is_large, known = await to_thread.run_sync(look, limiter=self._threads)
        if known is not None:
            return known
        async with AsyncExitStack() as held:
            if is_large:
                await held.enter_async_context(self._large)
            return await to_thread.run_sync(make, limiter=self._threads)

    async def _reader(self, source: str, param: str, owner: str) -> Callable[[], bytes]:
        """How to come by the bytes, in a thread."""
        scheme = source[: source.find(":") + 1].lower()
        if scheme == data_url.SCHEME:
            return lambda: data_url.bytes_of(source, self._max_bytes, param)
        if scheme:
            fetched = await self._fetcher.fetch(source, param)
            return lambda: fetched
        if not source.startswith(FILE_ID):
            raise InvalidRequest(
                f"{param} is {_shown(source)}; allowed is a data: URL, an https or http URL, or the id of an uploaded file",
                param=param,
            )
        found = self._find(source, owner)
        if found is None:
            raise InvalidRequest(f"{param} is {_shown(source)}; there is no such file, or no longer", param=param)
        return lambda: found


def _shown(source: str) -> str:
    return repr(source if len(source) <= SHOWN_CHARS else source[:SHOWN_CHARS] + "…")
