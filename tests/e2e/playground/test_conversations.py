"""The list of conversations in a real Chromium: search, rename, duplicate, delete and take back, branch, two tabs at once."""

import re
import time
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, expect

from tests.e2e.playground.browser import CHROMIUM, Tab, wait_for_running

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")

SOME = re.compile(r"\w{2}")
LONG = 20_000  # ms, for what a busy machine takes its time with
PUT = """async (conversations) => {
  const opening = indexedDB.open("streamserve");
  await new Promise((resolve) => (opening.onsuccess = resolve));
  const writing = opening.result.transaction(["conversations", "messages"], "readwrite");
  for (const { messages, ...row } of conversations) {
    writing.objectStore("conversations").put(row);
    const rest = { conversation: row.id, by: "", at: 0, pictures: [] };
    messages.forEach((message, order) => writing.objectStore("messages").put({ ...rest, order, message }, [row.id, message.id]));
  }
  await new Promise((resolve) => (writing.oncomplete = resolve));
  opening.result.close();
}"""
IN_VIEW = """(item) => {
  const { top, bottom } = item.getBoundingClientRect();
  const scroll = document.getElementById("scroll").getBoundingClientRect();
  return bottom > scroll.top && top < scroll.bottom;
}"""


def said(key: str, *texts: str, title: str = "", updated: int = 0) -> dict[str, Any]:
    """A conversation of these turns, as it is kept."""
    messages = [
        {
            "id": f"{key}{k}",
            "parent": f"{key}{k - 1}" if k else None,
            "role": "assistant" if k % 2 else "user",
            "content": text,
            "created": k + 1,
            "state": "done",
        }
        for k, text in enumerate(texts)
    ]
    head = messages[-1]["id"] if messages else None
    row = {"format": 1, "id": key, "title": title or texts[0][:60], "created": 1, "updated": updated or 1, "system": ""}
    return {**row, "sampling": {}, "draft": "", "head": head, "messages": messages}


def fill(tab: Tab, *conversations: dict[str, Any]) -> None:
    """Have these kept, and the page opened anew."""
    tab.open()
    expect(tab.page.get_by_text("No conversations yet")).to_be_visible(timeout=LONG)
    tab.page.evaluate(PUT, conversations)
    tab.page.reload()
    expect(tab.page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    expect(chats(tab)).to_have_count(len(conversations), timeout=LONG)


def chats(tab: Tab) -> Locator:
    return tab.page.locator("#chats a")


def questions(tab: Tab) -> Locator:
    return tab.page.locator(".user .text")


def texts(tab: Tab) -> list[str]:
    """Of all answers, in view or not."""
    return tab.page.locator(".assistant .text").all_text_contents()


def act(tab: Tab, title: str, entry: str) -> None:
    tab.page.get_by_role("button", name=f"Actions for {title}", exact=True).click()
    tab.page.get_by_role("menu", name=f"Actions for {title}").get_by_role("menuitem", name=entry).click()


def test_newest_use_stands_first_and_search_finds_titles_and_texts(tab: Tab) -> None:
    many = [said(f"c{k}", f"Talk number {k}", "Nothing of note", updated=k + 1) for k in range(200)]
    long = said("whale", *(f"Turn {k} " + "and so on\n\n" * 8 for k in range(60)), title="At sea", updated=900)
    long["messages"][30]["content"] = "Far out there was a <b>white</b> whale, they said."
    fill(tab, *many, long)
    page = tab.page
    assert chats(tab).all_text_contents()[:3] == ["At sea", "Talk number 199", "Talk number 198"]
    page.keyboard.press("Control+k")
    field = page.get_by_role("searchbox", name="Search conversations")
    expect(field).to_be_focused()
    page.keyboard.type("NUMBER 150")
    results = page.get_by_role("list", name="Conversations found").get_by_role("link")
    expect(results).to_have_text(["Talk number 150"], timeout=LONG)
    expect(page.locator("#status")).to_have_text("1 conversation found")
    field.fill("Whale (they")
    expect(page.get_by_text("Nothing has “Whale (they”.")).to_be_visible()
    field.fill("whale white")
    expect(results).to_have_text(re.compile(r"^At sea.*…out there was a <b>white</b> whale, they said\.$"))
    assert results.locator("mark").all_text_contents() == ["white", "whale"]
    field.press("ArrowDown")
    expect(results).to_be_focused()
    page.keyboard.press("Enter")
    shown = page.locator(".message", has_text="whale, they said")
    expect(shown).to_be_visible(timeout=LONG)
    page.wait_for_function(IN_VIEW, arg=shown.element_handle())
    assert page.evaluate("() => location.hash") == "#c=whale"
    field.press("Escape")
    expect(field).to_have_value("")
    expect(chats(tab)).to_have_count(201)
    expect(page.get_by_role("link", name="At sea")).to_have_attribute("aria-current", "page")
    tab.check_clean()


def test_menu_works_by_keys_and_gives_the_focus_back(tab: Tab) -> None:
    fill(tab, said("a", "Apples", "Red"), said("p", "Pears", "Green", updated=5))
    page = tab.page
    button = page.get_by_role("button", name="Actions for Pears")
    expect(button).to_have_attribute("aria-haspopup", "menu")
    button.focus()
    page.keyboard.press("Enter")
    entries = page.get_by_role("menu", name="Actions for Pears").get_by_role("menuitem")
    expect(entries).to_have_text(["Rename", "Duplicate", "Export", "Delete"])
    expect(entries.nth(0)).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(entries.nth(3)).to_be_focused()
    page.keyboard.press("Escape")
    expect(entries).to_have_count(0)
    expect(button).to_be_focused()
    page.keyboard.press("Enter")
    expect(entries.nth(0)).to_be_focused()
    page.keyboard.press("End")
    page.keyboard.press("r")
    expect(entries.nth(0)).to_be_focused()
    page.keyboard.press("Enter")
    field = page.get_by_role("textbox", name="New title of Pears")
    expect(field).to_be_focused()
    page.keyboard.type("<img src=x onerror=alert(1)>")
    page.keyboard.press("Enter")
    link = page.get_by_role("link", name="<img src=x onerror=alert(1)>")
    expect(link).to_be_focused()
    act(tab, "Apples", "Rename")
    page.keyboard.type("Not this")
    page.keyboard.press("Escape")
    expect(page.get_by_role("link", name="Apples")).to_be_focused()
    page.reload()
    expect(chats(tab)).to_have_text(["<img src=x onerror=alert(1)>", "Apples"], timeout=LONG)
    tab.check_clean()


def test_deleted_conversation_comes_back_whole_and_the_focus_goes_to_the_next(tab: Tab) -> None:
    fill(
        tab,
        said("a", "Apples", "Red", "And?", "Green"),
        said("p", "Pears", "Green", updated=5),
        said("f", "Figs", "x", updated=3),
    )
    page = tab.page
    act(tab, "Figs", "Delete")
    expect(chats(tab)).to_have_text(["Pears", "Apples"])
    expect(page.get_by_role("link", name="Apples")).to_be_focused()
    chats(tab).last.click()
    expect(questions(tab)).to_have_text(["Apples", "And?"])
    act(tab, "Apples", "Delete")
    expect(chats(tab)).to_have_text(["Pears"])
    expect(questions(tab)).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(questions(tab)).to_have_text(["Apples", "And?"], timeout=LONG)
    page.reload()
    expect(questions(tab)).to_have_text(["Apples", "And?"], timeout=LONG)
    expect(chats(tab)).to_have_text(["Pears", "Apples"])
    tab.check_clean()


def test_duplicate_and_branch_are_conversations_of_their_own(tab: Tab) -> None:
    fill(tab, said("a", "One", "First answer", "Two", "Second answer", title="Numbers"))
    page = tab.page
    page.get_by_role("link", name="Numbers").click()
    page.get_by_role("button", name="Branch off after message 2").click(timeout=LONG)
    expect(page.get_by_role("link", name="Numbers (branch)")).to_have_attribute("aria-current", "page", timeout=LONG)
    expect(questions(tab)).to_have_text(["One"])
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    tab.ask("Another two")
    tab.finish()
    expect(questions(tab)).to_have_text(["One", "Another two"])
    act(tab, "Numbers", "Duplicate")
    copy = page.get_by_role("link", name="Numbers (copy)")
    expect(copy).to_be_focused(timeout=LONG)
    act(tab, "Numbers", "Delete")
    copy.click()
    expect(questions(tab)).to_have_text(["One", "Two"])
    page.reload()
    expect(questions(tab)).to_have_text(["One", "Two"], timeout=LONG)
    expect(chats(tab)).to_have_text(["Numbers (copy)", "Numbers (branch)"])
    tab.check_clean()


def test_two_tabs_add_to_one_conversation_and_see_what_the_other_did(chromium: Browser, server: str) -> None:
    with chromium.new_context(viewport={"width": 1280, "height": 800}) as context:
        first, second = Tab(context.new_page(), server).open(), Tab(context.new_page(), server)
        first.ask("From the first tab")
        first.finish()
        second.url = first.page.url
        second.open()
        expect(questions(second)).to_have_text(["From the first tab"], timeout=LONG)
        second.page.get_by_label("Message", exact=True).fill("Written here")
        first.ask("Once more")
        first.finish()
        expect(questions(second)).to_have_text(["From the first tab", "Once more"], timeout=LONG)
        expect(second.page.locator(".assistant .stats").last).to_contain_text("401 tok", timeout=LONG)
        expect(second.page.get_by_label("Message", exact=True)).to_have_value("Written here")
        second.page.keyboard.press("Enter")
        second.finish()
        expect(questions(first)).to_have_text(["From the first tab", "Once more", "Written here"], timeout=LONG)
        act(second, "From the first tab", "Delete")
        expect(chats(first)).to_have_count(0, timeout=LONG)
        first.page.get_by_role("button", name="Keep it").click()
        expect(chats(second)).to_have_text(["From the first tab"], timeout=LONG)
        chats(second).click()
        expect(questions(second)).to_have_text(["From the first tab", "Once more", "Written here"], timeout=LONG)
        assert len(set(second.answers())) == 3
        second.url = server
        first.check_clean()
        second.check_clean()


def test_tabs_that_answer_at_once_in_one_conversation_lose_nothing(chromium: Browser, slow_server: str) -> None:
    with chromium.new_context(viewport={"width": 1280, "height": 800}) as context:
        first, second = Tab(context.new_page(), slow_server).open(), Tab(context.new_page(), slow_server)
        first.ask("Beginning")
        expect(first.page.locator(".assistant .text")).to_contain_text(SOME, timeout=LONG)
        first.page.keyboard.press("Escape")
        second.url = first.page.url
        second.open()
        expect(questions(second)).to_have_text(["Beginning"], timeout=LONG)
        first.ask("Of the first")
        expect(questions(second)).to_have_text(["Beginning", "Of the first"], timeout=LONG)
        second.ask("Of the second")
        for tab in (first, second):
            expect(tab.page.locator(".assistant:last-child .text")).to_contain_text(SOME, timeout=LONG)
        wait_for_running(slow_server, True)
        for tab in (first, second):
            tab.page.keyboard.press("Escape")
            expect(tab.page.get_by_role("button", name="Send", exact=True)).to_be_visible()
        expect(questions(first)).to_have_text(["Beginning", "Of the first", "Of the second"], timeout=LONG)
        wait_for_running(slow_server, False)
        ends = first.page.locator(".assistant .stats").all_text_contents()
        for _ in range(100):  # each tab tells the other what became of its own answer
            if ends == second.page.locator(".assistant .stats").all_text_contents():
                break
            time.sleep(0.1)
            ends = first.page.locator(".assistant .stats").all_text_contents()
        assert len(ends) == 3 and "Stopped by you" in ends[-1]  # an earlier one may have been through
        kept = texts(first)
        assert all(kept)
        first.page.reload()
        expect(questions(first)).to_have_text(["Beginning", "Of the first", "Of the second"], timeout=LONG)
        expect(first.page.locator(".assistant .stats")).to_have_text(ends, timeout=LONG)
        assert texts(first) == kept
