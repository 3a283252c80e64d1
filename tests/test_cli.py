"""The command line: what it understands, what it answers, and with which exit code."""

import argparse
import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamserve import __version__, cli
from streamserve.config import CacheConfig, Config, DeviceConfig, ModelConfig, SchedulerConfig, ServerConfig
from streamserve.errors import CheckpointError, ConfigError
from streamserve.flags import Parser, UsageError, add_flags, human_int, read_config

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run inside the test process here and must not redirect its logging."""
    monkeypatch.setattr("streamserve.log.configure", lambda *arguments, **more: None)


def _parse(*arguments: str) -> tuple[Config, frozenset[str]]:
    parser = Parser("test")
    add_flags(parser, show_all=False)
    return read_config(parser.parse(arguments))


def test_no_flags_give_the_defaults() -> None:
    assert _parse() == (Config(), frozenset())


def test_every_kind_of_flag_reaches_its_setting() -> None:
    config, given = _parse(
        *("--model-path", "m.gguf", "--port", "0", "--context-length", "8k", "--max-total-tokens", "64K"),
        *("--mem-fraction-static", "0.5", "--disable-radix-cache", "--op", "a=b", "--op", "c=d", "--threads", "2"),
    )
    assert config == Config(
        model=ModelConfig(model_path="m.gguf", context_length=8192),
        cache=CacheConfig(max_total_tokens=65_536, mem_fraction_static=0.5, disable_radix_cache=True),
        device=DeviceConfig(op=("a=b", "c=d"), threads=2),
        server=ServerConfig(port=0),
    )
    assert len(given) == 8


def test_names_from_elsewhere_are_understood() -> None:
    config, _ = _parse("--model", "m", "--max-model-len", "4k", "--max-num-seqs", "7", "--gpu-memory-utilization", "0.3")
    assert config.model == ModelConfig(model_path="m", context_length=4096)
    assert config.scheduler == SchedulerConfig(max_running_requests=7)
    assert config.cache == CacheConfig(mem_fraction_static=0.3)


@pytest.mark.parametrize("text, number", [("0", 0), ("1_000", 1000), ("1.5k", 1536), ("2M", 2 * 1024**2), ("-1", -1)])
def test_human_numbers(text: str, number: int) -> None:
    assert human_int(text) == number


@pytest.mark.parametrize("text", ["", "k", "1.5", "nank", "infk", "8kb", "1e3", "0.3k"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="8192 or 8k"):
        human_int(text)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--prot", "1"), "unknown flag --prot; did you mean --port?"),
        (("--max-runing-requests=3",), "did you mean --max-running-requests?"),
        (("--port", "x"), "'x' is not a whole number"),
        (("--dtype", "int3"), "int3"),
        (("--port",), "expected one argument"),
        (("--speculative-draft-model-path", "x"), "unknown flag --speculative-draft-model-path; --speculative says it in one"),
        (("--num-speculative-tokens=3",), "--speculative says it: ngram,N"),
        (("--por", "1"), "did you mean --port?"),  # abbreviations would change meaning when a flag is added
    ],
)
def test_a_wrong_flag_is_named(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        _parse(*arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["srve"], "did you mean serve?"),
        (["xyz"], "there are serve, "),
        (["serve", "--prot", "1"], "`streamserve serve --help` shows the flags"),
        (["serve", "--port", "99999"], "--port is 99999; allowed is 0 to 65535"),
        (["serve", "a.gguf", "--model-path", "b.gguf"], "two models were given"),
        (["serve", "a", "b"], "unknown argument b"),
    ],
)
def test_what_cannot_be_understood_is_one_line_and_exit_code_two(arguments: list[str], words: str, capsys: Capture) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("streamserve: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"], ["serve", "--help"], ["serve", "--help-all"], ["doctor", "-h"]])
def test_help_is_exit_code_zero(arguments: list[str], capsys: Capture) -> None:
    assert cli.main(arguments) == 0
    assert "usage: streamserve" in capsys.readouterr().out


def test_help_shows_the_common_flags_and_help_all_every_one(capsys: Capture) -> None:
    cli.main(["serve", "--help"])
    short = capsys.readouterr().out
    cli.main(["serve", "--help-all"])
    whole = capsys.readouterr().out
    assert "--port" in short and "--write-timeout-s" not in short and "--max-model-len" not in short
    assert "--port" in whole and "--write-timeout-s" in whole and "--max-model-len" in whole


def test_version(capsys: Capture) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"streamserve {__version__}\n"


def _verb_that_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(namespace: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(cli, "VERBS", (cli.Verb("serve", "", cli._model_and_flags, run),))


@pytest.mark.parametrize(
    "error, code",
    [(CheckpointError("no such model; try this"), 1), (ConfigError("contradiction"), 2), (KeyboardInterrupt(), 130)],
)
def test_errors_have_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, capsys: Capture) -> None:
    _verb_that_raises(monkeypatch, error)
    assert cli.main(["serve"]) == code
    err = capsys.readouterr().err
    assert err == (f"streamserve: {error}\n" if str(error) else "")


def test_a_traceback_only_with_debug(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    _verb_that_raises(monkeypatch, CheckpointError("no such model"))
    assert cli.main(["serve", "--log-level", "debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("streamserve: no such model\n")


def test_config_says_where_each_value_comes_from_and_hides_the_key(capsys: Capture) -> None:
    assert cli.main(["config", "--port", "31000", "--api-key", "s3cret", "--json"]) == 0
    out = capsys.readouterr().out
    rows = {row["flag"]: (row["value"], row["origin"]) for row in json.loads(out)}
    assert rows["--port"] == (31000, "flag")
    assert rows["--host"] == ("127.0.0.1", "default")
    assert rows["--threads"] == (None, "open")
    assert "s3cret" not in out


def test_doctor_reports_every_part_as_json(capsys: Capture) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    by_name = {check["name"]: check for check in checks}
    assert {"python", "torch", "numba", "processor", "memory", "default model", "calibration", "port"} <= set(by_name)
    assert all(check["state"] in ("ok", "warn", "fail") for check in checks)
    assert all(check["fix"] for check in checks if check["state"] != "ok")


@contextmanager
def _fake_server(tmp_path: Path, module: str, *flags: str) -> "Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]":
    """A fake server in a process of its own, and its ready line; stopped by SIGTERM in the end."""
    arguments = [sys.executable, "-m", module, *flags, "--fake", "--port", "0", "--fake-step-ms", "1"]
    with (
        (tmp_path / "stderr").open("w") as log,
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            events = (json.loads(line) for line in process.stdout)
            ready = next((event for event in events if event["event"] == "streamserve_ready"), None)
            assert ready is not None, (tmp_path / "stderr").read_text()
            yield process, ready
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)


@pytest.mark.parametrize("module, flags", [("streamserve", ("serve",)), ("streamserve.launch_server", ())])
def test_serve_prints_a_ready_line_and_stops_on_sigterm(tmp_path: Path, module: str, flags: tuple[str, ...]) -> None:
    with _fake_server(tmp_path, module, *flags) as (process, ready):
        assert ready["url"].startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{ready['url']}/ready", timeout=10) as answer:
            assert answer.status == 200
    assert process.returncode == 0, (tmp_path / "stderr").read_text()
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_a_second_signal_ends_background_responses_and_keeps_them(tmp_path: Path) -> None:
    flags = ("serve", "--response-store", str(tmp_path / "responses.db"))
    body = json.dumps({"input": "Hi", "background": True, "ignore_eos": True}).encode()
    with _fake_server(tmp_path, "streamserve", *flags) as (process, ready):
        request = urllib.request.Request(f"{ready['url']}/v1/responses", body)
        with urllib.request.urlopen(request, timeout=10) as answer:
            id = json.load(answer)["id"]
        process.send_signal(signal.SIGTERM)
        with pytest.raises(urllib.error.HTTPError):
            while True:  # until it refuses new ones: it has seen the first signal
                urllib.request.urlopen(request, timeout=10).close()
    assert process.returncode == 1
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    with (
        _fake_server(tmp_path, "streamserve", *flags) as (_, ready),
        urllib.request.urlopen(f"{ready['url']}/v1/responses/{id}", timeout=10) as answer,
    ):
        assert json.load(answer)["status"] == "cancelled"


def test_a_taken_port_is_one_sentence(tmp_path: Path) -> None:
    with _fake_server(tmp_path, "streamserve", "serve") as (_, ready):
        again = [sys.executable, "-m", "streamserve", "serve", "--fake", "--port", str(ready["port"])]
        second = subprocess.run(again, capture_output=True, text=True, timeout=30)
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1 and "choose another --port" in second.stderr


def test_a_format_that_the_model_cannot_have_is_one_sentence() -> None:
    command = [sys.executable, "-m", "streamserve", "serve", "--fake", "--port", "0", "--tool-call-parser", "mistral"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "--tool-call-parser is mistral" in done.stderr
