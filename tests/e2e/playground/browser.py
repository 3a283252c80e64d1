"""What tests of the playground share: servers with made-up tokens, a tab of a real Chromium and what it may not do, waiting."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, expect

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

WATCH = """
window.violations = [];
addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective + " " + event.blockedURI));
"""
NO_WEBSOCKET = "window.WebSocket = class { constructor() { throw new Error('switched off'); } };"
NO_STORAGE = """
Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };
IDBFactory.prototype.open = () => { throw new DOMException('storage is switched off', 'SecurityError'); };
"""
HIDE = """(value) => {
  Object.defineProperty(document, "hidden", { value, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
AT_END = """() => {
  const scroll = document.getElementById("scroll");
  return scroll.scrollHeight - scroll.clientHeight - scroll.scrollTop < 2;
}"""
NOTE_GROWTH = """() => {
  window.lengths = [];
  const list = document.getElementById("messages");
  const note = () => {
    const length = list.querySelector(".assistant:last-child .text")?.textContent.length;
    if (length && length !== window.lengths.at(-1)) window.lengths.push(length);
  };
  new MutationObserver(note).observe(list, { subtree: true, childList: true, characterData: true });
}"""


# By these words Chromium reports what became of requests.
REPORTS = ("net::ERR_", "WebSocket connection to", "Failed to load resource")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, f"the server ended with {server.returncode}:\n{log.read_text()}"
        try:
            urllib.request.urlopen(url + "ready", timeout=10).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
        except urllib.error.URLError:
            pass
        time.sleep(0.1)
    pytest.fail(f"the server was not ready within a minute:\n{log.read_text()}")


@contextmanager
def serve(log: Path, *flags: str, step_ms: int | None = 1, port: int | None = None) -> Iterator[str]:
    """A server whose answers have 400 tokens, `step_ms` apart; None: with the default model. Yields its address."""
    port = port or free_port()
    made_up = [] if step_ms is None else ["--fake", "--fake-step-ms", str(step_ms)]
    command = [
        sys.executable,
        "-m",
        "streamserve",
        "serve",
        *made_up,
        "--port",
        str(port),
        *flags,
    ]
    with log.open("wb") as out, subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT) as server:
        try:
            url = f"http://127.0.0.1:{port}/"
            wait_until_ready(server, url, log)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                server.kill()


@dataclass
class Tab:
    """One browser tab on the playground, and everything in it that must not happen."""

    page: Page
    url: str
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, *init_scripts: str) -> "Tab":
        self.page.on("console", self._note_console)
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("dialog", self._note_dialog)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("websocket", lambda websocket: self.requests.append(websocket.url))
        for script in (WATCH, *init_scripts):
            self.page.add_init_script(script)
        self.page.goto(self.url)
        return self

    def _note_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.console.append(message.text)

    def _note_dialog(self, dialog: Dialog) -> None:
        self.console.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def ask(self, text: str) -> None:
        expect(self.page.locator("#server-state")).to_have_text("Ready")
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def finish(self) -> None:
        """Wait until the answer is complete."""
        expect(self.page.get_by_role("button", name="Send", exact=True)).to_be_visible(timeout=60_000)

    def answers(self) -> list[str]:
        return self.page.locator(".assistant .text").all_inner_texts()

    def sockets(self) -> list[str]:
        return [url for url in self.requests if url.startswith("ws")]

    def check_quiet(self) -> None:
        """What holds at the end of every test: no error but those by which the browser itself reports requests that failed."""
        errors = [line for line in self.console if not any(report in line for report in REPORTS)]
        assert errors == [], errors
        assert self.page.evaluate("() => window.violations ?? []") == []

    def check_clean(self) -> None:
        assert self.console == []
        assert self.page.evaluate("() => window.violations") == []
        origins = {re.sub(r"^ws", "http", url).split("/")[2] for url in self.requests if not url.startswith(("data:", "blob:"))}
        assert origins == {self.url.split("/")[2]}


@contextmanager
def tab_on(chromium: Browser, url: str, **options: Any) -> Iterator[Tab]:
    """A tab in a browser profile of its own, not opened yet."""
    context = chromium.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
    try:
        tab = Tab(context.new_page(), url)
        yield tab
        tab.check_quiet()
    finally:
        context.close()


def running(url: str) -> int:
    loads = get_json(url + "v1/loads")
    return int(loads["running"]) + int(loads["waiting"])


def wait_for_running(url: str, wanted: bool) -> None:
    for _ in range(100):  # far less than the rest of a slow answer takes
        if bool(running(url)) == wanted:
            return
        time.sleep(0.02)
    pytest.fail(f"the server reports {running(url)} live requests")
