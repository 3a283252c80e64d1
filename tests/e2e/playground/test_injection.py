"""Text that tries to be more than text, in every place of the page that shows somebody else's: nothing runs, nothing is fetched,
and nothing hides or turns what stands around it."""

import json
import math
import re
from typing import Any

import pytest
from playwright.sync_api import FilePayload, Route, expect

from tests.e2e.playground.browser import CHROMIUM, NO_WEBSOCKET, Tab

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")
LONG = 20_000  # of a machine that is busy with other things

EVIL = (
    '<img src=x onerror="window.hacked = 1"><script>window.hacked = 2</script><svg onload="window.hacked = 3"></svg>'
    "[a](javascript:window.hacked=4) ![t](https://example.invalid/p.png) [b](data:text/html,<script>window.hacked=5</script>)"
    " <iframe srcdoc='<script>parent.hacked = 6</script>'></iframe><a href='javascript:window.hacked=7'>c</a>"
    "<style>* { display: none }</style>${window.hacked=8}{{constructor.constructor('window.hacked=9')()}}"
    " \x1b[31mred\x07 \u202eexe.txt\u2066 \U000e0041 $\\href{javascript:window.hacked=10}{x}$ <https://example.invalid/>"
)
NAME = '<img src=x onerror="window.hacked = 11">\u202egnp.png'

# What the page must not hold. Fields that are typed into show what they hold as it is; what is only read out has no looks.
BAD = r"""() => {
  const bad = [];
  const isOurs = (url) => new URL(url, location.href).origin === location.origin || /^(data:image\/png|blob:)/.test(url);
  const kinds = ["iframe", "object", "embed", "base", "style", "frame", "applet", "foreignobject"];
  for (const node of document.querySelectorAll("*")) {
    const { localName: name, src, href, attributes } = node;
    if (kinds.includes(name)) bad.push(name);
    if (name === "script" && !(src && isOurs(src))) bad.push("script");
    if (name === "img" && !isOurs(src)) bad.push(`img ${src}`);
    if (name === "a" && href && !/^(https?|mailto|blob):/.test(href)) bad.push(href);
    for (const { name: attribute, value } of attributes) {
      if (/^on|^srcdoc$/.test(attribute)) bad.push(attribute);
      if (/^(src|xlink:href|action|data|poster)$/.test(attribute) && !isOurs(value)) bad.push(attribute);
    }
  }
  const hidden = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]|\u{e0041}/u;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const { data, parentElement: parent } = walker.currentNode;
    if (!hidden.test(data) || parent.closest(".control, .hidden, textarea, script")) continue;
    bad.push(`hidden in ${parent.localName}.${parent.className}: ${data.slice(0, 60)}`);
  }
  return [...new Set(bad)];
}"""


def check(tab: Tab, where: str) -> None:
    assert tab.page.evaluate("() => window.hacked") is None, where
    assert tab.page.evaluate(BAD) == [], where


def tour(tab: Tab) -> None:
    """Look at every view, panel and section of the page."""
    page = tab.page
    for panel in page.locator("#panels").get_by_role("tab").all():
        panel.click()
        place = page.locator(f"#{panel.get_attribute('aria-controls')}")
        expect(place.locator(":scope > *").first).to_be_attached()
        check(tab, panel.inner_text())
        for section in place.get_by_role("radio").all():
            if section.is_visible():
                section.check(force=True)
                for row in place.get_by_role("listbox", name="Events").get_by_role("option").all()[:6]:
                    row.click(force=True)
                check(tab, f"{panel.inner_text()}: {section.get_attribute('value')}")
    for view in page.locator("#views").get_by_role("tab").all():
        view.click()
        expect(page.locator(f"#{view.get_attribute('aria-controls')}").locator(":scope > *").first).to_be_attached()
        check(tab, view.inner_text())
    page.get_by_role("tab", name="Chat", exact=True).click()


def entry(text: str) -> dict[str, Any]:
    token = {"token": text, "logprob": math.log(0.3), "bytes": list(text.encode())}
    return {**token, "top_logprobs": [token, {"token": "bytes:" + text, "logprob": -2.0, "bytes": [0xE4, 0xB8]}]}


def stream(*choices: dict[str, Any], **more: Any) -> str:
    chunks = [{"id": EVIL, "model": EVIL, "choices": [{"index": 0, **choice}], EVIL: EVIL} for choice in choices]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in [*chunks, *([more] if more else [])]) + "data: [DONE]\n\n"


ANSWER = stream(
    {"delta": {"role": "assistant", "reasoning_content": EVIL}},
    *({"delta": {"content": EVIL[k : k + 9]}, "logprobs": {"content": [entry(EVIL[k : k + 9])]}} for k in range(0, len(EVIL), 9)),
    {"delta": {"tool_calls": [{"index": 0, "id": EVIL, "type": "function", "function": {"name": EVIL, "arguments": EVIL}}]}},
    {"delta": {}, "finish_reason": EVIL},
)


def answer(tab: Tab, *bodies: str) -> None:
    given = iter(bodies)
    headers = {"x-evil": "<script>window.hacked = 12</script>"}
    tab.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", headers=headers, body=next(given)),
    )


def test_what_a_model_writes_is_text_in_every_view(tab: Tab) -> None:
    answer(tab, ANSWER)
    tab.open(NO_WEBSOCKET)
    tab.page.get_by_role("tab", name="Tokens").click()
    tab.page.get_by_role("switch", name="Record token probabilities").check()
    tab.ask("Say something evil")
    expect(tab.page.get_by_role("listbox", name="Tokens of the answer").get_by_role("option").first).to_be_visible()
    expect(tab.page.locator(".assistant .text")).to_contain_text("<script>window.hacked = 2</script>")
    tour(tab)
    tab.page.reload()
    expect(tab.page.locator(".assistant .text")).to_contain_text("<script>window.hacked = 2</script>")
    tour(tab)
    tab.check_clean()


def test_what_a_server_says_of_itself_and_its_errors_is_text(tab: Tab) -> None:
    def config(route: Route) -> None:
        given = route.fetch().json()
        route.fulfill(json={**given, "model": EVIL, "aliases": [EVIL], "version": EVIL})

    def lookup(route: Route) -> None:
        message = {"index": 0, "role": "user", "start": 0, "tokens": 9, "matched": 4}
        reason = {"code": "differs", "message": EVIL, "position": 4, "in_message": 0, "token": EVIL, "cached_token": EVIL}
        rest = {"path": [1], "per_message_reason": None, "pictures": [], "reason": reason}
        route.fulfill(json={"tokens": 9, "matched": 4, "per_message": [message], **rest})

    def tree(route: Route) -> None:
        given = route.fetch().json()
        node: dict[str, Any] = {
            "id": 1,
            "parent": 0,
            "num_tokens": 9,
            "end": 9,
            "num_pages": 1,
            "requests": 0,
            "is_pinned": False,
            "pins": 0,
        }
        node |= {"hits": 1, "age_s": 1.0, "num_children": 0, "is_salted": False, "preview": EVIL}
        route.fulfill(json={**given, "nodes": [node], "num_nodes": 1, "previews": True})

    def steps(route: Route) -> None:
        given = route.fetch().json()
        request: dict[str, Any] = {"id": EVIL, "client_id": EVIL, "state": "running", "prompt_tokens": 9, "computed_tokens": 9}
        request |= {"cached_tokens": 0, "generated_tokens": 1, "age_s": 1.0}
        route.fulfill(json={**given, "requests": [request], "num_requests": 1})

    tab.page.route("**/playground/config.json", config)
    tab.page.route("**/cache/lookup", lookup)
    tab.page.route(re.compile(r"/cache/tree\?"), tree)
    tab.page.route("**/engine/steps*", steps)
    failure = {"message": EVIL, "type": EVIL, "param": "temperature", "code": EVIL}
    answer(tab, stream({"delta": {"content": "Well"}}, error=failure), stream({"delta": {"content": "Fine"}}))
    tab.open(NO_WEBSOCKET)
    expect(tab.page.locator("#model-name")).to_contain_text("<script>")
    tab.ask("First")
    expect(tab.page.locator(".assistant [role=alert]")).to_contain_text("<script>window.hacked = 2</script>")
    tab.ask("Second")
    tab.finish()
    tour(tab)
    tab.check_clean()


def test_what_a_person_writes_and_calls_their_files_is_text(tab: Tab) -> None:
    answer(tab, stream({"delta": {"content": "Fine"}}))
    page = tab.open(NO_WEBSOCKET).page
    expect(page.get_by_role("button", name="Add a picture")).to_be_enabled(timeout=LONG)
    page.locator("#picture-file").set_input_files(FilePayload(name=NAME, mimeType="image/png", buffer=b"no picture"))
    expect(page.locator("#picture-note")).to_contain_text("<img src=x")
    check(tab, "a refused file")
    page.locator("#picture-file").set_input_files(FilePayload(name=NAME, mimeType="image/png", buffer=PIXEL))
    expect(page.locator("#chosen")).to_contain_text("<img src=x")
    check(tab, "a chosen picture")
    page.get_by_label("System prompt").fill(EVIL)
    tab.ask(EVIL)
    tab.finish()
    page.get_by_role("searchbox", name="Search conversations").fill("window.hacked = 2")
    expect(page.locator("#chats a, .chats a").first).to_contain_text("<script>")
    check(tab, "a search")
    page.get_by_role("searchbox", name="Search conversations").fill("")
    tour(tab)
    tab.check_clean()


PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)


def test_what_a_file_of_conversations_holds_is_text_and_breaks_no_part(tab: Tab) -> None:
    question = {"id": "m1", "parent": None, "role": "user", "content": EVIL, "created": 1, "state": "done"}
    base = {"parent": "m1", "role": "assistant", "content": EVIL, "created": 2, "state": "done"}
    odd: list[Any] = [
        EVIL,
        7,
        None,
        [],
        {"list": EVIL},
        {"list": [[{}, "x", EVIL]], "before": -1, "marks": [[EVIL]], "more": 1e300},
    ]
    answers = [
        {**base, "id": f"a{k}", "extra": dict.fromkeys(("tokens", "raw", "structure", "tools", "hits"), one)}
        for k, one in enumerate(odd)
    ]
    log = {"before": 0, "list": [[EVIL, -0.5, [EVIL, -0.5, [226, 128], -2]]], "more": 0, "marks": [[9, 2]]}
    answers.append({**base, "id": "last", "error": EVIL, "reasoning": EVIL, "finish": EVIL, "extra": {"tokens": log}})
    chat = {
        "format": 1,
        "id": "evil",
        "title": EVIL[-300:],
        "created": 1,
        "updated": 2,
        "system": EVIL,
        "sampling": {"stop": EVIL},
    }
    chat |= {"draft": EVIL, "head": "last", "messages": [question, *answers]}
    file = {"format": "streamserve.chat", "version": 1, "conversations": [chat], "pictures": {}}
    page = tab.open(NO_WEBSOCKET).page
    expect(page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    page.locator("#import-file").set_input_files(
        FilePayload(name=f"{NAME}.json", mimeType="application/json", buffer=json.dumps(file).encode())
    )
    page.get_by_role("button", name="Open").click(timeout=LONG)
    expect(page.locator(".assistant .text")).to_contain_text("<script>window.hacked = 2</script>", timeout=LONG)
    tour(tab)
    for _ in odd:
        page.get_by_role("button", name="Previous version of message 2").click()
        for panel in ("Raw", "Tokens", "Tools", "Schema"):
            page.get_by_role("tab", name=panel, exact=True).click()
        check(tab, "another version")
    tab.check_clean()


def test_the_check_finds_what_it_looks_for(tab: Tab) -> None:
    tab.open()
    tab.page.evaluate("""() => {
      const link = Object.assign(document.createElement("a"), { href: "javascript:1" });
      const text = Object.assign(document.createElement("p"), { textContent: "\u202e" });
      document.body.append(document.createElement("iframe"), link, text);
    }""")
    assert tab.page.evaluate(BAD) == ["iframe", "javascript:1", "hidden in p.: \u202e"]
