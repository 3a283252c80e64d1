"""OpenAI's Responses API over HTTP: responses made, streamed, kept, continued, followed, cancelled and forgotten.

Owns the responses that are under way and what a response continues. Knows nothing of WebSocket, whose frames carry the same
bodies and events (response_socket.py), nor of how chats are answered: a response is a chat (api/openai.py).

A response is found by its id, by the holder of the key that made it: while it is under way, and afterwards as long as the store
keeps it (`store` false: not at all). A client that leaves ends its response, unless it is a background one.
"""

from asyncio import CancelledError, Future, Task, get_running_loop
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, TypeVar

import orjson
import structlog
from anyio import CancelScope, to_thread

from streamserve.api import response_results as results
from streamserve.api.openai import Completions, Prepared, Source
from streamserve.api.pictures import Caller
from streamserve.api.query import Query, flag, number, page_of, query_of
from streamserve.api.response_events import Json, named
from streamserve.api.response_items import (
    HISTORY,
    Item,
    ItemReference,
    Message,
    groups_of,
    kept_items,
    messages_of,
    names_of,
    read_items,
    response_of,
    unread_in,
)
from streamserve.api.response_job import INLINE_BYTES, Journal, ResponseJob
from streamserve.api.response_schema import (
    INCLUDES,
    CountInputTokens,
    CreateResponse,
    chat_of,
    own_name,
    read_count,
    read_create,
    renamed,
    warnings_for,
)
from streamserve.api.response_store import MIB, Record, ResponseStore
from streamserve.api.routes import RouteSpec
from streamserve.api.schema import load_object, show
from streamserve.api.service import Service
from streamserve.api.sse import Events, EventStream
from streamserve.api.stream import Piece, collect, new_id
from streamserve.api.wire import RESUMABLE, Exchange, Headers, leaving_noticed, unforeseen
from streamserve.errors import ContextOverflow, InvalidRequest, NotFound, StreamServeError

log = structlog.get_logger(__name__)

MAX_CHAIN, MAX_CHAIN_BYTES = 10_000, 128 * MIB  # responses that continue each other: they are read together
MAX_LISTED = 100

T = TypeVar("T")


class PreviousResponseNotFound(InvalidRequest):
    """The response to be continued is not kept, or is somebody else's."""

    code: ClassVar[str] = "previous_response_not_found"


class Responses:
    """These routes, and their bodies for whoever carries them."""

    def __init__(self, service: Service, completions: Completions, store: ResponseStore) -> None:
        self._service = service
        self._completions = completions
        self._store = store
        self._live: dict[str, ResponseJob] = {}
        self._tasks: set[Task[None]] = set()

    def routes(self) -> list[RouteSpec]:
        """What there is here."""
        path, one = "/v1/responses", "/v1/responses/{id}"
        include = ("include", "further parts of items; all that there are come anyway")
        return [
            RouteSpec(
                "POST",
                path,
                self._service.streams.again(self.create),
                CreateResponse,
                results.ResponseObject,
                results.ResponseEvent,
                example={"input": "What is the capital of France?", "max_output_tokens": 64},
            ),
            RouteSpec("POST", f"{path}/input_tokens", self.input_tokens, CountInputTokens, results.InputTokens),
            RouteSpec(
                "GET",
                one,
                self.retrieve,
                None,
                results.ResponseObject,
                results.ResponseEvent,
                query=(
                    ("stream", "true: the events of a background response"),
                    ("starting_after", "only events behind this sequence number"),
                    ("include_obfuscation", "only false"),
                    include,
                ),
            ),
            RouteSpec("DELETE", one, self.delete, None, results.ResponseDeleted),
            RouteSpec("POST", f"{one}/cancel", self.cancel, None, results.ResponseObject),
            RouteSpec(
                "GET",
                f"{one}/input_items",
                self.input_items,
                None,
                results.InputItemList,
                query=(
                    ("limit", f"1 to {MAX_LISTED}; 20 when left out"),
                    ("order", "desc (newest first, when left out) or asc"),
                    ("after", "only items behind this one"),
                    include,
                ),
            ),
        ]

    # ---- bodies to jobs ------------------------------------------------------------------------------------------

    async def job(
        self, given: Json, caller: Caller, *, records: ResponseStore | None = None, only_reads: bool = False
    ) -> ResponseJob:
        """A body, checked; nothing is started. Raises RequestError naming the field at fault.

        `records`: responses that can be continued beside the kept ones. `only_reads`: the prompt is computed, for the cache,
        and nothing is answered.
        """
        request, owner = read_create(given), caller.owner
        id = new_id("resp").replace("-", "_")
        items = await self._items(request, owner, records)
        history = await self._history(request.previous_response_id, owner, records)
        prepared = await self._prepare(request, [*history, *items], caller)
        call = replace(prepared.run.call, id=id)
        if call.guidance is not None:  # the engine names it where it compiles no grammar
            call = replace(call, guidance=replace(call.guidance, param=own_name(call.guidance.param, ())))
        if only_reads:
            call = replace(call, drops_output=True, sampling=replace(call.sampling, max_new_tokens=1, min_new_tokens=0))
        return ResponseJob(
            self._service.run(call),
            request,
            self._service.text.tokenizer,
            model=self._service.model_name,
            owner=owner,
            input=kept_items(items, id.partition("_")[2]),
            warnings=(*warnings_for(request), *unread_in(request.input or ()), *prepared.warnings),
        )

    async def _items(self, request: CreateResponse, owner: str, records: ResponseStore | None) -> list[Item]:
        """The items of the input; references are replaced by what they refer to."""
        items = read_items(request.input or [])
        known = _Known({})
        return [
            await self._referenced(item, item.value.id, owner, records, known) if isinstance(item.value, ItemReference) else item
            for item in items
        ]

    async def _referenced(self, item: Item, id: str, owner: str, records: ResponseStore | None, known: "_Known") -> Item:
        response_id = response_of(id)
        if response_id is not None and response_id not in known.items:
            record = await self._find(response_id, owner, records, f"{item.path}.id")
            known.num_bytes += 0 if record is None else record.size
            if known.num_bytes > MAX_CHAIN_BYTES:
                raise InvalidRequest(
                    f"{item.path}.id: the responses referred to so far hold {known.num_bytes} bytes; at most {MAX_CHAIN_BYTES} "
                    f"are allowed; send what matters as input",
                    param=f"{item.path}.id",
                )
            known.items[response_id] = {} if record is None else await _in_thread(partial(_by_id, record), record.size)
        kept = None if response_id is None else known.items[response_id].get(id)
        if kept is None:
            raise InvalidRequest(f"{item.path}.id is {show(id)}, which is no item of a kept response", param=f"{item.path}.id")
        (found,) = read_items([kept])
        return Item(found.value, item.path)

    async def _history(self, id: str | None, owner: str, records: ResponseStore | None) -> list[Item]:
        """The items of a response and of all that it continues, oldest first."""
        chain: list[Record] = []
        num_bytes = 0
        while id is not None:
            record = await self._find(id, owner, records, "previous_response_id")
            if record is None:
                which = f"{show(id)} is" if not chain else f"{show(chain[0].id)} continues {show(id)}, which is"
                raise PreviousResponseNotFound(
                    f"previous_response_id: {which} not kept here (any more, or for this key); send the conversation as input",
                    param="previous_response_id",
                )
            chain.append(record)
            num_bytes += record.size
            if len(chain) > MAX_CHAIN or num_bytes > MAX_CHAIN_BYTES:
                raise InvalidRequest(
                    f"previous_response_id: {len(chain)} responses that continue each other hold {num_bytes} bytes; at most "
                    f"{MAX_CHAIN} and {MAX_CHAIN_BYTES} are allowed; send what matters of the conversation as input",
                    param="previous_response_id",
                )
            id = record.previous_id
        return await _in_thread(lambda: _items_of(chain), num_bytes)

    async def _find(self, id: str, owner: str, records: ResponseStore | None, param: str) -> Record | None:
        """A response that is over, wherever it is. `param`: the field that names it."""
        job = self._live.get(id)
        if job is not None and job.owner == owner:
            if not job.growing.is_over:
                status = job.growing.status.replace("_", " ")
                raise InvalidRequest(f"{param}: {show(id)} is still {status}; wait until it is completed", param=param)
            return await job.record(with_events=False)
        record = None if records is None else await records.get(id, owner)
        return record or await self._store.get(id, owner)

    async def _prepare(
        self, request: CreateResponse, items: Sequence[Item], caller: Caller, *, must_fit: bool = True
    ) -> Prepared:
        messages = messages_of(items, request.instructions)
        if not messages or (len(messages) == 1 and messages[0].path == "instructions"):
            raise InvalidRequest("input is missing; a text or at least one item is needed", param="input")
        source = Source(caller, known={})
        if request.truncation != "auto":
            return await self._prepare_all(request, messages, source, must_fit=must_fit)
        return await self._prepare_what_fits(request, messages, source)

    async def _prepare_all(
        self, request: CreateResponse, messages: Sequence[Message], source: Source, *, must_fit: bool = True
    ) -> Prepared:
        chat, source = chat_of(request, messages), replace(source, names=names_of(messages))
        try:
            return await self._completions.prepare_chat(chat, kind="resp", is_socket=True, must_fit=must_fit, source=source)
        except InvalidRequest as error:
            raise renamed(error, messages) from None

    async def _prepare_what_fits(self, request: CreateResponse, messages: Sequence[Message], source: Source) -> Prepared:
        """Without as many of the oldest turns as it takes. System messages at the head stay, and so does the last turn."""
        num_head = next((n for n, message in enumerate(messages) if message.value["role"] not in ("system", "developer")), 0)
        head, groups = messages[:num_head], groups_of(messages[num_head:])

        async def without(num_dropped: int) -> Prepared:
            kept = [message for group in groups[num_dropped:] for message in group]
            return await self._prepare_all(request, [*head, *kept], source)

        try:
            return await without(0)
        except ContextOverflow:
            if len(groups) < 2:
                raise
        low, high = 1, len(groups) - 1  # the answer lies between; the last one is tried at the end, for its error
        while low < high:
            middle = (low + high) // 2
            try:
                await without(middle)
            except ContextOverflow:
                low = middle + 1
            else:
                high = middle
        return await without(low)

    # ---- responses under way -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def under_way(self, job: ResponseJob) -> AsyncIterator[None]:
        """While the body runs, which begins when the run has started, the response is found by its id; then it is kept."""
        self._live[job.id] = job
        try:
            yield
        finally:
            try:
                if not job.growing.is_over:
                    job.closing()  # its client has left
                if job.journal is not None:
                    job.journal.end()
                with CancelScope(shield=True):
                    await self._keep(job)
            finally:
                del self._live[job.id]
                job.has_ended.set()

    async def settled(self) -> None:
        """Until nothing is under way any more, and what is to be kept is: for the shutdown, behind the engine's end."""
        for job in list(self._live.values()):
            await job.has_ended.wait()

    async def _keep(self, job: ResponseJob) -> None:
        if job.is_forgotten:
            return
        try:
            await self._store.put(await job.record())
        except Exception as failure:  # the answer is made: that nobody will find it is for the log
            log.error("response_not_kept", id=job.id, exc_info=failure)

    # ---- making --------------------------------------------------------------------------------------------------

    async def create(self, exchange: Exchange) -> None:
        """POST /v1/responses: an answer, as a response object or as the events of its making."""
        given = load_object(await exchange.body(self._service.max_body_bytes))
        if given.get("background") and exchange.header(RESUMABLE) == b"1":
            given["resumable"] = True  # the header says the same, and is refused like the field
        job = await self.job(given, self._service.caller(exchange))
        if job.request.background:
            await self._start_background(job)
            if job.journal is not None and job.wants_stream:
                await self._follow(exchange, job.journal, 0, self._headers(job))
            else:
                await exchange.answer_json(job.growing.as_json(), headers=self._headers(job))
        elif job.wants_stream:
            streams, produce = self._service.streams, partial(self.write, job)
            await streams.answer(exchange, (job.run,), produce, job.headers, is_resumable=job.request.resumable)
        else:
            self._service.streams.check_whole(exchange, job.request.resumable)
            await self._answer_whole(exchange, job)

    def _headers(self, job: ResponseJob) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", job.id.encode()), *job.headers]

    async def _answer_whole(self, exchange: Exchange, job: ResponseJob) -> None:
        with self._service.live(job.run):
            async with leaving_noticed(exchange, job.run.abort):
                await job.run.start()
                pieces = await collect(job.run)
                async with self.under_way(job):
                    await exchange.answer_json(job.whole(pieces), headers=self._headers(job))

    async def write(self, job: ResponseJob, stream: Events) -> None:
        """Write all events of a response whose run has started."""

        def send(events: list[bytes]) -> Awaitable[None] | None:
            return stream.named(*named(events)) if events else None

        def emit(piece: Piece) -> Awaitable[None] | None:
            return send(job.chunks(piece))

        async with self.under_way(job):
            waits_for = send(job.opening())
            if waits_for is not None:
                await waits_for
            waits_for = send(await job.deliver(emit))
            if waits_for is not None:
                await waits_for
        await stream.end()

    async def _start_background(self, job: ResponseJob) -> None:
        """Start it in a task of its own, which no connection's end can end. Raises what its start raises."""
        started: Future[StreamServeError | None] = get_running_loop().create_future()
        task = get_running_loop().create_task(self._carry(job, started))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            error = await started
        except CancelledError:
            task.cancel()  # nobody knows its id yet
            raise
        if error is not None:
            raise error

    async def _carry(self, job: ResponseJob, started: "Future[StreamServeError | None]") -> None:
        def emit(piece: Piece) -> None:
            job.chunks(piece)

        outcome: StreamServeError | None = None
        try:
            with self._service.live(job.run):
                await job.run.start()
                async with self.under_way(job):
                    job.opening()
                    if not started.done():
                        started.set_result(None)
                    await job.deliver(emit)
        except StreamServeError as error:
            outcome = error
        except CancelledError:
            outcome = StreamServeError("the server stopped")
        except Exception as bug:
            outcome = unforeseen(bug, id=job.id)
        if not started.done():
            started.set_result(outcome)

    # ---- reading -------------------------------------------------------------------------------------------------

    async def retrieve(self, exchange: Exchange) -> None:
        """GET /v1/responses/{id}: a response, under way or kept; with stream=true the events of a background response."""
        query = query_of(exchange, "stream", "starting_after", "include", "include_obfuscation")
        if flag(query, "include_obfuscation"):
            raise InvalidRequest(
                "include_obfuscation is for POST: events are sent again as they were made", param="include_obfuscation"
            )
        _check_includes(query)
        wants_stream = flag(query, "stream")
        after = number(query, "starting_after", 0, None)
        if after is not None and not wants_stream:
            raise InvalidRequest("starting_after is given but stream is not true", param="starting_after")
        found = await self._found(exchange)
        if not wants_stream:
            await exchange.answer(200, found.response if isinstance(found, Record) else orjson.dumps(found.growing.as_json()))
            return
        start = 0 if after is None else after + 1
        journal = found.journal if isinstance(found, ResponseJob) else await Journal.unpacked(found.events)
        if journal is None:
            raise InvalidRequest(
                "only responses made with background true keep their events; GET it without stream", param="stream"
            )
        await self._follow(exchange, journal, start, self._headers(found) if isinstance(found, ResponseJob) else ())

    async def _found(self, exchange: Exchange) -> ResponseJob | Record:
        id, owner = exchange.scope["path_params"]["id"], self._service.owner_of(exchange.scope)
        job = self._live.get(id)
        if job is not None and job.owner == owner and not (job.growing.is_over and job.is_forgotten):
            return job
        record = await self._store.get(id, owner)
        if record is None:
            raise NotFound(f"there is no response {show(id)} here; a response that is not kept ends with its answer", param="id")
        return record

    async def _follow(self, exchange: Exchange, journal: Journal, start: int, headers: Headers) -> None:
        """Send the events of a response from one on. Who leaves here ends nothing."""
        async with leaving_noticed(exchange, lambda: None) as presence:
            stream = EventStream(exchange)
            await stream.start(headers)
            stream.keep_alive(self._service.config.keep_alive_s, presence)
            async for events in journal.follow(start):
                waits_for = stream.named(*named(events))
                if waits_for is not None:
                    await waits_for
            await stream.end()

    async def cancel(self, exchange: Exchange) -> None:
        """POST /v1/responses/{id}/cancel: end a response that is under way; one that is over comes back as it is."""
        found = await self._found(exchange)
        if isinstance(found, ResponseJob):
            found.run.abort()
            await found.has_ended.wait()
            await exchange.answer_json(found.growing.as_json())
        else:
            await exchange.answer(200, found.response)

    async def delete(self, exchange: Exchange) -> None:
        """DELETE /v1/responses/{id}: forget a response; one that is under way ends."""
        found = await self._found(exchange)
        if isinstance(found, ResponseJob):
            found.is_forgotten = True
            found.run.abort()
            await found.has_ended.wait()
        await self._store.delete(found.id, found.owner)
        await exchange.answer_json({"id": found.id, "object": "response", "deleted": True})

    async def input_items(self, exchange: Exchange) -> None:
        """GET /v1/responses/{id}/input_items: the items of its own input, newest first unless order=asc."""
        query = query_of(exchange, "limit", "order", "after", "include")
        _check_includes(query)
        found = await self._found(exchange)
        items: list[Json] = found.input if isinstance(found, ResponseJob) else orjson.loads(found.input)
        await exchange.answer_json(page_of(query, items, MAX_LISTED, 20, "input item of this response"))

    async def input_tokens(self, exchange: Exchange) -> None:
        """POST /v1/responses/input_tokens: the tokens that a response's input makes."""
        request = read_count(load_object(await exchange.body(self._service.max_body_bytes)))
        caller = self._service.caller(exchange)
        items = await self._items(request, caller.owner, None)
        history = await self._history(request.previous_response_id, caller.owner, None)
        prepared = await self._prepare(request, [*history, *items], caller, must_fit=False)
        (prompt,) = prepared.run.call.prompts
        await exchange.answer_json({"object": "response.input_tokens", "input_tokens": len(prompt.token_ids)})


async def _in_thread(work: Callable[[], T], num_bytes: int) -> T:
    """Reading kept responses, beside the event loop where they are long."""
    return work() if num_bytes <= INLINE_BYTES else await to_thread.run_sync(work)


def _items_of(chain: Sequence[Record]) -> list[Item]:
    """The items of responses that continue each other, newest response first."""
    items: list[Item] = []
    for record in reversed(chain):
        response = orjson.loads(record.response)
        if response["status"] == "failed":
            raise InvalidRequest(
                f"previous_response_id: {show(record.id)} has failed; continue the one before it", param="previous_response_id"
            )
        for given in (orjson.loads(record.input), response["output"]):
            items += [Item(item.value, HISTORY) for item in read_items(given)]
    return items


@dataclass(slots=True)
class _Known:
    """Items of the responses that an input refers to: by response, by their ids."""

    items: dict[str, Mapping[str, Json]]
    num_bytes: int = 0


def _by_id(record: Record) -> Mapping[str, Json]:
    return {item["id"]: item for item in (*orjson.loads(record.input), *orjson.loads(record.response)["output"])}


# ---- queries -----------------------------------------------------------------------------------------------------


def _check_includes(query: Query) -> None:
    for name in query.get("include", ()):
        if name not in INCLUDES:
            raise InvalidRequest(f"include is {show(name)}; allowed is {', '.join(INCLUDES)}", param="include")
