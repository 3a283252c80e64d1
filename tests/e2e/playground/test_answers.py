"""Answers of the playground, whoever reads or stops them: bytes cut anywhere, a reader in the middle, a hidden page, a stop."""

import json
import re
from typing import Any

import pytest
from playwright.sync_api import WebSocketRoute, expect

from tests.e2e.playground.browser import AT_END, CHROMIUM, HIDE, Tab, get_json, running, wait_for_running

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")
LONG = 30_000  # ms, for what a busy machine takes its time with

NO_FRAMES_WHILE_HIDDEN = """
const real = window.requestAnimationFrame.bind(window);
const waiting = [];
window.requestAnimationFrame = (paint) => (document.hidden ? waiting.push(paint) : real(paint));
document.addEventListener("visibilitychange", () => document.hidden || waiting.splice(0).forEach((paint) => real(paint)));
"""
GREW = "(length) => document.querySelector('.assistant .text').innerText.length > length + 5"
UNTIL_STILL = """async () => {
  const scroll = document.getElementById("scroll");
  const frame = () => new Promise(requestAnimationFrame);
  for (let still = 0, top = -1; still < 10; await frame()) {
    still = top === scroll.scrollTop ? still + 1 : 0;
    top = scroll.scrollTop;
  }
}"""
READ_BYTE_BY_BYTE = """async ([text, end]) => {
  const { readStream } = await import("/static/js/wire/sse.js");
  const event = (content) => `id: s:${content.codePointAt(0)}${end}data: ${JSON.stringify({ content })}${end}${end}`;
  const parts = [...text].map(event);
  const bytes = new TextEncoder().encode(`: alive${end}${end}${parts.join("")}data: [DONE]${end}${end}`);
  const body = new ReadableStream({
    start(controller) {
      for (const byte of bytes) controller.enqueue(Uint8Array.of(byte));
      controller.close();
    },
  });
  const server = { fetch: async () => new Response(body) };
  let got = "";
  await new Promise((resolve, reject) => {
    const chunk = ({ content }, number) => (got += number === content.codePointAt(0) ? content : "?");
    const on = { opened() {}, named() {}, chunk, done: resolve, error: reject, lost: reject };
    readStream(server, { body: {}, keeps: false }, on);
  });
  return got;
}"""


class Model:
    """Answers over the page's socket what it is told to, when it is told to."""

    def __init__(self, tab: Tab) -> None:
        self.asked: list[dict[str, Any]] = []
        self._socket: WebSocketRoute | None = None
        tab.page.route_web_socket("**/v1/ws", self._connect)

    def _connect(self, socket: WebSocketRoute) -> None:
        self._socket = socket
        socket.on_message(lambda frame: self._note(json.loads(frame)))

    def _note(self, frame: dict[str, Any]) -> None:
        if frame["type"] == "chat.create":
            self.asked.append(frame)

    def _send(self, **frame: Any) -> None:
        assert self._socket
        self._socket.send(json.dumps({"id": self.asked[-1]["id"], **frame}))

    def say(self, text: str, size: int = 1_000) -> None:
        for at in range(0, len(text), size):
            choice = {"index": 0, "delta": {"content": text[at : at + size]}, "finish_reason": None}
            self._send(type="chunk", chunk={"id": "x", "choices": [choice]})

    def end(self, tokens: int) -> None:
        self._send(type="chunk", chunk={"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self._send(type="done", usage={"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens})


def asked(tab: Tab, model: Model, *init_scripts: str) -> None:
    tab.open(*init_scripts).ask("A long one")
    expect(tab.page.get_by_role("button", name="Stop", exact=True)).to_be_visible(timeout=LONG)
    for _ in range(100):
        if model.asked:
            break
        tab.page.wait_for_timeout(20)


def chapter(number: int) -> str:
    """About 50 tokens, of the kinds of blocks that grow in different ways."""
    words = " ".join(f"word{number}x{k}" for k in range(20))
    block = (f"```js\nlet a{number} = 1;\n```", f"| a | b |\n|---|---|\n| {number} | 2 |", f"- one {number}\n- two\n- three")[
        number % 3
    ]
    return f"Chapter {number}. {words}\n\n{block}\n\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_stream_that_comes_byte_by_byte_is_the_text(tab: Tab, end: str) -> None:
    text = "aé日🙂👩‍👧\u2028\u202e\x85 \\n z"
    assert tab.open().page.evaluate(READ_BYTE_BY_BYTE, [text, end]) == text
    tab.check_clean()


def test_reader_in_the_middle_of_a_long_answer_is_left_alone_until_they_jump(tab: Tab) -> None:
    model = Model(tab)
    asked(tab, model)
    page = tab.page
    model.say("".join(chapter(k) for k in range(100)))
    expect(page.locator(".assistant .text")).to_contain_text("Chapter 99.", timeout=LONG)
    page.wait_for_function(AT_END)
    half = page.evaluate("() => document.getElementById('scroll').scrollTop / 2")
    page.locator("#scroll").hover()
    page.mouse.wheel(0, -half)
    expect(page.get_by_role("button", name="Jump to latest")).to_be_visible()
    page.evaluate(UNTIL_STILL)
    state = """() => [document.getElementById('scroll').scrollTop, getSelection().toString(),
      window.finished.every((node, k) => document.querySelector('.assistant .text').children[k] === node)]"""
    page.evaluate("""() => {
      const blocks = [...document.querySelector(".assistant .text").children];
      window.finished = blocks.slice(0, -3);
      const inView = blocks.find((block) => block.localName === "p" && block.getBoundingClientRect().top > 100);
      getSelection().selectAllChildren(inView);
    }""")
    before = page.evaluate(state)
    assert re.match(r"Chapter \d+\.", before[1]) and before[2]
    model.say("".join(chapter(k) for k in range(100, 200)))
    expect(page.locator(".assistant .text")).to_contain_text("Chapter 199.", timeout=LONG)
    assert page.evaluate(state) == before
    model.end(10_000)
    tab.finish()
    expect(page.locator(".assistant .stats")).to_contain_text("10,000 tok")
    assert page.evaluate(state) == before
    assert page.evaluate("() => window.finished.length") > 190
    page.get_by_role("button", name="Jump to latest").click()
    page.wait_for_function(AT_END)
    expect(page.get_by_role("button", name="Jump to latest")).to_be_hidden()
    tab.check_clean()


def test_answer_that_came_while_nobody_looked_is_there_as_a_whole(tab: Tab) -> None:
    model = Model(tab)
    asked(tab, model, NO_FRAMES_WHILE_HIDDEN)
    page = tab.page
    model.say("Seen **at once**. ")
    expect(page.locator(".assistant strong")).to_have_text("at once", timeout=LONG)
    page.evaluate(HIDE, True)
    model.say("".join(chapter(k) for k in range(20)))
    model.end(1_000)
    tab.finish()
    page.evaluate(HIDE, False)
    expect(page.locator(".assistant .text")).to_contain_text("Chapter 19.", timeout=LONG)
    assert page.locator(".assistant .text > *").count() == 1 + 2 * 20 - 1  # the first words are in the first chapter's paragraph
    expect(page.locator(".assistant .stats")).to_contain_text("1,000 tok")
    tab.check_clean()


def test_stop_gives_the_memory_back_and_what_was_said_is_in_the_cache_when_it_goes_on(slow_tab: Tab) -> None:
    def in_use() -> int:
        load = get_json(slow_tab.url + "engine/steps")["load"]
        return int(load["total_tokens"] - load["free_tokens"] - load["evictable_tokens"])

    page = slow_tab.open().page
    wait_for_running(slow_tab.url, False)
    assert in_use() == 0
    slow_tab.ask("Tell me a long story")
    expect(page.locator(".assistant .text")).to_contain_text(re.compile(r"\w{5}"), timeout=LONG)
    assert running(slow_tab.url) == 1 and in_use() > 0
    page.keyboard.press("Escape")
    wait_for_running(slow_tab.url, False)
    assert in_use() == 0
    stats = page.locator(".assistant .stats")
    expect(stats).to_contain_text(re.compile(r"Stopped by you after \d+ tokens"))
    [said] = slow_tab.answers()
    page.get_by_role("button", name="Continue message 2").click()
    page.wait_for_function(GREW, arg=len(said))
    page.keyboard.press("Escape")
    expect(stats).to_contain_text(re.compile("Stopped by you after.*prompt tokens cached", re.DOTALL))
    cached, prompt = (int(number) for number in re.findall(r"(\d+) of (\d+) prompt tokens cached", stats.inner_text())[0])
    assert prompt - 2 <= cached < prompt
    slow_tab.check_clean()
