"""Embeddings of media on a GPU, and which tokens of a step they take the places of: what engine/embeddings.py is on a CPU.

Owns the tensors by key, each slot's places and rope positions, and the thread in which encoders run. Which to encode and which to
give up the scheduler says (engine/encodings.py).

An encoder of a few hundred launches keeps a thread busy for milliseconds, so another thread than the loop's does it, in a stream
of its own: what the device has to do for a picture runs beside the steps before the one that needs it, and only that one waits
for it, on the device. The loop waits only where a step needs what is not launched yet.

Work beside a step makes it slower. So what an encoder does in parts is launched a part a step, until a step needs it.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event as Flag
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import structlog
import torch
from torch import Tensor

from streamserve.engine.plan import Plan, Row
from streamserve.engine.rotary import Rotary, rotary_positions
from streamserve.errors import ConfigError
from streamserve.kernels.devices.device import Device, Event
from streamserve.kernels.devices.recorder import Recorder
from streamserve.messages import Span

log = structlog.get_logger(__name__)

Array = np.ndarray[Any, np.dtype[np.int32]]


class DeviceEncoder(Protocol):
    """Of the models' encoders what is needed here: models.vision.Vision."""

    whole_spans: ClassVar[bool]
    repeat: Callable[[Callable[[Tensor], Tensor], Tensor, Hashable], Tensor]

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]: ...


class Piece(NamedTuple):
    """Neighbouring tokens of a step that take embeddings: tokens first .. first + num_tokens - 1 of row `row` of its plan take
    those from `begin` on of the media with this key."""

    row: int
    first: int
    num_tokens: int
    key: bytes
    begin: int


class Encoding:
    """One media under way through the encoder, or through it. `job` brings embeddings and an event behind them, or says why not
    (what was raised is not kept). `hurry` is set when a step needs it."""

    def __init__(self, key: bytes, num_tokens: int, job: "Future[tuple[Tensor, Event] | str]", hurry: Flag) -> None:
        self.key = key
        self.num_tokens = num_tokens
        self._job = job
        self._hurry = hurry
        self._is_awaited = False

    def is_launched(self) -> bool:
        """Whether `why_not` and `embeds` would not wait. Once a step that takes its embeddings was launched, it is."""
        return self._job.done()

    def why_not(self) -> str | None:
        """Why there are no embeddings; None where there are."""
        found = self._job.result()
        return found if isinstance(found, str) else None

    def embeds(self, device: Device) -> Tensor | None:
        """For what this thread launches from now on; it waits for them on the device. None: there are none."""
        self._hurry.set()
        found = self._job.result()
        if isinstance(found, str):
            return None
        embeds_NX, event = found
        if not self._is_awaited:
            event.wait()  # all later steps come behind this one
            self._is_awaited = True
            device.keep(embeds_NX)
        return embeds_NX


class DeviceEmbeddings:
    """Of one runner. `width` and `dtype`: of embeddings. `has_rotary`: the network takes three rope positions a token."""

    def __init__(
        self,
        device: Device,
        encoder: DeviceEncoder | None,
        *,
        num_slots: int,
        width: int = 0,
        dtype: torch.dtype = torch.float32,
        has_rotary: bool = False,
    ) -> None:
        assert encoder is None or not encoder.whole_spans  # refused at start
        self._device = device
        self._encoder = encoder
        self._recorder = Recorder(device)
        self._hurry, self._num_parts = Flag(), 0  # of what is encoded now: the thread's
        self._step: Event | None = None  # behind the last step that was launched
        if encoder is not None:
            encoder.repeat = self._repeat
        self._width, self._dtype = width, dtype
        self._kept: dict[bytes, Encoding] = {}
        self._under_way: list[Encoding] = []  # of which failures() has not told
        self._places: dict[int, tuple[tuple[bytes, tuple[Span, ...]], ...]] = {}  # of slots that have media
        self.has_rotary = has_rotary
        self._rotary: dict[int, Rotary] = {}  # of the same slots' prompts
        self._shift = np.zeros(num_slots, np.int32)
        self._thread = None if encoder is None else ThreadPoolExecutor(1, thread_name_prefix="engine-encode")

    def take_in(self, plan: Plan) -> None:
        """The plan's admissions, then what it gives up and encodes."""
        for admission in plan.admissions:
            slot, media = admission.slot, admission.media
            if slot in self._places:
                del self._places[slot]
                self._rotary.pop(slot, None)
                self._shift[slot] = 0
            if media:
                self._places[slot] = tuple((one.key, one.spans) for one in media)
                if self.has_rotary:
                    self._rotary[slot], self._shift[slot] = rotary_positions(admission.num_prompt, media)
        for key in plan.forgets:
            self._kept.pop(key, None)  # not there if the step that was to encode it failed
        for encode in plan.encodes:
            assert self._thread is not None
            hurry = Flag()
            job = self._thread.submit(self._encode, encode.inputs, encode.num_tokens, hurry)
            self._kept[encode.key] = Encoding(encode.key, encode.num_tokens, job, hurry)
            self._under_way.append(self._kept[encode.key])

    def failures(self) -> dict[bytes, str]:
        """Those that failed since the last call, and why. A step's result tells of all whose embeddings it should have had."""
        over = [encoding for encoding in self._under_way if encoding.is_launched()]
        if over:
            self._under_way = [encoding for encoding in self._under_way if encoding not in over]
        return {encoding.key: why for encoding in over if (why := encoding.why_not()) is not None}

    def launched(self, step: Event) -> None:
        """A step was, up to this mark."""
        self._step = step

    def pieces(self, rows: Sequence[Row]) -> list[Piece]:
        """Where rows hold places of media."""
        found = []
        if self._places:
            for i, row in enumerate(rows):
                for key, spans in self._places.get(row.slot, ()):
                    done = 0
                    for span in spans:
                        begin, end = max(span.start, row.start), min(span.end, row.start + row.num_tokens)
                        if begin < end:
                            found.append(Piece(i, begin - row.start, end - begin, key, done + begin - span.start))
                        done += span.num_tokens
        return found

    def buffer(self, num_tokens: int) -> Tensor | None:
        """What `fill` fills for a step of so many tokens; None where nothing is encoded."""
        if self._encoder is None:
            return None
        return torch.zeros((num_tokens, self._width), dtype=self._dtype, device=self._device.torch_device)

    def fill(self, out_NX: Tensor, piece: Piece) -> None:
        """With what these places take. Never waits for the device."""
        embeds_NX = self._kept[piece.key].embeds(self._device)
        if embeds_NX is None:  # whose request ends with an error
            out_NX.zero_()
        else:
            out_NX.copy_(embeds_NX[piece.begin : piece.begin + piece.num_tokens])

    def write_rope(self, out_3N: Array, slots: Sequence[int], positions: Sequence[int]) -> None:
        """Rope positions of tokens of any slots."""
        out_3N[:] = np.asarray(positions, np.int32) + self._shift[slots]
        if self._rotary:
            for i, (slot, position) in enumerate(zip(slots, positions, strict=True)):
                known_3P = self._rotary.get(slot)
                if known_3P is not None and position < known_3P.shape[1]:
                    out_3N[:, i] = known_3P[:, position]

    def write_prompt_rope(self, out_3N: Array, slot: int, start: int) -> None:
        """Rope positions of a slot's tokens from position `start` on."""
        num_tokens = out_3N.shape[1]
        out_3N[:] = np.arange(start, start + num_tokens, dtype=np.int32) + self._shift[slot]
        known_3P = self._rotary.get(slot)
        if known_3P is not None and start < known_3P.shape[1]:
            end = min(start + num_tokens, known_3P.shape[1])
            out_3N[:, : end - start] = known_3P[:, start:end]

    def warm_up(self, inputs: Mapping[str, Any], num_tokens: int, store_bytes: int) -> None:
        """Encode a picture, and have so much memory for embeddings beside what that takes. Before any request; blocks."""
        assert self._thread is not None
        self._thread.submit(self._reserve, store_bytes).result()
        for _ in range(2):
            found = self._thread.submit(self._encode, inputs, num_tokens, Flag()).result()
            if isinstance(found, str):
                raise ConfigError(f"a large picture cannot be encoded on this device, beside the weights: {found}")
        self._device.synchronize()

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _reserve(self, num_bytes: int) -> None:
        """torch keeps what one tensor took for later ones of the same stream."""
        with self._device.beside():
            torch.empty(num_bytes, dtype=torch.uint8, device=self._device.torch_device)

    def _repeat(self, run: Callable[[Tensor], Tensor], x: Tensor, key: Hashable) -> Tensor:
        """In the thread: the next part."""
        if self._num_parts and self._step is not None and not self._hurry.is_set():
            self._step.synchronize()
        self._num_parts += 1
        return self._recorder(run, x, key)

    @torch.inference_mode()
    def _encode(self, inputs: Mapping[str, Any], num_tokens: int, hurry: Flag) -> tuple[Tensor, Event] | str:
        """In the thread: launches, and an event behind them. What is raised stays here: it would hold on to what the encoder had
        on the device, which may be why it failed."""
        assert self._encoder is not None
        self._hurry, self._num_parts = hurry, 0
        try:
            with self._device.beside():
                (embeds_NX,) = self._encoder.encode((inputs,))
                assert len(embeds_NX) == num_tokens, f"{len(embeds_NX)} embeddings for {num_tokens} places"
                event = self._device.event()
                event.record()
                return embeds_NX, event
        except Exception as error:
            log.error("media_not_encoded", exc_info=error)
            return f"{type(error).__name__}: {error}"
