"""A GPU: what it is, its memory, and events, pinned memory and graphs on it.

torch calls AMD's GPUs `cuda` too (torch.version.hip tells them apart); nothing here is NVIDIA's alone, except behind that
question. Knows no kernel and no model. CUDA_VISIBLE_DEVICES picks the card when there are several.
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_AMD_DRIVER = Path("/sys/module/amdgpu/version")
_PDL_SINCE = (9, 0)
_BF16_SINCE = (8, 0)


class Graph(Generic[T]):
    """Recorded launches. Implements device.Replay."""

    def __init__(self, graph: torch.cuda.CUDAGraph, out: T) -> None:
        self._graph = graph
        self.out = out

    def replay(self) -> None:
        self._graph.replay()


class Mark(torch.cuda.Event):
    """An event of one GPU. Implements device.Event: torch asks in every call which device is meant, which takes as long again."""

    index: int | None = None

    def record(self, stream: Any = None) -> None:
        super().record(torch.cuda.current_stream(self.index) if stream is None else stream)


class CUDA:
    """One GPU. Implements device.Device. Make one per process: its graphs share a memory pool and a capture stream."""

    name = "cuda"

    def __init__(self, index: int = 0) -> None:
        properties: Any = torch.cuda.get_device_properties(index)
        self.torch_device = torch.device("cuda", index)
        self.model: str = properties.name
        self.is_hip = torch.version.hip is not None
        self.capability: tuple[int, int] = (properties.major, properties.minor)
        self.num_sms: int = properties.multi_processor_count
        self.architecture = properties.gcnArchName.split(":")[0] if self.is_hip else "sm_{}{}".format(*self.capability)

    @classmethod
    def find(cls, index: int = 0) -> "CUDA | None":
        """The GPU, or None where torch can use none (`why_absent` says why)."""
        return cls(index) if torch.cuda.is_available() else None

    @property
    def supports_pdl(self) -> bool:
        """Programmatic dependent launch: a kernel may begin while the one before it ends."""
        return not self.is_hip and self.capability >= _PDL_SINCE

    @property
    def supports_bfloat16(self) -> bool:
        """In hardware, tensor cores included."""
        return self.is_hip or self.capability >= _BF16_SINCE

    @property
    def features(self) -> frozenset[str]:
        """What decisions may ask for: the architecture, bf16, pdl."""
        noted = {"bf16": self.supports_bfloat16, "pdl": self.supports_pdl}
        return frozenset({self.architecture, *(feature for feature, is_there in noted.items() if is_there)})

    def memory(self) -> tuple[int, int]:
        """Free and total bytes, as the driver counts them: what torch keeps for reuse is not free."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return free, total

    def release(self) -> None:
        """Give back to the driver what torch keeps for reuse."""
        torch.cuda.empty_cache()

    def event(self) -> Mark:
        mark = Mark(blocking=True)  # type: ignore[no-untyped-call]
        mark.index = self.torch_device.index
        return mark

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def capture(self, run: Callable[[], T], *, is_warm: bool = False, beside: bool = False) -> Graph[T]:
        """See Device. The calls that torch.cuda.graph() would make, without emptying torch's memory cache every time."""
        current, side = torch.cuda.current_stream(self.torch_device), self._second if beside else self._side
        pool = self._second_pool if beside else self._graph_pool
        side.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            if not is_warm:
                run()
            side.synchronize()
            # thread_local: other threads (weights, HTTP) may allocate meanwhile
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                out = run()
            finally:
                graph.capture_end()
        current.wait_stream(side)
        return Graph(graph, out)

    def beside(self) -> AbstractContextManager[Any]:
        """See Device."""
        return torch.cuda.stream(self._second)

    def keep(self, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(self.torch_device))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    @cached_property
    def _side(self) -> torch.cuda.Stream:
        """Of captures. Recorded kernels keep its priority wherever they are replayed: they go before what runs `beside`."""
        return torch.cuda.Stream(self.torch_device, priority=-1)  # type: ignore[no-untyped-call]

    @cached_property
    def _second(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    @cached_property
    def _graph_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @cached_property
    def _second_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()


def why_absent() -> tuple[str, str]:
    """Why torch can use no GPU here, and what to do about it."""
    build = f"torch {torch.__version__}"
    if torch.version.cuda is None and torch.version.hip is None:
        what = f"{build} is a build for CPUs"
        if driver_version() is None:
            return f"{what}, and no GPU driver is loaded", "install the driver of the card, then a GPU build of torch"
        fix = "pip uninstall torch, then install a GPU build (on Linux `pip install torch` without an --index-url is one)"
        return f"{what}, but a GPU driver is loaded ({driver_version()})", fix
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        said = "it counts 0 devices"
    except Exception as error:  # RuntimeError, AssertionError: as torch's version has it
        said = str(error).strip().split("\n", 1)[0]
    fix = "see whether nvidia-smi (or rocm-smi) lists a card, and what CUDA_VISIBLE_DEVICES is set to"
    return f"{build} finds no GPU: {said}", fix


def driver_version() -> str | None:
    """The kernel driver's version as the system shows it, or None where none is loaded (or the system is not Linux)."""
    for vendor, path in (("NVIDIA", _NVIDIA_DRIVER), ("AMD", _AMD_DRIVER)):
        try:
            found = re.search(r"\d+(\.\d+)+", path.read_text(encoding="utf-8"))
        except OSError:
            continue
        return f"{vendor} {found[0] if found else 'of unknown version'}"
    return None


def runtime_version() -> str:
    """The toolkit that torch was built for."""
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda is not None else "none"
