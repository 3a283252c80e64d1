"""Compare in a real Chromium: columns of settings that answer the same question at once, over one socket."""

import json
import re

import pytest
from playwright.sync_api import Browser, expect

from tests.e2e.playground.browser import CHROMIUM, NO_WEBSOCKET, Tab, wait_for_running
from tests.e2e.playground.columns import LONG, ask, change, column, finish, open_compare, requests_of, show_compare, texts

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")


def test_of_four_columns_one_fails_one_is_stopped_and_the_others_finish_over_one_socket(slow_tab: Tab) -> None:
    asked = requests_of(slow_tab)
    page = open_compare(slow_tab)
    change(page, "A", max_tokens="30")
    change(page, "B", max_tokens="40")
    page.get_by_role("button", name="Duplicate column B").click()
    page.get_by_role("button", name="Add column").click()
    change(page, "C", max_tokens="")
    change(page, "D", temperature="500")
    ask(page, "Tell me a story")
    alert = column(page, "D").get_by_role("alert")
    expect(alert).to_contain_text("temperature is 500", timeout=LONG)
    expect(column(page, "C").locator(".turn .text")).not_to_be_empty(timeout=LONG)
    expect(column(page, "C").locator(".turn")).to_have_attribute("aria-busy", "true")
    for letter in "AB":
        expect(column(page, letter).locator(".turn")).to_have_attribute("aria-busy", "false", timeout=LONG)
    page.get_by_role("button", name="Stop, column C").click()
    finish(page)
    words = "2 of 4 answers complete, 1 stopped, 1 failed"
    expect(page.locator(".progress")).to_have_text(words)
    expect(page.locator("#status")).to_have_text(words)
    expect(column(page, "C").get_by_text(re.compile("Stopped by you"))).to_be_visible()
    expect(column(page, "A").get_by_text("Cut at max_tokens 30")).to_be_visible()
    figures = column(page, "B").locator(".column-figures").inner_text()
    assert re.search(r"TTFT\s+[\d.]+ m?s.*Tok/s\s+[\d.,]+.*Cached\s+\d+ of \d+.*Tokens\s+40\b", figures, re.DOTALL), figures
    wait_for_running(slow_tab.url, False)
    assert len(slow_tab.sockets()) == 1 and len(asked) == 4
    column(page, "D").get_by_role("button", name="Change Temperature").click()
    temperature = column(page, "D").get_by_label("Temperature")
    expect(temperature).to_be_focused()
    expect(temperature).to_have_attribute("aria-invalid", "true")
    temperature.fill("1")
    page.get_by_role("button", name="Try again, column D").click()
    expect(column(page, "D").locator(".turn .text")).not_to_be_empty(timeout=LONG)
    expect(alert).to_have_count(0)
    page.keyboard.press("Escape")
    expect(page.locator(".column .turn")).to_have_count(4)
    slow_tab.check_clean()


def test_settings_that_differ_are_named_and_marked_in_words(tab: Tab) -> None:
    page = open_compare(tab)
    expect(column(page, "A").locator("summary").first).to_have_text(re.compile("Temperature 1$"))
    expect(column(page, "B").locator("summary").first).to_have_text(re.compile("Temperature 0$"))
    change(page, "A", system_prompt="Be brief")
    change(page, "B", temperature="1")
    marked = column(page, "B").locator(".field", has=page.locator(".differs:visible"))
    expect(marked).to_have_count(1)
    expect(marked.locator("label")).to_have_text("System promptdiffers")
    column(page, "B").get_by_text("Settings", exact=True).click()
    expect(column(page, "B").locator("summary").first).to_have_text(re.compile("System prompt none$"))
    change(page, "A", system_prompt="")
    expect(column(page, "B").get_by_text("same in all columns")).to_be_visible()
    tab.check_clean()


def test_same_seed_and_settings_give_the_same_text_in_every_column(tab: Tab) -> None:
    asked = requests_of(tab)
    page = open_compare(tab)
    change(page, "A", seed="7")
    change(page, "B", temperature="1")
    page.get_by_role("button", name="Duplicate column B").click()
    page.get_by_label("Same seed").check()
    expect(column(page, "A").get_by_label("Seed")).to_be_disabled()
    page.get_by_label("Seed for all columns").fill("42")
    ask(page, "Once upon a time")
    finish(page)
    assert [body["seed"] for body in asked] == [42, 42, 42]
    assert [body.get("temperature") for body in asked] == [None, 1, 1]
    first, *others = texts(page)
    assert first and others == [first, first]
    page.get_by_label("Mark differences").check()
    expect(column(page, "C").get_by_text("The same text as in column A")).to_be_visible()
    page.get_by_label("Same seed").uncheck()
    expect(column(page, "A").get_by_label("Seed")).to_have_value("7")
    page.get_by_role("button", name="Run all again").click()
    finish(page)
    assert [body.get("seed") for body in asked[3:]] == [7, None, None]
    assert len(tab.sockets()) == 1
    tab.check_clean()


def test_next_question_goes_below_each_columns_own_answer(tab: Tab) -> None:
    asked = requests_of(tab)
    page = open_compare(tab)
    change(page, "B", system_prompt="Be brief", max_tokens="5")
    ask(page, "First")
    finish(page)
    ask(page, "Second")
    finish(page)
    a, b = asked[2:]
    assert [message["role"] for message in a["messages"]] == ["user", "assistant", "user"]
    assert [message["role"] for message in b["messages"]] == ["system", "user", "assistant", "user"]
    assert b["messages"][2]["content"] != a["messages"][1]["content"]
    assert a["messages"][-1] == b["messages"][-1] == {"role": "user", "content": "Second"}
    page.get_by_role("textbox", name="Question for all columns").fill("Only here")
    page.get_by_role("button", name="Run, column B").click()
    finish(page)
    assert [message["content"] for message in asked[4]["messages"] if message["role"] == "user"] == [
        "First",
        "Second",
        "Only here",
    ]
    expect(column(page, "A").locator(".turn")).to_have_count(2)
    expect(column(page, "B").locator(".turn")).to_have_count(3)
    tab.check_clean()


def test_settings_of_a_column_are_taken_to_the_chat(tab: Tab) -> None:
    page = open_compare(tab)
    change(page, "B", system_prompt="Speak like a pirate", top_p="0.5")
    page.get_by_role("button", name="Use these settings in the chat, column B").click()
    expect(page.locator("#status")).to_have_text("The chat has the settings of column B")
    page.get_by_role("tab", name="Chat").click()
    settings = page.locator("#settings")
    expect(settings.get_by_label("System prompt")).to_have_value("Speak like a pirate")
    expect(settings.get_by_role("textbox", name="Temperature")).to_have_value("0")
    expect(settings.get_by_role("textbox", name="Top p")).to_have_value("0.5")
    tab.check_clean()


def test_columns_start_with_the_settings_of_the_chat(tab: Tab) -> None:
    tab.open()
    expect(tab.page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    settings = tab.page.locator("#settings")
    settings.get_by_label("System prompt").fill("Be kind")
    settings.get_by_role("textbox", name="Temperature").fill("0")
    show_compare(tab.page)
    for letter, temperature in (("A", "0"), ("B", "1")):  # to compare with itself says nothing
        change(tab.page, letter)
        expect(column(tab.page, letter).get_by_label("System prompt")).to_have_value("Be kind")
        expect(column(tab.page, letter).get_by_label("Temperature")).to_have_value(temperature)
    tab.check_clean()


def test_columns_are_added_and_removed_within_bounds_and_a_removed_one_comes_back(tab: Tab) -> None:
    page = open_compare(tab)
    expect(page.get_by_role("button", name="Remove column A")).to_be_disabled()
    change(page, "B", top_k="3")
    page.get_by_role("button", name="Duplicate column B").click()
    page.get_by_role("button", name="Duplicate column A").click()
    expect(page.get_by_role("button", name="Add column")).to_be_disabled()
    expect(page.locator(".column h2")).to_have_text(["Column A 1 of 4", "Column B 2 of 4", "Column C 3 of 4", "Column D 4 of 4"])
    change(page, "D")
    expect(column(page, "D").get_by_label("Top k")).to_have_value("3")
    ask(page, "Hello")
    finish(page)
    page.get_by_role("button", name="Remove column D").click()
    expect(page.locator(".column")).to_have_count(3)
    assert page.evaluate("() => document.activeElement.closest('.column').querySelector('h2').textContent").startswith("Column C")
    page.get_by_role("button", name="Undo").click()
    expect(column(page, "D").get_by_label("Top k")).to_have_value("3")
    expect(column(page, "D").locator(".turn .text")).not_to_be_empty()
    page.get_by_role("button", name="Clear answers").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".turn")).to_have_count(4)
    tab.check_clean()


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_all_ends_every_request_in_the_engine_and_keeps_the_texts(slow_tab: Tab, way: str) -> None:
    page = open_compare(slow_tab)
    page.get_by_role("button", name="Add column").click()
    ask(page, "A long story")
    for letter in "ABC":
        expect(column(page, letter).locator(".turn .text")).not_to_be_empty(timeout=LONG)
    expect(page.get_by_role("textbox", name="Question for all columns")).to_be_focused()
    if way == "button":
        page.get_by_role("button", name="Stop all").click()
    else:
        page.keyboard.press("Escape")
    wait_for_running(slow_tab.url, False)
    expect(page.locator("#status")).to_have_text("0 of 3 answers complete, 3 stopped")
    assert all(texts(page))
    slow_tab.check_clean()


def test_answers_go_on_while_the_chat_is_shown_and_both_share_the_socket(slow_tab: Tab) -> None:
    page = open_compare(slow_tab)
    change(page, "A", max_tokens="60")
    ask(page, "A long story")
    expect(column(page, "B").locator(".turn .text")).not_to_be_empty(timeout=LONG)
    page.get_by_role("tab", name="Chat").click()
    slow_tab.ask("And here?")
    expect(page.locator("#messages .assistant .text")).not_to_be_empty(timeout=LONG)
    expect(page.locator(".column .turn").first).to_have_attribute("aria-busy", "false", timeout=LONG)
    page.keyboard.press("Escape")  # the chat's answer only
    expect(page.locator("#messages .assistant")).to_contain_text("Stopped by you")
    page.get_by_role("tab", name="Compare").click()
    expect(column(page, "B").locator(".turn")).to_have_attribute("aria-busy", "true")
    page.keyboard.press("Escape")
    finish(page)
    a, b = texts(page)
    assert b.startswith(a[:40])
    assert len(slow_tab.sockets()) == 1
    page.get_by_role("button", name="Use these settings in the chat, column B").click()
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("tab", name="Compare").click()
    page.reload()  # the address names both the view and the conversation
    expect(column(page, "B")).to_be_visible(timeout=LONG)
    expect(page.locator("#nav a[aria-current=page]")).to_have_text("And here?")
    slow_tab.check_clean()


def test_differences_from_the_first_column_are_marked_word_by_word(tab: Tab) -> None:
    page = open_compare(tab)
    change(page, "A", max_tokens="30")
    change(page, "B", max_tokens="40")
    ask(page, "Hello")
    finish(page)
    page.get_by_label("Mark differences").check()
    compared = column(page, "B").locator(".compared")
    expect(compared.get_by_text(re.compile(r"^\d+ words only here, \d+ words? only in column A$"))).to_be_visible()
    parts = [(part.evaluate("(part) => part.localName"), part.text_content()) for part in compared.locator(".words > *").all()]
    state = json.loads(page.evaluate("() => localStorage['streamserve.compare']"))
    contents = [one["turns"][0]["content"] for one in state["columns"]]
    assert ["".join(text or "" for kind, text in parts if kind != other) for other in ("ins", "del")] == contents
    assert {kind for kind, _ in parts} >= {"span", "ins"}
    expect(column(page, "A").locator(".compared")).to_be_hidden()
    page.get_by_label("Mark differences").uncheck()
    expect(column(page, "B").locator(".turn .text")).to_be_visible()
    wrong = page.evaluate("""async () => {
      const { differences } = await import("/static/js/compare/word-diff.js");
      const text = (n) => Array.from({ length: n }, () => "abcd"[Math.floor(4 * Math.random())]).join(" ");
      const join = (parts, other) => parts.filter(({ kind }) => kind !== other).map(({ text }) => text).join("");
      for (let k = 0; k < 500; k += 1) {
        const [a, b] = [text(k % 23), text(k % 17)];
        const parts = differences(a, b);
        if (join(parts, "new") !== a || join(parts, "gone") !== b) return [a, b, parts];
      }
      const far = (name) => Array.from({ length: 5000 }, (_, k) => name + k).join(" ");
      const parts = differences(far("a"), far("b"));
      return join(parts, "new") === far("a") && join(parts, "gone") === far("b") ? null : "far";
    }""")
    assert wrong is None, wrong
    tab.check_clean()


HOSTILE = """<img src=x onerror="window.hacked = 1"> <script>window.hacked = 2</script> \u202egnp.\u202c
[a](javascript:window.hacked=3)
![tracker](https://example.invalid/pixel.png)"""


def test_hostile_texts_are_inert_in_every_place(tab: Tab) -> None:
    chunks = [{"choices": [{"index": 0, "delta": {"content": HOSTILE, "reasoning_content": HOSTILE}}]}]
    good = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    refusal = f"data: {json.dumps({'error': {'message': HOSTILE, 'code': 'bad', 'param': None}})}\n\n"
    tab.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream", body=refusal if "stop" in route.request.post_data else good
        ),
    )
    page = open_compare(tab, NO_WEBSOCKET)
    change(page, "A", system_prompt=HOSTILE)
    change(page, "B", **{"Stop texts": "END"})
    ask(page, HOSTILE)
    finish(page)
    expect(column(page, "A").locator(".question")).to_contain_text("<script>window.hacked = 2</script>")
    expect(column(page, "B").get_by_role("alert")).to_contain_text("<script>window.hacked = 2</script>")
    page.get_by_label("Mark differences").check()
    page.get_by_role("button", name="Use these settings in the chat, column A").click()
    assert page.locator(".column").locator("script, img, iframe").count() == 0
    assert page.evaluate("() => window.hacked") is None
    tab.check_clean()


def test_what_is_kept_is_bounded_and_settings_outlive_answers(tab: Tab) -> None:
    page = open_compare(tab)
    kept = page.evaluate("""async () => {
      const { loadState, newTurn, saveState, startState } = await import("/static/js/compare/state.js");
      const state = startState({ system: "Be kind", sampling: {} });
      const turn = (question, length) => ({ ...newTurn(question), content: "x".repeat(length), state: "done" });
      state.columns[0].turns = [turn("old", 90_000), turn("new", 90_000)];
      state.columns[1].turns = [turn("huge", 500_000)];
      const isKept = saveState(state);
      const { columns } = loadState();
      localStorage.setItem("streamserve.compare", '{"format": 1, "columns": 3}');
      const sizes = columns.map(({ turns }) => turns.map((t) => [t.question, t.content.length, t.state]));
      const whole = state.columns[1].turns[0].content.length;
      return { isKept, system: columns[1].system, turns: sizes, whole, broken: loadState() };
    }""")
    assert kept == {
        "isKept": True,
        "system": "Be kind",
        "turns": [[["old", 90_000, "done"], ["new", 90_000, "done"]], [["huge", 0, "dropped"]]],
        "whole": 500_000,
        "broken": None,
    }
    tab.check_clean()


def test_further_fields_that_are_no_json_fail_in_their_column_only(tab: Tab) -> None:
    page = open_compare(tab)
    change(page, "B", **{"Extra body": '{"ignore_eos": tru'})
    ask(page, "Hello")
    finish(page)
    expect(column(page, "B").get_by_role("alert")).to_contain_text("Extra body is not JSON")
    expect(column(page, "A").locator(".turn .text")).not_to_be_empty()
    expect(page.locator("#status")).to_have_text("1 of 2 answers complete, 1 failed")
    tab.check_clean()


def test_columns_are_moved_together_until_that_is_switched_off(tab: Tab) -> None:
    page = open_compare(tab)
    for question in ("First", "Second"):
        ask(page, question)
        finish(page)
    tops = "() => [...document.querySelectorAll('.column-scroll')].map((scroll) => scroll.scrollTop)"
    start = page.evaluate(tops)
    assert all(top > 100 for top in start)  # the newest answer is in sight
    column(page, "B").get_by_role("group", name="Answers of column B").focus()
    page.keyboard.press("Home")
    page.wait_for_function("() => [...document.querySelectorAll('.column-scroll')].every((scroll) => scroll.scrollTop === 0)")
    page.get_by_label("Scroll together").uncheck()
    column(page, "B").get_by_role("group", name="Answers of column B").focus()
    page.keyboard.press("End")
    page.wait_for_function("() => document.querySelectorAll('.column-scroll')[1].scrollTop > 100")
    assert page.evaluate(tops)[0] == 0
    tab.check_clean()


def test_everything_is_done_by_keys_and_enter_that_ends_a_word_asks_nothing(tab: Tab) -> None:
    page = open_compare(tab)
    page.keyboard.press("Control+/")
    box = page.get_by_role("textbox", name="Question for all columns")
    expect(box).to_be_focused()
    page.keyboard.type("Line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    box.dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True, "cancelable": True})
    expect(box).to_have_value("Line one\nline two")
    expect(page.locator(".turn")).to_have_count(0)
    page.keyboard.press("Enter")
    finish(page)
    expect(box).to_be_focused()
    expect(column(page, "B").locator(".question")).to_have_text("Line one\nline two")
    names = []
    column(page, "A").get_by_role("button", name="Run again").focus()
    for _ in range(6):
        names.append(page.evaluate("() => document.activeElement.ariaLabel ?? document.activeElement.textContent"))
        page.keyboard.press("Tab")
    assert names[0:2] == ["Run again, column A", "Duplicate column A"]
    assert names[2].startswith("Settings")
    assert names[3:] == ["Answers of column A", "Copy answer 1 of column A", "Use these settings in the chat, column A"]
    expect(page.get_by_role("button", name="Run again, column B")).to_be_focused()
    page.keyboard.press("Enter")
    finish(page)
    expect(page.locator("#status")).to_have_text("1 of 1 answer complete")
    tab.check_clean()


def test_on_a_phone_columns_are_swiped_one_by_one_and_nothing_else_scrolls_sideways(chromium: Browser, server: str) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    tab = Tab(context.new_page(), server)
    page = open_compare(tab)
    ask_box = page.get_by_role("textbox", name="Question for all columns")
    ask_box.fill("Hello")
    page.get_by_role("button", name="Run all").tap()
    finish(page)
    widths = page.locator(".column").evaluate_all("(columns) => columns.map((column) => column.getBoundingClientRect().width)")
    assert all(300 < width < 390 for width in widths)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    page.get_by_role("button", name="Run again, column B").focus()
    expect(column(page, "B").get_by_role("heading", level=2)).to_be_in_viewport(ratio=1)
    small = page.locator(".compare-view button:visible, .compare-view summary:visible").evaluate_all(
        "(controls) => controls.filter((c) => c.getBoundingClientRect().height < 24).map((c) => c.textContent)"
    )
    assert small == []
    tab.check_clean()
    context.close()
