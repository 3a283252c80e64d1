"""Servers that programs start: they are up when they are said to be, and no process stays behind."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from streamserve.errors import StartError
from streamserve.lang import loops
from streamserve.lang.backend import Prompt, Sampling
from streamserve.lang.endpoint import RuntimeEndpoint
from streamserve.lang.runtime import Runtime


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until_gone(pid: int) -> None:
    while is_alive(pid):  # the test's own limit ends it
        time.sleep(0.02)


@pytest.fixture(scope="module")
def runtime() -> "Runtime":
    with Runtime(fake=True, fake_step_ms=0.1, trust_remote_code=True) as runtime:  # type: ignore[misc]
        yield runtime  # type: ignore[misc]
    assert not is_alive(runtime.pid)
    runtime.shutdown()


def test_it_answers_plain_code(runtime: Runtime) -> None:
    one = runtime.generate("hello", {"max_new_tokens": 4})
    assert isinstance(one, dict) and one["meta_info"]["completion_tokens"] == 4
    several = runtime.generate(["a", "b"], {"max_new_tokens": 2}, return_logprob=True)
    assert isinstance(several, list) and len(several) == 2
    assert runtime.detokenize(runtime.tokenize("hello")) == "hello"
    assert runtime.get_tokenizer().encode("hello") == runtime.tokenize("hello")
    assert runtime.get_server_info()["fake"] is True
    runtime.cache_prefix("a prefix that is not short")
    longer = runtime.generate("a prefix that is not short, and more", {"max_new_tokens": 1})
    assert isinstance(longer, dict) and longer["meta_info"]["cached_tokens"] > 20
    runtime.flush_cache()
    piece = loops.run(runtime.endpoint.generate(Prompt("x"), Sampling(max_tokens=3)))[0]
    assert piece.meta["completion_tokens"] == 3


@pytest.mark.anyio
async def test_it_answers_inside_a_running_loop(runtime: Runtime) -> None:
    whole = await runtime.async_generate("hello", {"max_new_tokens": 16, "temperature": 0})
    assert isinstance(whole, dict)
    texts = [text async for text in runtime.add_request("hello", {"max_new_tokens": 16, "temperature": 0})]
    assert "".join(texts) == whole["text"] and len(texts) > 1
    assert runtime.generate("hello", {"max_new_tokens": 16, "temperature": 0}) is not None  # not even there it hangs


def test_start_that_fails_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StartError, match=r"(?s)ended before it was ready \(exit code 1\).*/nowhere"):
        Runtime("/nowhere/model")
    with pytest.raises(StartError, match=r"not ready within 0\.01 s"):
        Runtime(fake=True, launch_timeout=0.01)


def test_keys_are_known_to_the_endpoint_and_to_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("# ours\ns3cret\nother\n")
    for key in ("s3cret", ["s3cret", "other"], f"@{tmp_path / 'keys'}", None):
        monkeypatch.setenv("STREAMSERVE_API_KEY", "s3cret" if key is None else "elsewhere")
        with Runtime(fake=True, api_key=key, admin_api_key="b0ss") as runtime:
            assert runtime.detokenize(runtime.tokenize("hello")) == "hello"
            runtime.flush_cache()  # which the operator's key alone may
            if isinstance(key, list):
                assert RuntimeEndpoint(runtime.url, api_key="other").get_model_name()
            words = Path(f"/proc/{runtime.pid}/cmdline").read_bytes()
            assert b"s3cret" not in words and b"b0ss" not in words


@pytest.mark.parametrize(("drain_s", "end"), [(60, "length"), (0, "abort")])
def test_a_shutdown_lets_what_runs_end_within_the_drain_time(drain_s: float, end: str) -> None:
    runtime = Runtime(fake=True, fake_step_ms=2, drain_timeout_s=drain_s)
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(runtime.generate, "hello", {"max_new_tokens": 600, "ignore_eos": True})
        while not (asked.done() or runtime.get_server_info()["internal_states"][0]["running"]):
            time.sleep(0.01)
        runtime.shutdown()
        answer = asked.result()
    assert isinstance(answer, dict) and answer["meta_info"]["finish_reason"]["type"] == end
    assert not is_alive(runtime.pid)


def test_a_server_goes_on_when_its_process_is_interrupted_or_shuts_its_ears() -> None:
    script = (
        "import os, signal, sys, time\nfrom streamserve.lang.runtime import Runtime\n"
        "with Runtime(fake=True, log_level='info', log_requests=True) as runtime:\n"
        "    sys.stderr.close()\n"
        "    for _ in range(3):\n"
        "        try:\n            os.killpg(0, signal.SIGINT)\n            time.sleep(60)\n"
        "        except KeyboardInterrupt:\n            pass\n"
        "        print(runtime.generate(['hi'] * 200, {'max_new_tokens': 1})[-1]['meta_info']['completion_tokens'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True, check=True)
    assert done.stdout.split() == ["1"] * 3


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(3)", "del runtime; time.sleep(60)"])
def test_server_ends_with_its_process_or_its_holder(end: str) -> None:
    script = (
        "import os, signal, sys, time\nfrom streamserve.lang.runtime import Runtime\n"
        f"runtime = Runtime(fake=True)\nprint(runtime.pid, flush=True)\nsys.stdin.readline()\n{end}\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_alive(pid)
        process.stdin.write("\n")
        process.stdin.flush()
        until_gone(pid)
        os.kill(process.pid, signal.SIGKILL)
