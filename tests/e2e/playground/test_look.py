"""What a newcomer meets: ways back to the message box, panels where they belong, parts that come late, and nothing that jumps."""

import json
import re
import urllib.request
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.playground.browser import CHROMIUM, Tab, get_json, tab_on

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")
LONG = 20_000  # ms, of a machine that is busy with other things


@pytest.fixture
def phone(chromium: Browser, server: str) -> Iterator[Tab]:
    with tab_on(chromium, server, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True) as tab:
        yield tab


def view(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def message_box_has_focus(page: Page) -> None:
    expect(page.get_by_role("tab", name="Chat", exact=True)).to_have_attribute("aria-selected", "true")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def top_of(page: Page, selector: str) -> float:
    box = page.locator(selector).bounding_box()
    assert box
    return box["y"]


def test_every_way_to_the_message_box_leads_there_from_any_view(tab: Tab) -> None:
    page = tab.open().page
    for name in ("Cache", "Compare", "Engine"):
        view(page, name)
        page.get_by_role("button", name="New chat", exact=True).click()
        message_box_has_focus(page)
    assert "v=" not in page.url
    view(page, "Engine")
    page.keyboard.press("Control+/")
    message_box_has_focus(page)
    view(page, "Cache")
    page.get_by_role("link", name="Skip to the message box").focus()
    page.keyboard.press("Enter")
    message_box_has_focus(page)
    tab.check_clean()


def test_panels_stand_beside_the_chat_alone_and_are_equally_wide(tab: Tab) -> None:
    page = tab.open().page
    panels = page.get_by_role("complementary", name="Settings")
    widths = set()
    for name in ("Settings", "Schema", "Tools", "Raw", "Tokens"):
        view(page, name)
        box = panels.bounding_box()
        assert box
        widths.add(box["width"])
    assert len(widths) == 1  # or the messages would move
    for name in ("Cache", "Compare", "Engine"):
        view(page, name)
        expect(panels).to_be_hidden()
        expect(page.get_by_role("button", name="Settings", exact=True)).to_be_hidden()
    view(page, "Chat")
    expect(panels).to_be_visible()
    expect(page.get_by_role("tab", name="Tokens")).to_have_attribute("aria-selected", "true")
    tab.check_clean()


def test_part_that_was_not_to_be_had_comes_when_asked_again(tab: Tab) -> None:
    page = tab.page
    page.route(re.compile(r"/(cache/view\.js|css/cache\.css)$"), lambda route: route.abort())
    tab.open()
    view(page, "Cache")
    lost = page.get_by_role("alert").filter(has_text="could not be loaded")
    expect(lost).to_be_visible(timeout=LONG)
    again = lost.get_by_role("button", name="Try again")
    again.click()
    expect(again).to_be_focused(timeout=LONG)
    page.unroute_all()
    again.click()
    expect(page.get_by_role("heading", name="Prefix cache")).to_be_visible(timeout=LONG)
    expect(page.get_by_role("tab", name="Cache", exact=True)).to_be_focused()
    assert page.locator(".cache-meters").evaluate("(meters) => getComputedStyle(meters).display") == "grid"
    assert [line for line in tab.console if "Failed to load resource" not in line] == []
    tab.console.clear()
    tab.check_clean()


def test_figures_stand_where_they_stood_while_the_answer_came(tab: Tab) -> None:
    page = tab.open().page
    page.get_by_label("Max tokens", exact=True).fill("20")
    tab.ask("Hello")
    tab.finish()
    text = page.locator(".assistant .text").bounding_box()
    stats, actions = (page.locator(f".assistant {selector}").bounding_box() for selector in (".stats", ".actions"))
    assert text and stats and actions
    assert 0 <= stats["y"] - (text["y"] + text["height"]) < 8  # as the line of an answer that grows
    assert abs(stats["x"] - text["x"]) < 8
    assert actions["y"] >= stats["y"] + stats["height"] - 1
    tab.check_clean()


def test_large_tree_is_open_at_its_top(tab: Tab) -> None:
    url = tab.url + "v1/chat/completions"
    for number in range(40):
        message = {"role": "user", "content": f"{chr(65 + number % 20)} question {number}"}
        body = json.dumps(
            {"messages": [{"role": "system", "content": "All begin like this."}, message], "max_tokens": 1}
        ).encode()
        urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})).close()
    assert get_json(tab.url + "cache/tree?depth=1")["num_nodes"] > 30
    page = tab.open().page
    view(page, "Cache")
    rows = page.get_by_role("tree").get_by_role("treeitem")
    expect(rows.nth(10)).to_be_visible(timeout=LONG)
    tab.check_clean()


def test_message_box_fits_its_text_when_the_phone_is_turned(phone: Tab) -> None:
    page = phone.open().page
    box = page.get_by_label("Message", exact=True)
    box.fill("A question that needs more than one line of a phone, held upright, and only one of it held across.")
    fits = "(box) => Math.abs(box.scrollHeight - box.clientHeight) < 2 && box.clientHeight"
    upright = box.evaluate(fits)
    page.set_viewport_size({"width": 1300, "height": 390})
    page.wait_for_function(
        f"(upright) => {{ const height = ({fits})(document.getElementById('prompt')); return height && height < upright }}",
        arg=upright,
    )
    phone.check_clean()


def test_short_message_hides_nothing_that_can_be_pressed(slow_tab: Tab) -> None:
    page = slow_tab.open().page
    slow_tab.ask("Hello")
    page.locator("#scroll").evaluate("(scroll) => scroll.style.setProperty('max-height', '3rem')")  # so that it can be scrolled
    expect(page.get_by_label("Generating")).to_have_count(0)
    page.locator("#scroll").hover()
    expect(page.locator(".assistant .text")).not_to_be_empty(timeout=LONG)
    page.mouse.wheel(0, -2_000)
    jump = page.get_by_role("button", name="Jump to latest")
    expect(jump).to_be_visible(timeout=LONG)
    page.get_by_role("button", name=re.compile("^Actions for")).first.click()
    page.get_by_role("menuitem", name="Duplicate").click()
    page.locator("#toast").evaluate("(toast) => (toast.hidden = false)")
    assert top_of(page, "#jump") + 20 < top_of(page, "#toast")
    slow_tab.check_clean()
