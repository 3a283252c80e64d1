"""`streamserve bench serve` against a server that is not ours, and against ours."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamserve import cli
from tests.benchmark.foreign import KNOWN, Foreign

# The servers of these tests live in threads; `bench` forks a process that has none.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

Capture = pytest.CaptureFixture[str]
SMALL = ("--num-prompts", "5", "--random-input-len", "12", "--random-output-len", "4", "--max-concurrency", "2")


def _bench(port: int, *more: str) -> int:
    return cli.main(["bench", "serve", "--port", str(port), *more])


def _line(path: Path) -> dict[str, Any]:
    (line,) = path.read_text().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_server_that_refuses_what_it_does_not_know_and_counts_nothing_gets_the_same_table(
    capsys: Capture, tmp_path: Path
) -> None:
    with Foreign() as server:
        assert _bench(server.port, *SMALL, "--output-file", str(tmp_path / "out")) == 0
    table = capsys.readouterr().out
    assert "Successful requests:                5" in table and "TTFT  Time to First Token" in table
    assert "refuses ignore_eos" in table and "refuses stream_options" in table and "counts no tokens" in table
    assert "words, each taken for a token" in table and "Cached" not in table
    found = _line(tmp_path / "out")
    assert (found["total_output_tokens"], found["total_input_tokens"], found["tokens_counted_by"]) == (20, 60, "events")
    assert found["model"] == "theirs" and found["settings"]["request_rate"] == "inf" and "requests" not in found
    assert all(set(body) <= KNOWN for body in server.bodies)


@pytest.mark.parametrize(("is_chunked", "refuses_with"), [(True, 500), (False, 400)])
def test_a_server_that_counts_says_how_long_words_are(
    capsys: Capture, tmp_path: Path, is_chunked: bool, refuses_with: int
) -> None:
    known = KNOWN | {"stream_options", "max_completion_tokens"}
    with Foreign(
        known - {"max_tokens"}, counts=True, is_chunked=is_chunked, says_done=False, refuses_with=refuses_with
    ) as server:
        more = ("--backend", "openai-chat", "--output-file", str(tmp_path / "out"), "--save-detailed")
        assert _bench(server.port, *SMALL, *more) == 0
    assert "words of 2.00 tokens" in capsys.readouterr().out
    found = _line(tmp_path / "out")
    assert [one["input_tokens"] for one in found["requests"]] == [7 + 12] * 5
    assert [one["output_tokens"] for one in found["requests"]] == [3] * 5, "it answers max_tokens only"
    assert all(len(one["itl_ms"]) == 2 and one["error"] is None for one in found["requests"])
    assert {"max_completion_tokens"} <= set(server.bodies[-1])


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture) -> None:
    with Foreign(key="s3cret") as server:
        assert _bench(server.port, *SMALL) == 1
        assert "lists no model (status 401)" in capsys.readouterr().err
        monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
        assert _bench(server.port, *SMALL) == 0
        assert "s3cret" not in capsys.readouterr().out
        (tmp_path / "keys").write_text("# as the server has them\ns3cret\nother\n", encoding="utf-8")
        monkeypatch.setenv("STREAMSERVE_API_KEY", f"@{tmp_path / 'keys'}\nthird")
        monkeypatch.setenv("OPENAI_API_KEY", "of another server")
        assert _bench(server.port, *SMALL) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--port", "9"], 1, "http://127.0.0.1:9 does not answer"),
        (["--base-url", "ftp://x"], 2, "'ftp://x' is no URL"),
        (["--goodput", "speed:3"], 2, "'speed:3' is no promise such as ttft:500"),
        (["--extra-request-body", "[1]"], 2, "'[1]' is no JSON object"),
        (["--num-prompts", "0"], 2, "--num-prompts: 0 is no whole number of 1 or more"),
        (["--max-concurrency", "0"], 2, "--max-concurrency: 0 is"),
        (["--request-rate", "nan"], 2, "--request-rate: nan is no number above 0"),
        (["--output-file", "/dev/null/x", "--port", "9"], 2, "cannot write /dev/null/x"),
        (["--dataset-name", "sharegtp"], 2, "sharegtp"),
        (["--num-prompt", "1"], 2, "did you mean --num-prompts?"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments: list[str], code: int, words: str, capsys: Capture) -> None:
    assert cli.main(["bench", "serve", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


def test_a_missing_route_is_said_as_the_server_says_it(capsys: Capture) -> None:
    with Foreign() as server:
        assert _bench(server.port, *SMALL, "--endpoint", "v2/x") == 1
    assert "/v2/x cannot be measured: HTTP/1.1 404 Said" in capsys.readouterr().err


def test_the_commands_of_the_page_can_be_pasted(
    ours: int, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "benchmark.md").read_text()
    commands = [line for line in page.splitlines() if line.startswith("streamserve bench serve -")]
    assert len(commands) >= 4
    for command in commands:
        few = f" --port {ours} --num-prompts 2 --gsp-num-groups 1 --gsp-prompts-per-group 2 --random-output-len 4"
        assert cli.main((command + few).split()[1:]) == 0, command
        assert "Successful requests:                2" in capsys.readouterr().out


def test_a_run_that_is_stopped_shows_what_was_answered() -> None:
    arguments = ("--num-prompts", "60", "--random-input-len", "4", "--random-output-len", "2", "--request-rate", "3")
    with Foreign() as server:
        command = [sys.executable, "-m", "streamserve", "bench", "serve", "--port", str(server.port), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while sum(body.get("max_tokens") == 2 for body in server.bodies) < 5:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == ""
    assert "TTFT" in out and "Failed requests:                    0" in out and "stopped: 5" in out


def test_benches_are_listed(capsys: Capture) -> None:
    assert cli.main(["bench"]) == 0
    assert "serve      latency and throughput" in capsys.readouterr().out
    assert cli.main(["bench", "train"]) == 2
    assert "unknown bench train; there are serve" in capsys.readouterr().err


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server of ours with made-up tokens."""
    command = [sys.executable, "-m", "streamserve", "serve", "--fake", "--port", "0", "--fake-step-ms", "1"]
    with (
        (tmp_path_factory.mktemp("ours") / "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        events = (json.loads(line) for line in process.stdout)
        yield next(event["port"] for event in events if event["event"] == "streamserve_ready")
        process.terminate()


def test_ours_takes_token_ids_and_tells_of_its_cache(ours: int, capsys: Capture, tmp_path: Path) -> None:
    more = ("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "2", "--gsp-prompts-per-group", "4")
    lengths = ("--gsp-system-prompt-len", "64", "--gsp-question-len", "8", "--gsp-output-len", "6", "--max-concurrency", "1")
    promises = ("--goodput", "ttft:60000", "e2el:60000", "--output-file", str(tmp_path / "out"), "--flush-cache")
    assert _bench(ours, *more, *lengths, *promises) == 0
    table = capsys.readouterr().out
    assert (
        "prompts are token ids" in table and "Request goodput" in table and "refuses" not in table and "ended before" not in table
    )
    found = _line(tmp_path / "out")
    assert (found["completed"], found["total_input_tokens"], found["total_output_tokens"]) == (8, 8 * 72, 48)
    assert found["total_cached_tokens"] >= 6 * 63, "all but the first of each group"
    assert found["good_requests"] == 8 and found["tokens_counted_by"] == "usage"


def test_an_open_loop_keeps_its_rate_and_failures_are_told(ours: int, capsys: Capture, tmp_path: Path) -> None:
    rate = ("--request-rate", "200", "--burstiness", "50", "--num-prompts", "6", "--random-input-len", "5")
    more = ("--random-output-len", "2", "--output-file", str(tmp_path / "out"), "--save-detailed", "--backend", "openai-chat")
    assert _bench(ours, *rate, *more, "--extra-request-body", '{"seed": 5}') == 0
    found = _line(tmp_path / "out")
    due = [one["at_s"] for one in found["requests"]]
    assert due[0] == 0.0 and due == sorted(due) and 0.015 < due[-1] < 0.04
    capsys.readouterr()
    dataset = tmp_path / "chats"
    lines = [
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
        {"messages": [{"role": "nobody", "content": "b"}]},
    ]
    dataset.write_text("\n".join(json.dumps(line) for line in lines))
    chats = ("--backend", "openai-chat", "--dataset-name", "openai", "--dataset-path", str(dataset), "--warmup-requests", "0")
    assert _bench(ours, *chats) == 1
    out, err = capsys.readouterr()
    assert "Failed requests:                    1" in out and "Successful requests:                1" in out
    assert err.startswith("streamserve: a request failed: HTTP/1.1 400: messages[0]") and err.count("\n") == 1
    assert "prompts are the file's" in out
