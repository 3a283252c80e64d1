"""The main path through the playground with the default model: what only a model that answers can show."""

import re

import pytest
from playwright.sync_api import expect

from tests.e2e.playground.browser import CHROMIUM, NOTE_GROWTH, Tab
from tests.e2e.playground.parts import use_every_part

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")
LONG = 60_000  # ms, for what a busy machine takes its time with


def cached(tab: Tab) -> tuple[int, int]:
    """Of the last answer: prompt tokens from the cache, and all of them."""
    words = tab.page.locator(".assistant .stats").last.inner_text()
    found = re.findall(r"([\d,]+) of ([\d,]+) prompt tokens cached", words)[0]
    return int(found[0].replace(",", "")), int(found[1].replace(",", ""))


def test_a_model_answers_and_reads_little_twice(real_tab: Tab) -> None:
    page = real_tab.open().page
    expect(page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    for label in ("Temperature", "Top p"):
        assert float(page.get_by_label(label).get_attribute("placeholder") or "") > 0
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("40")
    page.evaluate(NOTE_GROWTH)
    real_tab.ask("What is the capital of France?")
    real_tab.finish()
    expect(page.locator(".assistant .text")).to_contain_text("Paris")
    lengths = page.evaluate("() => window.lengths")
    assert len(lengths) >= 3 and lengths == sorted(lengths)
    expect(page.locator(".assistant .stats")).to_contain_text(re.compile(r"\d+ tok · [\d.,]+ tok/s · TTFT"))
    real_tab.ask("And of Italy?")
    real_tab.finish()
    expect(page.locator(".assistant .text").last).to_contain_text("Rome")
    reused, prompt = cached(real_tab)
    assert prompt / 2 < reused < prompt
    expect(page.locator(".hits").first).to_contain_text(re.compile(r"[1-9]\d* of \d+ tokens reused"), timeout=LONG)
    first = page.locator(".assistant .text").first.inner_text()
    page.get_by_role("button", name="Regenerate message 2").click()
    real_tab.finish()
    assert page.locator(".assistant .text").all_inner_texts() == [first]  # the same, at temperature 0
    expect(page.locator(".assistant .place")).to_have_text("2/2")
    real_tab.check_clean()


def test_every_part_works_with_a_model(real_tab: Tab) -> None:
    page = real_tab.open().page
    use_every_part(real_tab, "What colour is this?")
    detail = page.get_by_role("region", name="The chosen token")
    expect(detail.get_by_role("row")).to_have_count(6)  # their titles, and five tokens that could have been
    real_tab.check_clean()
