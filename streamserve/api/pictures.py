"""Pictures, videos and sounds of requests, from the fields that hold them to what the model's encoder takes.

Owns the cache of prepared pictures, so that a chat's next turn, which shows the earlier ones again, prepares only new ones. How
a picture is loaded is media/loader.py's, what a model makes of it its family's. Knows no dialect.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from streamserve.api.schema import PictureRef
from streamserve.errors import ContextOverflow, InvalidRequest
from streamserve.media.family import ClipFamily, Family, PictureFamily, Prepared, SoundFamily, kinds_of
from streamserve.media.loader import MAX_PICTURES, Loader
from streamserve.media.picture import Picture
from streamserve.media.sound import decode_sound
from streamserve.media.video import Clip
from streamserve.messages import AUDIO, VIDEO

MAX_CACHE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: `owner` of uploaded files, and `watch`, in which loading is given up when the client leaves."""

    owner: str = ""
    watch: Callable[[], AbstractAsyncContextManager[Any]] = nullcontext


ANYBODY = Caller()


class Pictures:
    """Loads and prepares pictures for one model, whose context has room for `context_len` places."""

    def __init__(
        self, family: Family, loader: Loader, context_len: Callable[[], int], *, max_cache_bytes: int = MAX_CACHE_BYTES
    ) -> None:
        self._family = family
        self._loader = loader
        self._context_len = context_len
        self._max_bytes = max_cache_bytes
        self._kept: OrderedDict[bytes, Prepared] = OrderedDict()  # by the file's digest, least recently used first
        self._num_bytes = 0
        self.takes = kinds_of(family)

    async def prepared(
        self, pictures: Sequence[PictureRef], caller: Caller = ANYBODY, known: dict[str, Prepared] | None = None
    ) -> list[Prepared]:
        """The pictures as the encoder takes them. One that is there twice is loaded once. `known`: what was loaded before for the
        same request, by its source; more is added to it. Raises InvalidRequest naming the field of a picture that cannot be."""
        if len(pictures) > MAX_PICTURES:
            param, noun = pictures[MAX_PICTURES].param, "sounds" if AUDIO in self.takes else "pictures"
            raise InvalidRequest(
                f"{param} is one of {len(pictures)} {noun}; a request may have at most {MAX_PICTURES}", param=param
            )
        known = {} if known is None else known
        wanted: dict[str, str] = {}
        for picture in pictures:
            if picture.source not in known:
                wanted.setdefault(picture.source, picture.param)
        if wanted:
            # A model takes sounds or pictures; of one that takes both, a request could name one source for two kinds.
            prepare_clip = self._prepare_clip if VIDEO in self.takes else None
            prepare_sound = self._prepare_sound if AUDIO in self.takes else None
            context_len = self._context_len()

            def check(made: Sequence[tuple[bytes, Prepared]]) -> None:
                """More than fits is not worth loading, nor the memory."""
                num_places = sum(prepared.layout.num_tokens for _, prepared in made)
                if num_places > context_len:
                    raise ContextOverflow(
                        f"{len(made)} of {len(pictures)} pictures or sounds take {num_places} tokens by themselves, but the "
                        f"context holds {context_len}; send fewer or smaller ones",
                        param=pictures[0].param,
                    )

            async with caller.watch():
                made = await self._loader.load_all(
                    list(wanted.items()), self._prepare, caller.owner, self._find, prepare_clip, prepare_sound, check
                )
            for source, (digest, prepared) in zip(wanted, made, strict=True):
                known[source] = prepared
                self._keep(digest, prepared)
        return [known[picture.source] for picture in pictures]

    def _prepare(self, picture: Picture) -> tuple[bytes, Prepared]:
        """In a worker thread."""
        assert isinstance(self._family, PictureFamily)
        return picture.digest, self._family.prepare(picture)

    def _prepare_clip(self, clip: Clip) -> tuple[bytes, Prepared]:
        """In a worker thread."""
        assert isinstance(self._family, ClipFamily)
        return clip.digest, self._family.prepare_clip(clip)

    def _prepare_sound(self, data: bytes, param: str) -> tuple[bytes, Prepared]:
        """In a worker thread."""
        assert isinstance(self._family, SoundFamily)
        sound = decode_sound(data, param, rate=self._family.rate, max_seconds=self._family.max_seconds)
        try:
            return sound.digest, self._family.prepare_sound(sound)
        except InvalidRequest as error:
            raise InvalidRequest(f"{param}: {error}", param=param) from None

    def _find(self, digest: bytes) -> tuple[bytes, Prepared] | None:
        """In a worker thread."""
        prepared = self._kept.get(digest)
        return None if prepared is None else (digest, prepared)

    def _keep(self, digest: bytes, prepared: Prepared) -> None:
        if (before := self._kept.pop(digest, None)) is not None:
            self._num_bytes -= _num_bytes(before)
        self._kept[digest] = prepared
        self._num_bytes += _num_bytes(prepared)
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= _num_bytes(self._kept.popitem(last=False)[1])


def _num_bytes(prepared: Prepared) -> int:
    return sum(getattr(array, "nbytes", 0) for array in prepared.inputs.values()) + len(prepared.layout.text)
