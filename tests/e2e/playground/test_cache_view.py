"""The Cache view and the hit marks of the playground, in a real Chromium against servers with made-up tokens."""

import json
import re
import struct
import threading
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from tests.e2e.playground.browser import CHROMIUM, Tab, get_json, serve, tab_on

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")
WAIT_MS = 15_000  # the tests' machine may be busy


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Room for 2,048 tokens, and an admin of its own."""
    with serve(tmp_path_factory.mktemp("small") / "log.txt", "--max-total-tokens", "2048") as url:
        yield url


@pytest.fixture(scope="module")
def guarded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(tmp_path_factory.mktemp("guarded") / "log.txt", "--admin-api-key", "boss") as url:
        yield url


@pytest.fixture
def small_tab(chromium: Browser, small_server: str) -> Iterator[Tab]:
    with tab_on(chromium, small_server) as tab:
        yield tab


@pytest.fixture
def guarded_tab(chromium: Browser, guarded_server: str) -> Iterator[Tab]:
    with tab_on(chromium, guarded_server) as tab:
        yield tab


def post(url: str, path: str, body: Any) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def flush(url: str) -> None:
    post(url, "flush_cache?timeout=60", {})


def compute(url: str, prompt: str, max_tokens: int = 1, **fields: Any) -> None:
    """Another client asks for this."""
    post(url, "v1/completions", {"prompt": prompt, "max_tokens": max_tokens, **fields})


def tree(url: str) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = get_json(url + "cache/tree?depth=16&limit=1000&preview=32")["nodes"]
    return nodes


def open_cache(tab: Tab) -> Page:
    tab.open()
    expect(tab.page.locator("#server-state")).to_have_text("Ready", timeout=WAIT_MS)
    tab.page.get_by_role("tab", name="Cache").click()
    expect(tab.page.get_by_text("Reading the tree…")).to_be_hidden(timeout=WAIT_MS)
    return tab.page


def item(page: Page, text: str) -> Locator:
    return page.get_by_role("treeitem", name=re.compile(re.escape(text)))


def new_chat(tab: Tab, text: str) -> None:
    tab.page.get_by_role("button", name="New chat").click()
    tab.page.get_by_label("Max tokens").fill("8")
    tab.ask(text)
    tab.finish()


def notes(tab: Tab) -> Locator:
    return tab.page.locator(".hits")


def taken(tab: Tab) -> tuple[int, int]:
    """What the usage of the last answer says: prompt tokens from the cache, and all of them."""
    words = tab.page.locator(".assistant .stats").last.inner_text()
    cached, tokens = re.findall(r"(\d+) of (\d+) prompt tokens cached", words)[0]
    return int(cached), int(tokens)


# ---- the marks in the chat -----------------------------------------------------------------------------------------------


def test_second_prompt_is_marked_as_usage_says_and_a_changed_one_where_it_differs(tab: Tab) -> None:
    flush(tab.url)
    tab.open()
    new_chat(tab, "Name the harbour of Genoa, and who built it.")
    expect(notes(tab).first).to_contain_text("0 of 44 tokens reused")
    assert taken(tab)[0] == 0
    new_chat(tab, "Name the harbour of Genoa, and who built it.")
    expect(notes(tab).first).to_have_text("44 of 44 tokens reused")
    cached, tokens = taken(tab)
    assert cached == tokens - 1
    new_chat(tab, "Name the harbour of Malta, and who built it.")
    changed = notes(tab).first
    cached, _ = taken(tab)
    reused = len("Name the harbour of ")
    for _ in ("as it came", "as it was kept"):
        expect(changed).to_contain_text(f"{reused} of 44 tokens reused", timeout=WAIT_MS)
        expect(changed).to_contain_text(re.compile(f"First difference at position {cached}: .?M.? here, .?G.? in the cache"))
        share = tab.page.locator(".user").evaluate("(item) => item.style.getPropertyValue('--reused')")
        assert float(share.rstrip("%")) == pytest.approx(100 * reused / 44)
        tab.page.reload()
    tab.check_clean()


def test_each_message_of_a_longer_chat_and_the_system_prompt_have_their_share(tab: Tab) -> None:
    flush(tab.url)
    tab.open().page.get_by_label("System prompt").fill("Be brief.")
    new_chat(tab, "First question")
    tab.ask("Second question")
    tab.finish()
    shown = notes(tab)
    expect(shown.nth(0)).to_have_text(re.compile("System prompt: 9 of 9 tokens reused.*14 of 14 tokens reused", re.DOTALL))
    # The last token of an answer that was cut is read for the first time with the next question.
    expect(shown.nth(1)).to_have_text(re.compile(r"^7 of 8 tokens reused\s*New from position \d+ on$"))
    expect(shown.nth(2)).to_contain_text("0 of 15 tokens reused")
    assert taken(tab)[0] > 0
    tab.check_clean()


def test_lookup_that_does_not_answer_holds_no_question_and_marks_it_later(tab: Tab) -> None:
    flush(tab.url)
    held: list[Route] = []
    tab.page.route("**/cache/lookup", lambda route: held.append(route))
    tab.open()
    new_chat(tab, "Who waits for whom?")
    assert tab.answers()[0] and held
    expect(notes(tab).first).to_be_hidden()
    held[0].continue_()
    expect(notes(tab).first).to_have_text(re.compile("^0 of 19 tokens reused"))
    tab.check_clean()


def test_refused_question_is_told_once(tab: Tab) -> None:
    tab.open().page.get_by_label("Temperature").fill("-3")
    new_chat(tab, "Too cold")
    expect(tab.page.locator(".assistant [role=alert]")).to_contain_text("temperature")
    assert notes(tab).filter(has_text="tokens").count() == 0
    tab.check_clean()


def png(shade: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 32, 32, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes([shade]) * 32) * 32)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_picture_is_marked_as_reused_the_second_time(tab: Tab, tmp_path: Path) -> None:
    flush(tab.url)
    (tmp_path / "cat.png").write_bytes(png(90))
    tab.open()
    expect(tab.page.locator("#server-state")).to_have_text("Ready")
    for words in ("picture not reused", "picture reused"):
        tab.page.get_by_role("button", name="New chat").click()
        tab.page.locator("#picture-file").set_input_files(tmp_path / "cat.png")
        expect(tab.page.get_by_role("list", name="Pictures to send").get_by_role("listitem")).to_have_count(1)
        tab.ask("What is it?")
        tab.finish()
        expect(notes(tab).first).to_contain_text(words)
    tab.check_clean()


# ---- the view ------------------------------------------------------------------------------------------------------------


def test_empty_cache_offers_a_first_hit(tab: Tab) -> None:
    flush(tab.url)
    page = open_cache(tab)
    expect(page.get_by_text("Send the same prompt twice to see a hit.")).to_be_visible()
    page.get_by_role("button", name="Send a prompt twice").click()
    told = page.get_by_text(re.compile(r"The second time \d+ of \d+ prompt tokens came from the cache"))
    expect(told).to_be_visible(timeout=WAIT_MS)
    cached, tokens = re.findall(r"\d+", told.inner_text())
    assert int(cached) == int(tokens) - 1
    expect(page.get_by_role("treeitem")).not_to_have_count(0, timeout=WAIT_MS)
    expect(page.get_by_text("Cache is empty")).to_be_hidden()
    flush_button = page.get_by_role("button", name="Flush cache")
    flush_button.click()
    page.get_by_role("button", name="Press again to forget").click()
    expect(page.get_by_text("Cache is empty", exact=True)).to_be_visible(timeout=WAIT_MS)
    assert tree(tab.url) == []
    tab.check_clean()


def test_tree_that_cannot_be_read_says_why_and_can_be_tried_again(tab: Tab) -> None:
    compute(tab.url, "still here")
    broken: list[Route] = []

    def fail(route: Route) -> None:
        broken.append(route)
        route.fulfill(status=200, content_type="text/html", body="<p>a proxy's page</p>")

    looks = re.compile(r"/cache/tree\?")
    tab.page.route(looks, fail)
    page = open_cache(tab)
    expect(page.get_by_role("alert").filter(has_text="The tree cannot be read")).to_be_visible(timeout=WAIT_MS)
    page.unroute(looks)
    page.get_by_role("button", name="Try again").click()
    expect(item(page, "“still here")).to_be_visible(timeout=WAIT_MS)
    expect(page.get_by_text("The tree cannot be read")).to_be_hidden()
    assert broken
    tab.check_clean()


def test_tree_is_operable_by_keys_alone(tab: Tab) -> None:
    flush(tab.url)
    for prompt in ("apples are red", "apples are green", "bananas"):
        compute(tab.url, prompt)
    page = open_cache(tab)
    page.get_by_role("button", name="Flush cache").focus()
    page.keyboard.press("Tab")
    bananas, apples, red = item(page, "“bananas"), item(page, "“apples are "), item(page, "“red")
    expect(bananas).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(apples).to_be_focused()
    expect(apples).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("ArrowLeft")
    expect(apples).to_have_attribute("aria-expanded", "false")
    expect(red).to_have_count(0)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    expect(red).to_be_focused()
    assert [red.get_attribute(f"aria-{name}") for name in ("level", "posinset", "setsize")] == ["2", "2", "2"]
    page.keyboard.press("Enter")
    expect(red).to_have_attribute("aria-selected", "true")
    node = page.get_by_role("region", name="Selected node")
    expect(node.get_by_role("region", name="Text of the node")).to_have_text(re.compile("^red"))
    page.keyboard.press("ArrowLeft")
    expect(apples).to_be_focused()
    page.keyboard.press("b")
    expect(bananas).to_be_focused()
    expect(page.get_by_role("treeitem").and_(page.locator("[tabindex='0']"))).to_have_count(1)
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(node.get_by_role("button", name="Pin node")).to_be_focused()
    page.keyboard.press("Enter")
    expect(node.get_by_role("button", name="Unpin node")).to_be_focused(timeout=WAIT_MS)
    expect(item(page, "bananas")).to_have_accessible_name(re.compile("Pinned"))
    page.keyboard.press("Enter")
    expect(node.get_by_role("button", name="Pin node", exact=False)).to_be_focused()
    expect(item(page, "bananas")).not_to_have_accessible_name(re.compile("Pinned"), timeout=WAIT_MS)
    tab.check_clean()


def test_changes_by_others_show_without_moving_focus_selection_or_scroll(tab: Tab) -> None:
    flush(tab.url)
    for k in range(20):
        compute(tab.url, f"{chr(97 + k)} begins like no other, and goes on")
    page = open_cache(tab)
    item(page, "“f begins").click()
    page.evaluate("() => (document.querySelector('.cache-scroll').scrollTop = 150)")
    page.evaluate("() => (window.kept = document.activeElement)")
    place = "() => [document.querySelector('.cache-scroll').scrollTop, document.activeElement === window.kept]"
    compute(tab.url, "f begins like many others")  # splits what is selected
    expect(item(page, "many others")).to_be_visible(timeout=WAIT_MS)
    chosen = page.locator("[role=treeitem][aria-selected=true]")
    expect(chosen).to_have_accessible_name(re.compile("“no other"))
    expect(chosen).to_have_attribute("aria-level", "2")
    assert page.evaluate(place)[1]
    [gone] = [node["id"] for node in tree(tab.url) if node["preview"].startswith("t begins")]
    post(tab.url, "cache/evict", {"node": gone})
    expect(item(page, "“t begins")).to_have_count(0, timeout=WAIT_MS)
    scrolled, is_focused = page.evaluate(place)
    assert scrolled > 0 and is_focused
    compute(tab.url, "f begins like no other, and goes on and on")
    expect(chosen).to_have_accessible_name(re.compile(r", [1-9]\d* hit"), timeout=WAIT_MS)
    tab.check_clean()


def test_large_level_is_shown_in_parts(tab: Tab) -> None:
    flush(tab.url)

    def compute_all(first: int) -> None:
        for k in range(first, first + 30):
            compute(tab.url, f"{k} of many", cache_salt=f"salt {k}")

    threads = [threading.Thread(target=compute_all, args=(30 * k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    page = open_cache(tab)
    shown, more = page.get_by_role("treeitem"), item(page, "Show 100 more")
    expect(shown).to_have_count(101, timeout=WAIT_MS)
    expect(shown.first).to_have_accessible_name(re.compile("Kept apart by a cache_salt"))
    for num_shown in (201, 240):
        more.focus()
        page.keyboard.press("Enter")
        expect(shown).to_have_count(num_shown, timeout=WAIT_MS)
        expect(page.locator("[role=treeitem]:focus")).to_have_count(1)
    expect(more).to_have_count(0)
    compute(tab.url, "late to come", cache_salt="late")
    expect(item(page, "“late to come")).to_be_visible(timeout=WAIT_MS)
    expect(shown).to_have_count(241)
    tab.check_clean()


def test_pin_survives_a_burst_that_evicts_all_else(small_tab: Tab) -> None:
    url = small_tab.url
    compute(url, "precious words that shall stay " * 4)
    compute(url, "words that may go " * 8)
    page = open_cache(small_tab)
    item(page, "“words that may go").click()
    item(page, "“precious words").click()
    page.get_by_role("button", name="Pin node").click()
    expect(page.get_by_role("button", name="Unpin node")).to_be_visible(timeout=WAIT_MS)
    for k in range(8):
        compute(url, f"{k} burst of other things " * 20)
    expect(item(page, "“words that may go")).to_have_count(0, timeout=WAIT_MS)
    expect(item(page, "“precious words")).to_have_accessible_name(re.compile("Pinned"))
    expect(page.get_by_role("list", name="Memory, in tokens")).to_contain_text(re.compile(r"Pinned [1-9]\d+"))
    evict = page.get_by_role("button", name="Evict node")
    expect(evict).to_have_attribute("aria-disabled", "true")
    expect(evict).to_have_accessible_description(re.compile("Cannot be evicted now: it is pinned"))
    page.get_by_role("button", name="Unpin node").click()
    expect(evict).to_have_attribute("aria-disabled", "false", timeout=WAIT_MS)
    evict.click()
    page.get_by_role("button", name="Press again").click()
    expect(page.get_by_role("heading", name="is gone")).to_be_visible(timeout=WAIT_MS)
    expect(item(page, "“precious words")).to_have_count(0)
    small_tab.check_clean()


def test_node_that_a_request_stands_on_says_so_and_is_not_evicted(slow_tab: Tab) -> None:
    flush(slow_tab.url)
    page = open_cache(slow_tab)
    asking = threading.Thread(target=compute, args=(slow_tab.url, "a long story goes on", 150))
    asking.start()
    row = item(page, "“a long story")
    expect(row).to_have_accessible_name(re.compile("Used by 1 running request"), timeout=WAIT_MS)
    row.click()
    node = page.get_by_role("region", name="Selected node")
    evict = node.get_by_role("button", name="Evict")
    expect(evict).to_have_accessible_description(re.compile("Cannot be evicted now: 1 running request stands on it"))
    evict.click(force=True)
    expect(node.get_by_role("button", name="Press again")).to_have_count(0)
    asking.join()
    expect(evict).to_have_attribute("aria-disabled", "false", timeout=WAIT_MS)
    expect(row).not_to_have_accessible_name(re.compile("Used by"))
    # Somebody pins it before the page knows: the server's own refusal is shown.
    page.route("**/cache/evict", lambda route: route.fulfill(status=409, json={"error": {"message": "a pin holds it"}}))
    evict.click()
    node.get_by_role("button", name="Press again").click()
    expect(node.get_by_role("alert")).to_have_text("a pin holds it")
    slow_tab.console = [line for line in slow_tab.console if "409" not in line]  # the browser notes any refusal
    slow_tab.check_clean()


def test_who_may_not_see_texts_or_change_anything_is_told_why(guarded_tab: Tab) -> None:
    compute(guarded_tab.url, "words of others")
    page = open_cache(guarded_tab)
    row = page.get_by_role("treeitem").first
    expect(row).to_have_accessible_name(re.compile(r"^Node \d+, 1[56] tokens"))
    row.click()
    node = page.get_by_role("region", name="Selected node")
    expect(node).to_contain_text("Pinning, evicting and flushing are for the holder of the server's admin key.")
    for name in ("Pin", "Evict"):
        expect(node.get_by_role("button", name=name)).to_have_attribute("aria-disabled", "true")
    expect(page.get_by_role("button", name="Flush cache")).to_have_attribute("aria-disabled", "true")
    reason = get_json(guarded_tab.url + "cache/tree")["previews_reason"]
    expect(page.get_by_text(reason).first).to_be_visible()
    assert "words of others" not in page.locator("body").inner_text()
    guarded_tab.check_clean()


def test_way_of_the_chat_is_lit_and_opened_as_it_goes_on(tab: Tab) -> None:
    flush(tab.url)
    compute(tab.url, "elsewhere")
    page = open_cache(tab)
    follow = page.get_by_role("button", name="Follow my chat")
    follow.click()
    expect(follow).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_text("This conversation has no messages yet.")).to_be_visible()
    lit = page.locator("[role=treeitem].lit")
    page.get_by_role("tab", name="Chat").click()
    tab.ask("Where do I stand?")
    tab.finish()
    page.get_by_role("tab", name="Cache").click()
    expect(page.get_by_text(re.compile(r"\d+ of \d+ tokens of this conversation are in the cache"))).to_be_visible(
        timeout=WAIT_MS
    )
    expect(lit.last).to_have_accessible_name(re.compile("Part of the conversation on screen"))
    expect(item(page, "“elsewhere")).not_to_have_class(re.compile("lit"))
    path = get_json(tab.url + "cache/tree?depth=16")["nodes"]
    assert {int(lit.nth(k).get_attribute("data-node") or 0) for k in range(lit.count())} <= {node["id"] for node in path}
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.get_by_role("tab", name="Cache").click()
    expect(lit).to_have_count(0, timeout=WAIT_MS)
    tab.check_clean()


def test_texts_of_others_are_inert_and_no_width_needs_sideways_scrolling(tab: Tab) -> None:
    flush(tab.url)
    compute(tab.url, "<img src=x onerror='window.hacked = 1'>\u202e\x1b[31m" + "x" * 200)
    page = open_cache(tab)
    row = item(page, "<img src=x onerror=")
    row.click()
    text = page.get_by_role("region", name="Text of the node")
    expect(text).to_contain_text("<img src=x onerror='window.hacked = 1'>")
    expect(text.locator("bdi.control")).to_have_count(2, timeout=WAIT_MS)
    assert page.locator(".cache-view img").count() == 0
    assert page.evaluate("() => window.hacked") is None
    for width in (360, 900):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0
        wide = "() => { const view = document.querySelector('.cache-view'); return view.scrollWidth - view.clientWidth; }"
        assert page.evaluate(wide) <= 0
    page.set_viewport_size({"width": 390, "height": 844})
    boxes = [page.locator(name).bounding_box() for name in (".cache-scroll", ".cache-node")]
    assert boxes[0] and boxes[1] and boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    tab.check_clean()
