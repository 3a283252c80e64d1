"""The CPU behind the surface a GPU runner works on: what is launched is done at once, a replay calls the function again.

For tests of what runs on a GPU; serving on a CPU goes another way (engine/runner.py). Owns nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Done:
    """An event on a device that is never behind. Implements device.Event."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def wait(self) -> None: ...


class Again(Generic[T]):
    """Calls the recorded function anew. Implements device.Replay: results land in the tensors that the first call returned,
    as a graph fills the same memory every time."""

    def __init__(self, run: Callable[[], T]) -> None:
        self._run = run
        self.out = run()

    def replay(self) -> None:
        new = self._run()
        for old, now in zip(_tensors(self.out), _tensors(new), strict=True):
            if old is not now:
                old.copy_(now)


class Host:
    """Implements device.Device."""

    name = "cpu"
    model = "host"
    torch_device = torch.device("cpu")
    num_sms = 4  # kernels split their work by it; a few, so that the interpreter meets splits
    supports_pdl = False

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30

    def release(self) -> None: ...

    def event(self) -> Done:
        return Done()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def capture(self, run: Callable[[], T], *, is_warm: bool = False, beside: bool = False) -> Again[T]:
        if not is_warm:
            run()
        return Again(run)

    def beside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def keep(self, tensor: Tensor) -> None: ...

    def synchronize(self) -> None: ...


def _tensors(value: object) -> list[Tensor]:
    """All tensors of a result: one, or a tuple of such; None holds none."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    assert value is None, f"a recorded function returns tensors, not {type(value).__name__}"
    return []
