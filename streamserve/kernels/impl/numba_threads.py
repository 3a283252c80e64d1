"""Threads that share the work of a step: phases of numbered items, handed out by atomic counters, without locks.

A phase is done when all its items are. A thread that comes late, or not at all because the machine is busy, leaves more items
to the others; nobody waits for a thread, only for items in hand. Between steps the helpers sleep in sem_wait, outside Python
and without the GIL, so a wake-up never waits for the event loop's thread. Owns the counters; knows no kernel.

    counters[phase] = (items taken, ..., items done, ...), 64 bytes apart, zeroed before every step
    gate            = (open, helpers inside, stop): a helper first says that it is inside, then looks whether the step is open;
                      the leader first closes, then waits until nobody is inside. One of the two always sees the other.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator"

import ctypes

from llvmlite import ir
from numba import types

from streamserve.kernels.impl.numba_ir import I32, I64, Emit, Value, native, vector_code

SEMAPHORE_BYTES = 64  # a sem_t takes 32; a line each
COUNTER_WORDS = 16
_DONE = 8
OPEN, INSIDE, STOP = 0, 8, 16  # words of the gate, a line each
GATE_WORDS = 24
_SPINS = 400  # a few microseconds; then give the core away, because others may need it to finish


@vector_code(types.int64, types.int64, returns=types.int64)
def _fetch_add(e: Emit, address: Value, amount: Value) -> Value:
    return e.builder.atomic_rmw("add", e.builder.inttoptr(address, I64.as_pointer()), amount, "seq_cst")


@vector_code(types.int64, types.int64, returns=types.int64)
def _exchange(e: Emit, address: Value, value: Value) -> Value:
    return e.builder.atomic_rmw("xchg", e.builder.inttoptr(address, I64.as_pointer()), value, "seq_cst")


@vector_code(types.int64, returns=types.int64)
def _acquire(e: Emit, address: Value) -> Value:
    return e.builder.load_atomic(e.builder.inttoptr(address, I64.as_pointer()), "acquire", 8)


@vector_code()
def _pause(e: Emit) -> None:
    e.call("llvm.x86.sse2.pause", ir.VoidType())


@vector_code()
def _give_way(e: Emit) -> None:
    e.call("sched_yield", I32)


@vector_code(types.int64)
def _sem_wait(e: Emit, semaphore: Value) -> None:
    e.call("sem_wait", I32, semaphore)


@vector_code(types.int64)
def _sem_post(e: Emit, semaphore: Value) -> None:
    e.call("sem_post", I32, semaphore)


@native
def take(counters: int, phase: int, num_items: int) -> int:
    """The number of an item that nobody else has; -1 when there is none left."""
    at = counters + phase * COUNTER_WORDS * 8
    if _acquire(at) >= num_items:
        return -1
    item = _fetch_add(at, 1)
    return item if item < num_items else -1


@native
def put(counters: int, phase: int) -> None:
    """An item is done: what it wrote is seen by whoever has waited for the phase."""
    _fetch_add(counters + (phase * COUNTER_WORDS + _DONE) * 8, 1)


@native
def wait(counters: int, phase: int, num_items: int) -> None:
    """Until all items of the phase are done."""
    at = counters + (phase * COUNTER_WORDS + _DONE) * 8
    _until(at, num_items)


@native
def _until(address: int, value: int) -> None:
    spins = 0
    while _acquire(address) < value:
        spins += 1
        if spins < _SPINS:
            _pause()
        else:
            _give_way()


@native
def open_gate(gate: int, semaphores: int, num_helpers: int) -> None:
    """The leader lets the helpers in; counters and inputs are ready."""
    _exchange(gate + OPEN * 8, 1)
    for helper in range(num_helpers):
        _sem_post(semaphores + helper * SEMAPHORE_BYTES)


@native
def close_gate(gate: int) -> None:
    """The leader ends a step; when this returns no helper reads the step's memory any more."""
    _exchange(gate + OPEN * 8, 0)
    spins = 0
    while _acquire(gate + INSIDE * 8) != 0:
        spins += 1
        if spins < _SPINS:
            _pause()
        else:
            _give_way()


@native
def enter(gate: int, semaphore: int) -> int:
    """A helper sleeps until called: 1 = work on the open step, then leave(); 0 = it is over already; -1 = end the thread."""
    _sem_wait(semaphore)
    if _acquire(gate + STOP * 8) != 0:
        return -1
    _fetch_add(gate + INSIDE * 8, 1)
    if _acquire(gate + OPEN * 8) == 0:
        leave(gate)
        return 0
    return 1


@native
def leave(gate: int) -> None:
    _fetch_add(gate + INSIDE * 8, -1)


def init_semaphores(address: int, count: int) -> None:
    """Make `count` semaphores of zeroed memory."""
    for i in range(count):
        if _libc().sem_init(ctypes.c_void_p(address + i * SEMAPHORE_BYTES), 0, 0) != 0:
            raise OSError("sem_init failed")


def post(semaphore: int) -> None:
    """Wake the helper that sleeps on the semaphore."""
    _libc().sem_post(ctypes.c_void_p(semaphore))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
