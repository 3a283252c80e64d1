"""The chat of the playground in a real Chromium against a real server with made-up tokens: `streamserve serve --fake`.

Skips, saying why, where there is no Chromium. Waits on conditions, never on times.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Route, expect

from tests.e2e.playground.browser import (
    AT_END,
    CHROMIUM,
    NO_STORAGE,
    NO_WEBSOCKET,
    NOTE_GROWTH,
    Tab,
    free_port,
    get_json,
    serve,
    wait_for_running,
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")


def test_page_loads_without_error_and_asks_only_its_own_server(tab: Tab) -> None:
    tab.open()
    expect(tab.page.locator("#server-state")).to_have_text("Ready")
    model = get_json(tab.url + "v1/models")["data"][0]["id"]
    expect(tab.page.locator("#model-name")).to_have_text(model)
    expect(tab.page.get_by_label("Temperature")).to_have_attribute("placeholder", "1")
    tab.check_clean()


def test_answer_streams_over_the_socket_and_its_figures_are_shown(tab: Tab) -> None:
    tab.open().page.evaluate(NOTE_GROWTH)
    tab.ask("What is the capital of France?")
    tab.finish()
    lengths = tab.page.evaluate("() => window.lengths")
    assert len(lengths) >= 5 and lengths[0] < lengths[len(lengths) // 2] < lengths[-1]
    assert len(tab.sockets()) == 1
    assert not any("chat/completions" in url for url in tab.requests)
    figures = tab.page.locator(".assistant .stats").inner_text()
    assert re.search(r"\d+ tok · [\d.,]+ tok/s · TTFT [\d.]+ m?s · \d+ of \d+ prompt tokens cached", figures), figures
    expect(tab.page.locator("#status")).to_contain_text("Answer complete")
    expect(tab.page.get_by_label("Message", exact=True)).to_be_focused()
    tab.check_clean()


@pytest.mark.parametrize("way", ["button", "Escape"])
@pytest.mark.parametrize("init_script", ["", NO_WEBSOCKET], ids=["websocket", "sse"])
def test_stop_ends_the_request_in_the_engine_and_keeps_the_text(slow_tab: Tab, way: str, init_script: str) -> None:
    slow_tab.open(init_script)
    slow_tab.ask("Tell me a long story")
    expect(slow_tab.page.locator(".assistant .text")).not_to_be_empty()
    wait_for_running(slow_tab.url, True)
    if way == "button":
        slow_tab.page.get_by_role("button", name="Stop", exact=True).click()
    else:
        slow_tab.page.keyboard.press("Escape")
    wait_for_running(slow_tab.url, False)
    expect(slow_tab.page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(slow_tab.page.locator(".assistant .stats")).to_contain_text("Stopped by you")
    [kept] = slow_tab.answers()
    assert kept
    slow_tab.ask("Go on")
    expect(slow_tab.page.locator(".assistant .text").last).not_to_be_empty()
    slow_tab.page.keyboard.press("Escape")
    first, second = slow_tab.answers()
    assert first == kept and second
    slow_tab.check_clean()


def test_reload_keeps_the_conversation_and_its_figures(tab: Tab) -> None:
    tab.open()
    tab.ask("Keep this")
    tab.finish()
    kept = (".user .text", ".assistant .text", ".assistant .stats")
    before = [tab.page.locator(place).inner_text() for place in kept]
    tab.page.reload()
    expect(tab.page.locator(".assistant .text")).to_be_visible()
    assert [tab.page.locator(place).inner_text() for place in kept] == before
    expect(tab.page.get_by_role("link", name="Keep this")).to_have_attribute("aria-current", "page")
    tab.check_clean()


def test_reload_in_mid_answer_keeps_what_had_arrived_and_goes_on_until_it_is_stopped(slow_tab: Tab) -> None:
    slow_tab.open()
    slow_tab.ask("Tell me a long story")
    expect(slow_tab.page.locator(".assistant .text")).not_to_be_empty()
    slow_tab.page.reload()
    slow_tab.page.get_by_role("button", name="Stop", exact=True).click()
    expect(slow_tab.page.locator(".assistant .stats").first).to_contain_text("Stopped by you")
    assert slow_tab.answers()[0]
    wait_for_running(slow_tab.url, False)


def test_second_turn_takes_earlier_tokens_from_the_cache(tab: Tab) -> None:
    tab.open()
    tab.ask("First question of this conversation")
    tab.finish()
    tab.ask("And a second one")
    tab.finish()
    figures = tab.page.locator(".assistant .stats").last.inner_text()
    cached, prompt = re.findall(r"([\d,]+) of ([\d,]+) prompt tokens cached", figures)[0]
    assert 0 < int(cached.replace(",", "")) < int(prompt.replace(",", ""))


def test_refused_value_is_shown_as_text_and_at_its_field(tab: Tab) -> None:
    tab.open()
    tab.page.get_by_label("Temperature").fill("500")
    tab.ask("Too hot")
    alert = tab.page.locator(".assistant [role=alert]")
    expect(alert).to_contain_text("temperature is 500")
    expect(tab.page.get_by_label("Temperature")).to_have_attribute("aria-invalid", "true")
    tab.page.get_by_role("button", name="Reset").click()
    tab.page.get_by_role("button", name="Try again").click()
    tab.finish()
    expect(alert).to_have_count(0)
    assert tab.answers()[0]
    expect(tab.page.get_by_role("button", name="Previous version of message 2")).to_have_count(0)
    tab.check_clean()


def test_answer_streams_over_sse_where_no_socket_opens(tab: Tab) -> None:
    tab.open(NO_WEBSOCKET).page.evaluate(NOTE_GROWTH)
    tab.ask("What is the capital of France?")
    tab.finish()
    lengths = tab.page.evaluate("() => window.lengths")
    assert len(lengths) >= 5 and lengths[0] < lengths[len(lengths) // 2] < lengths[-1]
    assert tab.sockets() == []
    expect(tab.page.locator(".assistant .stats")).to_contain_text("prompt tokens cached")
    tab.page.get_by_label("Top p").fill("2")
    tab.ask("Refused before any event")
    expect(tab.page.locator(".assistant [role=alert]")).to_contain_text("top_p is 2")
    # Chromium itself logs the 400 as a failed resource; nothing else may be there.
    assert [line for line in tab.console if "400" not in line] == []


HOSTILE = """<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2"> <svg onload="window.hacked = 3"></svg>

[click](javascript:window.hacked=4) [data](data:text/html,<script>window.hacked=5</script>)

![tracker](https://example.invalid/pixel.png) and [a link](https://example.invalid/page)

```html"><script>window.hacked = 6</script>
<script>window.hacked = 7</script>
```
"""


def test_hostile_answer_is_inert_text(tab: Tab) -> None:
    chunks = [{"choices": [{"index": 0, "delta": {"content": HOSTILE[k : k + 7]}}]} for k in range(0, len(HOSTILE), 7)]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    tab.open(NO_WEBSOCKET)
    tab.ask("<b>Attack</b> <script>window.hacked = 8</script>")
    tab.finish()
    expect(tab.page.locator(".user .text")).to_have_text("<b>Attack</b> <script>window.hacked = 8</script>")
    answer = tab.page.locator(".assistant .text")
    expect(answer).to_contain_text('<img src=x onerror="window.hacked = 2">')
    expect(answer).to_contain_text("<script>window.hacked = 7</script>")
    assert answer.locator("script, img, svg, iframe, style, form").count() == 0
    links = answer.locator("a").evaluate_all("(links) => links.map((link) => [link.protocol, link.rel, link.target])")
    assert links == [["https:", "noopener noreferrer nofollow", "_blank"]] * 2
    assert tab.page.evaluate("() => window.hacked") is None
    tab.check_clean()


def test_finished_blocks_keep_their_nodes_while_text_grows(tab: Tab) -> None:
    kept = tab.open().page.evaluate(
        """async () => {
          const { MarkdownView } = await import("/static/js/text/render.js");
          const root = document.createElement("div");
          const view = new MarkdownView(root);
          view.append("one\\n\\n```\\ncode\\n");
          const [paragraph, code] = [root.children[0], root.querySelector("code").firstChild];
          view.append("more\\n```\\n\\nthree\\n\\nfour\\n\\nfive");
          view.finish();
          return [root.children[0] === paragraph, root.querySelector("code").firstChild === code, root.children.length];
        }"""
    )
    assert kept == [True, True, 5]


def chunk_with(*parts: tuple[str, bool], usage: dict[str, Any] | None = None) -> str:
    marks = [{"text": text, "drafted": is_drafted} for text, is_drafted in parts]
    choice = {"index": 0, "delta": {"content": "".join(text for text, _ in parts)}, "draft_marks": marks}
    return f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n"


def test_guessed_text_is_underlined_when_asked_for_and_nowhere_else(tab: Tab) -> None:
    details = {"accepted_prediction_tokens": 9, "rejected_prediction_tokens": 3}
    usage = {"prompt_tokens": 5, "completion_tokens": 14, "completion_tokens_details": details}
    events = [
        chunk_with(("**Grüße", False), (" <b>an", True)),
        chunk_with((" die 👩", True), ("‍👧 W", False), ("elt**", True), usage=usage),
    ]
    asked: list[Any] = []

    def answer(route: Route) -> None:
        asked.append(route.request.post_data_json)
        route.fulfill(content_type="text/event-stream", body="".join(events) + "data: [DONE]\n\n")

    tab.page.route("**/v1/chat/completions", answer)
    tab.open(NO_WEBSOCKET)
    tab.ask("Say hello")
    tab.finish()
    assert asked[0]["return_draft_marks"] is True
    for _ in ("as it came", "as it was kept"):
        button = tab.page.get_by_role("button", name="9 of 14 tokens guessed")
        expect(button).to_have_attribute("title", "Of 12 guesses 9 were right")
        expect(tab.page.locator(".assistant strong")).to_be_visible()
        button.click()
        expect(button).to_have_attribute("aria-pressed", "true")
        marked = tab.page.locator(".assistant .marked")
        assert marked.inner_text() == "**Grüße <b>an die 👩‍👧 Welt**"
        assert marked.locator("mark").all_inner_texts() == [" <b>an die 👩", "elt**"]
        expect(tab.page.locator(".assistant strong")).to_be_hidden()
        button.click()
        expect(tab.page.locator(".assistant .marks")).to_have_count(0)
        expect(tab.page.locator(".assistant strong")).to_be_visible()
        tab.page.reload()
    events[:] = [chunk_with(("Nothing guessed", False), usage={"prompt_tokens": 5, "completion_tokens": 3})]
    tab.ask("Again")
    tab.finish()
    expect(tab.page.locator(".assistant .text").last).to_have_text("Nothing guessed")
    expect(tab.page.get_by_role("button", name="tokens guessed")).to_have_count(1)
    tab.check_clean()


def test_regenerating_and_editing_keep_what_was_there(tab: Tab) -> None:
    tab.open()
    tab.ask("Original question")
    tab.finish()
    tab.page.get_by_role("button", name="Regenerate message 2").click()
    tab.finish()
    expect(tab.page.locator(".assistant .place")).to_have_text("2/2")
    tab.page.get_by_role("button", name="Edit message 1").click()
    expect(tab.page.get_by_text("Editing an earlier message; it")).to_be_visible()
    expect(tab.page.get_by_label("Message", exact=True)).to_have_value("Original question")
    tab.ask("Edited question")
    tab.finish()
    expect(tab.page.locator(".user .text")).to_have_text("Edited question")
    tab.page.get_by_role("button", name="Previous version of message 1").click()
    expect(tab.page.locator(".user .text")).to_have_text("Original question")
    expect(tab.page.locator(".assistant .place")).to_have_text("2/2")
    tab.page.reload()
    expect(tab.page.locator(".user .text")).to_have_text("Original question")
    tab.page.get_by_role("button", name="Next version of message 1").click()
    expect(tab.page.locator(".user .text")).to_have_text("Edited question")


def test_conversations_are_listed_deleted_and_brought_back(tab: Tab) -> None:
    tab.open()
    for title in ("Apples", "Pears"):
        tab.page.get_by_role("button", name="New chat").click()
        tab.ask(title)
        tab.finish()
    chats = tab.page.locator("#chats a")
    expect(chats).to_have_text(["Pears", "Apples"])
    chats.last.click()
    expect(tab.page.locator(".user .text")).to_have_text("Apples")
    tab.page.get_by_role("button", name="Actions for Apples").click()
    tab.page.get_by_role("menuitem", name="Delete").click()
    expect(chats).to_have_text(["Pears"])
    tab.page.get_by_role("button", name="Undo").click()
    expect(chats).to_have_text(["Pears", "Apples"])
    tab.check_clean()


def test_key_is_asked_for_only_when_the_server_wants_one(locked_tab: Tab) -> None:
    page = locked_tab.open().page
    dialog = page.get_by_role("dialog", name="This server asks for a key")
    for key in ("wrong", "sesame"):
        expect(dialog).to_be_visible()
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use key").click()
    expect(dialog).to_be_hidden()
    locked_tab.ask("With the key")
    locked_tab.finish()
    assert locked_tab.answers()[0]
    assert len(locked_tab.sockets()) == 1
    assert not any("sesame" in url for url in locked_tab.requests)
    page.reload()
    expect(page.locator("#server-state")).to_have_text("Ready")
    expect(dialog).to_be_hidden()
    assert page.evaluate("() => JSON.stringify(localStorage).includes('sesame')") is False


def test_server_that_goes_away_and_comes_back_is_noticed(chromium: Browser, tmp_path: Path) -> None:
    state, port = "#server-state", free_port()
    with chromium.new_context() as context:
        tab = Tab(context.new_page(), f"http://127.0.0.1:{port}/")
        with serve(tmp_path / "first.txt", "--drain-timeout-s", "0", step_ms=20, port=port):
            tab.open().ask("Tell me a long story")
            expect(tab.page.locator(".assistant .text")).not_to_be_empty()
        expect(tab.page.locator(state)).to_contain_text("Server not reachable, retrying in")
        expect(tab.page.get_by_role("button", name="Send", exact=True)).to_be_visible()
        [kept] = tab.answers()
        assert kept
        with serve(tmp_path / "second.txt", port=port):
            expect(tab.page.locator(state)).to_have_text("Ready")
            tab.ask("And now?")
            tab.finish()
            assert tab.answers()[0] == kept and tab.answers()[1]
            assert tab.page.locator(".assistant [role=alert]").count() == 0


def test_page_works_and_says_so_when_nothing_can_be_stored(tab: Tab) -> None:
    tab.open(NO_STORAGE)
    tab.ask("Forget this")
    tab.finish()
    assert tab.answers()[0]
    expect(tab.page.locator("#banner")).to_contain_text("not saved")
    tab.check_clean()


def test_enter_that_ends_a_composed_word_does_not_send(tab: Tab) -> None:
    tab.open()
    expect(tab.page.locator("#server-state")).to_have_text("Ready")
    prompt = tab.page.get_by_label("Message", exact=True)
    prompt.fill("日本")
    for event in ({"key": "Enter", "isComposing": True}, {"key": "Enter", "keyCode": 229}):
        prompt.dispatch_event("keydown", {**event, "bubbles": True, "cancelable": True})
    expect(tab.page.locator(".message")).to_have_count(0)
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator(".user .text")).to_have_text("日本")


def test_reader_who_scrolled_up_stays_there_until_they_jump_back(slow_tab: Tab) -> None:
    slow_tab.page.set_viewport_size({"width": 700, "height": 420})
    slow_tab.open()
    slow_tab.ask("Fill the page\n" * 40)
    expect(slow_tab.page.locator(".assistant .text")).not_to_be_empty()
    slow_tab.page.locator("#scroll").hover()
    slow_tab.page.mouse.wheel(0, -5000)
    top = "() => document.getElementById('scroll').scrollTop"
    slow_tab.page.wait_for_function(f"() => ({top})() === 0")
    before = len(slow_tab.answers()[-1])
    slow_tab.page.wait_for_function(
        "(length) => document.querySelector('.assistant:last-child .text').textContent.length > length + 20", arg=before
    )
    assert slow_tab.page.evaluate(top) == 0
    slow_tab.page.get_by_role("button", name="Jump to latest").click()
    slow_tab.page.wait_for_function(AT_END)
    expect(slow_tab.page.get_by_role("button", name="Jump to latest")).to_be_hidden()


@pytest.mark.parametrize("width", [360, 900, 1280])
def test_no_width_needs_sideways_scrolling(tab: Tab, width: int) -> None:
    tab.page.set_viewport_size({"width": width, "height": 700})
    tab.open()
    tab.ask("x" * 300)
    tab.finish()
    assert tab.page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0
    settings = tab.page.get_by_role("button", name="Settings", exact=True)
    if width < 1100:
        settings.click()
    expect(tab.page.get_by_label("System prompt")).to_be_visible()
    tab.page.keyboard.press("Escape")
    assert tab.page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0
    if width < 1100:
        expect(tab.page.get_by_label("System prompt")).to_be_hidden()
        expect(settings).to_be_focused()


def test_theme_follows_the_system_until_one_is_chosen(tab: Tab) -> None:
    tab.page.emulate_media(color_scheme="dark")
    tab.open()
    ground = "() => getComputedStyle(document.body).backgroundColor"
    dark = tab.page.evaluate(ground)
    tab.page.emulate_media(color_scheme="light")
    light = tab.page.evaluate(ground)
    assert light != dark
    theme = tab.page.get_by_role("button", name=re.compile("^Theme"))
    theme.click()
    theme.click()
    expect(theme).to_have_accessible_name("Theme: dark")
    assert tab.page.evaluate(ground) == dark
    tab.page.reload()
    expect(theme).to_have_accessible_name("Theme: dark")
    assert tab.page.evaluate(ground) == dark
