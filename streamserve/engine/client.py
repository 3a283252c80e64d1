"""The seam between API and engine: its methods, the mailbox in which a request's deltas wait, and the turns of their readers.

Owns undelivered deltas and the order in which readers get theirs. Knows nothing of HTTP, text or scheduling. Torch-free.
"""

from asyncio import Future, TimerHandle, get_running_loop
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from streamserve.messages import (
    CacheSummary,
    Delta,
    EncoderFacts,
    EncoderInput,
    EngineFacts,
    GenerateRequest,
    NodeSummary,
    PinSummary,
    PrefixMatch,
    RequestSummary,
    StepRecord,
)

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

MAX_PENDING = 64  # deltas; then they are merged, so that a slow reader costs little memory and, on average, little time
MIN_SLICE = 16  # readers; fewer would cost more loop iterations than they save time
LAST_WEIGHT = 8  # readers that one with its last delta counts as: an answer's end is as much work as so many of its events
SLICES = 8  # of a long queue a slice is this part: an engine that never has to wait leaves every reader one turn in so many steps


class Turns:
    """The mailboxes that have something for a reader who wants it, first come, first served, in the event loop's spare time.

    A few are served per loop iteration. In between the engine looks at the device, so it is late by a slice at most, however
    many streams there are; and a reader whose turn has not come when the next step is taken in gets the tokens of both in one
    delta. So streams send at every step while the loop has time for it, and just as much less often as it has not.
    """

    __slots__ = ("_is_scheduled", "_queue", "num_served")

    def __init__(self) -> None:
        self._queue: deque[Mailbox] = deque()
        self._is_scheduled = False
        self.num_served = 0

    @property
    def are_waiting(self) -> bool:
        """Somebody's turn has yet to come."""
        return bool(self._queue)

    def add(self, mailbox: "Mailbox") -> None:
        """Queue a mailbox that is not queued."""
        self._queue.append(mailbox)
        if not self._is_scheduled:
            self._is_scheduled = True
            get_running_loop().call_soon(self._serve)

    def _serve(self) -> None:
        queue = self._queue
        left = max(MIN_SLICE, len(queue) // SLICES)
        try:
            while queue and left > 0:
                self.num_served += 1
                left -= LAST_WEIGHT if queue.popleft().call_reader() else 1
        finally:
            self._is_scheduled = bool(queue)
            if queue:
                get_running_loop().call_soon(self._serve)


class Mailbox:
    """Undelivered output of one request, for one reader. Deltas merge while it does not take them."""

    __slots__ = ("_is_queued", "_pending", "_reader", "_rest", "_turns", "request_id")

    def __init__(self, request_id: str, turns: Turns | None = None) -> None:
        self.request_id = request_id
        self._turns = Turns() if turns is None else turns
        self._pending: list[Delta] = []
        self._reader: Callable[[], object] | None = None
        self._is_queued = False  # for a turn
        self._rest: TimerHandle | None = None  # ends the time in which nothing but the last delta is given out

    def put_nowait(self, delta: Delta) -> None:
        """Engine side. Never blocks, and runs no reader."""
        pending = self._pending
        pending.append(delta)
        if len(pending) == MAX_PENDING:
            self._pending = [Delta.merged(pending)]
        if self._rest is not None:
            if delta.finish_reason is None:
                return
            self._rest.cancel()
            self._rest = None
        if not self._is_queued and self._reader is not None:
            self._is_queued = True
            self._turns.add(self)

    def listen(self, reader: Callable[[], object] | None) -> None:
        """Client side: call `reader`, when its turn comes, whenever there is something to take; None: no more.

        It is called on the event loop, takes what is there, and must neither wait nor raise."""
        self._reader = reader
        self._queue_up()

    def take(self) -> Delta:
        """Client side: everything that arrived since the last call, as one delta. There must be something."""
        pending, self._pending = self._pending, []
        return Delta.merged(pending) if len(pending) > 1 else pending[0]

    async def get(self) -> Delta:
        """Client side: wait for something, and take it."""
        arrived: Future[None] = get_running_loop().create_future()

        def wake() -> None:
            if not arrived.done():
                arrived.set_result(None)

        self.listen(wake)
        try:
            await arrived
        finally:
            self.listen(None)
        return self.take()

    def rest(self, seconds: float) -> None:
        """Client side: let deltas merge for so long, or until the last one is here. One rest at a time."""
        if self._rest is None and not (self._pending and self._pending[-1].finish_reason is not None):
            self._rest = get_running_loop().call_later(seconds, self._end_rest)

    def _end_rest(self) -> None:
        self._rest = None
        self._queue_up()

    def _queue_up(self) -> None:
        if self._pending and self._reader is not None and self._rest is None and not self._is_queued:
            self._is_queued = True
            self._turns.add(self)

    def call_reader(self) -> bool:
        """The mailbox's turn has come. Its reader may have left, or begun to rest, in the meantime. Returns whether it was called
        for the request's last delta."""
        self._is_queued = False
        pending = self._pending
        if self._reader is None or not pending or self._rest is not None:
            return False
        last = pending[-1]
        self._reader()
        # What is no delta was for its reader to find: here it would stop everybody's turns.
        return getattr(last, "finish_reason", None) is not None


class Inspection(Protocol):
    """What there is to see inside an engine, and what operators do to its cache. All methods are called on the event loop; what
    one costs depends on what it gives, not on how large the cache is.

    A method that names a node raises NotFound when that is gone.
    """

    def nodes(self, node_id: int, *, depth: int, limit: int, num_first: int) -> tuple[tuple[NodeSummary, ...], bool]:
        """So many levels of the prefix tree below a node (0: the root), behind the node itself unless that is the root: at most
        `limit` nodes, level by level, newest children first, and whether that left any out. With the first `num_first` tokens of
        each."""
        ...

    def pinned_nodes(self, *, num_first: int) -> tuple[NodeSummary, ...]:
        """Those with a pin, the oldest first."""
        ...

    def look_up(self, request: GenerateRequest, *, looks_elsewhere: bool) -> PrefixMatch:
        """What the cache knows of a prompt, as if it were submitted now. Changes nothing, not even what is evicted next.
        `looks_elsewhere`: whether to see if another salt knows more."""
        ...

    def pin(self, node_id: int) -> PinSummary:
        """Keep a node, and the path to it, from being evicted as long as every request can run beside it. Raises Conflict where
        pins would hold more than half of the memory."""
        ...

    def unpin(self, node_id: int) -> PinSummary:
        """Undo that; nothing where it is not pinned."""
        ...

    def evict(self, node_id: int) -> tuple[int, int]:
        """Forget a node and all below it. Returns how many nodes and how many tokens of memory that freed. Raises Conflict while
        a request or a pin holds any of them."""
        ...

    def steps(self, since: int) -> tuple[tuple[StepRecord, ...], int]:
        """Steps with a higher number, oldest first, as far as they are remembered; and how many of them are not."""
        ...

    def requests(self, most: int) -> tuple[RequestSummary, ...]:
        """So many live requests: running ones first, then waiting ones, each in order of arrival."""
        ...

    def now_s(self) -> float:
        """The engine's clock."""
        ...


class EngineClient(Protocol):
    """What the API may ask of an engine. All methods are called on the event loop; none blocks it."""

    @property
    def inspection(self) -> Inspection:
        """Its insides."""
        ...

    async def submit(self, request: GenerateRequest) -> Mailbox:
        """Queue a request. Raises ContextOverflow, QueueFull, EngineStopped, or InvalidRequest for a grammar that does not
        compile within its limits, before anything has started."""
        ...

    async def check_grammar(self, grammar: str, param: str) -> None:
        """Raise what `submit` would for this grammar of a request's field. Nothing is kept of it."""
        ...

    def abort(self, request_id: str) -> bool:
        """End a request before the next plan; its pages are free by then. False when no such request lives.

        A request that was live gets a last delta with finish_reason ABORT."""
        ...

    def end_thought(self, request_id: str) -> bool:
        """End the reasoning of a live request after its next token: the answer begins. False when it is not thinking, or no
        longer."""
        ...

    def flush_cache(self) -> bool:
        """Forget every cached prefix but pinned ones. False, and nothing is done, while requests are live."""
        ...

    def facts(self) -> EngineFacts:
        """Limits, health and load right now."""
        ...

    def cache_summary(self, max_prefixes: int = 10) -> CacheSummary:
        """The prefix tree right now."""
        ...


class EncoderClient(Protocol):
    """What the API may ask of an encoder, which may stand beside an engine. All methods are called on the event loop."""

    @property
    def facts(self) -> EncoderFacts:
        """What it gives, and its limits."""
        ...

    async def encode(self, inputs: Sequence[EncoderInput]) -> "NDArray[float32]":
        """One row per input: its vector, or the logits of its classes. Raises QueueFull, EngineStopped or StepFailed.

        Every input holds 1 to `facts.max_len` tokens of the vocabulary. Cancelling the call takes what has not been computed yet
        out of the queue."""
        ...


async def collect(mailbox: Mailbox) -> Delta:
    """The whole output of one request as one delta."""
    deltas = [await mailbox.get()]
    while deltas[-1].finish_reason is None:
        deltas.append(await mailbox.get())
    return Delta.merged(deltas)
