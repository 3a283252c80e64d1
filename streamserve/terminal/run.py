"""`streamserve run`: a chat in the terminal, with a model in this process or a server somewhere.

Owns the terminal: lines in, answers out as they come, Ctrl+C, history. One prompt on the command line, or what is piped in, is
answered once, and nothing but the answer is written to standard output.
"""

import argparse
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamserve.config import Config
from streamserve.errors import ConfigError, StreamServeError
from streamserve.keys import key_to_send
from streamserve.lang import loops
from streamserve.lang.transport import Http, Transport
from streamserve.terminal import commands
from streamserve.terminal.chat import Chat, Piece
from streamserve.terminal.commands import QUOTES

PROMPT, MORE = ">>> ", "... "
FAILED, INTERRUPTED = 1, 130
HISTORY_LINES = 1000
# What a model writes must not command the terminal: control characters are shown as pictures of themselves.
_SAFE = {
    **{code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def run(config: Config, options: argparse.Namespace) -> int:
    """Chat until the other side of the terminal leaves."""
    with _opened(config, options) as (transport, model):
        chat = Chat(transport, model, _settings(options), options.system)
        for path in options.image:
            chat.attach(path)
        prompt = _one_prompt(options)
        if prompt is not None:
            return _answer_once(chat, prompt, options)
        return _Session(chat, is_verbose=options.verbose).run()


@contextmanager
def _opened(config: Config, options: argparse.Namespace) -> Iterator[tuple[Transport, str | None]]:
    """How the model is reached, and by which name."""
    if options.url is not None:
        url = options.url if "://" in options.url else f"http://{options.url}"
        if not url.startswith(("http://", "https://")) or url.endswith("://"):
            raise ConfigError(f"--url is {options.url!r}, which is no URL such as http://127.0.0.1:30000")
        transport = Http(url.rstrip("/").removesuffix("/v1"), api_key=key_to_send(os.environ))
        try:
            yield transport, config.model.model_path
        finally:
            loops.run(transport.aclose())
        return
    from streamserve.llm.host import Host, InProcess
    from streamserve.llm.settings import INSIDE
    from streamserve.terminal.loading import Loading

    with Loading(sys.stderr) as display:
        host = Host(replace(config, server=replace(config.server, **INSIDE)), display)
    try:
        yield InProcess(host), None
    finally:
        host.close()


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in ("max_tokens", "temperature", "seed")}
    return {name: value for name, value in given.items() if value is not None}


def _one_prompt(options: argparse.Namespace) -> str | None:
    """The only prompt there will be: from the command line, from a pipe, or one before the other."""
    piped = "" if sys.stdin.isatty() else sys.stdin.read()
    if sys.stdin.isatty() and options.prompt is None:
        return None
    prompt = "\n\n".join(text for text in (options.prompt, piped.strip("\n")) if text)
    if not prompt.strip():
        raise ConfigError("there is nothing to answer: neither a prompt nor standard input has text")
    return prompt


def _answer_once(chat: Chat, prompt: str, options: argparse.Namespace) -> int:
    chat.find_model()
    with closing(chat.say(prompt)) as pieces:
        _show(pieces, thinks_aloud=sys.stdout.isatty())
    if options.verbose:
        print(f"[{chat.told.line()}]", file=sys.stderr)
    return 0


def _show(pieces: Generator[Piece, None, None], *, thinks_aloud: bool = True) -> None:
    """Write an answer as it comes; thoughts dimmed, or not at all."""
    is_thinking = False
    last = "\n"
    try:
        for piece in pieces:
            if piece.is_thought and not thinks_aloud:
                continue
            if piece.is_thought != is_thinking:
                _write(("\x1b[2m" if piece.is_thought else "\x1b[0m\n\n") if thinks_aloud else "")
                is_thinking = piece.is_thought
            last = piece.text[-1:] or last
            _write(piece.text.translate(_SAFE))
    finally:
        _write(("\x1b[0m" if is_thinking else "") + ("" if last == "\n" else "\n"))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class _Session:
    """A conversation at a terminal."""

    def __init__(self, chat: Chat, *, is_verbose: bool) -> None:
        self._chat = chat
        self._is_verbose = is_verbose
        self._was_interrupted = False  # by the last thing that was done: once more means leaving

    def run(self) -> int:
        """Line after line, until somebody leaves."""
        model = self._chat.find_model()
        print(f"{model}: /help shows what can be typed; Ctrl+D leaves")
        with _history():
            while True:
                try:
                    line, is_message = _read()
                except EOFError:
                    print()
                    return 0
                except KeyboardInterrupt:
                    print()
                    if self._was_interrupted:
                        return 0
                    self._was_interrupted = True
                    print("(once more, Ctrl+D or /bye to leave)")
                    continue
                if line.strip():
                    self._was_interrupted = False
                    if self._take(line, is_message=is_message):
                        return 0

    def _take(self, line: str, *, is_message: bool) -> bool:
        """Do what a line says; whether it says to leave."""
        try:
            if is_message or not line.lstrip().startswith("/"):
                self._answer(self._chat.say(line))
                return False
            done = commands.run(self._chat, line)
            if done.says:
                print(done.says)
            if done.pieces is not None:
                self._answer(done.pieces)
            return done.leaves
        except StreamServeError as error:
            print(f"error: {error}")
            return False

    def _answer(self, pieces: Generator[Piece, None, None]) -> None:
        try:
            with closing(pieces):
                _show(pieces)
        except KeyboardInterrupt:
            self._was_interrupted = True
            print("(stopped)")
        if self._is_verbose:
            print(f"[{self._chat.told.line()}]")


def _read() -> tuple[str, bool]:
    """A line, or what stands between two lots of quotes: that is a message whatever it begins with."""
    line = input(PROMPT)
    if not line.startswith(QUOTES):
        return line, False
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(input(MORE))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip("\n"), True


@contextmanager
def _history() -> Iterator[None]:
    """Lines of earlier chats at the arrow keys, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "streamserve"
    file = folder / "history"
    with suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)
