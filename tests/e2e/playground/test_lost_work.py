"""What must not cost a reader their work: a part that fails, odd files, haste, a slow network, two copies of a conversation."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Route, expect

from tests.e2e.playground.browser import CHROMIUM, NO_WEBSOCKET, Tab
from tests.e2e.playground.network import Network, network_to

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")

LONG = 20_000  # ms, for what a busy machine takes its time with
SOME = re.compile(r"\w{2}")
FAILING = """
const fail = () => { throw new Error("a part failed"); };
export class Hits {
  turns() { return fail(); }
  before() { return fail(); }
  sent() { fail(); }
  chunk() { fail(); }
  ended() { fail(); }
  decorate() { fail(); }
  under() { return fail(); }
  blocks() { return fail(); }
  actions() { return fail(); }
}"""
SLOW_READS = """
const get = IDBObjectStore.prototype.get;
IDBObjectStore.prototype.get = function (key) {
  const request = get.call(this, key);
  if (this.name !== "conversations" || key !== window.slowId) return request;
  const transaction = this.transaction;
  let isHeld = true;
  window.release = () => (isHeld = false);
  const spin = () => isHeld && (transaction.objectStore("conversations").count().onsuccess = spin);
  spin();
  return request;
};"""
PRESS = """async (names) => {
  for (const name of names) {
    document.querySelector(`button[aria-label="${name}"]`).click();
    for (let k = 0; k < 6; k += 1) await new Promise((resolve) => setTimeout(resolve));
  }
}"""
KEPT = """async () => {
  const db = await new Promise((resolve) => (indexedDB.open("streamserve").onsuccess = (e) => resolve(e.target.result)));
  const all = db.transaction("messages").objectStore("messages").getAll();
  const rows = await new Promise((resolve) => (all.onsuccess = () => resolve(all.result)));
  db.close();
  return rows.sort((a, b) => a.order - b.order).map(({ message }) => message);
}"""


def button(tab: Tab, name: str) -> Locator:
    return tab.page.get_by_role("button", name=name, exact=True)


def chat(tab: Tab, title: str) -> Locator:
    return tab.page.locator("#chats").get_by_role("link", name=title, exact=True)


def shown(tab: Tab) -> Locator:
    return tab.page.locator(".user .text")


def answering(tab: Tab, *init: str) -> list[Any]:
    """Answers "Answer 1", "Answer 2", … at once; returns what was asked."""
    asked: list[Any] = []

    def answer(route: Route) -> None:
        asked.append(json.loads(route.request.post_data or ""))
        chunks = [
            {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": f"Answer {len(asked)}"}}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        ]
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        route.fulfill(content_type="text/event-stream", body=body)

    tab.page.route("**/v1/chat/completions", answer)
    tab.open(NO_WEBSOCKET, *init)
    return asked


def give(tab: Tab, file: dict[str, Any]) -> None:
    data = json.dumps(file).encode()
    tab.page.locator("#import-file").set_input_files([{"name": "c.json", "mimeType": "application/json", "buffer": data}])


def test_part_that_fails_costs_neither_the_chat_nor_an_answer(tab: Tab) -> None:
    tab.page.route("**/js/cache/hits.js", lambda route: route.fulfill(content_type="text/javascript", body=FAILING))
    tab.open().ask("Stay")
    tab.finish()
    expect(tab.page.locator(".assistant .text")).to_have_text(SOME)
    text = tab.answers()
    tab.page.reload()
    expect(shown(tab)).to_have_text("Stay", timeout=LONG)
    assert tab.answers() == text
    expect(tab.page.locator(".stats")).to_contain_text("tok/s")
    button(tab, "Regenerate message 2").click()
    tab.finish()
    expect(tab.page.locator(".place")).to_have_text("2/2")
    assert set(tab.console) == {"a part failed"}  # said to who looks for it
    tab.console.clear()
    tab.check_clean()


def test_settings_that_cannot_be_brought_do_not_hold_a_question(tab: Tab) -> None:
    tab.page.route("**/js/settings/form.js", lambda route: route.abort())
    tab.open().ask("Anybody?")
    expect(tab.page.locator(".assistant .text")).to_have_text(SOME, timeout=LONG)
    tab.finish()
    expect(tab.page.locator(".actions").last).to_be_visible()
    tab.console = [line for line in tab.console if "net::ERR_FAILED" not in line]
    tab.check_clean()


ODD: list[Any] = [
    None,
    5,
    "x",
    [],
    [None],
    {"list": None},
    {"list": [None]},
    {"calls": "abc"},
    {"calls": [None]},
    {"calls": [5, {}]},
]
ODD += [
    {"kind": 5},
    {"kind": "schema", "schema": 5},
    {"kind": "choice", "choice": {}},
    {"kind": "grammar"},
    {"isOn": 1, "list": 7},
]


def odd_file() -> dict[str, Any]:
    """A conversation for each odd value: as what parts keep with it and with its messages."""
    conversations = []
    for k, odd in enumerate(ODD):
        extra = dict.fromkeys(("tools", "structure", "hits", "tokens", "raw", "editing", "from", "compare"), odd)
        rest = {"created": 1, "state": "done", "extra": extra}
        question = {**rest, "id": f"q{k}", "parent": None, "role": "user", "content": f"Question {k}"}
        answer = {**rest, "id": f"a{k}", "parent": f"q{k}", "role": "assistant", "content": f"**Reply** {k}"}
        answer |= {"stream": odd, "state": "interrupted"}
        one = {"id": f"c{k}", "title": f"Odd {k}", "created": 1, "updated": 2, "system": "", "sampling": {}, "draft": ""}
        conversations.append({**one, "head": f"a{k}", "messages": [question, answer], "extra": extra})
    return {"format": "streamserve.chat", "version": 1, "conversations": conversations}


def test_conversations_with_odd_parts_are_read_and_gone_on_with(tab: Tab) -> None:
    answering(tab)
    expect(tab.page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    give(tab, odd_file())
    expect(chat(tab, "Odd 0")).to_be_visible(timeout=LONG)
    for k, odd in enumerate(ODD):
        chat(tab, f"Odd {k}").click()
        expect(shown(tab).first).to_have_text(f"Question {k}", timeout=LONG)
        expect(tab.page.locator(".assistant")).to_contain_text(re.compile(rf"Reply\W* {k}"))
        expect(tab.page.locator(".actions")).to_have_count(2)
        if odd not in (5, [None], {"list": [None]}, {"calls": [None]}):
            continue
        tab.page.reload()
        expect(shown(tab)).to_have_text(f"Question {k}", timeout=LONG)
        tab.ask("More")
        expect(shown(tab).last).to_have_text("More")
        tab.finish()
    expect(tab.page.get_by_label("System prompt")).to_be_visible(timeout=LONG)
    tab.check_clean()


@pytest.fixture
def far_tab(chromium: Browser, slow_server: str) -> Iterator[tuple[Tab, Network]]:
    """Behind a network that can be slow."""
    with network_to(slow_server) as network, chromium.new_context(viewport={"width": 1280, "height": 800}) as context:
        yield Tab(context.new_page(), network.url), network


def test_late_end_of_a_stopped_answer_does_not_end_the_next_one(far_tab: tuple[Tab, Network]) -> None:
    tab, network = far_tab
    tab.open().ask("Go on")
    expect(tab.page.locator(".assistant .text")).to_have_text(SOME)
    tab.page.evaluate("() => import('./static/js/chat/changes.js')")  # brought once already
    network.delay_s = 0.7
    tab.page.evaluate(PRESS, ["Stop", "Continue message 2"])
    expect(tab.page.locator(".assistant")).to_have_attribute("aria-busy", "true")
    length = len(tab.answers()[0])
    network.delay_s = 0
    grown = "(n) => document.querySelector('.assistant .text').textContent.length > n + 40"
    tab.page.wait_for_function(grown, arg=length, timeout=LONG)
    expect(tab.page.locator(".assistant")).to_have_attribute("aria-busy", "true")
    button(tab, "Stop").click()
    expect(tab.page.locator(".end")).to_contain_text("Stopped by you")
    tab.check_clean()


def test_answer_that_was_stopped_before_it_was_sent_is_not_sent_with_the_next_one(tab: Tab) -> None:
    asked = answering(tab)
    tab.ask("First")
    tab.finish()
    button(tab, "Edit message 2").click()
    field = tab.page.get_by_label("Text of message 2")
    field.fill("Once upon")
    held: list[Route] = []
    tab.page.route("**/cache/lookup", lambda route: held.append(route))
    button(tab, "Save in place").click()
    tab.page.evaluate(PRESS, ["Continue message 2", "Stop", "Continue message 2"])
    expect(tab.page.locator(".assistant .text")).to_have_text("Once uponAnswer 2")
    tab.finish()
    expect(tab.page.locator(".assistant .text")).to_have_text("Once uponAnswer 2")
    assert len(asked) == 2
    for route in held:
        route.abort()
    tab.console = [line for line in tab.console if "net::ERR_FAILED" not in line]
    tab.check_clean()


def test_undo_after_a_visit_elsewhere_adds_to_what_was_said_since(tab: Tab) -> None:
    answering(tab)
    tab.ask("Other")
    tab.finish()
    button(tab, "New chat").click()
    for text in ("First", "Second"):
        tab.ask(text)
        tab.finish()
    button(tab, "Delete message 3").click()
    chat(tab, "Other").click()
    expect(shown(tab)).to_have_text(["Other"])
    chat(tab, "First").click()
    expect(shown(tab)).to_have_text(["First"])
    tab.ask("Third")
    tab.finish()
    button(tab, "Undo").click()
    expect(shown(tab)).to_have_text(["First", "Second"])
    tab.page.reload()
    expect(shown(tab)).to_have_text(["First", "Second"], timeout=LONG)
    button(tab, "Next version of message 3").click()
    expect(tab.page.locator(".message .text")).to_have_text(["First", "Answer 2", "Third", "Answer 4"])
    tab.check_clean()


def test_conversation_that_was_chosen_last_is_shown_also_when_an_earlier_one_comes_late(tab: Tab) -> None:
    answering(tab, SLOW_READS)
    for text in ("Slow", "Quick"):
        tab.ask(text)
        tab.finish()
        button(tab, "New chat").click()
    slow_id = chat(tab, "Slow").get_attribute("data-id")
    tab.page.evaluate("(id) => { window.slowId = id; }", slow_id)
    chat(tab, "Slow").click()
    tab.page.wait_for_function("() => Boolean(window.release)")
    button(tab, "New chat").click()
    tab.page.get_by_label("Message", exact=True).fill("For a new one")
    tab.page.evaluate("() => { window.slowId = ''; window.release(); }")
    tab.page.evaluate(KEPT)  # read after the slow one
    expect(shown(tab)).to_have_count(0)
    expect(tab.page.get_by_label("Message", exact=True)).to_have_value("For a new one")
    tab.check_clean()


def test_question_that_is_being_edited_and_is_deleted_stays_in_the_composer(tab: Tab) -> None:
    answering(tab)
    for text in ("First", "Second"):
        tab.ask(text)
        tab.finish()
    button(tab, "Edit message 3").click()
    tab.page.get_by_label("Message", exact=True).fill("Second, better")
    button(tab, "Delete message 1").click()
    expect(tab.page.locator("#welcome")).to_be_visible()
    expect(tab.page.get_by_label("Message", exact=True)).to_have_value("Second, better")
    tab.page.get_by_label("Message", exact=True).press("Enter")
    tab.finish()
    messages = tab.page.evaluate(KEPT)
    ids = {message["id"] for message in messages}
    assert all(message["parent"] is None or message["parent"] in ids for message in messages)
    assert [message["content"] for message in messages] == ["Second, better", "Answer 3"]
    tab.check_clean()


def test_what_was_typed_right_before_leaving_is_there(tab: Tab) -> None:
    answering(tab)
    for text in ("One", "Two"):
        tab.ask(text)
        tab.finish()
        button(tab, "New chat").click()
    chat(tab, "One").click()
    expect(shown(tab)).to_have_text("One")
    box = tab.page.get_by_label("Message", exact=True)
    hurry = """(titles) => {
      const box = document.getElementById("prompt");
      box.value = "Half a thought";
      box.dispatchEvent(new Event("input"));
      const link = (title) => [...document.querySelectorAll("#chats a")].find((one) => one.textContent === title);
      link(titles[0]).click();
    }"""
    tab.page.evaluate(hurry, ["Two"])
    expect(shown(tab)).to_have_text("Two")
    tab.page.evaluate("() => [...document.querySelectorAll('#chats a')].find((one) => one.textContent === 'One').click()")
    expect(shown(tab)).to_have_text("One")
    expect(box).to_have_value("Half a thought")
    tab.page.evaluate(hurry.replace("Half", "Whole"), ["Two"])
    expect(shown(tab)).to_have_text("Two")
    tab.page.reload()
    expect(shown(tab)).to_have_text("Two")
    chat(tab, "One").click()
    expect(box).to_have_value("Whole a thought")
    tab.check_clean()


def test_key_that_was_asked_for_elsewhere_answers_nothing_here(locked_tab: Tab) -> None:
    page = locked_tab.open().page
    key = page.get_by_role("dialog").get_by_role("textbox")
    key.fill("sesame")
    page.keyboard.press("Enter")
    locked_tab.ask("Here")
    locked_tab.finish()
    refusal = {"error": {"message": "another key is needed", "param": None, "code": "invalid_api_key"}}
    page.add_init_script(NO_WEBSOCKET)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=401, json=refusal))
    page.reload()
    button(locked_tab, "New chat").click()
    locked_tab.ask("Elsewhere")
    expect(key).to_be_visible(timeout=LONG)
    button(locked_tab, "Cancel").click()
    page.unroute("**/v1/chat/completions")
    chat(locked_tab, "Here").click()
    expect(shown(locked_tab)).to_have_text("Here")
    page.evaluate("() => document.getElementById('key-dialog').showModal()")
    key.fill("sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    expect(button(locked_tab, "Regenerate message 2")).to_be_visible()
    expect(page.locator(".place")).to_have_count(0)
    locked_tab.console = [line for line in locked_tab.console if "401" not in line]
    locked_tab.check_clean()


def test_copy_works_where_the_browser_gives_no_clipboard(tab: Tab) -> None:
    answering(tab, "Object.defineProperty(navigator, 'clipboard', { value: undefined });")
    tab.ask("Copy me")
    tab.finish()
    note = "() => document.addEventListener('copy', () => { window.copied = document.activeElement.value; })"
    tab.page.evaluate(note)
    button(tab, "Copy message 2").click()
    expect(tab.page.locator("#status")).to_have_text("Copied")
    assert tab.page.evaluate("() => window.copied") == "Answer 1"
    expect(button(tab, "Copy message 2")).to_be_focused()
    tab.check_clean()
