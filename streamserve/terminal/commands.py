"""What may be typed beside messages: `/help`, `/set temperature 0.2` and the like.

Owns their names and what each does to a conversation; says what is to be shown. Reads and writes no terminal.
"""

import json
import shlex
from collections.abc import Callable, Generator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from streamserve.errors import ConfigError
from streamserve.terminal.chat import Chat, Piece

QUOTES = '"""'
OWN_FIELDS = ("messages", "n", "stream", "stream_options")  # of requests: a chat fills them itself


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a command: `says` is shown; `pieces` is an answer that begins; `leaves` ends the program."""

    says: str = ""
    pieces: Generator[Piece, None, None] | None = None
    leaves: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """One of them."""

    usage: str
    help: str
    run: Callable[[Chat, str], Done]


def run(chat: Chat, line: str) -> Done:
    """Run the command that a line is. Raises ConfigError with what would have been understood."""
    name, _, rest = line.strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"/help shows them; a message that begins with / goes between {QUOTES}"
        raise ConfigError(f"unknown command {name}; {hint}")
    return command.run(chat, rest.strip())


def _help(chat: Chat, rest: str) -> Done:
    shown = [command for name, command in COMMANDS.items() if name not in ("/exit", "/quit")]
    lines = [f"  {command.usage:<24} {command.help}" for command in shown]
    lines.append(f"  {QUOTES:<24} begins and ends a message of several lines")
    lines.append(f"  {'Ctrl+C':<24} stops the answer; a second time, or Ctrl+D, leaves")
    return Done("\n".join(lines))


def _clear(chat: Chat, rest: str) -> Done:
    chat.clear()
    return Done("the conversation begins anew")


def _system(chat: Chat, rest: str) -> Done:
    if not rest:
        return Done(f"system: {chat.system or '(the model has its own, or none)'}")
    chat.system = rest
    return Done("system text set")


def _set(chat: Chat, rest: str) -> Done:
    if not rest:
        return Done("\n".join(f"  {name} {json.dumps(value)}" for name, value in chat.settings.items()) or "nothing is set")
    name, _, text = rest.partition(" ")
    name = name.replace("-", "_")
    if not text.strip():
        chat.settings.pop(name, None)
        return Done(f"{name} is the model's own again")
    if name in OWN_FIELDS:
        raise ConfigError(f"{name} is the chat's own and cannot be set")
    chat.settings[name] = _value(text.strip())
    return Done(f"{name} is {json.dumps(chat.settings[name])}")


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=str)  # NaN and the like are no JSON
    except ValueError:
        return text


def _again(chat: Chat, rest: str) -> Done:
    if not chat.messages:
        raise ConfigError("nothing was asked yet")
    return Done(pieces=chat.again())


def _image(chat: Chat, rest: str) -> Done:
    if not rest:
        raise ConfigError("give a file: /image FILE")
    chat.attach(_path(rest))
    return Done("the picture goes with your next message")


def _path(text: str) -> str:
    """A file's name as it was typed, or as a terminal writes it when the file is dropped there: quoted."""
    try:
        return text if Path(text).exists() else " ".join(shlex.split(text))
    except (OSError, ValueError):
        return text


def _save(chat: Chat, rest: str) -> Done:
    if not rest:
        raise ConfigError("give a file: /save FILE")
    system = [{"role": "system", "content": chat.system}] if chat.system else []
    body = {"model": chat.model, "messages": [*system, *chat.messages], **chat.settings}
    try:
        Path(rest).expanduser().write_text(json.dumps(body, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {rest}: {error.strerror}") from None
    return Done(f"saved to {rest}, as the body of a request")


def _leave(chat: Chat, rest: str) -> Done:
    return Done(leaves=True)


COMMANDS = {
    "/help": Command("/help", "shows this", _help),
    "/clear": Command("/clear", "forgets what was said", _clear),
    "/system": Command("/system TEXT", "says what the model is told first", _system),
    "/set": Command("/set NAME VALUE", "sets a field of requests, as temperature 0.2; without VALUE takes it back", _set),
    "/regen": Command("/regen", "answers the last message again", _again),
    "/image": Command("/image FILE", "puts a picture before your next message", _image),
    "/save": Command("/save FILE", "writes the conversation as JSON", _save),
    "/bye": Command("/bye", "leaves", _leave),
    "/exit": Command("/exit", "leaves", _leave),
    "/quit": Command("/quit", "leaves", _leave),
}
