"""What there is to see inside an engine: the prefix tree, the last steps, live requests; and pins, which operators set.

Owns the record of the last steps. Everything else it reads where that is owned. Torch-free; runs on the event loop.
"""

from collections import deque
from collections.abc import Callable

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.request import Request, State
from streamserve.engine.scheduler import Scheduler
from streamserve.errors import Conflict, NotFound
from streamserve.messages import GenerateRequest, MatchEnd, NodeSummary, PinSummary, PrefixMatch, RequestSummary, StepRecord

NUM_STEPS = 600  # remembered: some seconds of a busy device


class Inspector:
    """See engine/client.py's Inspection."""

    def __init__(self, scheduler: Scheduler, now: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._cache: KVCache = scheduler.cache
        self._now = now
        self._steps: deque[StepRecord] = deque(maxlen=NUM_STEPS)
        self._last_dropped = 0  # number of the newest step that is not remembered

    def add(self, step: StepRecord) -> None:
        """A step was taken in. For the engine."""
        steps = self._steps
        if len(steps) == NUM_STEPS:
            self._last_dropped = steps[0].step
        steps.append(step)

    def nodes(self, node_id: int, *, depth: int, limit: int, num_first: int) -> tuple[tuple[NodeSummary, ...], bool]:
        """See Inspection."""
        found = self._cache.nodes(node_id, depth, limit, num_first)
        if found is None:
            raise _gone(node_id)
        return found

    def pinned_nodes(self, *, num_first: int) -> tuple[NodeSummary, ...]:
        """See Inspection."""
        return self._cache.pinned_nodes(num_first)

    def look_up(self, request: GenerateRequest, *, looks_elsewhere: bool) -> PrefixMatch:
        """See Inspection."""
        if request.sampling.prompt_logprobs is not None:
            return PrefixMatch(0, (), MatchEnd.OFF)
        limit = len(request.token_ids) - 1
        found = self._cache.look_up(request.salt, request.token_ids, limit, looks_elsewhere=looks_elsewhere)
        whole = self._scheduler.without_part_of_span(request, request.token_ids, limit)
        if whole >= found.num_tokens:
            return found
        return PrefixMatch(whole, found.path, MatchEnd.PICTURE)

    def pin(self, node_id: int) -> PinSummary:
        """See Inspection."""
        self._check(node_id)
        if not self._cache.pin(node_id):
            held = self._cache.pin_summary()
            raise Conflict(
                f"node {node_id} cannot be pinned: pins hold {held.pinned_tokens} tokens of memory in whole pages, and with it "
                f"would hold more than {held.max_pinned_tokens}, half of what there is; unpin another",
                param="node",
            )
        return self._cache.pin_summary()

    def unpin(self, node_id: int) -> PinSummary:
        """See Inspection."""
        self._check(node_id)
        self._cache.unpin(node_id)
        return self._cache.pin_summary()

    def evict(self, node_id: int) -> tuple[int, int]:
        """See Inspection."""
        self._check(node_id)
        num_requests, num_pins = self._cache.holders_of(node_id)
        if num_requests or num_pins:
            raise Conflict(
                f"node {node_id} cannot be evicted: {num_requests} running requests and {num_pins} pins hold it or what is below",
                param="node",
            )
        num_nodes, num_pages = self._cache.evict(node_id)
        return num_nodes, num_pages * self._cache.page_size

    def _check(self, node_id: int) -> None:
        if not self._cache.has_node(node_id):
            raise _gone(node_id)

    def steps(self, since: int) -> tuple[tuple[StepRecord, ...], int]:
        """See Inspection."""
        found: list[StepRecord] = []
        for step in reversed(self._steps):
            if step.step <= since:
                break
            found.append(step)
        return tuple(reversed(found)), max(0, self._last_dropped - since)

    def requests(self, most: int) -> tuple[RequestSummary, ...]:
        """See Inspection."""
        now_s = self._now()
        return tuple([_summary(request, now_s) for request in self._scheduler.first_live(most)])

    def now_s(self) -> float:
        """See Inspection."""
        return self._now()


def _summary(request: Request, now_s: float) -> RequestSummary:
    return RequestSummary(
        id=request.id,
        is_running=request.state is State.RUNNING,
        num_prompt=request.num_prompt,
        num_computed=request.computed if request.state is State.RUNNING else 0,
        num_cached=request.num_cached,
        num_generated=request.num_generated,
        age_s=max(0.0, now_s - request.submitted_s),
    )


def _gone(node_id: int) -> NotFound:
    return NotFound(f"the prefix tree has no node {node_id}; it may have been evicted: GET /cache/tree shows those that live")
