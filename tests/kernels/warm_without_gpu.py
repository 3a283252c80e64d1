"""Rehearses launches on a device that is only described, in a process of its own (test_warm.py runs it).

Prints one JSON line: what was compiled, in which order progress was told, whether launches came through afterwards.
"""

import json
import threading

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from streamserve.kernels.warm import rehearsal


class Described:
    """As much of a Triton driver as compiling asks for: one H100."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@triton.jit
def add_one(x, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(x + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)


@triton.jit
def twice(x, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(x + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


@triton.jit
def broken(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), tl.no_such_thing(SIZE))


def main() -> None:
    driver.set_active(Described())
    told: list[tuple[int, int]] = []
    x = torch.zeros(64)
    run = triton.JITFunction.run
    with rehearsal(lambda done, total: told.append((done, total)), threads=3):
        for size in (16, 32):
            add_one[(1,)](x, 5, SIZE=size, num_warps=1)
            add_one[(1,)](x, 5, SIZE=size, num_warps=1)  # the same again: nothing more to do
        twice[(1,)](x, 5, SIZE=32, launch_pdl=True)
        threads = {thread.name for thread in threading.enumerate()}
    is_restored = triton.JITFunction.run is run
    kinds = [
        sorted(compiled.asm)
        for kernel in (add_one, twice)
        for cache, *_ in kernel.device_caches.values()
        for compiled in cache.values()
    ]
    try:
        with rehearsal():
            broken[(1,)](x, SIZE=16)
        error = None
    except Exception as raised:
        error = type(raised).__name__
    print(
        json.dumps(
            {
                "told": told,
                "binaries": sum("cubin" in kind for kind in kinds),
                "kernels": len(kinds),
                "restored": is_restored and triton.JITFunction.run is run,
                "untouched": not x.any().item(),
                "threads": any(name.startswith("kernels-compile") for name in threads),
                "error": error,
            }
        )
    )


if __name__ == "__main__":
    main()
