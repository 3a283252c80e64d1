"""Streams that outlive their connection: what is kept, for whom, for how long, and that nothing else is."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve.api.app import Api, create_app
from streamserve.api.resume import Reader, Recording, Streams
from streamserve.config import ServerConfig
from streamserve.engine.client import Mailbox
from streamserve.errors import QueueFull
from streamserve.messages import Delta, FinishReason, GenerateRequest
from streamserve.text.byte_tokenizer import byte_text_model
from tests.api.scripted import ScriptedEngine

pytestmark = pytest.mark.anyio
TEXT = "/v1/completions"
BODY = {"prompt": "go on", "max_tokens": 100, "stream": True, "resumable": True}


class Visit:
    """One HTTP exchange with an application in this process, by a client that may leave."""

    def __init__(self, app: Api, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.data = b""
        self.has_ended = False
        self.gate = asyncio.Event()  # closed: the client reads nothing
        self.gate.set()
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": body})
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
        }
        self.task = asyncio.create_task(app(scope, self._incoming.get, self._send))

    async def _send(self, message: Any) -> None:
        await self.gate.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.data += message.get("body", b"")
            self.has_ended = not message.get("more_body", False)

    async def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})
        await self.task

    async def until(self, text: str) -> None:
        """Wait until the answer contains a text."""
        async with asyncio.timeout(5):
            while text.encode() not in self.data:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    @property
    def stream(self) -> str:
        return self.headers["x-request-id"]

    @property
    def ids(self) -> list[str]:
        return re.findall(r"^id: (.*)$", self.data.decode(), re.M)

    @property
    def numbers(self) -> list[int]:
        return [int(id.rpartition(":")[2]) for id in self.ids]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in re.findall(r"^data: (\{.*)$", self.data.decode(), re.M)]

    @property
    def text(self) -> str:
        return "".join(choice["text"] for event in self.events for choice in event.get("choices", ()))

    def error(self) -> tuple[int, str, str]:
        error = json.loads(self.data)["error"]
        return self.status, error["code"], error["param"]


class Stage:
    """An application whose engine says what the test says, when it says it."""

    def __init__(self, config: ServerConfig) -> None:
        self.engine = ScriptedEngine(lambda request: [])
        self.app = create_app(self.engine, byte_text_model(), config, model_name="tiny")
        self.streams: Streams = self.app._service.streams

    def visit(self, method: str, path: str, body: Any = None, **headers: str) -> Visit:
        data = b"" if body is None else json.dumps(body).encode()
        return Visit(self.app, method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})

    async def begin(self, **fields: Any) -> Visit:
        """A resumable stream that has its 200."""
        visit = self.visit("POST", TEXT, {**BODY, **fields})
        await visit.until("retry:")
        return visit

    def come_back(self, stream: str, after: int | None = None, **headers: str) -> Visit:
        last = {} if after is None else {"last_event_id": f"{stream}:{after}"}
        return self.visit("GET", f"/v1/streams/{stream}", **last, **headers)

    def say(self, text: str, finish: FinishReason | None = None, *, stream: str | None = None) -> None:
        """More of the answers; with a finish reason it is their end."""
        self.put(Delta(tuple(text.encode()), finish_reason=finish), stream)

    def put(self, delta: Delta, stream: str | None = None) -> None:
        for id, mailbox in list(self.engine.live.items()):
            if stream is None or id.startswith(stream):
                mailbox.put_nowait(delta)
                if delta.finish_reason is not None:
                    del self.engine.live[id]


@asynccontextmanager
async def stage(config: ServerConfig | None = None) -> AsyncIterator[Stage]:
    before = asyncio.all_tasks()
    yield (made := Stage(config or ServerConfig()))
    for kept in list(made.streams._kept.values()):
        made.streams._drop(kept)
    await asyncio.sleep(0.01)
    assert made.streams.num_kept == made.streams.num_bytes == 0
    assert asyncio.all_tasks() <= before, "no task is left"
    assert not made.engine.live


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


# ---- coming back ---------------------------------------------------------------------------------------------------------


async def test_who_comes_back_gets_what_was_missed_and_goes_on() -> None:
    async with stage() as s:
        first = await s.begin()
        s.say("one ")
        await first.until("one ")
        await first.leave()
        s.say("two ")
        await asyncio.sleep(0.01)
        s.say("three ")
        second = s.come_back(first.stream, 1)
        await second.until("three ")
        assert not s.engine.aborted
        s.say("four", FinishReason.LENGTH)
        await second.task
        assert (first.text, second.text) == ("one ", "two three four")
        assert second.numbers == list(range(2, 2 + len(second.numbers)))
        assert second.has_ended and second.data.endswith(b"data: [DONE]\n\n")
        assert second.headers["x-request-id"] == first.stream
        assert second.headers["content-type"].startswith("text/event-stream")


async def test_the_same_body_with_the_last_id_goes_on_as_well() -> None:
    async with stage() as s:
        first = await s.begin()
        s.say("one ")
        await first.until("one ")
        await first.leave()
        second = s.visit("POST", TEXT, BODY, last_event_id=first.ids[-1])
        s.say("two", FinishReason.LENGTH)
        await second.task
        assert second.text == "two"
        assert len(s.engine.requests) == 1

        other = s.visit("POST", TEXT, {**BODY, "prompt": "another"}, last_event_id=first.ids[-1])
        await other.task
        assert other.error() == (400, "invalid_value", "last-event-id")


async def test_the_header_asks_for_it_too() -> None:
    async with stage() as s:
        body = {name: value for name, value in BODY.items() if name != "resumable"}
        first = s.visit("POST", TEXT, body, x_streamserve_resumable="1")
        await first.until("retry:")
        s.say("one")
        await first.until("one")
        await first.leave()
        second = s.visit("POST", TEXT, body, last_event_id=first.ids[-1])
        s.say("two", FinishReason.LENGTH)
        await second.task
        assert second.text == "two"


async def test_native_streams_of_several_prompts_survive_too() -> None:
    async with stage() as s:
        body = {"text": ["a", "b"], "stream": True, "incremental": True, "resumable": True}
        first = s.visit("POST", "/generate", body)
        await first.until("retry:")
        s.say("one ")
        await until(lambda: len(first.events) == 2)
        await first.leave()
        assert not s.engine.aborted
        s.say("two", FinishReason.LENGTH)
        again = s.visit("POST", "/generate", body, last_event_id=f"{first.stream}:2")
        await again.task
        for visit, text in ((first, "one "), (again, "two")):
            assert sorted((event["index"], event["text"]) for event in visit.events) == [(0, text), (1, text)]
        assert again.data.endswith(b"data: [DONE]\n\n")

        header = s.visit("PUT", "/generate", {"text": "a", "stream": True}, x_streamserve_resumable="1")
        await header.until("retry:")
        ended = s.visit("DELETE", f"/v1/streams/{header.stream}")
        await asyncio.gather(ended.task, header.task)
        assert header.events[-1]["meta_info"]["finish_reason"]["type"] == "abort"

        whole = s.visit("POST", "/generate", {"text": "a", "resumable": True})
        await whole.task
        assert whole.error() == (400, "invalid_value", "resumable")


async def test_a_finished_stream_can_be_read_again_until_its_window_ends() -> None:
    async with stage() as s:
        first = await s.begin()
        s.say("all of it", FinishReason.LENGTH)
        await first.task
        last = first.numbers[-1]
        for after in (None, 0, 1, last - 1):
            again = s.come_back(first.stream, after)
            await again.task
            assert again.numbers == list(range((after or 0) + 1, last + 1))
            assert first.data.endswith(again.data.removeprefix(b"retry: 1000\n"))
        nothing_left = s.come_back(first.stream, last)
        await nothing_left.task
        assert (nothing_left.status, nothing_left.data) == (204, b"")


async def test_a_stream_without_the_wish_has_no_ids_and_ends_with_its_connection() -> None:
    async with stage() as s:
        visit = s.visit("POST", TEXT, {**BODY, "resumable": False})
        await until(lambda: s.engine.live)
        s.say("one")
        await visit.until("one")
        assert b"id:" not in visit.data.replace(b'"id"', b"") and b"retry:" not in visit.data
        await visit.leave()
        assert len(s.engine.aborted) == 1
        assert s.streams.num_kept == 0


async def test_the_newer_of_two_readers_goes_on() -> None:
    async with stage() as s:
        first = await s.begin()
        s.say("one ")
        await first.until("one ")
        second = s.come_back(first.stream, 1)
        await first.task
        assert first.events[-1]["error"]["code"] == "stream_taken"
        assert first.has_ended
        s.say("two", FinishReason.LENGTH)
        await second.task
        assert second.text == "two"


async def test_events_that_come_while_a_reader_takes_over_wake_the_new_one() -> None:
    async with stage() as s:
        readers = [await s.begin()]
        for turns in range(12):
            s.say(f"{turns:02} ")
            readers.append(s.come_back(readers[0].stream))
            for _ in range(turns):
                await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        s.say("end", FinishReason.LENGTH)
        await readers[-1].until("[DONE]")
        assert readers[-1].text == "".join(f"{turns:02} " for turns in range(12)) + "end"
        await asyncio.gather(*(reader.task for reader in readers))


async def test_a_reader_whose_socket_is_blocked_gives_way_too() -> None:
    async with stage() as s:
        first = await s.begin()
        first.gate.clear()
        s.say("one ")
        await until(lambda: s.streams._kept[first.stream].recording.num_given == 1)
        second = s.come_back(first.stream)
        await second.until("one ")
        s.say("two", FinishReason.LENGTH)
        await second.task
        assert second.text == "one two"
        await first.task


async def test_an_error_in_mid_stream_is_kept_like_an_event() -> None:
    async with stage() as s:
        first = await s.begin()
        await first.leave()
        s.put(Delta(finish_reason=FinishReason.ERROR, error="the step failed"))
        second = s.come_back(first.stream)
        await second.task
        assert [event["error"]["code"] for event in second.events] == ["step_failed"]
        assert second.data.endswith(b"data: [DONE]\n\n")


# ---- who may -------------------------------------------------------------------------------------------------------------


async def test_only_the_key_that_began_a_stream_reads_or_ends_it() -> None:
    async with stage(ServerConfig(api_key=("mine", "yours"))) as s:
        first = s.visit("POST", TEXT, BODY, authorization="Bearer mine")
        await first.until("retry:")
        s.say("one")
        await first.until("one")
        await first.leave()
        for method in ("GET", "DELETE"):
            thief = s.visit(method, f"/v1/streams/{first.stream}", authorization="Bearer yours")
            await thief.task
            assert thief.error()[:2] == (404, "not_found")
        thief = s.visit("POST", TEXT, BODY, authorization="Bearer yours", last_event_id=first.ids[-1])
        await thief.task
        assert thief.error()[:2] == (404, "not_found")
        owner = s.come_back(first.stream, x_api_key="mine")
        await owner.until("one")
        await owner.leave()


@pytest.mark.parametrize(
    ("last", "status"), [("{}:2", 400), ("{}:-1", 400), ("{}:1x", 400), ("other:1", 400), ("{}:9999999999999", 400), (":", 400)]
)
async def test_ids_that_are_none_of_the_streams_are_refused(last: str, status: int) -> None:
    async with stage() as s:
        first = await s.begin()
        s.say("one")
        await first.until("one")
        visit = s.visit("GET", f"/v1/streams/{first.stream}", last_event_id=last.format(first.stream))
        await visit.task
        assert visit.error() == (status, "invalid_value", "last-event-id")
        assert not first.task.done(), "who reads goes on"
        await first.leave()


async def test_unknown_streams_are_not_found_and_begin_nothing() -> None:
    async with stage() as s:
        for visit in (s.come_back("cmpl-1", 1), s.visit("POST", TEXT, BODY, last_event_id="cmpl-1:3")):
            await visit.task
            assert visit.error()[:2] == (404, "not_found")
        assert not s.engine.requests


@pytest.mark.parametrize(
    ("fields", "headers", "param"),
    [
        ({"stream": False}, {}, "resumable"),
        ({"stream": False, "resumable": False}, {"x_streamserve_resumable": "1"}, "x-streamserve-resumable"),
        ({}, {"x_streamserve_resumable": "yes"}, "x-streamserve-resumable"),
        ({"resumable": 1}, {}, "resumable"),
    ],
)
async def test_wishes_that_cannot_be_met_are_refused(fields: dict[str, Any], headers: dict[str, str], param: str) -> None:
    async with stage() as s:
        fields = {**BODY, **fields} if fields else {**BODY, "resumable": False}
        visit = s.visit("POST", TEXT, fields, **headers)
        await visit.task
        assert visit.error() == (400, "invalid_value", param)
        assert not s.engine.requests


async def test_a_server_without_a_window_says_so() -> None:
    async with stage(ServerConfig(resume_window_s=0)) as s:
        visit = s.visit("POST", TEXT, BODY)
        await visit.task
        assert visit.error() == (400, "invalid_value", "resumable")


async def test_a_refused_start_is_an_error_before_any_200_and_leaves_nothing() -> None:
    async with stage() as s:
        s.engine.refusal = QueueFull("full", retry_after_s=2)
        visit = s.visit("POST", TEXT, BODY)
        await visit.task
        assert visit.status == 429
        assert s.streams.num_kept == 0


# ---- how long, how much --------------------------------------------------------------------------------------------------


async def test_when_the_window_ends_so_does_the_request() -> None:
    async with stage(ServerConfig(resume_window_s=0.05)) as s:
        first = await s.begin()
        s.say("one")
        await first.until("one")
        await first.leave()
        assert not s.engine.aborted
        await until(lambda: s.engine.aborted)
        assert s.streams.num_kept == s.streams.num_bytes == 0
        late = s.come_back(first.stream, 1)
        await late.task
        assert late.error()[:2] == (404, "not_found")


async def test_a_reader_keeps_a_stream_beyond_its_window() -> None:
    async with stage(ServerConfig(resume_window_s=0.05)) as s:
        first = await s.begin()
        await first.leave()
        second = s.come_back(first.stream)
        await asyncio.sleep(0.1)
        s.say("still here", FinishReason.LENGTH)
        await second.task
        assert second.text == "still here"


async def test_what_nobody_reads_is_bounded_and_loses_nothing() -> None:
    async with stage() as s:
        s.streams._max_bytes = 8000
        first = await s.begin(max_tokens=450)
        await first.leave()
        recording = s.streams._kept[first.stream].recording
        for number in range(100):
            s.say(f"{number:03} ")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert s.streams.num_bytes < 8000
        assert recording.num_events < 50
        s.say("end", FinishReason.LENGTH)
        second = s.come_back(first.stream)
        await second.task
        assert second.text == "".join(f"{number:03} " for number in range(100)) + "end"
        assert second.numbers == list(range(1, 1 + len(second.numbers)))


async def test_every_choice_that_waits_for_room_goes_on_when_there_is_some() -> None:
    async with stage() as s:
        s.streams._max_bytes = 2000
        first = await s.begin(n=3, max_tokens=200)
        await first.leave()
        for number in range(40):
            s.say(f"{number:03} ")
            await asyncio.sleep(0.001)
        s.say("end", FinishReason.LENGTH)
        second = s.come_back(first.stream)
        await second.until("[DONE]")
        await second.task
        for index in range(3):
            text = "".join(c["text"] for event in second.events for c in event.get("choices", ()) if c["index"] == index)
            assert text == "".join(f"{number:03} " for number in range(40)) + "end"


async def test_who_leaves_before_the_stream_has_a_name_leaves_nothing_behind() -> None:
    async with stage() as s:
        started, submit = asyncio.Event(), s.engine.submit

        async def slow_submit(request: GenerateRequest) -> Mailbox:  # as one whose grammar compiles
            started.set()
            await asyncio.sleep(0.05)
            return await submit(request)

        s.engine.submit = slow_submit  # type: ignore[method-assign]
        visit = s.visit("POST", TEXT, BODY)
        await started.wait()
        await visit.leave()
        await asyncio.sleep(0.1)
        assert (visit.status, s.streams.num_kept, s.engine.live) == (0, 0, {})


async def test_a_finished_stream_keeps_its_events_and_not_its_prompt() -> None:
    async with stage() as s:
        first = await s.begin()
        s.say("all of it", FinishReason.LENGTH)
        await first.task
        kept = s.streams._kept[first.stream]
        assert kept.recording.num_events and not kept.runs


async def test_events_that_are_no_longer_kept_are_said_to_be_gone() -> None:
    async with stage() as s:
        s.streams._max_bytes = 4000
        first = await s.begin(max_tokens=450)
        for number in range(60):
            s.say(f"{number:03} ")
            await first.until(f"{number:03} ")
        assert s.streams.num_bytes <= 4000
        await first.leave()
        gone = s.come_back(first.stream, 3)
        await gone.task
        assert gone.error() == (410, "stream_gone", "last-event-id")
        second = s.come_back(first.stream, 58)
        await second.until("059 ")
        assert second.text == "058 059 "
        await second.leave()


async def test_of_many_orphans_the_oldest_are_ended() -> None:
    async with stage() as s:
        s.streams._max_orphans = 3
        visits = [await s.begin(prompt=str(number)) for number in range(5)]
        assert not s.engine.aborted
        for visit in visits:
            await visit.leave()
        assert s.engine.aborted == [f"{visit.stream}-0" for visit in visits[:2]]
        assert s.streams.num_kept == 3


async def test_memory_of_all_streams_is_bounded_and_finished_ones_go_first() -> None:
    async with stage() as s:
        s.streams._max_total_bytes = 3000
        done = await s.begin()
        s.say("x" * 60, FinishReason.LENGTH)
        await done.task
        running = await s.begin()
        s.say("one ")
        await running.until("one ")
        await running.leave()
        reader = await s.begin()
        for number in range(30):
            s.say("y", stream=reader.stream)
            await until(lambda number=number: len(reader.text) > number)
            if s.streams.num_kept == 2:
                assert not s.engine.aborted, "the one that was finished went first"
        assert s.engine.aborted == [f"{running.stream}-0"], "who is read stays"
        refused = s.visit("POST", TEXT, BODY)
        await refused.task
        assert refused.error() == (429, "queue_full", "resumable")
        await reader.leave()


async def test_delete_ends_it_for_its_reader_and_for_good() -> None:
    async with stage() as s:
        first = await s.begin()
        s.say("one")
        await first.until("one")
        deleted = s.visit("DELETE", f"/v1/streams/{first.stream}")
        await deleted.task
        assert json.loads(deleted.data) == {
            "id": first.stream,
            "object": "stream.deleted",
            "deleted": True,
            "aborted": True,
        }
        await first.task
        assert first.events[-1]["choices"][0]["finish_reason"] == "abort"
        assert s.streams.num_bytes == 0
        again = s.visit("DELETE", f"/v1/streams/{first.stream}")
        await again.task
        assert again.status == 404


# ---- recordings against a slow model of themselves -------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 30), st.just("take"), st.just("leave"), st.integers(-40, -1)), max_size=80))
def test_a_recording_gives_every_event_behind_a_position_or_says_that_it_is_gone(ops: list[Any]) -> None:
    asyncio.run(compare(ops))


async def compare(ops: list[Any]) -> None:
    sizes = [0]
    recording = Recording("s", b"", b"", 600, lambda change: sizes.append(sizes[-1] + change))
    written: list[bytes] = []
    seen = position = 0
    for op in ops:
        if op == "take":
            recording.reader = recording.reader or Reader(position)
            frames = recording.take(position)
            assert frames == written[position : position + len(frames)]
            position += len(frames)
            recording.reader.position = position
            seen = max(seen, position)
        elif op == "leave":
            recording.reader = None
        elif op < 0 and recording.num_forgotten <= max(0, seen + op):
            position = max(0, seen + op)
            recording.reader = Reader(position)
        elif op > 0:
            full = recording.events(b"x" * op)
            written.append(b"id: s:%d\ndata: %b\n\n" % (len(written) + 1, b"x" * op))
            if full is not None:
                full.close()  # type: ignore[attr-defined]
            unread = sum(map(len, written[seen:]))
            assert (full is not None) == (unread > 300), "the writer waits for readers, never for what was read"
        assert recording.num_events == len(written)
        assert recording.num_forgotten <= seen
        assert sizes[-1] == sum(map(len, written[recording.num_forgotten :]))
        floor = position if recording.reader is not None else seen
        assert sizes[-1] <= 600 or recording.num_forgotten >= floor
    recording.drop()
    assert sizes[-1] == 0
