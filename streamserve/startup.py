"""What a newcomer sees while the server starts: identity, decisions with their reasons, memory, one weight bar, ready.

Owns standard output during a start. On a terminal it is text; otherwise the same facts are JSON lines, of which
`streamserve_ready` (with the URL) is the one scripts wait for. Knows nothing of how things are loaded.
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import structlog

from streamserve import __version__
from streamserve.config import Config, ServerConfig
from streamserve.log import is_json, wants_colour
from streamserve.resolve import Reason, Resolved

log = structlog.get_logger(__name__)
Progress = Callable[[int, int], None]  # done, in all; of weights: bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class StartUp:
    """The start-up display. Methods are called in the order below, each at most once (`phase`: any time, from one thread at
    a time); any thread."""

    def __init__(self, config: Config, out: TextIO | None = None) -> None:
        self._config = config
        self._out = sys.stdout if out is None else out
        self._json = is_json(config.server.log_format, self._out)
        self._bar: _Bar | None = None  # the one that is shown: a new one ends it
        self._progress: dict[str, object] | None = None
        self._phases: dict[str, float] = {}  # seconds, in order of their first beginning
        self._open: list[str] = []  # phases that are under way, the innermost last
        self._since = 0.0  # when the innermost went on

    def progress(self) -> dict[str, object] | None:
        """How far the part of the start is that takes time now: its name, what is done, of how much (of weights: bytes)."""
        return self._progress

    def hello(self, model: str, device: str) -> None:
        """The first line: who starts what on which device. Print it before anything slow."""
        python = platform.python_version()
        self._event("streamserve_starting", version=__version__, model=model, device=device, python=python)
        self._line(f"streamserve {__version__} · {model} · {device} · Python {python}")

    def decided(self, resolved: Resolved, more: Iterable[Reason] = ()) -> None:
        """What was chosen and why (`more`: decisions made outside resolve(), such as kernels), then the memory table."""
        for reason in (*resolved.reasons, *more):
            value, why = reason.value, reason.why
            self._event("setting_resolved", name=reason.name, value=value, why=why, flag=reason.flag, origin=reason.origin)
            self._line(f"  {reason.name:<16} {_grouped(value):<12} {why}  ({reason.flag})")
        memory = memory_table(resolved)
        self._event("memory_planned", **memory, kv_tokens=resolved.kv_tokens)
        chats = resolved.kv_tokens / resolved.context_len
        self._line(
            f"  {'memory':<16} weights {_gb(resolved.weight_bytes)} | KV {_gb(resolved.kv_bytes)} = {resolved.kv_tokens:,} "
            f"tokens ({chats:.1f} full contexts) | reserve {_gb(resolved.reserve_bytes)} | left {_gb(memory['left_bytes'])} GB"
        )

    @contextmanager
    def loading(self) -> Iterator[Progress]:
        """One bar over all weight bytes; the callable takes bytes done and bytes in all. The bar appears with the first call,
        so that lines printed before it stand above it."""
        started, num_bytes = time.monotonic(), 0
        with self._showing("weights") as show:

            def count(done: int, total: int) -> None:
                nonlocal num_bytes
                num_bytes = done
                show(done, total)

            yield count
        self._event("weights_loaded", bytes=num_bytes, seconds=round(time.monotonic() - started, 3))

    @contextmanager
    def phase(self, name: str) -> Iterator[Progress]:
        """A part of the start whose time is shown in the end; several of one name count together, and one inside another is
        taken out of it. A bar appears with the first call of the callable, which takes how many are done, and of how many."""
        self._switch()
        self._phases.setdefault(name, 0.0)
        self._open.append(name)
        try:
            with self._showing(name) as show:
                yield show
        finally:
            self._switch()
            self._open.pop()

    @contextmanager
    def _showing(self, name: str) -> Iterator[Progress]:
        """A bar, if people are looking. Whoever asks is told anyway."""
        bar = _Bar(self._out, name)

        def show(done: int, total: int) -> None:
            self._progress = {"phase": name, "done": done, "total": total}
            if self._json:
                return
            if self._bar is not bar:
                if self._bar is not None:
                    self._bar.close()
                self._bar = bar
            bar.show(done, total)

        try:
            yield show
        finally:
            self._progress = None
            bar.close()

    def _switch(self) -> None:
        """Book the time until now on the innermost phase."""
        now = time.monotonic()
        if self._open:
            self._phases[self._open[-1]] += now - self._since
        self._since = now

    def ready(self, port: int, model_name: str, seconds: float, encoder_name: str | None = None) -> None:
        """The last block: where the server is and how to try it. `encoder_name`: the embedding model beside the other."""
        server = self._config.server
        url = base_url(server, port)
        if server.host not in LOOPBACK and not server.api_key:
            log.warning("server_open_to_network", host=server.host, hint="anyone who reaches it may use it; set --api-key")
        phases = {name: round(took, 2) for name, took in self._phases.items()}
        more = {} if encoder_name is None else {"embedding_model": encoder_name}
        self._event("streamserve_ready", url=url, model=model_name, port=port, seconds=round(seconds, 2), phases=phases, **more)
        times = ", ".join(f"{name} {took:.1f}" for name, took in phases.items())
        self._line(f"  ready in {seconds:.1f} s{': ' if times else ''}{times}\n")
        if not server.disable_playground:
            self._line(f"  Playground  {url}/")
        self._line(f'  OpenAI API  {url}/v1   model "{model_name}"   key: {_key_state(server)}')
        if encoder_name is not None:
            self._line(f'  Embeddings  {url}/v1/embeddings   model "{encoder_name}"')
        self._line(f"  Try         {try_line(server, url, model_name)}")
        self._line(f"  Stop        Ctrl+C (running requests get up to {server.drain_timeout_s:g} s; again = now)")

    def failed(self, error: Exception) -> None:
        """The start ended here: one sentence on standard error; the traceback at log level debug."""
        self._event("streamserve_failed", error=str(error))
        print(f"streamserve: {error}", file=sys.stderr, flush=True)
        log.debug("start_failed", exc_info=error)

    def _line(self, text: str) -> None:
        if not self._json:
            if self._bar is not None:
                self._bar.close()  # it would be drawn over the line
            print(text, file=self._out, flush=True)

    def _event(self, event: str, **fields: Any) -> None:
        if self._json:
            print(json.dumps({"event": event, **fields}, ensure_ascii=False), file=self._out, flush=True)


def memory_table(resolved: Resolved) -> dict[str, int]:
    """Bytes by purpose; `left_bytes` of what is free now stays unused."""
    used = resolved.weight_bytes + resolved.kv_bytes + resolved.reserve_bytes
    return {
        "weight_bytes": resolved.weight_bytes,
        "kv_bytes": resolved.kv_bytes,
        "reserve_bytes": resolved.reserve_bytes,
        "left_bytes": max(0, resolved.free_bytes - used),
    }


def base_url(server: ServerConfig, port: int) -> str:
    """A URL that works on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(server.host, f"[{server.host}]" if ":" in server.host else server.host)
    return f"{'https' if server.ssl_certfile else 'http'}://{host}:{port}"


def try_line(server: ServerConfig, url: str, model_name: str) -> str:
    """A command to paste into another terminal."""
    key = ' -H "Authorization: Bearer $API_KEY"' if server.api_key else ""
    body = json.dumps({"model": model_name, "messages": [{"role": "user", "content": "What is the capital of France?"}]})
    return f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"


def _key_state(server: ServerConfig) -> str:
    if server.api_key:
        return "set"
    return "none (loopback only)" if server.host in LOOPBACK else "NONE, and open to the network: set --api-key"


class _Bar:
    """A progress bar that starts when it is first told something, and stays as it is once closed."""

    def __init__(self, out: TextIO, name: str) -> None:
        self._out = out
        self._name = name
        self._progress: Any = None
        self._task: Any = None
        self._is_closed = False

    def show(self, done: int, total: int) -> None:
        if self._is_closed:
            return
        if self._progress is None:
            self._progress = _rich_progress(self._out, self._name)
            self._progress.start()
            self._task = self._progress.add_task(self._name, total=total)
        self._progress.update(self._task, completed=done)

    def close(self) -> None:
        if self._progress is not None and not self._is_closed:
            self._progress.stop()
        self._is_closed = True


def _rich_progress(out: TextIO, name: str) -> Any:
    from rich.console import Console  # only a terminal pays for it
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(file=out, no_color=not wants_colour(out))
    counts = (DownloadColumn(), TransferSpeedColumn()) if name == "weights" else (MofNCompleteColumn(),)
    return Progress(TextColumn(f"  {name:<16}"), BarColumn(), *counts, TimeRemainingColumn(), console=console)


def _grouped(value: str) -> str:
    return f"{int(value):,}" if value.isdigit() else value


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f}"
