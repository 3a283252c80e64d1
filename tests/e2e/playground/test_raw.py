"""The developer's view in a real Chromium: requests, events, and programs that are run against the server and ask the same."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Locator, Page, Route, expect

from tests.e2e.playground.browser import CHROMIUM, NO_WEBSOCKET, Tab

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")

# What shells, Python and JavaScript would take for their own, and what hides.
NASTY = (
    "It's $HOME, `id` $(id) !! !x \"two\" \\n \\\\ %s {{x}} ${y} '\\'' EOF\nsecond line\ttab é 😀 \u202eevil\u2069 \u2028 end'"
)
CANNED = {"object": "chat.completion.chunk", "id": "x", "created": 1, "model": "fake"}


@dataclass
class Recorder:
    """A server in front of the server, which keeps every chat request and its answer."""

    url: str
    asked: list[Any] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)


@contextmanager
def recording(server: str) -> Iterator[Recorder]:
    host = server.split("/")[2]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.forward("")

        def do_POST(self) -> None:
            self.forward(self.rfile.read(int(self.headers["Content-Length"])).decode())

        def forward(self, body: str) -> None:
            is_chat = self.path == "/v1/chat/completions"
            if is_chat:
                recorder.asked.append(json.loads(body))
            connection = HTTPConnection(host, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "content-length"}
            connection.request(self.command, self.path, body.encode() or None, headers)
            answer = connection.getresponse()
            content = answer.read()
            if is_chat:
                recorder.answered.append(said(content.decode()))
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            connection.close()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        recorder = Recorder(f"http://127.0.0.1:{proxy.server_address[1]}/")
        thread = Thread(target=proxy.serve_forever)
        thread.start()
        yield recorder
        proxy.shutdown()
        thread.join()


def said(stream: str) -> str:
    """The text of an answer in server-sent events."""
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk.get("choices"))


@pytest.fixture
def replay(chromium: Browser, server: str) -> Iterator[tuple[Tab, Recorder]]:
    """A tab whose requests go by HTTP through a recorder, which programs made by the page ask too."""
    with recording(server) as recorder, chromium.new_context(permissions=["clipboard-read", "clipboard-write"]) as context:
        context.set_default_timeout(15_000)
        context.new_page().close()
        page = context.new_page()
        page.set_viewport_size({"width": 1280, "height": 800})
        yield Tab(page, recorder.url).open(NO_WEBSOCKET), recorder


def raw(page: Page, section: str) -> Locator:
    page.get_by_role("tab", name="Raw").click()
    page.get_by_role("radio", name=section, exact=True).check()
    return page.get_by_role("tabpanel", name="Raw")


def copied(page: Page, name: str) -> str:
    page.get_by_role("tabpanel", name="Raw").get_by_role("button", name=name).click()
    expect(page.locator("#status")).to_have_text("Copied")
    page.evaluate("() => { document.getElementById('status').textContent = ''; }")
    text: str = page.evaluate("() => navigator.clipboard.readText()")
    return text


def program(page: Page, language: str) -> str:
    raw(page, "Code")
    page.get_by_role("radio", name=language, exact=True).check()
    return copied(page, "Copy code")


def run(language: str, text: str, folder: Path, **env: str) -> str:
    """What the program prints. The shell is an interactive one, which expands more than others."""
    script = folder / "request.mjs"
    script.write_text(text)
    commands = {
        "curl": ["bash", "--norc", "--noprofile", "-i"],
        "Python": [sys.executable, "-"],
        "JavaScript": ["node", str(script)],
        "WebSocket": ["node", "--experimental-websocket", "--no-warnings", str(script)],
    }
    given = {} if commands[language][-1] == str(script) else {"input": text}
    environ = {**os.environ, "HISTFILE": "", "PYTHONWARNINGS": "ignore", **env}
    done = subprocess.run(commands[language], cwd=folder, env=environ, capture_output=True, text=True, timeout=60, **given)  # type: ignore[call-overload]
    assert done.stdout, done.stderr
    printed: str = done.stdout
    return said(printed) if language == "curl" else printed.removesuffix("\n") if language == "Python" else printed


def set_seed(page: Page) -> None:
    page.get_by_text("More sampling").click()
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Top k").fill("40")
    page.get_by_label("Stop texts").fill("never '$x'\\n")
    page.get_by_label("System prompt").fill("Be 'brief'.\n\n# $PATH")


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
def test_copied_program_sends_the_same_request_and_gets_the_same_answer(
    replay: tuple[Tab, Recorder], language: str, tmp_path: Path
) -> None:
    tab, recorder = replay
    if language == "JavaScript" and not shutil.which("node"):
        pytest.skip("no node here")
    set_seed(tab.page)
    tab.ask(NASTY)
    tab.finish()
    text = program(tab.page, language)
    assert not re.search("[\u202e\u2069\u2028]", text)
    answer = run(language, text, tmp_path)
    ours, theirs = recorder.asked
    assert ours["messages"][-1]["content"] == NASTY
    assert theirs == ours
    assert answer == recorder.answered[0] == recorder.answered[1] != ""
    tab.check_clean()


def test_program_for_a_socket_sends_the_same_request(tab: Tab, tmp_path: Path) -> None:
    node = shutil.which("node")
    if not node or int(subprocess.check_output([node, "--version"], text=True)[1:].split(".")[0]) < 20:
        pytest.skip("no node with a WebSocket here")
    sent: list[Any] = []
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.page.on("websocket", lambda socket: socket.on("framesent", lambda frame: sent.append(json.loads(frame))))
    tab.open()
    set_seed(tab.page)
    tab.ask(NASTY)
    tab.finish()
    text = program(tab.page, "WebSocket")
    [request] = [frame["request"] for frame in sent if frame["type"] == "chat.create"]
    request.pop("resumable", None)  # how the page keeps an answer over a lost connection; no part of the question
    spy = tmp_path / "spied"
    seen = f"const send = (frame) => (spy({json.dumps(str(spy))}, JSON.stringify(frame)), write(frame));\nconst write = "
    assert "const send = " in text
    answer = run("WebSocket", 'import { writeFileSync as spy } from "node:fs";\n' + text.replace("const send = ", seen), tmp_path)
    assert json.loads(spy.read_text())["request"] == request
    raw(tab.page, "Events")
    assert answer == "".join(deltas(copied(tab.page, "Copy all events"))) != ""
    tab.check_clean()


def deltas(events: str) -> list[str]:
    chunks = [json.loads(line)["chunk"] for line in events.splitlines()]
    return [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]]


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
def test_program_reads_long_pictures_from_files_that_the_page_saves(
    replay: tuple[Tab, Recorder], language: str, tmp_path: Path
) -> None:
    tab, recorder = replay
    if language == "JavaScript" and not shutil.which("node"):
        pytest.skip("no node here")
    noise = BytesIO()
    Image.frombytes("RGB", (80, 80), Random(3).randbytes(80 * 80 * 3)).save(noise, "PNG")
    expect(tab.page.locator("#server-state")).to_have_text("Ready")
    tab.page.locator("#picture-file").set_input_files(FilePayload(name="it's.png", mimeType="image/png", buffer=noise.getvalue()))
    tab.ask("What's this?")
    tab.finish()
    text = program(tab.page, language)
    assert len(text) < 3_000
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Save image-1.png").click()
    download.value.save_as(tmp_path / "image-1.png")
    answer = run(language, text, tmp_path)
    ours, theirs = recorder.asked
    assert len(ours["messages"][0]["content"][0]["image_url"]["url"]) > 10_000
    assert theirs == ours and answer == recorder.answered[0]
    request = raw(tab.page, "Request").get_by_label("Request as JSON")
    assert "<image-1.png, 2" in request.input_value()
    tab.page.get_by_role("button", name="Send this").click()
    tab.finish()
    assert recorder.asked[2] == ours


def test_edited_request_is_what_is_sent_and_its_answer_stands_beside_the_first(replay: tuple[Tab, Recorder]) -> None:
    tab, recorder = replay
    tab.ask("Original question")
    tab.finish()
    panel = raw(tab.page, "Request")
    box = panel.get_by_label("Request as JSON")
    expect(box).to_have_value(re.compile("Original question"))
    assert json.loads(box.input_value()) == recorder.asked[0]
    send = panel.get_by_role("button", name="Send this")
    box.fill('{"model": "fake",\n "messages": nothing}')
    expect(panel.get_by_text("Line 2, column 14: nothing is no value")).to_be_visible()
    expect(send).to_be_disabled()
    box.fill('{"seed": 12345678901234567890, "stream": true}')
    expect(panel.get_by_text("cannot be kept exactly")).to_be_visible()
    edited = {"messages": [{"role": "user", "content": "Another question"}], "max_tokens": 5, "stream": True, "temperature": 0.25}
    box.fill(json.dumps({**edited, "stream": False}))
    expect(panel.get_by_text('"stream" has to be true')).to_be_visible()
    box.fill(json.dumps(edited))
    send.click()
    tab.finish()
    assert recorder.asked[1] == edited
    expect(tab.page.locator(".assistant .place")).to_have_text("2/2")
    expect(tab.page.locator(".assistant").get_by_text("Answers an edited request")).to_be_visible()
    assert recorder.answered[1].strip() == tab.page.locator(".assistant .text").inner_text().strip()
    expect(box).to_have_value(re.compile("0.25"))
    assert json.loads(box.input_value()) == edited
    tab.check_clean()


def test_request_that_would_be_sent_follows_what_is_written_and_can_be_sent(tab: Tab) -> None:
    tab.open()
    expect(tab.page.locator("#server-state")).to_have_text("Ready")
    panel = raw(tab.page, "Events")
    expect(panel.get_by_text("Send something to see the events")).to_be_visible()
    box = raw(tab.page, "Request").get_by_label("Request as JSON")
    tab.page.get_by_label("Message", exact=True).fill("Written, not sent")
    expect(box).to_have_value(re.compile("Written, not sent"))
    panel.get_by_role("button", name="Send this").click()
    tab.finish()
    expect(tab.page.locator(".user .text")).to_have_text("Written, not sent")
    expect(tab.page.get_by_label("Message", exact=True)).to_have_value("")
    assert tab.answers()[0]
    expect(panel.get_by_label("Request for")).to_have_value(re.compile("^(?!next)"))
    tab.check_clean()


def test_events_hold_the_whole_answer_and_can_be_filtered_and_looked_at(tab: Tab) -> None:
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.open()
    tab.ask("Tell me something")
    tab.finish()
    tab.page.get_by_role("button", name="Copy message 2").click()
    expect(tab.page.locator("#status")).to_have_text("Copied")
    answer = tab.page.evaluate("() => navigator.clipboard.readText()")
    tab.page.get_by_role("button", name="Raw request and events of message 2").click()
    panel = raw(tab.page, "Events")
    events = copied(tab.page, "Copy all events")
    assert "".join(deltas(events)) == answer != ""
    times = [json.loads(line)["ms"] for line in events.splitlines()]
    assert times == sorted(times) and times[0] > 0
    box = panel.get_by_role("listbox", name="Events")
    box.focus()
    tab.page.keyboard.press("End")
    expect(box.get_by_role("option", selected=True)).to_have_attribute("aria-posinset", str(len(times)))
    expect(panel.get_by_role("group", name="The chosen event")).to_contain_text('"completion_tokens"')
    panel.get_by_label("Show only events that hold").fill('"FINISH_reason":"')
    expect(box.get_by_role("option")).to_have_count(1)
    assert '"finish_reason":"stop"' in copied(tab.page, "Copy 1 events")
    tab.page.reload()
    expect(panel.get_by_role("tab", name="Raw")).to_have_count(0)
    raw(tab.page, "Events")
    expect(panel.get_by_text("Events are kept for one visit only")).to_be_visible()
    tab.check_clean()


def test_only_so_many_events_are_kept_and_few_are_in_the_page(tab: Tab) -> None:
    texts = [f"w{k} " for k in range(5_200)]
    chunks = [{**CANNED, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"

    def answer(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", headers={"x-made-up": "<b>value</b>"}, body=body)

    tab.page.route("**/v1/chat/completions", answer)
    tab.open(NO_WEBSOCKET)
    tab.ask("A long one")
    tab.finish()
    panel = raw(tab.page, "Events")
    expect(panel.get_by_text("5,200 events")).to_contain_text("The first 5,000 are kept.")
    box = panel.get_by_role("listbox", name="Events")
    expect(box.get_by_role("option").first).to_have_attribute("aria-setsize", "5000")
    assert 0 < box.get_by_role("option").count() < 80
    box.evaluate("(list) => { list.scrollTop = list.scrollHeight; }")
    expect(box.locator('[aria-posinset="5000"]')).to_contain_text("w4999")
    assert box.get_by_role("option").count() < 80
    raw(tab.page, "Request")
    panel.get_by_text("Answer's head: HTTP 200").click()
    expect(panel.get_by_role("definition").filter(has_text="<b>value</b>")).to_be_visible()
    tab.check_clean()


def test_request_is_rebuilt_after_a_reload_and_said_to_be(replay: tuple[Tab, Recorder]) -> None:
    tab, recorder = replay
    set_seed(tab.page)
    tab.ask("First")
    tab.finish()
    tab.ask("Second")
    tab.finish()
    tab.page.reload()
    expect(tab.page.locator("#server-state")).to_have_text("Ready")
    tab.page.get_by_role("button", name="Raw request and events of message 2").click()
    panel = raw(tab.page, "Request")
    expect(panel.get_by_text("Built again from the conversation")).to_be_visible()
    box = panel.get_by_label("Request as JSON")
    expect(box).to_have_value(re.compile("First"))
    assert json.loads(box.input_value()) == recorder.asked[0]
    panel.get_by_label("Request for").select_option(label="Message 4: Second")
    expect(box).to_have_value(re.compile("Second"))
    assert json.loads(box.input_value()) == recorder.asked[1]
    tab.check_clean()


def test_key_is_nowhere_but_programs_run_with_it(locked_tab: Tab, tmp_path: Path) -> None:
    page = locked_tab.page
    page.set_viewport_size({"width": 1280, "height": 800})
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    locked_tab.open()
    page.get_by_label("API key").fill("sesame")
    page.get_by_role("button", name="Use key").click()
    locked_tab.ask("With the key")
    locked_tab.finish()
    panel = raw(page, "Request")
    texts = [panel.get_by_label("Request as JSON").input_value()]
    raw(page, "Events")
    texts.append(copied(page, "Copy all events"))
    programs = {language: program(page, language) for language in ("curl", "Python", "JavaScript", "WebSocket")}
    assert all("STREAMSERVE_API_KEY" in text for text in programs.values())
    texts += [*programs.values(), page.url, *locked_tab.requests]
    assert not any("sesame" in text for text in texts)
    for language in ("curl", "Python"):
        assert run(language, programs[language], tmp_path, STREAMSERVE_API_KEY="sesame") == "".join(deltas(texts[1]))
