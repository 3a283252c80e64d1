"""`streamserve run` as people use it: at a terminal, and in a pipe."""

import fcntl
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.benchmark.foreign import KNOWN, Foreign

# The process of a terminal is made by a fork of one that may have threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

COMMAND = (sys.executable, "-m", "streamserve", "run")
FAKE = ("--fake", "--fake-step-ms", "1", "--verbose")
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """One end of a terminal whose other end a program has."""

    def __init__(self, descriptor: int, process: "subprocess.Popen[bytes]") -> None:
        self._descriptor = descriptor
        self.process = process
        self.seen = ""

    def until(self, words: str) -> str:
        """What is shown up to these words."""
        limit = time.monotonic() + 30
        while words not in self.seen:
            ready, _, _ = select.select([self._descriptor], [], [], max(0.0, limit - time.monotonic()))
            assert ready, f"waited for {words!r}; seen: {self.seen}"
            try:
                data = os.read(self._descriptor, 65536)
            except OSError:  # the program has ended
                data = b""
            assert data, f"ended before {words!r}: {self.seen}"
            self.seen += data.decode("utf-8", "replace")
        shown, _, self.seen = self.seen.partition(words)
        return shown

    def type(self, text: str) -> None:
        """As a person does."""
        os.write(self._descriptor, text.encode())

    def interrupt(self) -> None:
        """Ctrl+C at a prompt, a moment behind it: while readline shows its prompt it would notice only the next key."""
        time.sleep(0.3)
        self.type(CTRL_C)

    def line(self, text: str, answer: str) -> str:
        """Type a line; what is shown behind it, up to these words."""
        self.type(text + "\n")
        self.until(text.splitlines()[-1])
        return self.until(answer)


@contextmanager
def _terminal(folder: Path, *arguments: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "XDG_STATE_HOME": str(folder)}
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=environment,
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_chat_at_a_terminal(tmp_path: Path) -> None:
    with _terminal(tmp_path, *FAKE, "--max-tokens", "20") as terminal:
        assert "fake: /help shows" in terminal.until(">>> ")
        assert "cached" in terminal.line("Hello", ">>> ")
        assert "temperature 0.2" in terminal.line("/help", ">>> ")
        assert "did you mean /regen?" in terminal.line("/regn", ">>> ")
        assert "temperature is 0.2" in terminal.line("/set temperature 0.2", ">>> ")
        assert "20 tokens, " in terminal.line("/regen", ">>> ")
        terminal.line("/set temprature 3", ">>> ")
        assert "error: unknown field" in terminal.line("Does this work?", ">>> ")
        terminal.line("/set temprature", ">>> ")
        terminal.type('"""first line\n')
        terminal.until("... ")
        assert "20 tokens, " in terminal.line('second line"""', ">>> ")
        assert "20 tokens, " in terminal.line('"""/etc/hosts is a file"""', ">>> ")
        assert "n is the chat's own" in terminal.line(" /set n 2", ">>> ")
        assert 'seed is "NaN"' in terminal.line("/set seed NaN", ">>> ")
        terminal.line("/set seed", ">>> ")
        terminal.line("/system Be brief.", ">>> ")
        assert "error: cannot read no ne.png" in terminal.line("/image 'no ne.png'", ">>> ")
        terminal.line(f"/save {tmp_path / 'saved'}", ">>> ")
        terminal.line("/set max_tokens 7000", ">>> ")
        terminal.type("Go on\n")
        terminal.until("Go on")
        terminal.until("fake engine")
        terminal.type(CTRL_C)
        terminal.until("(stopped)")
        terminal.until(">>> ")
        terminal.line("/set max_tokens 2", ">>> ")
        assert "2 tokens, " in terminal.line("Still there?", ">>> ")
        terminal.interrupt()
        terminal.until("once more")
        terminal.until(">>> ")
        terminal.interrupt()
        assert terminal.process.wait(timeout=20) == 0
    saved = json.loads((tmp_path / "saved").read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", *["user", "assistant"] * 3]
    assert saved["messages"][3]["content"] == "first line\nsecond line" and saved["temperature"] == 0.2
    assert "Still there?" in (tmp_path / "streamserve" / "history").read_text()


def test_a_chat_with_another_server(tmp_path: Path) -> None:
    with (
        Foreign(KNOWN | {"stream_options"}, says_done=False) as server,
        _terminal(tmp_path, "--url", f"http://127.0.0.1:{server.port}/v1", "--system", "Be kind.") as terminal,
    ):
        assert "theirs: /help" in terminal.until(">>> ")
        assert "word0 word1 word2" in terminal.line("Hello", ">>> ")
        assert "beginning anew" not in terminal.line("/clear", ">>> ")
        assert "error" not in terminal.line("Again", ">>> ")
        terminal.type(CTRL_D)
        assert terminal.process.wait(timeout=20) == 0
    assert [one["content"] for one in server.bodies[-1]["messages"]] == ["Be kind.", "Again"]


def _piped(*arguments: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *arguments], input=text, capture_output=True, text=True, timeout=60)


def test_one_prompt_is_answered_and_nothing_else_is_written() -> None:
    done = _piped("-", "Say it:", *FAKE, "--max-tokens", "5", text="twice\n")
    assert done.returncode == 0 and done.stdout.strip() and done.stdout.endswith("\n")
    assert done.stderr.startswith("[5 tokens, ") and done.stderr.count("\n") == 1


def test_what_goes_wrong_is_one_sentence() -> None:
    done = _piped("--url", "ftp://x", text="hello")
    assert (done.returncode, done.stdout) == (2, "") and "'ftp://x', which is no URL" in done.stderr
    done = _piped("-", *FAKE, text="\n")
    assert (done.returncode, done.stdout) == (2, "") and "nothing to answer" in done.stderr
    done = _piped("--url", "127.0.0.1:9", text="hello")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1 and "is the server running?" in done.stderr
    done = _piped("-", "a", *FAKE, "--temperature", "-3")
    assert (done.returncode, done.stdout) == (1, "") and "temperature" in done.stderr and done.stderr.count("\n") == 1


def test_a_model_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from streamserve.terminal.chat import Piece
    from streamserve.terminal.run import _show

    _show(iter([Piece("hm", is_thought=True), Piece("a\x1b]0;x\x07\tb\x9b1m\n")]), thinks_aloud=False)  # type: ignore[arg-type]
    assert capsys.readouterr().out == "a␛]0;x␇\tb�1m\n"
