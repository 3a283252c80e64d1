"""`streamserve batch`, on the fake engine: both files' formats, what is refused, and going on where an earlier run ended."""

import json
import os
import sys
import time
from asyncio import Event, create_task, gather, get_running_loop, sleep
from collections.abc import Callable
from errno import EIO, ENOLCK, ENOSPC
from pathlib import Path
from typing import Any

import pytest

from streamserve import cli
from streamserve.api.batch_ledger import Entry, Ledger
from streamserve.api.batch_lines import START, Usage, answer_line, read_line
from streamserve.api.batch_todo import Todo
from streamserve.errors import EngineStopped, StreamServeError

Capture = pytest.CaptureFixture[str]
FLAGS = ("--fake", "--fake-step-ms", "0")
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(autouse=True)
def own_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run inside the test process here and must not redirect its logging, nor change its settings."""
    monkeypatch.setattr("streamserve.log.configure", lambda *arguments, **more: None)
    monkeypatch.setattr("streamserve.process.settle", lambda: None)


def request(custom_id: str, url: str = COMPLETION, method: str = "POST", **body: Any) -> str:
    body = body or {"prompt": f"about {custom_id}", "max_tokens": 3}
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


def entry(custom_id: str) -> Entry:
    line = read_line(request(custom_id).encode(), 1)
    return Entry(line, answer_line(line, 200, "req", b"{}"), True, Usage())


class Files:
    """An input, an output, and the command over them."""

    def __init__(self, folder: Path) -> None:
        self.source, self.output, self.errors = (folder / name for name in ("in.jsonl", "out.jsonl", "errors.jsonl"))

    def ask(self, *lines: str) -> None:
        self.source.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def run(self, *flags: str) -> int:
        return cli.main(["batch", str(self.source), str(self.output), *FLAGS, *flags])

    def answers(self, path: Path | None = None) -> dict[str, dict[str, Any]]:
        """By custom_id, each of which is there once."""
        lines = [json.loads(line) for line in (path or self.output).read_text(encoding="utf-8").splitlines()]
        found = {line["custom_id"]: line for line in lines}
        assert len(found) == len(lines)
        return found


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_lines_are_answered_as_over_http_whatever_they_ask(files: Files, capsys: Capture) -> None:
    chat: Any = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    files.ask(
        request("chat", CHAT, **chat),
        request("text", COMPLETION, prompt=["a", "b"], max_tokens=2),
        request("response", "/v1/responses", input="hi", max_output_tokens=16),
        request("native", "/generate", text="hi", sampling_params={"max_new_tokens": 4}),
        "",
        request("unheard of", CHAT, **chat, temprature=1),
        request("vectors", "/v1/embeddings", input="hi"),
        request("Größe 世界", CHAT, **chat, model="gpt-9"),
    )
    assert files.run() == 1
    answers = files.answers()
    assert {id: answer["response"]["status_code"] for id, answer in answers.items()} == {
        **dict.fromkeys(("chat", "text", "response", "native"), 200),
        **{"unheard of": 400, "vectors": 400, "Größe 世界": 404},
    }
    assert all(answer["error"] is None and answer["id"].startswith("batch_req_") for answer in answers.values())
    assert answers["chat"]["response"]["body"]["object"] == "chat.completion"
    assert answers["chat"]["response"]["request_id"] == answers["chat"]["response"]["body"]["id"]
    assert len(answers["text"]["response"]["body"]["choices"]) == 2
    assert answers["unheard of"]["response"]["body"]["error"]["param"] == "temprature"
    assert "7 requests, 7 answered now, 3 failed" in capsys.readouterr().err


def test_what_is_answered_is_not_asked_again(files: Files, capsys: Capture) -> None:
    files.ask(*(request(f"r{n}") for n in range(40)))
    assert files.run() == 0
    first = files.output.read_bytes()
    files.ask(request("new"), *(request(f"r{n}") for n in range(40)))
    assert files.run() == 0
    assert files.output.read_bytes().startswith(first)
    assert len(files.answers()) == 41
    assert "41 requests, 1 answered now, 40 before, 0 failed" in capsys.readouterr().err


def test_a_run_with_nothing_left_to_do_loads_no_model(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.ask(request("a"))
    assert files.run() == 0
    monkeypatch.setattr("streamserve.batch.build", lambda *arguments: pytest.fail("it was loaded"))
    assert files.run() == 0


def test_an_output_torn_at_any_byte_of_its_last_lines_is_mended(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamserve.api.batch_ledger.os.fsync", lambda fd: None)  # hundreds of them
    files.ask(*(request(f"r{n}") for n in range(4)))
    whole = b"".join(entry(f"r{n}").data for n in range(4))
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(ends[1], len(whole) + 1):
        files.output.write_bytes(whole[:size])
        ledger = Ledger(files.output)
        ledger.close()
        kept = max(end for end in ends if end <= size)
        assert files.output.read_bytes() == whole[:kept]
        assert (len(ledger.answers), ledger.num_cut) == (ends.index(kept) + 1, size != kept)
    for size in (0, 1, ends[0] - 1, ends[1], ends[2] + 1, len(whole) - 1):
        files.output.write_bytes(whole[:size] + (b"\0" * 50 if size == ends[1] else b""))
        assert files.run() == 0
        assert sorted(files.answers()) == ["r0", "r1", "r2", "r3"]


def test_failures_go_to_a_file_of_their_own_and_are_asked_again_when_it_is_gone(files: Files) -> None:
    files.ask(request("good"), request("bad", prompt="x", temperature=900))
    assert files.run("--errors", str(files.errors)) == 1
    assert (list(files.answers()), list(files.answers(files.errors))) == (["good"], ["bad"])
    assert files.run("--errors", str(files.errors)) == 1  # known, and not asked again
    assert list(files.answers(files.errors)) == ["bad"]
    files.errors.unlink()
    assert files.run("--errors", str(files.errors)) == 1
    assert (list(files.answers()), list(files.answers(files.errors))) == (["good"], ["bad"])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([request("a"), "", request("b"), request("a")], 'line 4: custom_id "a" stands on line 1 already'),
        ([request("a"), "no JSON"], "line 2: "),
        ([request("a"), "[]"], "line 2: the body is []"),
        ([request("a", method="GET")], 'line 1: method is "GET"; allowed is POST'),
        ([request("a", url="/v1/nothing")], 'line 1: url is "/v1/nothing"; allowed is /v1/chat/completions'),
        ([request("")], "line 1: custom_id has 0 characters"),
        ([request("a", prompt="x", stream=True)], "line 1: body.stream is true"),
        ([request("a", "/v1/responses", input="x", background=True)], "line 1: body.background is true"),
        (['{"custom_id": "a", "method": "POST", "url": "/v1/completions"}'], "line 1: body is missing"),
        (['{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": 3}'], "line 1: body is 3"),
        (['{"custom_id": 5, "method": "POST", "url": "/v1/completions", "body": {}}'], "line 1: custom_id is 5"),
        (['{"custom_id": "a", "method": "POST", "url": "/generate", "body": {}, "boddy": 1}'], "line 1: unknown field"),
        (["x", "y", "z"], "(and 2 more)"),
        ([request("a", prompt=0).replace("0", "[" * 300 + "]" * 300)], "line 1: it is nested too deeply"),
        ([request("a", prompt=0).replace("0", "[" * 90_000 + "]" * 90_000)], "line 1: it is nested too deeply"),
        ([], "there is no request"),
    ],
)
def test_an_input_that_cannot_be_run_is_refused_by_its_line_before_anything_runs(
    files: Files, capsys: Capture, lines: list[str], said: str
) -> None:
    files.ask(*lines)
    assert files.run() == 2
    assert said in capsys.readouterr().err
    assert not files.output.exists()


def test_a_line_that_is_too_long_is_named(files: Files, capsys: Capture) -> None:
    files.ask(request("a"), request("b", prompt="x" * (1 << 20)))
    assert files.run("--max-body-mb", "1") == 2
    assert "line 2: it has more than 1048576 bytes" in capsys.readouterr().err


def test_an_answered_line_that_now_asks_something_else_is_refused(files: Files, capsys: Capture) -> None:
    files.ask(request("a", prompt="x", max_tokens=2), request("b"))
    assert files.run() == 0
    before = files.output.read_bytes()
    spaced = '{ "url":"/v1/completions","method":"POST", "body":{"max_tokens": 2,"prompt":"x"},"custom_id":"a"}'
    files.ask(spaced)
    assert files.run() == 0  # the same in another spelling; that b is gone is only said
    assert "1 answers are of requests that" in capsys.readouterr().err
    files.ask(request("b"), request("a", prompt="x", max_tokens=3))
    assert files.run() == 2
    assert "line 2 of the input is answered already, but it asked something else then" in capsys.readouterr().err
    assert files.output.read_bytes() == before


@pytest.mark.parametrize("held", ["my notes", "my notes\n", "{}\n", request("a") + "\n", '{"id": "batch_req_x"}\n', "\n"])
def test_a_file_that_is_something_else_is_never_written(files: Files, capsys: Capture, held: str) -> None:
    files.ask(request("a"))
    files.output.write_text(held)
    assert files.run() == 2
    assert "is no answer of a batch; nothing was changed" in capsys.readouterr().err
    assert files.output.read_text() == held


def _beside(files: Files) -> None:
    files.output = files.source


def _in_no_folder(files: Files) -> None:
    files.output = files.source.parent / "nowhere" / "out.jsonl"


def _without_input(files: Files) -> None:
    files.source.unlink()


@pytest.mark.parametrize(
    ("change", "said"), [(_beside, "different ones"), (_in_no_folder, "cannot open"), (_without_input, "is no file")]
)
def test_files_that_cannot_be_used_are_one_sentence(
    files: Files, capsys: Capture, change: Callable[[Files], None], said: str
) -> None:
    files.ask(request("a"))
    change(files)
    assert files.run() == 2
    assert said in capsys.readouterr().err


def test_failures_of_lines_that_are_gone_no_longer_count(files: Files, capsys: Capture) -> None:
    files.ask(request("good"), request("bad", prompt="x", temperature=900))
    assert files.run() == 1
    files.ask(request("good"))
    assert files.run() == 0
    assert "1 requests, 0 answered now, 1 before, 0 failed" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such pipes")
def test_an_output_that_cannot_be_read_again_is_refused(files: Files, capsys: Capture) -> None:
    files.ask(request("a"))
    os.mkfifo(files.output)
    assert files.run() == 2
    assert "out.jsonl is no file" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_files_that_cannot_be_locked_are_written_all_the_same(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def lock(fd: int, how: int) -> None:
        raise OSError(ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", lock)
    files.ask(request("a"))
    assert files.run() == 0


def test_two_writers_of_one_output_are_one_too_many(files: Files, capsys: Capture) -> None:
    files.ask(request("a"))
    ledger = Ledger(files.output)
    try:
        assert files.run() == 2
        assert "is being written by another process" in capsys.readouterr().err
    finally:
        ledger.close()
    assert files.run() == 0


def test_answers_that_stand_twice_in_an_output_are_named(files: Files, capsys: Capture) -> None:
    files.ask(request("a"))
    assert files.run() == 0
    files.output.write_bytes(files.output.read_bytes() * 2)
    assert files.run() == 2
    assert "lines 1 and 2" in capsys.readouterr().err
    assert files.output.read_bytes().startswith(START)


def test_a_disk_that_is_full_stops_the_run_and_keeps_whole_lines(
    files: Files, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.ask(*(request(f"r{n}") for n in range(40)))
    write, left = os.write, 3000

    def until_full(fd: int, data: memoryview) -> int:
        nonlocal left
        if left == 0:
            raise OSError(ENOSPC, "No space left on device")
        taken = min(len(data), left)
        left -= taken
        return write(fd, data[:taken])

    monkeypatch.setattr("streamserve.api.batch_ledger.os.write", until_full)
    assert files.run() == 1
    said = capsys.readouterr().err
    assert "No space left on device; what was answered before stands in it" in said and "not yet" in said
    held = files.output.read_bytes()
    assert held == b"" or held.endswith(b"\n")
    monkeypatch.undo()
    monkeypatch.setattr("streamserve.log.configure", lambda *arguments, **more: None)
    monkeypatch.setattr("streamserve.process.settle", lambda: None)
    assert files.run() == 0
    assert files.output.read_bytes().startswith(held) and len(files.answers()) == 40


# ---- slow and broken disks --------------------------------------------------------------------------------------------


def test_an_answer_that_is_being_written_when_the_run_ends_is_counted(
    files: Files, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def slowly(fd: int, data: memoryview) -> int:
        time.sleep(0.1)
        return write(fd, data)

    async def interrupted(todo: Todo, ask: object, ledger: Ledger, room: object) -> None:
        putting = create_task(ledger.put(entry("a")))
        await sleep(0.01)
        putting.cancel()
        raise EngineStopped("it broke")

    monkeypatch.setattr("streamserve.api.batch_ledger.os.write", slowly)
    monkeypatch.setattr("streamserve.batch.work", interrupted)
    files.ask(request("a"), request("b"))
    assert files.run() == 1
    assert "1 answered now, 1 not yet" in capsys.readouterr().err
    assert list(files.answers()) == ["a"]


@pytest.mark.anyio
async def test_what_a_disk_lost_is_told_at_the_end_though_it_then_says_that_all_is_well(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, loop, sync = Event(), get_running_loop(), os.fsync
    ledger = Ledger(files.output)

    def fail(fd: int) -> None:
        monkeypatch.setattr("streamserve.api.batch_ledger.os.fsync", sync)
        loop.call_soon_threadsafe(synced.set)
        raise OSError(EIO, "Input/output error")

    monkeypatch.setattr("streamserve.api.batch_ledger.SYNC_EVERY_S", 0)
    monkeypatch.setattr("streamserve.api.batch_ledger.os.fsync", fail)
    await ledger.put(entry("a"))
    await synced.wait()
    with pytest.raises(StreamServeError, match="its last lines may be lost"):
        ledger.close()


@pytest.mark.anyio
async def test_nothing_is_written_behind_a_line_that_could_not_be_cut_off(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    write, num_writes = os.write, 0
    ledger = Ledger(files.output)

    def broken(fd: int, data: memoryview) -> int:
        nonlocal num_writes
        num_writes += 1
        if num_writes == 2:
            raise OSError(EIO, "Input/output error")
        return write(fd, data[:20])

    def refuse(fd: int, size: int) -> None:
        raise OSError(EIO, "Input/output error")

    monkeypatch.setattr("streamserve.api.batch_ledger.os.write", broken)
    monkeypatch.setattr("streamserve.api.batch_ledger.os.ftruncate", refuse)
    first = create_task(ledger.put(entry("a")))
    await sleep(0)
    results = await gather(first, ledger.put(entry("b")), return_exceptions=True)
    assert all(isinstance(result, StreamServeError) for result in results)
    assert len(files.output.read_bytes()) == 20
    with pytest.raises(StreamServeError):
        ledger.close()
    monkeypatch.undo()
    ledger = Ledger(files.output)
    ledger.close()
    assert ledger.num_cut == 1
