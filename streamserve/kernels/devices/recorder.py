"""Work that comes again and again in the same shape, recorded so that launching it costs next to nothing.

Owns the recordings, which are few. For one thread: what is recorded runs beside the rest (Device.beside), in memory of its own.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

import structlog
from torch import Tensor

from streamserve.kernels.devices.device import Device, Replay

MAX_KEPT = 12  # three sizes of pictures, in four parts each
MAX_BYTES = 32 << 20  # of what goes in: more keeps a device busy for longer than launches take

log = structlog.get_logger(__name__)


class _Recording(NamedTuple):
    x: Tensor
    replay: Replay[Tensor]
    run: Callable[[Tensor], Tensor]  # what it holds is read by what was recorded: it must not be freed before that


class Recorder:
    """Calls functions of one tensor that launch alike whenever key and shape are alike. The first time they are called as they
    are, so that libraries have chosen their kernels; the second time they are recorded."""

    def __init__(self, device: Device, max_kept: int = MAX_KEPT) -> None:
        self._device = device
        self._max_kept = max_kept
        self._kept: OrderedDict[Hashable, _Recording | None] = OrderedDict()  # None: seen once
        self._is_off = False

    def __call__(self, run: Callable[[Tensor], Tensor], x: Tensor, key: Hashable) -> Tensor:
        """`run(x)`, all of which `key` and the shape of x decide, but for its numbers. `run` must wait for nothing."""
        if self._is_off or x.nbytes > MAX_BYTES:
            return run(x)
        at = (key, x.shape, x.dtype)
        if at not in self._kept:
            while len(self._kept) >= self._max_kept:
                self._kept.popitem(last=False)
            self._kept[at] = None
            return run(x)
        self._kept.move_to_end(at)
        recording = self._kept[at]
        if recording is None:
            recording = self._record(run, x)
            if recording is None:
                return run(x)
            self._kept[at] = recording
        recording.x.copy_(x)
        recording.replay.replay()
        return recording.replay.out.clone()

    def _record(self, run: Callable[[Tensor], Tensor], x: Tensor) -> _Recording | None:
        """None where it cannot be: launched one by one, the work is the same."""
        given = x.clone()
        try:
            return _Recording(given, self._device.capture(lambda: run(given), is_warm=True, beside=True), run)
        except RuntimeError as error:
            self._is_off = True
            log.warning("encoder_not_recorded", error=str(error))
            return None
