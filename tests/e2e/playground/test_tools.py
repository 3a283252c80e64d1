"""Tools in a real browser: what is defined in the panel, the calls in the chat, and the loop of results."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Route, expect

from tests.e2e.playground.browser import CHROMIUM, NO_WEBSOCKET, Tab

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium, which CI installs")
SLOW = 20_000  # of a machine that is busy with other things


def open_tools(tab: Tab, choice: str = "required", *, once: bool = True) -> None:
    """The panel with the sample tool, which the model must call."""
    tab.page.get_by_role("tab", name="Tools").click()
    tab.page.get_by_role("button", name="Sample: get_weather").click()
    tab.page.get_by_label("May the model choose?").select_option(choice)
    tab.page.get_by_label("Several calls at once").uncheck()
    if not once:
        tab.page.get_by_label("Demand a call only once").uncheck()


def answer_with(tab: Tab, mock: str, text: str | None = None) -> None:
    tab.page.get_by_label("When it is called, answer with").select_option(mock)
    if text is not None:
        tab.page.get_by_label("Its result").fill(text)


def cards(tab: Tab) -> Locator:
    return tab.page.get_by_role("region", name="Tool calls of answer")


class Played:
    """A model that calls what it is told to call, then answers."""

    def __init__(self, tab: Tab, *turns: list[tuple[str, str]] | str) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._turns: Iterator[list[tuple[str, str]] | str] = iter(turns)
        tab.page.route("**/v1/chat/completions", self._answer)

    def _answer(self, route: Route) -> None:
        self.bodies.append(route.request.post_data_json)
        turn = next(self._turns)
        choices: list[dict[str, Any]] = []
        if isinstance(turn, str):
            choices.append({"index": 0, "delta": {"content": turn}, "finish_reason": "stop"})
        else:
            for index, (name, arguments) in enumerate(turn):
                head = {"index": index, "id": f"call_{len(self.bodies)}{index}", "type": "function"}
                choices.append({"index": 0, "delta": {"tool_calls": [{**head, "function": {"name": name, "arguments": ""}}]}})
                for at in range(0, len(arguments), 5):
                    part = {"index": index, "function": {"arguments": arguments[at : at + 5]}}
                    choices.append({"index": 0, "delta": {"tool_calls": [part]}})
            choices.append({"index": 0, "delta": {}, "finish_reason": "tool_calls"})
        body = "".join(f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices) + "data: [DONE]\n\n"
        route.fulfill(content_type="text/event-stream", body=body)


PARIS = '{"city": "Paris \\"x\\"", "unit": "celsius"}'


def test_a_template_answers_a_call_and_the_model_goes_on(tab: Tab) -> None:
    played = Played(tab, [("get_weather", PARIS)], "It is 21 degrees.")
    open_tools(tab.open(NO_WEBSOCKET))
    tab.ask("Weather in Paris?")
    expect(tab.page.locator(".assistant .text").last).to_have_text("It is 21 degrees.", timeout=SLOW)
    expect(cards(tab)).to_contain_text(["Arguments fit"])
    assert cards(tab).locator(".json-key").all_inner_texts() == ["city", "unit"]
    first, second = played.bodies
    assert first["tool_choice"] == "required" and second["tool_choice"] == "auto" and first["parallel_tool_calls"] is False
    assert first["tools"][0]["function"]["parameters"]["properties"]["unit"] == {"enum": ["celsius", "fahrenheit"]}
    question, call, result = second["messages"]
    assert question["content"] == "Weather in Paris?"
    assert call["tool_calls"] == [{"id": "call_10", "type": "function", "function": {"name": "get_weather", "arguments": PARIS}}]
    assert (result["role"], result["tool_call_id"]) == ("tool", "call_10")
    assert json.loads(result["content"])["city"] == 'Paris "x"'
    tab.page.reload()
    expect(cards(tab)).to_contain_text(["Arguments fit"])
    expect(cards(tab).locator(".call-result pre")).to_contain_text('Paris \\"x\\"')
    expect(tab.page.locator(".assistant .text").last).to_have_text("It is 21 degrees.")
    expect(tab.page.get_by_role("button", name="1 tool")).to_be_visible()
    assert len(played.bodies) == 2
    tab.check_clean()


def test_a_fixed_answer_is_sent_as_it_is_and_calls_side_by_side_get_each_their_own(tab: Tab) -> None:
    calls = [("get_weather", '{"city": "Rome", "unit": "celsius"}'), ("get_weather", '{"city": "Oslo", "unit": "celsius"}')]
    played = Played(tab, calls, "Both are fine.")
    open_tools(tab.open(NO_WEBSOCKET), "get_weather")
    answer_with(tab, "fixed", "{{args.city}} is 7")
    tab.ask("Weather?")
    expect(tab.page.locator(".assistant .text").last).to_have_text("Both are fine.", timeout=SLOW)
    assert played.bodies[0]["tool_choice"] == {"type": "function", "function": {"name": "get_weather"}}
    results = played.bodies[1]["messages"][2:]
    assert [result["tool_call_id"] for result in results] == ["call_10", "call_11"]
    assert [result["content"] for result in results] == ["{{args.city}} is 7"] * 2
    tab.check_clean()


def test_a_result_that_is_asked_for_waits_and_can_be_changed_afterwards(tab: Tab) -> None:
    played = Played(tab, [("get_weather", PARIS)], "Cold.", "Warm.", "And now?")
    open_tools(tab.open(NO_WEBSOCKET))
    answer_with(tab, "ask")
    tab.ask("Weather in Paris?")
    field = tab.page.get_by_label("Result of get_weather")
    field.fill("minus 3", timeout=SLOW)
    assert len(played.bodies) == 1
    tab.page.get_by_role("button", name="Send result").click()
    expect(tab.page.locator(".assistant .text").last).to_have_text("Cold.", timeout=SLOW)
    assert played.bodies[1]["messages"][-1]["content"] == "minus 3"
    tab.page.get_by_role("button", name="Change the result").click()
    expect(field).to_be_focused()
    field.fill("30")
    tab.page.get_by_role("button", name="Send result").click()
    expect(tab.page.locator(".assistant .text").last).to_have_text("Warm.", timeout=SLOW)
    assert played.bodies[2]["messages"][-1]["content"] == "30"
    expect(tab.page.locator(".assistant .place")).to_have_text("2/2")
    tab.check_clean()


def test_a_call_that_nobody_answered_does_not_break_the_next_question(tab: Tab) -> None:
    played = Played(tab, [("get_weather", PARIS)], "Never mind.")
    open_tools(tab.open(NO_WEBSOCKET))
    answer_with(tab, "ask")
    tab.ask("Weather in Paris?")
    expect(tab.page.get_by_role("button", name="Send result")).to_be_visible(timeout=SLOW)
    tab.ask("Forget it")
    expect(tab.page.locator(".assistant .text").last).to_have_text("Never mind.", timeout=SLOW)
    assert [message["role"] for message in played.bodies[1]["messages"]] == ["user", "assistant", "tool", "user"]
    assert played.bodies[1]["messages"][2]["content"] == "No result was given."
    tab.check_clean()


def test_arguments_that_do_not_fit_stop_the_loop_and_an_error_can_be_sent(tab: Tab) -> None:
    hostile = "<b onclick=alert(1)>\u202ex</b>"
    bad = json.dumps({"city": 5, "unit": hostile})
    played = Played(tab, [("get_weather", bad), ("rm<i>", '{"a": ')], "Sorry.")
    open_tools(tab.open(NO_WEBSOCKET))
    tab.ask("Weather?")
    expect(cards(tab).locator(".form-badge")).to_have_text(["Arguments do not fit", "No such tool"], timeout=SLOW)
    expect(cards(tab).locator(".form-problems").first).to_contain_text("/city is of type number; expected is string")
    expect(cards(tab).locator(".form-problems").last).to_contain_text("The arguments are not JSON. Line 1, column")
    assert cards(tab).locator("b, i").count() == 0
    assert cards(tab).locator(".call-name").last.inner_text() == "rm<i>"
    assert cards(tab).locator(".json-value").nth(1).text_content() == hostile
    error = tab.page.get_by_label("Error that is sent of get_weather")
    assert "expected is string" in json.loads(error.input_value())["error"]
    assert len(played.bodies) == 1
    tab.page.get_by_role("button", name="Send 2 error results").click()
    expect(tab.page.locator(".assistant .text").last).to_have_text("Sorry.", timeout=SLOW)
    _, call, first, second = played.bodies[1]["messages"]
    assert call["tool_calls"][0]["function"]["arguments"] == bad
    assert "expected is string" in first["content"] and "not JSON" in second["content"]
    tab.check_clean()


def test_the_loop_of_a_real_server_ends_at_its_limit(tab: Tab) -> None:
    open_tools(tab.open(), once=False)
    tab.ask("Weather in Paris?")
    expect(cards(tab)).to_have_count(8, timeout=60_000)
    expect(tab.page.get_by_text("The calls went on by themselves for 8 turns")).to_be_visible(timeout=SLOW)
    assert cards(tab).locator(".call-turn").all_text_contents() == [f"Tool turn {turn} of 8" for turn in range(1, 9)]
    expect(tab.page.get_by_role("button", name="Send result")).to_have_count(1)
    tab.page.get_by_role("button", name="Send result").click()
    expect(cards(tab)).to_have_count(9, timeout=SLOW)
    tab.check_clean()


def test_stop_ends_the_loop(slow_tab: Tab) -> None:
    tab = slow_tab
    open_tools(tab.open(), once=False)
    tab.ask("Weather in Paris?")
    stop = cards(tab).first.get_by_role("button", name="Stop")
    stop.click(timeout=SLOW)
    tab.finish()
    expect(cards(tab).first).to_contain_text("Change the result")
    number = tab.page.locator(".message.assistant").count()
    assert number == 2
    tab.page.wait_for_function("() => !document.querySelector('.message[aria-busy=true]')")
    expect(tab.page.locator(".message.assistant").last).to_contain_text("Stopped by you")
    tab.page.reload()
    expect(tab.page.locator(".message.assistant")).to_have_count(number)
    tab.check_clean()


def test_tools_that_are_not_usable_say_so_at_their_field_and_cannot_be_sent(tab: Tab) -> None:
    open_tools(tab.open())
    tab.page.get_by_label("Message", exact=True).fill("Anything")
    send = tab.page.get_by_role("button", name="Send", exact=True)
    expect(send).to_be_enabled()
    parameters = tab.page.get_by_label("Parameters, as a JSON schema")
    parameters.fill('{"type": "object",\n "properties": {"a": 1,}}')
    expect(send).to_be_disabled()
    expect(tab.page.locator(".tool .code-status")).to_contain_text("Line 2, column 24: nothing comes after the last comma")
    parameters.fill('{"type": "object",\n "properties": {"a": {"not": {}, "uniqueItems": true}}}')
    expect(tab.page.locator(".tool .code-status")).to_contain_text("Line 2, column", timeout=SLOW)
    expect(send).to_be_disabled()
    tab.page.get_by_label("May the model choose?").select_option("auto")  # then nothing is held to the schema
    expect(send).to_be_enabled(timeout=SLOW)
    tab.page.get_by_label("Name", exact=True).fill("not a name")
    expect(tab.page.locator(".tool .note.wrong")).to_contain_text("letters, digits")
    expect(tab.page.locator("#form-chips")).to_contain_text("not a name: a name has")
    tab.page.get_by_role("button", name="Remove this tool").click()
    expect(tab.page.locator("#form-chips")).to_be_hidden()
    expect(send).to_be_enabled()
    tab.page.get_by_role("button", name="Undo").click()
    expect(tab.page.get_by_label("Name", exact=True)).to_have_value("not a name")
    tab.check_clean()


def test_tools_are_imported_in_the_forms_that_people_have(tab: Tab) -> None:
    tab.open()
    tab.page.get_by_role("tab", name="Tools").click()
    tab.page.get_by_text("Import and export").click()
    field = tab.page.get_by_label("Tools as JSON, in the form of OpenAI or Anthropic")
    for given in (
        [{"type": "function", "function": {"name": "one", "description": "First", "parameters": {"type": "object"}}}],
        {"tools": [{"name": "two", "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}}}]},
    ):
        field.fill(json.dumps(given))
        tab.page.get_by_role("button", name="Add these").click()
    expect(tab.page.locator(".tool-title")).to_have_text(["one", "two"])
    field.fill('{"tools": [{"description": "no name"}]}')
    tab.page.get_by_role("button", name="Add these").click()
    expect(tab.page.get_by_text("Entry 1 has no name.")).to_be_visible()
    expect(tab.page.locator(".tool-title")).to_have_count(2)
    expect(tab.page.get_by_role("button", name="2 tools")).to_be_visible()
    tab.check_clean()


def test_a_real_model_calls_a_tool_and_fills_a_form(real_tab: Tab) -> None:
    tab = real_tab
    open_tools(tab.open())
    tab.page.get_by_role("tab", name="Settings").click()
    tab.page.get_by_label("Temperature", exact=True).fill("0")
    tab.ask("What is the weather in Paris, in celsius?")
    expect(cards(tab)).to_contain_text(["Arguments fit"], timeout=60_000)
    expect(cards(tab).locator(".json-value").first).to_have_text("Paris")
    expect(cards(tab).locator(".call-result pre")).to_contain_text('"city": "Paris", "temperature": 21')
    expect(tab.page.locator(".message.assistant")).to_have_count(2)
    tab.finish()
    expect(tab.page.locator(".assistant .text").last).not_to_be_empty()
    tab.page.get_by_role("button", name="New chat").click()
    tab.page.get_by_role("tab", name="Schema").click()
    tab.page.get_by_label("Form of the answer", exact=True).select_option("schema")
    tab.page.get_by_role("button", name="Extract").click()
    tab.ask("Ada Lovelace was born in London in 1815.")
    expect(tab.page.locator(".form-badge")).to_have_text("Valid", timeout=60_000)
    expect(tab.page.locator(".json-value").first).to_have_text("Ada Lovelace")
    expect(tab.page.locator(".structured .legend")).to_contain_text("cost no step of their own")
    tab.check_clean()


def test_a_small_screen_shows_the_panels_and_a_call_without_sideways_scrolling(chromium: Browser, server: str) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    tab = Tab(context.new_page(), server).open()
    expect(tab.page.locator("#server-state")).to_have_text("Ready", timeout=SLOW)
    tab.page.get_by_role("button", name="Settings", exact=True).click()
    open_tools(tab)
    answer_with(tab, "ask")
    tab.page.get_by_role("button", name="Close settings").click()
    tab.page.get_by_label("Message", exact=True).fill("Weather in Paris?")
    tab.page.get_by_role("button", name="Send", exact=True).click()
    expect(tab.page.get_by_role("button", name="Send result")).to_be_visible(timeout=SLOW)
    places = "[...document.querySelectorAll('#scroll, #inspector, body')]"
    assert tab.page.evaluate(f"() => {places}.filter((node) => node.scrollWidth > node.clientWidth + 1).length") == 0
    tab.check_clean()
    context.close()
