"""A server of its own process, started for programs and ended with them.

Owns that process: it is up when the constructor returns, and ends with `shutdown`, with this process, or when nobody holds the
Runtime any longer, whatever comes first. Everything else is the server's: this talks to it as anybody does (endpoint.py).
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import Any
from weakref import finalize

from streamserve.config import ServerConfig
from streamserve.errors import StartError
from streamserve.keys import ADMIN_KEY, API_KEY, key_to_send
from streamserve.lang import loops
from streamserve.lang.backend import Prompt
from streamserve.lang.endpoint import RuntimeEndpoint
from streamserve.lang.streams import Stream
from streamserve.lang.tokenizer import ServerTokenizer
from streamserve.sglang_flags import arguments_of

NUM_LAST_LINES = 20  # of its output, for an error
STOP_WAIT_S = 10.0
# The child's own: its standard input ends when this process does, however that comes. Nothing is ever written there.
_WATCHED = """
import os, signal, sys, threading, time
def watch():
    while os.read(0, 4096):  # not through sys.stdin, whose lock the interpreter wants at its end
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
from streamserve.launch_server import main
sys.exit(main(sys.argv[1:]))
"""


class Runtime:
    """A server with the model at `model_path` (the default model without one), on a free port unless `port` says which.

    `settings` are the server's flags, in SGLang's names or ours. `endpoint` is the back end that it is; the Runtime itself will
    do where one is wanted. Raises StartError with the server's last words when it does not come up, within `launch_timeout`
    seconds if that is given.
    """

    def __init__(
        self,
        model_path: str | None = None,
        *,
        log_level: str = "error",
        launch_timeout: float | None = None,
        chat_template_name: str | None = None,
        **settings: Any,
    ) -> None:
        given = {"port": 0, **settings, "model_path": model_path, "log_level": log_level, "log_format": "json"}
        environment = {**os.environ, **_secrets(given)}
        self._child = _Child([sys.executable, "-c", _WATCHED, *arguments_of(given)], environment)
        self._finalizer = finalize(self, self._child.stop)
        self._drain_s = float(settings.get("drain_timeout_s", ServerConfig().drain_timeout_s))
        self.url = self._child.ready(launch_timeout)
        self.endpoint = RuntimeEndpoint(
            self.url,
            api_key=key_to_send(environment, (ADMIN_KEY, API_KEY)),  # an operator's opens every route
            verify=False if settings.get("ssl_certfile") else None,
            chat_template_name=chat_template_name,
        )

    @property
    def pid(self) -> int:
        """Of the server."""
        return self._child.pid

    @property
    def generate_url(self) -> str:
        """SGLang's name for the native route."""
        return f"{self.url}/generate"

    def generate(
        self, prompt: str | Sequence[str], sampling_params: Mapping[str, Any] | None = None, **fields: Any
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """POST /generate, waited for: SGLang's answer, or a list of them for a list. `fields` are further ones of the body."""
        found: dict[str, Any] | list[dict[str, Any]] = self._ask("/generate", _native(prompt, sampling_params, fields))
        return found

    async def async_generate(
        self, prompt: str | Sequence[str], sampling_params: Mapping[str, Any] | None = None, **fields: Any
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The same, awaited on any loop."""
        body = _native(prompt, sampling_params, fields)
        found: dict[str, Any] | list[dict[str, Any]]
        found = await loops.arun(self.endpoint.call("POST", "/generate", body))
        return found

    async def add_request(
        self, prompt: str, sampling_params: Mapping[str, Any] | None = None, **fields: Any
    ) -> AsyncIterator[str]:
        """SGLang's stream, on any loop: what is new of the text, as it comes. Leaving it early ends the answer."""
        body = {**_native(prompt, sampling_params, fields), "stream": True, "incremental": True}
        async with aclosing(aiter(Stream(partial(self.endpoint.events, "/generate", body)))) as events:
            async for event in events:
                yield event["text"]

    def encode(self, prompt: str | Sequence[str]) -> Any:
        """POST /encode: vectors, where the server has an embedding model."""
        return self._ask("/encode", {"text": prompt if isinstance(prompt, str) else list(prompt)})

    def tokenize(self, text: str) -> list[int]:
        """The text's token ids."""
        ids: list[int] = self._ask("/tokenize", {"prompt": text})["tokens"]
        return ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        text: str = self._ask("/detokenize", {"tokens": list(token_ids)})["text"]
        return text

    def get_tokenizer(self) -> ServerTokenizer:
        """The model's tokenizer, as far as scripts use transformers'."""
        return self.endpoint.get_tokenizer()

    def get_server_info(self) -> dict[str, Any]:
        """The server's settings and state."""
        return loops.run(self.endpoint.server_info())

    def cache_prefix(self, prefix: str) -> None:
        """Computes a text, so that prompts which begin with it find it."""
        loops.run(self.endpoint.cache_prefix(Prompt(prefix)))

    def flush_cache(self) -> None:
        """Forgets all cached prefixes, once what runs is done."""
        loops.run(self.endpoint.flush_cache())

    def shutdown(self) -> None:
        """Ends the server, and waits until it has: it lets running requests end, for at most its `drain_timeout_s`. Ctrl+C in
        the meantime ends it at once, and so does dropping a Runtime without a word. Twice is once."""
        if self._finalizer.alive:
            try:
                self._child.drain(self._drain_s + STOP_WAIT_S)
            finally:
                self._finalizer()
                with contextlib.suppress(Exception):
                    loops.run(self.endpoint.aclose())

    def __enter__(self) -> "Runtime":
        """For a with block, at whose end the server ends."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """See __enter__."""
        self.shutdown()

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        return loops.run(self.endpoint.call("POST", path, body))


class _Child:
    """The process. A thread reads what it says, so that it never waits for a reader, and passes on what a log is for."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl+C ends what a program does, not the server that the next one needs
        )
        self._owner = os.getpid()
        self._lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._url: str | None = None
        self._told = threading.Event()  # it is up, or will not be
        self._reader = threading.Thread(target=self._read, name="streamserve-runtime", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self, timeout_s: float | None) -> str:
        """Its URL, once it is up. Raises StartError, and ends it, when it is not."""
        try:
            is_told = self._told.wait(timeout_s)
        except BaseException:
            self.stop()
            raise
        if self._url is not None:
            return self._url
        said = "\n".join(self._lines) or "nothing"
        self.stop()
        if not is_told:
            raise StartError(f"the server was not ready within {timeout_s:g} s; it last said:\n{said}")
        raise StartError(f"the server ended before it was ready (exit code {self._process.returncode}); it last said:\n{said}")

    def drain(self, wait_s: float) -> None:
        """Tells it to end when it has nothing to do, and waits for that; no longer than `wait_s`."""
        if os.getpid() == self._owner:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)

    def stop(self) -> None:
        """Ends it, and waits until it has ended."""
        process = self._process
        if os.getpid() != self._owner:  # a fork of this process ends: the server is not its own
            return
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.terminate()
        try:
            process.wait(STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._reader.join(STOP_WAIT_S)
        process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._take(line.decode("utf-8", "replace").rstrip())
        finally:
            self._process.wait()
            self._told.set()

    def _take(self, line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and event.get("event") == "streamserve_ready":
            self._url = event["url"]
            self._told.set()
            return
        self._lines.append(line)
        if self._url is not None or not isinstance(event, dict) or "level" in event:  # how a start gets on is nobody's matter
            with contextlib.suppress(OSError, ValueError):  # nobody listens any longer; the server must not wait for that
                print(line, file=sys.stderr)


def _secrets(settings: dict[str, Any]) -> dict[str, str]:
    """Keys, taken out of the settings, as environment variables: a command line can be read by everybody."""
    found: dict[str, str] = {}
    for name, variable in (("api_key", API_KEY), ("admin_api_key", ADMIN_KEY)):
        keys = settings.pop(name, None)
        if keys is not None:
            found[variable] = "\n".join(map(str, keys if isinstance(keys, list | tuple) else [keys]))
    return found


def _native(prompt: str | Sequence[str], sampling_params: Mapping[str, Any] | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    given = {"text": prompt if isinstance(prompt, str) else list(prompt), "sampling_params": dict(sampling_params or {})}
    return {**given, **{name: value for name, value in fields.items() if value is not None}}
