"""What SGLang's example and benchmark scripts import beside the language: files of lines, a server started by a command.

Owns these few helpers under the names that scripts know. Programs written for StreamServe need none of them.
"""

import argparse
import base64
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from json import dumps
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import streamserve

POLL_S = 0.2


def read_jsonl(filename: str) -> Iterator[Any]:
    """The values of a file of JSON lines; lines that begin with # are comments."""
    with open(filename, encoding="utf-8") as lines:
        for line in lines:
            if line.strip() and not line.startswith("#"):
                yield json.loads(line)


def dump_state_text(filename: str, states: Sequence[Any], mode: str = "w") -> None:
    """Write the texts of programs that ran, each under a rule with its number."""
    with open(filename, mode, encoding="utf-8") as out:
        for index, state in enumerate(states):
            text = state.text() if callable(getattr(state, "text", None)) else str(state)
            out.write(f"{f' {index} ':=^80}\n{text}\n{'':=^80}\n\n")


def download_and_cache_file(url: str, filename: str | None = None) -> str:
    """The path of a file that was brought from `url`, now or earlier."""
    path = Path(filename) if filename else Path(gettempdir()) / url.rsplit("/", 1)[-1]
    if not path.exists():
        part = path.with_name(path.name + ".part")
        urllib.request.urlretrieve(url, part)
        part.replace(path)
    return str(path)


def encode_image_base64(image: str | bytes | Path) -> str:
    """A picture's file as base64."""
    return base64.b64encode(image if isinstance(image, bytes) else Path(image).read_bytes()).decode()


class HttpReply:
    """What `http_request` gives back."""

    def __init__(self, status_code: int, body: bytes) -> None:
        self.status_code = status_code
        self.text = body.decode("utf-8", errors="replace")

    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.text)


def http_request(
    url: str, json: Any = None, api_key: str | None = None, method: str | None = None, stream: bool = False
) -> HttpReply:
    """One call of a server: a POST where there is a body."""
    if stream:
        raise NotImplementedError("http_request does not stream here: read the events with httpx")
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {api_key}"} if api_key else {})}
    data = None if json is None else dumps(json).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method)) as answer:
            return HttpReply(answer.status, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return HttpReply(error.code, error.read())


def print_highlight(text: object) -> None:
    """Print; notebooks of SGLang's documentation show it in colour."""
    print(text)


def launch_server_cmd(command: str, host: str = "0.0.0.0", port: int | None = None) -> tuple[subprocess.Popen[str], int]:
    """Start a server by the command that would start SGLang's, on a free port if none is given: its process, and the port."""
    if port is None:
        with socket.socket() as free:
            free.bind((host, 0))
            port = free.getsockname()[1]
    words = shlex.split(command.replace("\\\n", " "))
    words = ["streamserve.launch_server" if word == "sglang.launch_server" else word for word in words]
    if words[0] in ("python", "python3"):
        words[0] = sys.executable
    return subprocess.Popen([*words, "--port", str(port)], text=True), port


def wait_for_server(base_url: str, timeout: float | None = None, process: "subprocess.Popen[str] | None" = None) -> None:
    """Return when the server at `base_url` answers. RuntimeError if its process ends first, TimeoutError after `timeout` s."""
    end = None if timeout is None else time.monotonic() + timeout
    while True:
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode} before it was ready")
        try:
            urllib.request.urlopen(f"{base_url.rstrip('/')}/v1/models", timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:
            pass
        if end is not None and time.monotonic() > end:
            raise TimeoutError(f"no server at {base_url} within {timeout} s")
        time.sleep(POLL_S)


def terminate_process(process: "subprocess.Popen[str]") -> None:
    """End a server that was started here, and wait until it has."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def add_common_sglang_args_and_parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags that SGLang's benchmark scripts share."""
    parser.add_argument("--parallel", type=int, default=64)
    parser.add_argument("--host", default="http://127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--backend", default="srt")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--result-file", default="result.jsonl")
    parser.add_argument("--raw-result-file")
    return parser.parse_args()


def select_sglang_backend(args: argparse.Namespace) -> Any:
    """The backend that these flags ask for: a running server, or a model of OpenAI's."""
    if args.backend.startswith("srt"):
        return streamserve.RuntimeEndpoint(f"{args.host}:{args.port}")
    if args.backend.startswith("gpt-"):
        return streamserve.OpenAI(args.backend)
    raise ValueError(f"--backend is {args.backend!r}; it may be srt or the name of a model of OpenAI's, gpt-...")
