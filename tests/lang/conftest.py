"""The default model for programs: behind a server of its own process, and as an engine in this one."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"context_length": 4096, "max_total_tokens": 24_000, "max_running_requests": 64}


@pytest.fixture(scope="package")
def server_url() -> Iterator[str]:
    """`streamserve serve` with the default model."""
    flags = [word for name, value in LIMITS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "streamserve", "serve", "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            events = (json.loads(line) for line in process.stdout)
            port = next(event["port"] for event in events if event["event"] == "streamserve_ready")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)


@pytest.fixture(scope="package")
def engine() -> Iterator[Any]:
    """The same model and limits in this process."""
    from streamserve import Engine

    with Engine(**LIMITS) as engine:
        yield engine
