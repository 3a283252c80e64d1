"""What tests of Compare share: opening it, its columns, asking them."""

import json
import re
from typing import Any

from playwright.sync_api import Locator, Page, WebSocket, expect

from tests.e2e.playground.browser import Tab

LONG = 30_000  # ms, for what a busy machine takes its time with


def open_compare(tab: Tab, *init_scripts: str) -> Page:
    tab.open(*init_scripts)
    expect(tab.page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    show_compare(tab.page)
    return tab.page


def show_compare(page: Page) -> None:
    page.get_by_role("tab", name="Compare").click()
    expect(page.get_by_role("region", name=re.compile("Column A"))).to_be_visible(timeout=LONG)


def requests_of(tab: Tab) -> list[dict[str, Any]]:
    """The bodies that are asked over the socket, as they come."""
    asked: list[dict[str, Any]] = []

    def note(frame: str | bytes) -> None:
        data = json.loads(frame)
        if data["type"] == "chat.create":
            asked.append(data["request"])

    def watch(websocket: WebSocket) -> None:
        websocket.on("framesent", note)

    tab.page.on("websocket", watch)
    return asked


def column(page: Page, letter: str) -> Locator:
    return page.get_by_role("region", name=re.compile(f"^Column {letter}"))


def change(page: Page, letter: str, **settings: str) -> None:
    """Fill in fields of a column by their labels, with _ for a space."""
    one = column(page, letter)
    if not one.get_by_label("System prompt").is_visible():
        one.get_by_text("Settings", exact=True).click()
    for label, value in settings.items():
        one.get_by_label(re.compile(f"^{label.replace('_', ' ')}", re.IGNORECASE)).first.fill(value)


def ask(page: Page, question: str) -> None:
    page.get_by_role("textbox", name="Question for all columns").fill(question)
    page.keyboard.press("Enter")


def finish(page: Page) -> None:
    expect(page.get_by_role("button", name="Run all")).to_be_visible(timeout=60_000)


def texts(page: Page) -> list[str]:
    return page.locator(".column .turn:last-child .text").all_inner_texts()
