"""The start-up display: JSON lines for programs, text for people; one sentence when it fails."""

import io
import json

import pytest

from streamserve.config import Config, ServerConfig
from streamserve.errors import ConfigError
from streamserve.resolve import Reason, resolve
from streamserve.startup import StartUp, base_url
from tests.test_resolve import CPU, MODEL


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def _start(out: io.StringIO, server: ServerConfig | None = None) -> str:
    config = Config(server=server or ServerConfig())
    display = StartUp(config, out)
    display.hello("SmolLM2", "a processor")
    display.decided(resolve(config, MODEL, CPU), (Reason("attention", "numba", "fastest here", "--op"),))
    with display.loading() as progress:
        progress(50, 100)
        progress(100, 100)
    display.ready(31000, "SmolLM2", 1.5)
    return out.getvalue()


def test_a_program_gets_json_lines_that_end_with_the_url() -> None:
    events = [json.loads(line) for line in _start(io.StringIO()).splitlines()]
    assert events[0]["event"] == "streamserve_starting"
    assert {"name": "attention", "value": "numba", "why": "fastest here"}.items() <= events[-4].items()
    assert events[-2]["event"] == "weights_loaded" and events[-2]["bytes"] == 100
    assert events[-1] == {
        "event": "streamserve_ready",
        "url": "http://127.0.0.1:31000",
        "model": "SmolLM2",
        "port": 31000,
        "seconds": 1.5,
        "phases": {},
    }


def test_a_person_gets_text_and_the_ready_block_is_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    lines = _start(Terminal()).strip().splitlines()
    assert lines[0].startswith("streamserve 0.1.0 · SmolLM2 · a processor · Python 3")
    assert any("fastest here" in line for line in lines)
    assert any(line.lstrip().startswith("memory") and "full contexts" in line for line in lines)
    assert [line.split()[0] for line in lines[-4:]] == ["Playground", "OpenAI", "Try", "Stop"]
    assert "\x1b[3" not in "".join(lines)


def test_log_format_json_wins_over_a_terminal() -> None:
    assert all(json.loads(line) for line in _start(Terminal(), ServerConfig(log_format="json")).splitlines())


def test_an_open_door_is_called_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    text = _start(Terminal(), ServerConfig(host="0.0.0.0"))
    assert "NONE, and open to the network: set --api-key" in text
    assert "s3cret" not in _start(Terminal(), ServerConfig(host="0.0.0.0", api_key=("s3cret",)))


@pytest.mark.parametrize(
    "server, url",
    [
        (ServerConfig(), "http://127.0.0.1:1"),
        (ServerConfig(host="0.0.0.0"), "http://127.0.0.1:1"),
        (ServerConfig(host="::"), "http://[::1]:1"),
        (ServerConfig(host="fe80::1"), "http://[fe80::1]:1"),
        (ServerConfig(host="box", ssl_certfile="c", ssl_keyfile="k"), "https://box:1"),
    ],
)
def test_the_url_can_be_opened_on_this_machine(server: ServerConfig, url: str) -> None:
    assert base_url(server, 1) == url


def test_a_failed_start_is_one_sentence_and_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    StartUp(Config(), out).failed(ConfigError("it does not fit; try less"))
    assert json.loads(out.getvalue()) == {"event": "streamserve_failed", "error": "it does not fit; try less"}
    assert capsys.readouterr().err == "streamserve: it does not fit; try less\n"


def test_phases_share_the_time_and_are_named_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("streamserve.startup.time.monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "dumb")
    for out in (io.StringIO(), Terminal()):
        display = StartUp(Config(), out)
        with display.phase("weights"):
            now[0] += 2
            with display.phase("kernels") as progress:  # inside: its time is not the weights'
                now[0] += 0.5
                progress(1, 3)
                progress(3, 3)
            now[0] += 1
        now[0] += 10  # between phases
        with display.phase("kernels"):
            now[0] += 0.25
        display.ready(31000, "SmolLM2", 14.0)
        if out.isatty():
            assert "  ready in 14.0 s: weights 3.0, kernels 0.8\n" in out.getvalue()
            assert "3/3" in out.getvalue()
        else:
            assert json.loads(out.getvalue().splitlines()[-1])["phases"] == {"weights": 3.0, "kernels": 0.75}


def test_a_phase_that_fails_is_closed() -> None:
    display = StartUp(Config(), out := io.StringIO())
    with pytest.raises(ConfigError), display.phase("memory"):
        raise ConfigError("no")
    with display.phase("graphs"):
        pass
    display.ready(1, "m", 0.0)
    assert set(json.loads(out.getvalue())["phases"]) == {"memory", "graphs"}


def test_one_bar_is_shown_at_a_time_and_lines_stand_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU starts: decisions come after the weights, and bars of phases inside the loading."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")
    config = Config()
    display = StartUp(config, out := Terminal())
    with display.loading() as weights:
        weights(50, 100)
        weights(100, 100)
        display.decided(resolve(config, MODEL, CPU))
        with display.phase("graphs") as graphs:
            graphs(7, 7)
        weights(100, 100)  # late news change nothing
    lines = [line.split()[0] for line in out.getvalue().splitlines() if line.strip()]
    assert lines[0] == "weights" and lines[-1] == "graphs"
    assert lines.count("weights") == lines.count("graphs") == 1
    assert "memory" in lines


def test_an_embedding_model_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    for out in (io.StringIO(), Terminal()):
        StartUp(Config(), out).ready(31000, "m", 1.0, "vectors")
        if out.isatty():
            assert '  Embeddings  http://127.0.0.1:31000/v1/embeddings   model "vectors"\n' in out.getvalue()
        else:
            assert json.loads(out.getvalue())["embedding_model"] == "vectors"
