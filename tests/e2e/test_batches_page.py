"""The examples of docs/batches.md work when pasted, with made-up tokens."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streamserve.api.batch_lines import ENDPOINTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "batches.md").read_text(encoding="utf-8")


def block(kind: str) -> str:
    (found,) = re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.mark.skipif(sys.platform == "win32", reason="the example is for bash")
def test_the_command_works_when_pasted(tmp_path: Path) -> None:
    command = block("bash").replace("streamserve batch", f"{sys.executable} -m streamserve batch --fake")
    done = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert {answer["custom_id"] for answer in answers} == {"1", "2", "3"}
    assert "3 requests, 3 answered now, 0 failed" in done.stderr


def test_the_program_works_when_pasted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamserve", "serve", "--fake", "--fake-step-ms", "1", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            events = (json.loads(line) for line in process.stdout)
            port = next(event["port"] for event in events if event["event"] == "streamserve_ready")
            program = block("python").replace(":30000", f":{port}")
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("completed BatchRequestCounts(completed=8, failed=0, total=8)")
    assert done.stdout.count("question-") == 8


def test_the_page_names_every_url() -> None:
    assert [url for url in ENDPOINTS if f"`{url}`" not in PAGE] == []
