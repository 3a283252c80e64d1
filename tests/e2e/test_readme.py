"""The examples of the README and of docs/speculation.md work when pasted, against a server of that name with made-up tokens."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/speculation.md")]
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", "\n".join(PAGES), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def port() -> Iterator[str]:
    arguments = ["serve", "--fake", "--fake-step-ms", "1", "--port", "0", "--served-model-name", "SmolLM2-135M-Instruct"]
    command = [sys.executable, "-m", "streamserve", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            events = (json.loads(line) for line in process.stdout)
            yield next(str(event["port"]) for event in events if event["event"] == "streamserve_ready")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)


def test_there_are_examples_for_curl_openai_and_websockets() -> None:
    text = " ".join(block for _, block in BLOCKS)
    assert len(BLOCKS) >= 4
    assert all(word in text for word in ("curl ", "from openai import", "from websockets"))


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_an_example_works_when_pasted(index: int, port: str, tmp_path: Path) -> None:
    kind, block = BLOCKS[index]
    if kind == "bash" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    block = block.replace("127.0.0.1:30000", f"127.0.0.1:{port}")
    command = (
        ["bash", "-euc", block.replace("curl ", "curl -sS --fail-with-body ")]
        if kind == "bash"
        else [sys.executable, "-c", block]
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert len(done.stdout) > 40
    assert '"error"' not in done.stdout
