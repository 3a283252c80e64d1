"""The playground by keys alone: all can be reached, says what it is, is in sight where it has the focus, and shows that."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.playground.browser import CHROMIUM, Tab

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")
LONG = 30_000  # ms, for what a busy machine takes its time with

# Elements that Tab must come to: of radios of one name and of rows of tabs only one.
STOPS = """() => {
  const isShown = (e) => e.checkVisibility({ visibilityProperty: true }) && !e.closest("[inert]");
  const all = document.querySelectorAll("a[href], :is(button, input, select, textarea):enabled, summary, [tabindex]");
  window.stops = [...all].filter((e) => e.tabIndex >= 0 && isShown(e) && !(e.type === "radio" && !e.checked));
  return window.stops.length;
}"""
AT = """() => {
  const node = document.activeElement;
  if (!node || node === document.body) return null;
  const { left, top, right, bottom, width, height } = node.getBoundingClientRect();
  const label = node.labels?.[0];
  const named = document.getElementById(node.getAttribute("aria-labelledby"));
  const words = node.ariaLabel || named?.textContent || label?.textContent || node.textContent || node.title;
  const [x, y] = [Math.max(1, left + Math.min(width, innerWidth) / 2), top + Math.min(height, 20) / 2];
  const above = document.elementFromPoint(x, y);
  const isCovered = !above || !(node.contains(above) || above.contains(node) || label?.contains(above));
  const around = [node, node.firstElementChild, node.nextElementSibling, node.parentElement, node.closest("form, label, .field")];
  const hasRing = around.some((place) => {
    const { outlineStyle, outlineWidth, boxShadow } = place ? getComputedStyle(place) : {};
    return place && ((outlineStyle !== "none" && outlineWidth !== "0px") || boxShadow !== "none");
  });
  return {
    at: window.stops.indexOf(node),
    what: `${node.localName}#${node.id}.${node.className}`,
    name: words.trim().slice(0, 60),
    isOutside: bottom < 0 || top > innerHeight || right < 0 || left > innerWidth,
    isCovered,
    hasRing,
  };
}"""


def walk(page: Page) -> list[dict[str, Any]]:
    """Where Tab leads to from the top of the page until it has left it."""
    page.evaluate("() => document.activeElement.blur()")
    num_stops = page.evaluate(STOPS)
    page.locator("#skip").focus()
    found: list[dict[str, Any]] = []
    for _ in range(num_stops + 10):
        at = page.evaluate(AT)
        if at is None or (found and at["what"] == found[0]["what"]):
            return found
        found.append(at)
        page.keyboard.press("Tab")
    pytest.fail(f"Tab does not leave the page: {[at['what'] for at in found[-10:]]}")


def check(page: Page, where: str) -> None:
    found = walk(page)
    for fault in ("isOutside", "isCovered"):
        assert [at["what"] for at in found if at[fault]] == [], (where, fault)
    assert [at["what"] for at in found if not at["name"]] == [], where
    assert [at["what"] for at in found if not at["hasRing"]] == [], where
    missed = page.evaluate(
        "(found) => window.stops.filter((_, k) => !found.includes(k)).map((e) => `${e.localName}#${e.id}.${e.className}`)",
        [at["at"] for at in found],
    )
    assert missed == [], where


def along(page: Page, row: str) -> Iterator[str]:
    """The tabs of a row, shown by arrow keys, one after the other."""
    page.locator(f"{row} [role=tab][tabindex='0']").focus()
    page.keyboard.press("Home")
    first = page.evaluate("() => document.activeElement.textContent")
    title = first
    while True:
        expect(page.get_by_role("tabpanel", name=title, exact=True).locator(":scope > *").first).to_be_attached(timeout=LONG)
        yield title
        page.locator(f"{row} [role=tab][aria-selected=true]").focus()
        page.keyboard.press("ArrowRight")
        title = page.evaluate("() => document.activeElement.textContent")
        if title == first:
            return


def test_everything_is_reached_by_tab_and_arrows_and_seen(tab: Tab) -> None:
    page = tab.open().page
    expect(page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("By keys alone")
    page.keyboard.press("Enter")
    tab.finish()
    shown = []
    for panel in along(page, "#panels"):
        shown.append(panel)
        check(page, panel)
    for view in along(page, "#views"):
        shown.append(view)
        check(page, view)
    assert {"Settings", "Schema", "Tools", "Raw", "Tokens", "Chat", "Cache", "Compare", "Engine"} <= set(shown)
    page.locator("#skip").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    tab.check_clean()


def test_on_a_phone_what_lies_over_the_page_takes_the_focus_and_gives_it_back(chromium: Browser, server: str) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 844})
    tab = Tab(context.new_page(), server).open()
    page = tab.page
    expect(page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    for opener in ("Conversations", "Settings"):
        page.get_by_role("button", name=opener, exact=True).focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name=re.compile("^Close")).and_(page.locator(":focus"))).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name=opener, exact=True)).to_be_focused()
    check(page, "phone")
    tab.check_clean()
    context.close()
