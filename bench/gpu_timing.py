"""How long kernels take on a GPU: recorded in a graph, as a server replays them, on memory that no cache holds.

Owns the way of measuring. Knows no kernel.
"""

import statistics
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 160 << 20  # more than any L2 cache here holds: what is read again after so much else was read comes from memory


def need_gpu() -> None:
    """Ends the program with the reason where torch sees no GPU."""
    if not torch.cuda.is_available():
        from streamserve.kernels.devices.cuda import why_absent

        what, fix = why_absent()
        raise SystemExit(f"this measures a GPU: {what}; {fix}")


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of all that `run` launches. Runs it once before, so that everything is compiled."""
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        side.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, rounds: int = 7, target_us: float = 3000.0) -> float:
    """Median time of one replay in microseconds. Rounds last about `target_us` each, the first is not counted."""
    times: list[float] = []
    count = 1
    for i in range(rounds + 2):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        for _ in range(count):
            graph.replay()
        after.record()
        after.synchronize()
        time_us = before.elapsed_time(after) * 1e3 / count
        if i == 1:
            count = max(1, min(200, round(target_us / time_us)))
        elif i > 1:
            times.append(time_us)
    return statistics.median(times)


def launch_us(launches: Sequence[Callable[[], object]], rounds: int = 7) -> float:
    """Mean time of one of the launches, replayed in a graph one behind the other. Give each memory of its own
    (`cold_copies` of it) where a kernel is meant to read from memory, not from a cache."""
    return replay_us(capture(lambda: [launch() for launch in launches]), rounds) / len(launches)


def cold_copies(num_bytes: int) -> int:
    """How many copies of what a launch reads keep all of them out of the cache."""
    return max(1, min(64, -(-COLD_BYTES // num_bytes)))


def call_us(run: Callable[[], object], rounds: int = 5, target_us: float = 20_000.0) -> float:
    """Median time of a call launched from Python, as steps with prompts are: the host's time counts if it is the longer."""
    times: list[float] = []
    count = 2
    for i in range(rounds + 2):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        for _ in range(count):
            run()
        after.record()
        after.synchronize()
        time_us = before.elapsed_time(after) * 1e3 / count
        if i == 1:
            count = max(2, min(100, round(target_us / time_us)))
        elif i > 1:
            times.append(time_us)
    return statistics.median(times)
