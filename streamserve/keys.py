"""API keys as they are given: one or several, themselves or in a file.

Owns the environment variables that hold them, and how they are read. Knows neither who is let in by a key nor who sends it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from streamserve.errors import ConfigError

API_KEY, ADMIN_KEY = "STREAMSERVE_API_KEY", "STREAMSERVE_ADMIN_API_KEY"  # a command line can be read by everybody
OF_ANY_SERVER = (API_KEY, "OPENAI_API_KEY")


def keys_of(entry: str, name: str) -> list[str]:
    """The keys that an entry stands for: `@FILE` for those in there, one a line. `name`: what the entry was given as. Raises
    ConfigError."""
    keys = [entry]
    if entry.startswith("@"):
        try:
            text = Path(entry[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name} names the file {entry[1:]!r}, which cannot be read: {error}") from None
        lines = [line.strip() for line in text.splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ConfigError(f"{name} names the file {entry[1:]!r}, which holds no key; one a line is expected")
    for key in keys:
        # Anything else cannot be sent in a header, or not without surprises.
        if not key or not key.isascii() or not key.isprintable() or key != key.strip():
            raise ConfigError(f"{name} is empty, or begins or ends with a space, or holds characters that no header can carry")
    return keys


def keys_in(environ: Mapping[str, str], name: str) -> list[str]:
    """Those that a variable of the environment holds, one entry a line. Raises ConfigError."""
    return [key for entry in environ.get(name, "").splitlines() for key in keys_of(entry, name)]


def key_to_send(environ: Mapping[str, str], names: Sequence[str] = OF_ANY_SERVER) -> str | None:
    """What a client sends: the first key of the first of these variables that has one. Raises ConfigError."""
    return next((key for name in names for key in keys_in(environ, name)), None)
