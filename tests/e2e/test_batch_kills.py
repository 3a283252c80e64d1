"""`streamserve batch`, and a server with a batch, killed again and again in the middle of the work: in the end every line is
answered, once, as if nothing had happened.

STREAMSERVE_BATCH_KILLS sets how often, STREAMSERVE_BATCH_SEED when, STREAMSERVE_BATCH_MODEL with which model (`default`: the
default one); the suite kills the fake engine a few times.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

KILLS = int(os.environ.get("STREAMSERVE_BATCH_KILLS", "5"))
SEED = int(os.environ.get("STREAMSERVE_BATCH_SEED", str(time.time_ns())))
MODEL = os.environ.get("STREAMSERVE_BATCH_MODEL")
LINES_PER_KILL = 12  # at most, so that there is something left for the last one
ENGINE = {None: ("--fake", "--fake-step-ms", "2"), "default": ()}.get(MODEL, (str(MODEL),))
COMMAND = (sys.executable, "-m", "streamserve", "batch")
WAIT_S = 100


def requests(count: int) -> list[dict[str, Any]]:
    """Of several kinds and lengths; one in ten fails."""
    random, lines = Random(1), []
    for number in range(count):
        body: dict[str, Any] = {"max_tokens": random.randint(1, 12), "temperature": 900 if number % 10 == 3 else 0}
        text = f"{number} " + "word " * random.randint(1, 20)
        if number % 2:
            url, body = "/v1/completions", body | {"prompt": text}
        else:
            url, body = "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
        lines.append({"custom_id": f"r{number}", "method": "POST", "url": url, "body": body})
    return lines


def start(source: Path, output: Path) -> "subprocess.Popen[str]":
    command = [*COMMAND, str(source), str(output), *ENGINE, "--max-running-requests", "4", "--log-level", "error"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def answers(*paths: Path) -> dict[str, Any]:
    """What was answered, by custom_id, without what differs from run to run. Every line is whole, and there once."""
    found: dict[str, Any] = {}
    for line in chain.from_iterable(path.read_text(encoding="utf-8").splitlines() for path in paths):
        answer = json.loads(line)
        assert answer["custom_id"] not in found
        body = answer["response"]["body"]
        said = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in body.get("choices", ())]
        found[answer["custom_id"]] = (answer["response"]["status_code"], said or body["error"]["message"])
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.timeout(120 if KILLS <= 6 else 3600)
def test_killed_at_random_points_every_line_is_answered_once(tmp_path: Path) -> None:
    random, lines = Random(SEED), requests(KILLS * LINES_PER_KILL + 8)
    source, output, reference = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "reference.jsonl"))
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    undisturbed, num_torn = start(source, reference), 0
    for kill in range(KILLS):
        before = size_of(output)
        with start(source, output) as process:
            assert process.stderr is not None
            # A byte count anywhere within the next lines: in the middle of one as well as between two.
            until, deadline = before + random.randint(1, LINES_PER_KILL * 400), time.monotonic() + WAIT_S
            while size_of(output) < until and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(random.random() * 0.02)
            process.send_signal(signal.SIGKILL)
            said = process.stderr.read()
        num_torn += "torn off" in said
        whole = output.read_bytes()
        known = [json.loads(line)["custom_id"] for line in whole[: whole.rfind(b"\n") + 1].splitlines()]
        assert len(set(known)) == len(known), f"kill {kill} of seed {SEED}"
        print(f"kill {kill + 1}: {len(known)} of {len(lines)} answered; {said.strip()}")
    assert process.returncode == -signal.SIGKILL, f"seed {SEED}: the last run was done before it was killed"
    for process in (start(source, output), undisturbed):
        with process:
            assert process.stderr is not None
            said = process.stderr.read()
        assert process.returncode == 1, said  # some lines are wrong
    assert answers(output) == answers(reference), f"seed {SEED}"
    assert answers(output).keys() == {line["custom_id"] for line in lines}
    print(f"seed {SEED}: {KILLS} kills, {num_torn} torn lines mended")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT for one process")
def test_interrupted_it_keeps_what_it_has_and_says_how_to_go_on(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in requests(400)), encoding="utf-8")
    with start(source, output) as process:
        assert process.stderr is not None
        deadline = time.monotonic() + WAIT_S
        while size_of(output) < 2000 and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130, said
    assert "not yet: the same command goes on" in said and "Traceback" not in said
    assert 0 < len(answers(output)) < 400


class Served:
    """A server of its own process, with a folder for batches."""

    def __init__(self, folder: Path) -> None:
        flags = ("--port", "0", "--batch-folder", str(folder), "--api-key", "secret", "--max-running-requests", "4")
        command = [*COMMAND[:3], "serve", *ENGINE, *flags, "--log-level", "error", "--log-format", "json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        events = map(json.loads, self.process.stdout)
        port = next((event["port"] for event in events if event["event"] == "streamserve_ready"), None)
        assert port is not None, f"it ended with {self.process.wait(WAIT_S)}"
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"authorization": "Bearer secret"})

    def batch(self, id: str) -> dict[str, Any]:
        batch: dict[str, Any] = self.http.get(f"/v1/batches/{id}").raise_for_status().json()
        return batch

    def num_answered(self, id: str) -> int:
        counts = self.batch(id)["request_counts"]
        return int(counts["completed"] + counts["failed"])

    def end(self, number: signal.Signals) -> int:
        self.http.close()
        self.process.send_signal(number)
        with self.process:
            return self.process.wait(WAIT_S)


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Served]]:
    """Starts servers, of which none stays."""
    started: list[Served] = []

    def start_one(folder: Path) -> Served:
        started.append(Served(folder))
        return started[-1]

    yield start_one
    for server in started:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.timeout(120 if KILLS <= 6 else 3600)
def test_a_servers_batch_goes_on_when_it_was_killed_and_when_it_was_told_to_end(
    tmp_path: Path, serve: Callable[[Path], Served]
) -> None:
    random = Random(SEED)
    lines = [line for line in requests(max(400, 80 * KILLS)) if line["url"] == "/v1/completions"]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    server = serve(folder := tmp_path / "batches")
    form = {"file": ("lines.jsonl", data)}
    kept = server.http.post("/v1/files", files=form, data={"purpose": "batch"}).raise_for_status().json()
    asked = {"input_file_id": kept["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    id = server.http.post("/v1/batches", json=asked).raise_for_status().json()["id"]
    for kill in range(max(3, KILLS // 2)):
        until, deadline = server.num_answered(id) + random.randint(1, 12), time.monotonic() + WAIT_S
        while server.num_answered(id) < until and time.monotonic() < deadline:
            time.sleep(0.001)
        if kill % 3 == 1:
            assert server.end(signal.SIGTERM) == 0
        else:
            server.end(signal.SIGKILL)
        answers(*(path for path in (folder / id / "output.jsonl", folder / id / "errors.jsonl") if size_of(path)))
        server = serve(folder)
    assert server.batch(id)["status"] == "in_progress", f"seed {SEED}: it was done before the last kill"
    while (batch := server.batch(id))["status"] != "completed":
        assert batch["status"] in ("in_progress", "finalizing")
        time.sleep(0.02)
    files = [tmp_path / f"{name}.jsonl" for name in ("output", "error")]
    for file in files:
        file.write_bytes(server.http.get(f"/v1/files/{batch[f'{file.stem}_file_id']}/content").raise_for_status().content)
    assert server.end(signal.SIGTERM) == 0
    found = answers(*files)
    assert found.keys() == {line["custom_id"] for line in lines}, f"seed {SEED}"
    counts = batch["request_counts"]
    assert (counts["total"], counts["completed"] + counts["failed"]) == (len(lines), len(lines))
    assert {status for status, _ in found.values()} == {200, 400}
