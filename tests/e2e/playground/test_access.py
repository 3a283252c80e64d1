"""Every view and panel of the playground is held to WCAG 2.2 A and AA by axe-core, in both themes, wide and narrow.

axe-core comes inside a package of the extra "test" and is evaluated in the page, under its policy. What it cannot judge (order of
focus, what is said and when) is in the tests of each part.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.e2e.playground.browser import CHROMIUM, NO_WEBSOCKET, tab_on

AXE = "axe_playwright_python"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium"),
    pytest.mark.skipif(find_spec(AXE) is None, reason='no axe-core here: pip install "streamserve[test]"'),
]

LONG = 30_000  # ms
WIDTHS = {"wide": 1280, "narrow": 360}
RUN = """async (rules) => {
  const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22a", "wcag22aa"];
  const { violations } = await axe.run(document, { runOnly: rules ?? tags, resultTypes: ["violations"] });
  const words = (id) => ({ target, failureSummary }) => `${id} at ${target}: ${failureSummary}`;
  return violations.flatMap(({ id, nodes }) => nodes.map(words(id)));
}"""
OPEN = "(all) => all.forEach((details) => (details.open = true))"
COLOURS = ["color-contrast", "link-in-text-block"]  # the rules that the theme makes a difference for
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


def problems(page: Page) -> list[str]:
    page.emulate_media(color_scheme="dark")
    dark = [f"dark: {problem}" for problem in page.evaluate(RUN, COLOURS)]
    page.emulate_media(color_scheme="light")
    return [*page.evaluate(RUN), *dark]


def check(page: Page, where: str) -> None:
    found = problems(page)
    assert found == [], f"{where}:\n" + "\n".join(found)


def answer_rich(route: Route) -> None:
    """An answer of all kinds of Markdown to one question; the server's own to others."""
    request = json.loads(route.request.post_data or "{}")
    if request["messages"][-1]["content"] != "Rich" or request.get("logprobs"):
        return route.continue_()
    chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": RICH, "reasoning_content": "Let me see."}}]}
    route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")


@contextmanager
def opened(chromium: Browser, server: str, width: int) -> Iterator[Page]:
    """The page with an answer of the server and one of all kinds of Markdown."""
    with tab_on(chromium, server, viewport={"width": width, "height": 800}, reduced_motion="reduce") as tab:
        tab.page.route("**/v1/chat/completions", answer_rich)
        tab.open(NO_WEBSOCKET)
        for question in ("Plain", "Rich"):
            tab.ask(question)
            tab.finish()
        tab.page.evaluate(files(AXE).joinpath("axe.min.js").read_text())
        yield tab.page
        tab.page.unroute_all(behavior="ignoreErrors")


# What there is to see of a view or panel: each yields when there is something new to judge.


def chat(page: Page) -> Iterator[str]:
    yield "messages"
    page.locator("#messages details").evaluate_all(OPEN)
    page.get_by_role("button", name="Edit message 2").click()
    yield "thoughts and an answer that is edited"
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Edit message 1").click()
    yield "a question that is edited"
    page.keyboard.press("Escape")


def compare(page: Page) -> Iterator[str]:
    yield "nothing asked"
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
    yield "answers, one of which failed"


def cache(page: Page) -> Iterator[str]:
    node = page.get_by_role("treeitem").first
    expect(node).to_be_visible(timeout=LONG)
    yield "the tree"
    node.click()
    expect(page.get_by_role("region", name="Selected node").get_by_role("button").first).to_be_visible(timeout=LONG)
    yield "a node that is selected"


def engine(page: Page) -> Iterator[str]:
    yield "steps"
    page.get_by_text("Steps as a table").click()
    page.get_by_role("button", name="Table").click()
    yield "tables"


def settings(page: Page) -> Iterator[str]:
    yield "fields"
    page.locator("#panel-settings details").evaluate_all(OPEN)
    yield "all fields"


def schema(page: Page) -> Iterator[str]:
    form = page.get_by_label("Form of the answer", exact=True)
    first, *others = form.get_by_role("option").all_inner_texts()
    for option in (*others, first):
        form.select_option(label=option)
        yield option


def tools(page: Page) -> Iterator[str]:
    yield "no tool"
    page.get_by_role("button", name="Sample: get_weather").click()
    yield "a tool"


def raw(page: Page) -> Iterator[str]:
    for part in ("Request", "Events", "Code"):
        page.get_by_role("radio", name=part, exact=True).check()
        yield part


def tokens(page: Page) -> Iterator[str]:
    yield "nothing recorded"
    page.get_by_role("button", name="Turn on and resend").click()
    expect(page.get_by_role("tabpanel", name="Tokens").get_by_text(re.compile("alternatives|entropy")).last).to_be_visible(
        timeout=LONG
    )
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible(timeout=LONG)
    yield "probabilities"
    page.get_by_role("radio", name="List").check()
    yield "the list"


SIGHTS = {f.__name__: f for f in (chat, compare, cache, engine, settings, schema, tools, raw, tokens)}


def judge(page: Page, row: str, where: str, wanted: set[str]) -> None:
    """Shows each part of this row of tabs and what there is to see of it."""
    titles = page.locator(row).get_by_role("tab").all_inner_texts()
    assert wanted <= set(titles)
    for title in titles:
        page.locator(row).get_by_role("tab", name=title, exact=True).click()
        shown = page.get_by_role("tabpanel", name=title, exact=True)
        expect(shown.locator(":scope > *").first).to_be_attached(timeout=LONG)
        sights = SIGHTS.get(title.lower())
        for sight in sights(page) if sights else [""]:
            check(page, f"{title}, {sight}, {where}")


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_no_view_breaks_a_rule(chromium: Browser, server: str, width: int) -> None:
    with opened(chromium, server, width) as page:
        judge(page, "#views", f"{width} px", {"Chat", "Cache", "Compare", "Engine"})


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_no_panel_breaks_a_rule(chromium: Browser, server: str, width: int) -> None:
    with opened(chromium, server, width) as page:
        if width == WIDTHS["narrow"]:
            page.locator("#open-inspector").click()
        judge(page, "#panels", f"{width} px", {"Settings", "Schema", "Tools", "Raw", "Tokens"})


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_nothing_that_opens_over_the_page_breaks_a_rule(chromium: Browser, server: str, width: int) -> None:
    with opened(chromium, server, width) as page:
        where = f"{width} px"
        if width == WIDTHS["narrow"]:
            page.get_by_role("button", name="Conversations", exact=True).click()
        page.get_by_role("button", name="Actions for Plain").click()
        expect(page.get_by_role("menu")).to_be_visible()
        check(page, f"menu of a conversation, {where}")
        page.keyboard.press("Escape")
        page.get_by_role("searchbox").fill("fake engine")
        expect(page.locator("#nav mark").first).to_be_visible(timeout=LONG)
        check(page, f"what a search found, {where}")
        page.evaluate("() => document.getElementById('key-dialog').showModal()")
        check(page, f"question for a key, {where}")
        page.keyboard.press("Escape")
        page.evaluate("() => document.getElementById('show-keys').click()")
        expect(page.get_by_role("dialog")).to_be_visible(timeout=LONG)
        check(page, f"list of keys, {where}")


def test_the_judge_finds_what_is_wrong(chromium: Browser, server: str) -> None:
    with opened(chromium, server, WIDTHS["wide"]) as page:
        page.evaluate("""() => {
          const list = document.querySelector("#messages");
          const item = list.appendChild(document.createElement("li"));
          item.append(document.createElement("button"), "Hard to read");
          item.style.color = "light-dark(#111, #222)";
        }""")
        found = problems(page)
        assert len(found) >= 2
        assert any(problem.startswith("button-name") for problem in found)
        assert [problem for problem in found if "color-contrast" in problem and not problem.startswith("dark: ")] == []
        assert any(problem.startswith("dark: color-contrast") for problem in found)


def test_what_is_chosen_is_told_from_the_rest_where_the_system_chooses_the_colours(chromium: Browser, server: str) -> None:
    looks = (
        "(node) => ['outlineStyle', 'borderBottomStyle', 'textDecorationLine'].map((name) => getComputedStyle(node)[name]).join()"
    )
    with opened(chromium, server, WIDTHS["wide"]) as page:
        page.emulate_media(forced_colors="active")
        for row in ("#panels", "#views"):
            tabs = page.locator(row).get_by_role("tab")
            tabs.nth(1).click()
            chosen = page.locator(row).get_by_role("tab", selected=True)
            page.locator("#skip").focus()  # the ring of the focus is no part of this
            assert chosen.evaluate(looks) != tabs.nth(0).evaluate(looks), row
        page.get_by_role("tab", name="Cache").click()
        follow = page.get_by_role("button", name="Follow my chat")
        follow.click(timeout=LONG)
        page.locator("#skip").focus()
        assert follow.evaluate(looks) != page.get_by_role("button", name="Flush cache").evaluate(looks)
