"""Compare when something is lost on the way: the page is loaded again, the socket is cut, the server wants another key."""

import json
import re

import pytest
from playwright.sync_api import WebSocketRoute, expect

from tests.e2e.playground.browser import CHROMIUM, NO_WEBSOCKET, Tab, wait_for_running
from tests.e2e.playground.columns import LONG, ask, change, column, finish, open_compare, show_compare, texts

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")

REFUSAL = json.dumps({"error": {"message": "The key is wrong", "code": "invalid_api_key"}})


def test_reload_keeps_columns_and_what_is_being_written_and_answers_go_on(slow_tab: Tab) -> None:
    page = open_compare(slow_tab)
    change(page, "A", max_tokens="20")
    page.get_by_label("Same seed").check()
    ask(page, "Keep this")
    expect(column(page, "A").locator(".turn")).to_have_attribute("aria-busy", "false", timeout=LONG)
    page.get_by_role("textbox", name="Question for all columns").fill("Not yet asked")
    kept = column(page, "A").locator(".turn").inner_text()
    expect(column(page, "B").locator(".turn .text")).not_to_be_empty(timeout=LONG)
    begun = column(page, "B").locator(".turn .text").inner_text()
    page.reload()
    expect(column(page, "A").locator(".turn")).to_be_visible(timeout=LONG)
    assert column(page, "A").locator(".turn").inner_text() == kept
    expect(column(page, "B").locator(".turn .text")).to_contain_text(begun.strip()[:20], timeout=LONG)
    expect(column(page, "B").locator(".turn")).to_have_attribute("aria-busy", "true")
    page.get_by_role("button", name="Stop, column B").click()
    expect(column(page, "B").get_by_text(re.compile("Stopped by you"))).to_be_visible()
    expect(page.get_by_label("Same seed")).to_be_checked()
    expect(page.get_by_role("textbox", name="Question for all columns")).to_have_value("Not yet asked")
    wait_for_running(slow_tab.url, False)
    slow_tab.check_clean()


def test_answer_that_the_server_has_no_more_of_is_kept_as_far_as_it_came(slow_tab: Tab) -> None:
    page = open_compare(slow_tab)
    ask(page, "A long story")
    for letter in "AB":
        expect(column(page, letter).locator(".turn .text")).not_to_be_empty(timeout=LONG)
    page.keyboard.press("Escape")
    wait_for_running(slow_tab.url, False)
    before = texts(page)
    page.evaluate("""() => {
      const state = JSON.parse(localStorage["streamserve.compare"]);
      for (const { turns } of state.columns) Object.assign(turns[0], { state: "streaming", stream: "chatcmpl-long-gone" });
      addEventListener("pagehide", () => (localStorage["streamserve.compare"] = JSON.stringify(state)));
    }""")
    page.reload()
    for letter in "AB":
        expect(column(page, letter).get_by_text("Cut off by a reload")).to_be_visible(timeout=LONG)
    assert texts(page) == before
    slow_tab.check_clean()


def test_answers_of_all_columns_go_on_behind_a_lost_socket_with_nothing_lost_or_doubled(slow_tab: Tab) -> None:
    sockets: list[WebSocketRoute] = []

    def connect(websocket: WebSocketRoute) -> None:
        websocket.connect_to_server()
        sockets.append(websocket)

    slow_tab.page.route_web_socket("**/v1/ws", connect)
    page = open_compare(slow_tab)
    change(page, "A", max_tokens="100")
    change(page, "B", max_tokens="100")
    ask(page, "A long story")
    for letter in "AB":
        expect(column(page, letter).locator(".turn .text")).not_to_be_empty(timeout=LONG)
    sockets[0].close(code=1012, reason="cut")
    finish(page)
    expect(page.locator("#status")).to_have_text("2 of 2 answers complete")
    cut = texts(page)
    assert len(sockets) == 2 and cut[0] and cut[0] == cut[1]
    page.get_by_role("button", name="Run all again").click()
    finish(page)
    assert texts(page) == cut
    slow_tab.check_clean()


def test_column_that_the_server_refuses_for_its_key_asks_for_one_and_can_be_tried_again(locked_tab: Tab) -> None:
    locked_tab.open(NO_WEBSOCKET)
    page = locked_tab.page
    page.get_by_role("button", name="Cancel").click()
    show_compare(page)
    page.get_by_role("textbox", name="Question for all columns").fill("Hello")
    expect(page.get_by_role("button", name="Run all")).to_be_disabled()
    page.reload()
    for key in ("sesame", "sesame"):  # the second time because of the refusal below
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
        expect(page.get_by_role("dialog")).to_have_count(0)
        if column(page, "A").get_by_role("alert").count():
            break
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=401, body=REFUSAL), times=1)
        page.get_by_role("button", name="Run, column A").click()
        expect(page.get_by_role("dialog")).to_be_visible()
    expect(column(page, "A").get_by_role("alert")).to_contain_text("The key is wrong")
    page.get_by_role("button", name="Try again, column A").click()
    expect(column(page, "A").locator(".turn .text")).not_to_be_empty(timeout=LONG)
    assert [line for line in locked_tab.console if "401" not in line] == []  # Chromium itself logs refusals
