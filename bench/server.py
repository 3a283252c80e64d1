"""`streamserve serve` in a process of its own, as a user starts it, and what can be asked of it from outside.

Owns the process and the lines it prints. Knows no workload.
"""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from streamserve.config import Config
from streamserve.flags import Parser, add_flags, read_config

ROOT = Path(__file__).parents[1]
FAKE = "fake"  # as a model: the server's own made-up tokens
START_LIMIT_S = 600.0


class Server:
    """A running server. `ready_s` is the time from exec to the line that says it is ready."""

    def __init__(
        self,
        model: str | None,
        flags: Sequence[str] = (),
        *,
        program: Sequence[str] = ("-m", "streamserve", "serve"),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.command = [sys.executable, *program, *_model_flags(model), "--port", "0", *flags]
        self.port, self.model, self.ready_s = 0, "", 0.0
        self.lines: list[str] = []
        self.events: list[dict[str, Any]] = []
        self._ready = threading.Event()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.started_s = time.perf_counter()
        self.process = subprocess.Popen(
            self.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(START_LIMIT_S) or self.port == 0:
            self.close()
            raise SystemExit("the server did not start:\n" + "\n".join(self.lines[-30:]))

    def _read(self) -> None:
        """All it prints, so that it never waits for us."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if not isinstance(event, dict):
                continue
            self.events.append({**event, "after_s": round(time.perf_counter() - self.started_s, 3)})
            if event.get("event") == "streamserve_ready":
                self.port, self.model, self.ready_s = event["port"], event["model"], time.perf_counter() - self.started_s
                self._ready.set()
        self._ready.set()

    def problems(self) -> list[str]:
        """Warnings and errors it has logged."""
        return [json.dumps(event) for event in self.events if event.get("level") in ("warning", "error", "critical")]

    def get(self, path: str) -> Any:
        """A JSON answer."""
        return self._ask("GET", path, None)

    def metrics(self) -> dict[str, float]:
        """The values of /metrics that have no labels, by name."""
        lines = self._bytes("GET", "/metrics", None).decode().splitlines()
        pairs = [line.split(" ", 1) for line in lines if not line.startswith("#") and "{" not in line]
        return {name: float(value) for name, value in pairs}

    def flush_cache(self) -> None:
        """Forget every cached prefix, as soon as nothing runs."""
        self._bytes("POST", "/flush_cache?timeout=30", None)

    def _ask(self, method: str, path: str, body: Any) -> Any:
        return json.loads(self._bytes(method, path, body))

    def _bytes(self, method: str, path: str, body: Any) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            data = answer.read()
            if answer.status != 200:
                raise SystemExit(f"{method} {path}: {answer.status} {data[:300]!r}")
            return data
        finally:
            connection.close()

    def context_len(self) -> int:
        """Most tokens of a request, prompt and answer."""
        return int(self._ask("POST", "/tokenize", {"prompt": "a"})["max_model_len"])

    def wait_idle(self, limit_s: float = 60.0) -> bool:
        """Whether no request is left, within the limit."""
        ends_s = time.monotonic() + limit_s
        while time.monotonic() < ends_s:
            load = self.get("/v1/loads")
            if load["running"] == load["waiting"] == 0:
                return True
            time.sleep(0.1)
        return False

    def resident_mib(self) -> float:
        """Resident memory of the process."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise AssertionError("the server has no resident memory")

    def cpu_s(self) -> float:
        """Processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Stop it, and wait until it has gone."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A bench's own arguments, and those behind `--`, which are for the server."""
    own = list(arguments)
    at = own.index("--") if "--" in own else len(own)
    return own[:at], own[at + 1 :]


def config_of(model: str | None, flags: Sequence[str]) -> Config:
    """The settings that the same words give on the command line."""
    parser = Parser("bench")
    add_flags(parser, show_all=True)
    namespace = parser.parse([*_model_flags(model), *flags])
    return read_config(namespace)[0]


def _model_flags(model: str | None) -> list[str]:
    return ["--fake"] if model == FAKE else ["--model-path", model] if model else []


def random_range(model: str | None) -> range:
    """Token ids that random prompts of a model are drawn from: ordinary words, no special tokens."""
    if model == FAKE:
        return range(1, 250)
    config = Path(model or "") / "config.json"
    if model and config.is_file():
        size = int(json.loads(config.read_text())["vocab_size"])
        return range(1000, 100_000) if size > 100_000 else range(size // 16, size * 15 // 16)
    return range(1000, 48_000)
