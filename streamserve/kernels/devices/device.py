"""What a runner asks of the device it works on. cuda.CUDA is a GPU; host.Host is the same surface over CPU tensors.

Owns nothing: the contract. Work is launched in order on the calling thread's current stream and nothing here waits for it,
unless it says so.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Event(Protocol):
    """A mark in the stream of launched work."""

    def record(self) -> None:
        """Set the mark behind all that this thread has launched so far; again: move it there."""
        ...

    def query(self) -> bool:
        """Whether the work before the mark is done."""
        ...

    def synchronize(self) -> None:
        """Sleep until it is (no spinning: the processor is free for others). Any thread."""
        ...

    def wait(self) -> None:
        """What this thread launches from now on begins when the work before the mark is done. Does not wait itself."""
        ...


class Replay(Protocol[T_co]):
    """Launches that were recorded once. `out` is what they fill, in the same memory every time."""

    @property
    def out(self) -> T_co: ...
    def replay(self) -> None:
        """Launch all of it again, in one go."""
        ...


class Device(Protocol):
    """Where tensors live and work is launched."""

    @property
    def name(self) -> str: ...  # cpu, cuda: as in DeviceFacts and in kernel choices
    @property
    def model(self) -> str: ...  # as its maker calls it
    @property
    def torch_device(self) -> torch.device: ...
    @property
    def num_sms(self) -> int: ...
    @property
    def supports_pdl(self) -> bool: ...  # a kernel may begin while the one before it ends

    def memory(self) -> tuple[int, int]:
        """Free and total bytes, now."""
        ...

    def release(self) -> None:
        """Give back what is kept for reuse."""
        ...

    def event(self) -> Event:
        """A new event, not recorded yet; it counts as done until it is."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory, not cleared, that the device copies from and to without a stop."""
        ...

    def capture(self, run: Callable[[], T], *, is_warm: bool = False, beside: bool = False) -> Replay[T]:
        """Record what `run` launches. It is called twice: once for real, so that kernels are compiled and libraries have their
        workspace, then recorded; `is_warm` says that the like has been run before, and it is only recorded. All tensors it
        touches must outlive the replay; those it allocates lie in one pool that all recordings share, so replays run one after
        the other only. Recordings made, and replayed, in the stream `beside` have a pool of their own. Blocks."""
        ...

    def beside(self) -> AbstractContextManager[Any]:
        """What is launched inside goes into a second stream, whose work runs beside that of the first, and gives way to recorded
        launches there. One and the same stream every time. Work on what the other stream makes waits for an event of it, and for
        tensors from the other stream see `keep`."""
        ...

    def keep(self, tensor: Tensor) -> None:
        """A tensor made `beside` is used by what this thread launches: its memory is not made use of anew before that is done."""
        ...

    def synchronize(self) -> None:
        """Block until everything launched on the device is done."""
        ...
