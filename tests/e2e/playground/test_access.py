"""Every view and panel of the playground is held to WCAG 2.2 A and AA by axe-core, in both themes, wide and narrow.

axe-core comes inside a package of the extra "test" and is evaluated in the page, under its policy. What it cannot judge (order of
focus, what is said and when) is in the tests of each part.
"""

import json
import re
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.playground.browser import CHROMIUM, NO_WEBSOCKET, Tab

AXE = "axe_playwright_python"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium"),
    pytest.mark.skipif(find_spec(AXE) is None, reason='no axe-core here: pip install "streamserve[test]"'),
]

LONG = 30_000  # ms
WIDTHS = {"wide": 1280, "narrow": 360}
RUN = """async () => {
  const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22a", "wcag22aa"];
  const { violations } = await axe.run(document, { runOnly: tags, resultTypes: ["violations"] });
  const words = (id) => ({ target, failureSummary }) => `${id} at ${target}: ${failureSummary}`;
  return violations.flatMap(({ id, nodes }) => nodes.map(words(id)));
}"""
RICH = """## A heading

Some *text* with `code`, a [link](https://example.invalid/page) and ~~more~~ \u202e.

| Name | Size |
|:-----|-----:|
| a    | 1    |

- [x] done
- [ ] open

> A quotation

```python
def double(x):  # twice as much
    return "2" * x
```

$$x^2 + y_1$$
"""


def check(page: Page, where: str) -> None:
    problems = page.evaluate(RUN)
    assert problems == [], f"{where}:\n" + "\n".join(problems)


def open_page(chromium: Browser, server: str, width: int, theme: str) -> Tab:
    """The page with a few messages: an answer of all kinds of Markdown, and one that failed."""
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=theme, reduced_motion="reduce")  # type: ignore[arg-type]
    tab = Tab(context.new_page(), server)
    chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": RICH, "reasoning_content": "Let me see."}}]}
    rich = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    tab.page.route(
        "**/v1/chat/completions",
        lambda route: (
            route.fulfill(content_type="text/event-stream", body=rich)
            if '"Rich"' in route.request.post_data
            else route.continue_()
        ),
    )
    tab.open(NO_WEBSOCKET)
    for question in ("Rich", "Plain"):
        tab.ask(question)
        tab.finish()
    tab.page.evaluate(files(AXE).joinpath("axe.min.js").read_text())
    return tab


def fill_compare(page: Page) -> None:
    page.get_by_role("button", name="Add column").click()
    for letter, value in (("A", "5"), ("B", "none"), ("C", "7")):
        column = page.get_by_role("region", name=re.compile(f"^Column {letter}"))
        column.get_by_text("Settings", exact=True).click()
        column.get_by_label(re.compile("^Max tokens")).fill(value)
    page.get_by_label("Same seed").check()
    page.get_by_label("Mark differences").check()
    page.get_by_role("textbox", name="Question for all columns").fill("Plain")
    page.get_by_role("button", name="Run all").click()
    expect(page.get_by_role("button", name="Run all again")).to_be_visible(timeout=LONG)
    expect(page.locator(".column").get_by_role("alert")).to_be_visible()


FILL = {"Compare": fill_compare}  # what a view needs before there is something to judge


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_no_view_breaks_a_rule(chromium: Browser, server: str, width: int, theme: str) -> None:
    tab = open_page(chromium, server, width, theme)
    page = tab.page
    views = page.locator("#views").get_by_role("tab").all_inner_texts()
    assert {"Chat", "Compare", "Engine"} <= set(views)
    for view in views:
        page.locator("#views").get_by_role("tab", name=view, exact=True).click()
        expect(page.get_by_role("tabpanel", name=view, exact=True)).to_be_visible()
        expect(page.get_by_role("tabpanel", name=view, exact=True).locator(":scope > *").first).to_be_attached(timeout=LONG)
        if view in FILL:
            FILL[view](page)
        check(page, f"{view}, {theme}, {width} px")
    page.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_no_panel_breaks_a_rule(chromium: Browser, server: str, width: int, theme: str) -> None:
    tab = open_page(chromium, server, width, theme)
    page = tab.page
    if width == WIDTHS["narrow"]:
        page.get_by_role("button", name="Conversations", exact=True).click()
        check(page, f"conversations, {theme}, {width} px")
        page.keyboard.press("Escape")
        page.locator("#open-inspector").click()
    panels = page.locator("#panels").get_by_role("tab").all_inner_texts()
    assert {"Settings", "Raw"} <= set(panels)
    for panel in panels:
        page.locator("#panels").get_by_role("tab", name=panel, exact=True).click()
        shown = page.get_by_role("tabpanel", name=panel, exact=True)
        expect(shown.locator(":scope > *").first).to_be_attached(timeout=LONG)
        for summary in shown.locator("details:not([open]) > summary:visible").all():
            summary.click()
        check(page, f"{panel}, {theme}, {width} px")
    page.context.close()
