"""Answers of a given form in a real browser: what is written in the panel, what is sent, and how the answer is shown."""

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Locator, Route, expect

from tests.e2e.playground.browser import CHROMIUM, NO_WEBSOCKET, Tab

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium, which CI installs")
SLOW = 20_000  # of a machine that is busy with other things
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["person", "place"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}


def open_form(tab: Tab, kind: str, text: str | None = None) -> Locator:
    """The panel with this kind chosen, and its field filled."""
    tab.page.get_by_role("tab", name="Schema").click()
    tab.page.get_by_label("Form of the answer", exact=True).select_option(kind)
    field = tab.page.locator(".form-panel textarea")
    if text is not None:
        field.fill(text)
    return field


def status(tab: Tab) -> Locator:
    return tab.page.locator(".form-panel .code-status").first


def play(tab: Tab, *texts: str, forced: tuple[int, ...] = (), finish: str = "stop") -> list[Any]:
    """Answers chats with these pieces instead of the server; `forced` of them count as forced. Returns the bodies."""
    bodies: list[Any] = []
    choices: list[dict[str, Any]] = [
        {
            "index": 0,
            "delta": {"content": text},
            "draft_marks": [{"text": text, "drafted": False, **({"forced": True} if k in forced else {})}],
        }
        for k, text in enumerate(texts)
    ]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish})
    details = {"jumped_tokens": len(forced)}
    usage = {"prompt_tokens": 5, "completion_tokens": len(texts), "completion_tokens_details": details}
    events = [json.dumps({"choices": [choice], "usage": usage}) for choice in choices]

    def answer(route: Route) -> None:
        bodies.append(route.request.post_data_json)
        body = "".join(f"data: {event}\n\n" for event in events) + "data: [DONE]\n\n"
        route.fulfill(content_type="text/event-stream", body=body)

    tab.page.route("**/v1/chat/completions", answer)
    return bodies


def test_a_schema_with_an_error_says_where_and_cannot_be_sent(tab: Tab) -> None:
    field = open_form(tab.open(), "schema", '{\n  "type": "object",\n  "properties": {"a": }\n}')
    expect(status(tab)).to_contain_text('Line 3, column 23: a value is missing before "}"')
    tab.page.get_by_label("Message", exact=True).fill("Anything")
    send = tab.page.get_by_role("button", name="Send", exact=True)
    expect(send).to_be_disabled()
    expect(tab.page.locator("#form-chips")).to_contain_text("Line 3, column 23")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator(".message")).to_have_count(0)
    tab.page.get_by_role("button", name="Go to line 3").click()
    expect(field).to_be_focused()
    assert field.evaluate("(field) => field.selectionStart") == len('{\n  "type": "object",\n  "properties": {"a": ')
    field.fill('{"type": "object", "properties": {}}')
    expect(send).to_be_enabled()
    expect(status(tab)).to_have_text("Answers can be held to this.", timeout=SLOW)
    expect(tab.page.locator(".code-lines .wrong")).to_have_count(0)
    tab.check_clean()


def test_a_keyword_that_the_server_cannot_hold_is_named_with_its_place(tab: Tab) -> None:
    schema = '{"type": "object",\n "properties": {\n  "a.b": {"type": "array",\n    "uniqueItems": true}}}'
    open_form(tab.open(), "schema", schema)
    expect(status(tab)).to_contain_text("uniqueItems is not supported", timeout=SLOW)
    expect(status(tab)).to_contain_text("Line 4, column 5")
    expect(tab.page.locator(".code-lines .wrong")).to_have_text("4")
    tab.page.get_by_label("Message", exact=True).fill("Anything")
    expect(tab.page.get_by_role("button", name="Send", exact=True)).to_be_disabled()
    for kind, text, words in (
        ("regex", "[0-9", "not closed"),
        ("grammar", "start: a\na: foo", 'Line 2, column 4: unknown name: "foo"'),
        ("choice", "", "Write at least one text."),
    ):
        open_form(tab, kind, text)
        expect(status(tab)).to_contain_text(words, timeout=SLOW)
    tab.check_clean()


def test_an_answer_held_to_a_schema_is_a_valid_tree_with_its_forced_parts_marked(tab: Tab) -> None:
    open_form(tab.open(), "schema", json.dumps(PERSON))
    tab.page.get_by_role("button", name="Format").click()
    expect(tab.page.locator(".form-panel textarea")).to_have_value(re.compile(r"^\{\n  \"type\": \"object\",\n  \"properties\""))
    tab.ask("Who?")
    expect(tab.page.locator(".form-badge")).to_have_text("Valid", timeout=SLOW)
    tree = tab.page.get_by_role("group", name="Answer 1 as a tree")
    assert tree.locator(".json-key").all_inner_texts() == ["name", "kind"]
    assert tree.locator(".json-key.forced").count() == 2
    expect(tab.page.locator(".structured .legend")).to_contain_text("cost no step of their own")
    tab.page.get_by_role("button", name="Show answer 1 as text").click()
    expect(tree).to_be_hidden()
    text = tab.page.locator(".structured-text")
    answer = json.loads(text.inner_text())
    assert set(answer) == {"name", "kind"} and answer["kind"] in ("person", "place")
    assert text.locator(".forced").first.inner_text() == '{"name":"'
    tab.page.reload()
    expect(tab.page.locator(".form-badge")).to_have_text("Valid", timeout=SLOW)
    assert tab.page.locator(".structured-text .forced").first.text_content() == '{"name":"'
    expect(tab.page.get_by_role("button", name="Form of the answer: JSON schema")).to_be_visible()
    tab.check_clean()


def test_an_answer_that_is_cut_is_not_called_invalid(tab: Tab) -> None:
    open_form(tab.open(), "schema", json.dumps(PERSON))
    tab.page.get_by_role("tab", name="Settings").click()
    tab.page.get_by_label("Max tokens", exact=True).fill("12")
    tab.ask("Who?")
    expect(tab.page.locator(".form-badge")).to_have_text("Cut at max_tokens 12", timeout=SLOW)
    expect(tab.page.locator(".form-problems")).to_be_hidden()
    expect(tab.page.locator(".json-tree .json-key")).to_have_text("name")
    tab.check_clean()


def test_choices_regular_expressions_and_grammars_reach_the_server(tab: Tab) -> None:
    tab.open()
    for number, (kind, text, pattern) in enumerate(
        (
            ("choice", "red\ngreen\n", r"^(red|green)$"),
            ("regex", "[0-9]{3}-x", r"^\d{3}-x$"),
            ("grammar", 'root ::= "yes" | "no"', r"^(yes|no)$"),
            ("json", None, r"^\{"),
        ),
        start=1,
    ):
        tab.page.get_by_role("tab", name="Schema").click()
        open_form(tab, kind, text)
        tab.ask(f"Question {number}")
        expect(tab.page.locator(".form-badge")).to_have_count(number, timeout=SLOW)
        expect(tab.page.locator(".form-badge").last).to_have_text(
            {"choice": "One of them", "json": "Valid JSON"}.get(kind, "Matches"), timeout=SLOW
        )
        answer = tab.page.locator(".structured-text").last.text_content() or ""
        assert tab.page.evaluate("([pattern, text]) => new RegExp(pattern).test(text)", [pattern, answer]), (kind, answer)
    tab.check_clean()


def test_problems_of_an_answer_lead_to_their_places(tab: Tab) -> None:
    schema = {
        "type": "object",
        "properties": {"list": {"type": "array", "items": {"type": "integer"}}},
        "required": ["list", "x"],
    }
    bodies = play(tab, '{"list": [1, "tw', 'o\\u0041", {"deep": ', "null}]}", forced=(0,))
    open_form(tab.open(NO_WEBSOCKET), "schema", json.dumps(schema))
    tab.ask("Go")
    expect(tab.page.locator(".form-badge")).to_have_text("3 problems", timeout=SLOW)
    assert bodies[0]["response_format"]["json_schema"]["schema"] == schema
    problems = tab.page.locator(".form-problems li")
    expect(problems).to_contain_text(['"x" is missing', "is of type string; expected is integer", "is of type object"])
    summary = tab.page.locator(".json-tree summary")
    summary.nth(1).click()  # folds the list away
    expect(tab.page.locator(".json-value.string")).to_be_hidden()
    tab.page.get_by_role("button", name="/list/1").click()
    place = tab.page.locator(".json-item.wrong.string")
    expect(place).to_be_visible()
    expect(place).to_be_focused()
    assert place.locator(".json-value").inner_text() == "twoA"
    tab.check_clean()


def test_what_is_no_json_and_what_is_hostile_is_shown_as_text(tab: Tab) -> None:
    hostile = '<img src=x onerror="alert(1)">\u202e'
    text = json.dumps({hostile: [hostile, {"__proto__": 1, "a/b~": "x" * 3000}]}) + " and more"
    play(tab, *[text[at : at + 7] for at in range(0, len(text), 7)])
    open_form(tab.open(NO_WEBSOCKET), "json")
    tab.ask("Go")
    expect(tab.page.locator(".form-badge")).to_have_text("Not JSON", timeout=SLOW)
    expect(tab.page.locator(".form-problems")).to_contain_text('the JSON is over before "a"')
    assert tab.page.locator(".structured img").count() == 0
    assert tab.page.locator(".json-key").first.text_content() == hostile
    expect(tab.page.locator(".json-key bdi").first).to_have_attribute("data-name", "U+202E")
    assert tab.page.locator(".json-key").all_text_contents()[1:] == ["__proto__", "a/b~"]
    tab.check_clean()


def test_the_form_belongs_to_its_conversation_and_the_editor_is_left_with_tab(tab: Tab) -> None:
    field = open_form(tab.open(), "regex", "[ab]")
    field.press("Tab")
    expect(field).not_to_be_focused()
    tab.ask("First")
    tab.finish()
    tab.page.get_by_role("button", name="New chat").click()
    expect(tab.page.locator("#form-chips")).to_be_hidden()
    expect(tab.page.get_by_label("Form of the answer", exact=True)).to_have_value("")
    tab.page.get_by_role("link", name="First").click()
    expect(tab.page.get_by_label("Form of the answer", exact=True)).to_have_value("regex")
    expect(tab.page.locator(".form-panel textarea")).to_have_value("[ab]")
    tab.page.get_by_role("tab", name="Settings").click()
    tab.page.get_by_role("button", name="Form of the answer: Regular expression").click()
    expect(tab.page.get_by_role("tab", name="Schema")).to_be_focused()
    tab.check_clean()
