"""The engine at work, for those who watch: its last steps and its live requests, once, or again and again on a socket.

Owns what is shown of them. Costs nothing while nobody watches. Knows nothing of plans or of what requests are about.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any

import orjson
from anyio import CancelScope, Event, current_time, move_on_after
from anyio.abc import TaskGroup

from streamserve.api.auth import given_key
from streamserve.api.query import number, query_of
from streamserve.api.results import EngineSteps
from streamserve.api.routes import RouteSpec
from streamserve.api.service import Service
from streamserve.api.wire import Exchange
from streamserve.messages import RequestSummary, StepRecord

MAX_STEPS = 600  # of an answer; the engine remembers no more
MAX_REQUESTS = 200
MAX_STEP = (1 << 48) - 1
HEARTBEAT_S = 2.0  # with nothing new to show

STEPS_QUERY = (
    ("since", "only steps with a higher number: the last one that was seen"),
    ("limit", f"steps, 0 to {MAX_STEPS}, the newest of them; {MAX_STEPS} when left out"),
)


class LiveView:
    """What is to be seen of the engine right now."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._inspection = service.client.inspection

    def routes(self) -> list[RouteSpec]:
        """What there is here."""
        return [RouteSpec("GET", "/engine/steps", self.steps, result=EngineSteps, query=STEPS_QUERY)]

    async def steps(self, exchange: Exchange) -> None:
        """GET /engine/steps: the engine's last steps in numbers, and the requests that run or wait. Ids of requests only where
        everybody's may be seen."""
        query = query_of(exchange, *(name for name, _ in STEPS_QUERY))
        since, limit = number(query, "since", 0, MAX_STEP), number(query, "limit", 0, MAX_STEPS)
        shows_ids = self._service.door.may_see_texts(exchange.scope, given_key(exchange.scope))
        limit = MAX_STEPS if limit is None else limit
        await exchange.answer_json(self.snapshot(since or 0, limit=limit, shows_ids=shows_ids))

    def snapshot(
        self, since: int, *, limit: int = MAX_STEPS, shows_ids: bool, own: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Steps behind `since` and the state now. `own`: the asker's requests: by their call's id, what the asker calls them."""
        steps, num_missed = self._inspection.steps(since)
        num_missed += max(0, len(steps) - limit)
        steps = steps[max(0, len(steps) - limit) :]
        load, summary = self._service.client.facts().load, self._service.client.cache_summary(0)
        names = self._service.names_of_runs()
        return {
            "now_s": round(self._inspection.now_s(), 4),
            "columns": StepRecord._fields,
            "steps": [_row(step) for step in steps],
            "last": steps[-1].step if steps else since,
            "missed": num_missed,
            "load": asdict(load),
            "hit_rate": summary.hit_rate,
            "num_requests": load.running + load.waiting,
            "requests": [_shown(one, names, own or {}, shows_ids) for one in self._inspection.requests(MAX_REQUESTS)],
            "shows_ids": shows_ids,
        }


def _row(step: StepRecord) -> list[float]:
    return [step.step, round(step.time_s, 4), round(step.ms, 3), *step[3:]]


def _shown(request: RequestSummary, names: Mapping[str, str | None], own: Mapping[str, str], shows_ids: bool) -> dict[str, Any]:
    call_id = request.id.rpartition("-")[0]  # the engine's requests are a call's choices
    frame_id = own.get(call_id)
    is_seen = shows_ids or frame_id is not None
    shown: dict[str, Any] = {
        "id": call_id if is_seen else None,
        "client_id": names.get(call_id) if is_seen else None,
        "state": "running" if request.is_running else "waiting",
        "prompt_tokens": request.num_prompt,
        "computed_tokens": request.num_computed,
        "cached_tokens": request.num_cached,
        "generated_tokens": request.num_generated,
        "age_s": round(request.age_s, 3),
    }
    return shown if frame_id is None else {**shown, "frame_id": frame_id}


class Watcher:
    """One socket's subscription. A frame at once, and then whenever there is something new, as often as asked for."""

    def __init__(
        self,
        view: LiveView,
        put: Callable[[bytes], Awaitable[None]],
        own: Callable[[], Mapping[str, str]],
        shows_ids: Callable[[], bool],
    ) -> None:
        self._view = view
        self._put = put
        self._own = own
        self._shows_ids = shows_ids
        self._interval_s = 0.0
        self._scope: CancelScope | None = None
        self._has_changed = Event()

    def start(self, interval_s: float, tasks: TaskGroup) -> None:
        """From now on, or from now on as often as that."""
        self._interval_s = interval_s
        if self._scope is not None:
            self._has_changed.set()
            return
        self._scope = CancelScope()
        tasks.start_soon(self._run, self._scope)

    def stop(self) -> None:
        """Nothing more, but for a frame that is on its way."""
        if self._scope is not None:
            self._scope.cancel()
            self._scope = None

    async def _run(self, scope: CancelScope) -> None:
        since, seen, sent_s = 0, None, 0.0
        with scope:
            while True:
                shown = self._view.snapshot(since, shows_ids=self._shows_ids(), own=self._own())
                state = (shown["load"], shown["requests"] and [one | {"age_s": 0} for one in shown["requests"]])
                if shown["steps"] or state != seen or current_time() - sent_s >= HEARTBEAT_S:
                    since, seen, sent_s = shown["last"], state, current_time()
                    await self._put(orjson.dumps({"type": "engine", "engine": shown}))
                self._has_changed = Event()
                with move_on_after(self._interval_s):
                    await self._has_changed.wait()
