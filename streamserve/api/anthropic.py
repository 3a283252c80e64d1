"""Anthropic's Messages API: bodies to runs, and runs to messages, whole or as events.

Owns how a message is run and answered. What bodies mean is in anthropic_chat.py, what answers look like in anthropic_events.py;
tokens, tools and grammars are those of a chat.
"""

import re
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from streamserve.api.anthropic_chat import Translation, translate
from streamserve.api.anthropic_events import (
    Blocks,
    End,
    MessageEvents,
    NamedEvent,
    anthropic_error_body,
    end_of,
    message_json,
    usage_json,
    whole_blocks,
)
from streamserve.api.anthropic_results import MessageAnswer, MessageEvent, TokenCount
from streamserve.api.anthropic_schema import CountTokensRequest, MessagesRequest, read_body
from streamserve.api.openai import Completions, Prepared, Source, warning_headers
from streamserve.api.pictures import Caller
from streamserve.api.routes import RouteSpec
from streamserve.api.schema import load_object
from streamserve.api.service import Service
from streamserve.api.sse import Events
from streamserve.api.stream import Piece, Run, collect, events_of
from streamserve.api.wire import Exchange, Headers, leaving_noticed, unforeseen
from streamserve.errors import InvalidRequest, SlowReader, StreamServeError

__all__ = ["Messages", "anthropic_error_body"]

# What a chat calls the fields of these bodies, where an error names one.
_FIELDS = {
    "stop": "stop_sequences",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "max_completion_tokens": "max_tokens",
    "max_thinking_tokens": "thinking.budget_tokens",
    "reasoning_effort": "output_config.effort",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: its run, not yet started. `is_capped`: the context ends before max_tokens does."""

    run: Run
    model: str
    headers: Headers
    is_capped: bool
    omits_thinking: bool
    more: dict[str, Any]  # fields that only some answers have

    def end(self, piece: Piece) -> End:
        """How the answer ended with its last piece."""
        assert piece.finish_reason is not None
        end = end_of(piece.finish_reason, piece.matched_stop)
        return End("model_context_window_exceeded") if self.is_capped and piece.finish_reason == "length" else end


class Messages:
    """These routes."""

    def __init__(self, service: Service, completions: Completions) -> None:
        self._service = service
        self._completions = completions

    # ---- routes --------------------------------------------------------------------------------------------------

    def routes(self) -> list[RouteSpec]:
        """Both of them."""
        create = self._service.streams.again(self.create)
        hello = {"model": self._service.model_name, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
        return [
            RouteSpec(
                "POST",
                "/v1/messages",
                create,
                MessagesRequest,
                MessageAnswer,
                MessageEvent,
                example={**hello, "max_tokens": 64},
            ),
            RouteSpec("POST", "/v1/messages/count_tokens", self.count_tokens, CountTokensRequest, TokenCount, example=hello),
        ]

    async def create(self, exchange: Exchange) -> None:
        """POST /v1/messages: the next message of a conversation, whole or as events."""
        request = read_body(load_object(await exchange.body(self._service.max_body_bytes)), MessagesRequest)
        job = await self._job(request, self._service.caller(exchange))
        if request.stream:
            produce = partial(self.write, job)
            await self._service.streams.answer(exchange, (job.run,), produce, job.headers, is_resumable=request.resumable)
            return
        self._service.streams.check_whole(exchange, request.resumable)
        run = job.run
        with self._service.live(run):
            async with leaving_noticed(exchange, run.abort):
                await run.start()
                (piece,) = await collect(run)
                await exchange.answer_json(
                    self._whole(job, piece), headers=[(b"x-request-id", run.call.id.encode()), *job.headers]
                )

    async def count_tokens(self, exchange: Exchange) -> None:
        """POST /v1/messages/count_tokens: the tokens of the prompt that the same body would make."""
        request = read_body(load_object(await exchange.body(self._service.max_body_bytes)), CountTokensRequest)
        prepared = await self._prepare(self._translated(request), self._service.caller(exchange), must_fit=False)
        (prompt,) = prepared.run.call.prompts
        await exchange.answer_json({"input_tokens": len(prompt.token_ids)})

    # ---- bodies to jobs ------------------------------------------------------------------------------------------

    async def job(self, given: dict[str, Any], caller: Caller) -> Job:
        """A body, checked; nothing is started. Raises RequestError naming the field at fault."""
        return await self._job(read_body(given, MessagesRequest), caller)

    def _translated(self, request: CountTokensRequest) -> Translation:
        template = self._service.text.template
        can_think = self._completions.forms.reasoning is not None
        return translate(request, template.variables if template is not None else frozenset(), can_think=can_think)

    async def _prepare(self, given: Translation, caller: Caller, *, must_fit: bool = True) -> Prepared:
        """Its length is still open: as with Anthropic, an answer ends where the context does, if that is before max_tokens."""
        try:
            source = Source(caller, given.names)
            return await self._completions.prepare_chat(given.chat, kind="msg", must_fit=must_fit, source=source)
        except InvalidRequest as error:
            raise _renamed(error, given.tool_places) from None

    async def _job(self, request: MessagesRequest, caller: Caller) -> Job:
        given = self._translated(request)
        prepared = await self._prepare(given, caller)
        call = prepared.run.call
        room = self._service.client.facts().context_len - len(call.prompts[0].token_ids)
        limit = max(1, min(request.max_tokens, room))  # 0 is for those who want the prompt in the cache, and nothing else
        sampling = replace(call.sampling, max_new_tokens=limit)
        call = replace(call, sampling=sampling, drops_output=request.max_tokens == 0)
        if call.guidance is not None:  # the engine names it where it compiles no grammar
            call = replace(call, guidance=replace(call.guidance, param=_own_name(call.guidance.param)))
        warnings = warning_headers((*given.warnings, *prepared.warnings))
        return Job(
            run=self._service.run(call),
            model=self._service.model_name,
            headers=[(b"request-id", call.id.encode()), *warnings],
            is_capped=request.max_tokens > room,
            omits_thinking=request.thinking is not None and request.thinking.display == "omitted",
            more={} if request.context_management is None else {"context_management": await self._edits(given.cleared)},
        )

    async def _edits(self, cleared: Sequence[str]) -> dict[str, Any]:
        """What became of the wish to leave thoughts out."""
        if not cleared:
            return {"applied_edits": []}
        num_tokens = 0
        for thought in cleared:
            num_tokens += len(await self._service.prompts.of_text(thought, "messages", add_special_tokens=False))
        counts = {"cleared_thinking_turns": len(cleared), "cleared_input_tokens": num_tokens}
        return {"applied_edits": [{"type": "clear_thinking_20251015", **counts}]}

    # ---- jobs to answers -----------------------------------------------------------------------------------------

    def _whole(self, job: Job, piece: Piece) -> dict[str, Any]:
        blocks = Blocks(omits_thinking=job.omits_thinking)
        content = whole_blocks([*blocks.take(events_of(piece)), *blocks.finish()])
        return message_json(job.run.call.id, job.model, content, job.end(piece), usage_json(job.run.usage), **job.more)

    async def write(self, job: Job, stream: Events) -> None:
        """Write all events of an answer whose run has started."""
        blocks, shape = Blocks(omits_thinking=job.omits_thinking), MessageEvents()
        has_begun = False

        def emit(piece: Piece) -> Awaitable[None] | None:
            nonlocal has_begun
            made: list[NamedEvent] = []
            if not has_begun:  # not earlier: what the cache held is known by now, and clients read it here
                has_begun = True
                usage = {**usage_json(job.run.usage), "output_tokens": 0}
                made += shape.opening(message_json(job.run.call.id, job.model, [], None, usage))
            made += shape.of(blocks.take(events_of(piece)))
            if piece.finish_reason is not None:
                made += shape.of(blocks.finish())
                made += shape.closing(job.end(piece), usage_json(job.run.usage), **job.more)
            return stream.named(*made) if made else None

        try:
            await job.run.deliver(emit)
        except SlowReader:
            raise
        except Exception as failure:  # the status is sent: what remains is an event that says so
            error = failure if isinstance(failure, StreamServeError) else unforeseen(failure, id=job.run.call.id)
            job.run.outcome = error.code
            waits_for = stream.named(*shape.failure(error))
            if waits_for is not None:
                await waits_for
        await stream.end()


def _renamed(error: InvalidRequest, tool_places: Sequence[int]) -> InvalidRequest:
    """The same error, naming the field of these bodies that a chat's field was made from."""
    param = error.param or ""
    ours = _own_name(param, tool_places)
    return error if ours == param else type(error)(str(error).replace(param, ours), param=ours)


def _own_name(param: str, tool_places: Sequence[int] = ()) -> str:
    """What a chat's field is called in these bodies. `tool_places`: where among the given tools those of the chat stand."""
    for theirs, ours in _FIELDS.items():
        if param == theirs or param.startswith((f"{theirs}.", f"{theirs}[")):
            return ours + param[len(theirs) :]
    if tool := re.match(r"tools\[(\d+)\]", param):
        param = f"tools[{tool_places[int(tool[1])]}]{param[tool.end() :]}"
    param = re.sub(r"^(tools\[[^]]*\])\.function", r"\1", param)
    return re.sub(r"^(tools\[[^]]*\])\.parameters", r"\1.input_schema", param)
