"""What was measured at an earlier start: which kernel is faster on this processor, for this model.

Owns one JSON file per combination of processor, versions and model, in the user's cache folder. Knows nothing of what is
measured: values are JSON. A broken file is ignored, with a log event, and written anew.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger(__name__)


def cache_folder() -> Path:
    """Where measurements are kept; XDG_CACHE_HOME moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamserve"


class Calibration:
    """Measurements under one key. `facts` is everything they depend on (processor, threads, versions, model numbers);
    a change of any of them is another file."""

    def __init__(self, facts: Mapping[str, Any], folder: Path | None = None) -> None:
        self._facts = json.loads(json.dumps(dict(facts), sort_keys=True))  # a set, whose order changes, is refused
        digest = sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or cache_folder()) / f"calibration-{digest}.json"

    def load(self) -> dict[str, Any] | None:
        """What `store` wrote under these facts, or None. Blocks on the disk."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["facts"] == self._facts and isinstance(found["measured"], dict):
                return dict(found["measured"])
            reason = "it was written for other facts"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        log.warning("calibration_ignored", path=str(self.path), reason=reason, hint="it is measured again; delete the file")
        return None

    def store(self, measured: Mapping[str, Any]) -> None:
        """Replace the file in one move, so that no reader sees half of it. A cache that cannot be written costs a
        measurement at the next start, not this start."""
        text = json.dumps({"facts": self._facts, "measured": dict(measured)}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                file.write(text)
            os.replace(file.name, self.path)
        except OSError as error:
            log.warning("calibration_not_stored", path=str(self.path), reason=str(error), hint="set XDG_CACHE_HOME")


def stored(folder: Path | None = None) -> list[tuple[Path, dict[str, Any]]]:
    """Every readable calibration file with its content (`facts`, `measured`), newest first; for `doctor`."""
    files = sorted((folder or cache_folder()).glob("calibration-*.json"), key=lambda path: -path.stat().st_mtime)
    found = []
    for path in files:
        try:
            found.append((path, json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError):
            found.append((path, {}))
    return found
