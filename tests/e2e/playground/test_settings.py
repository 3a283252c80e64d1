"""The playground's settings: what is sent, what is refused before it is sent, presets, and what a screen reader hears."""

import json
from typing import Any

import pytest
from playwright.sync_api import Route, expect

from tests.e2e.playground.browser import CHROMIUM, NO_WEBSOCKET, Tab

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")

ANSWER = 'data: {"choices":[{"index":0,"delta":{"content":"First.\\n\\nSecond part.\\n\\nLast"}}]}\n\ndata: [DONE]\n\n'


def recording(tab: Tab) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []

    def answer(route: Route) -> None:
        asked.append(json.loads(route.request.post_data or ""))
        route.fulfill(content_type="text/event-stream", body=ANSWER)

    tab.page.route("**/v1/chat/completions", answer)
    tab.open(NO_WEBSOCKET)
    expect(tab.page.locator("#server-state")).to_have_text("Ready")
    return asked


def test_what_is_set_is_sent_and_what_is_not_is_left_to_the_server(tab: Tab) -> None:
    asked = recording(tab)
    page = tab.page
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Stop texts").fill("END\n\\n\\n")
    page.get_by_text("More sampling").click()
    page.get_by_label("Top k").fill("20")
    page.get_by_text("Extra body (JSON)").click()
    page.get_by_label("Further fields").fill('{"ignore_eos": true, "temperature": 0.25}')
    tab.ask("Hello")
    tab.finish()
    body = asked[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["top_k"], body["stop"], body["ignore_eos"]) == (0.25, 20, ["END", "\n\n"], True)
    assert not {"top_p", "min_p", "seed", "max_tokens", "reasoning_effort"} & set(body)
    tab.check_clean()


def test_changed_field_shows_it_and_goes_back_to_the_default_alone(tab: Tab) -> None:
    tab.open()
    page = tab.page
    expect(page.locator("#server-state")).to_have_text("Ready")
    top_p, temperature = page.get_by_label("Top p"), page.get_by_label("Temperature")
    expect(top_p).to_have_attribute("placeholder", "1")
    top_p.fill("0.5")
    temperature.fill("0.3")
    expect(page.locator(".field.changed")).to_have_count(2)
    page.get_by_role("button", name="Back to default: top p").click()
    expect(top_p).to_have_value("")
    expect(top_p).to_be_focused()
    expect(temperature).to_have_value("0.3")
    page.get_by_role("button", name="Reset").click()
    expect(temperature).to_have_value("")
    expect(page.locator(".field.changed")).to_have_count(0)
    tab.check_clean()


def test_number_moves_by_keys_and_by_slider(tab: Tab) -> None:
    tab.open()
    page = tab.page
    expect(page.locator("#server-state")).to_have_text("Ready")
    temperature = page.get_by_label("Temperature")
    for _ in range(3):
        temperature.press("ArrowDown")
    expect(temperature).to_have_value("0.85")
    slider = page.locator(".field:has(#set-temperature) input[type=range]")
    expect(slider).to_have_js_property("value", "0.85")
    slider.evaluate("(node) => { node.value = '1.5'; node.dispatchEvent(new Event('input', { bubbles: true })); }")
    expect(temperature).to_have_value("1.5")
    temperature.fill("2")
    temperature.press("ArrowUp")
    expect(temperature).to_have_value("2.05")
    tab.check_clean()


OUT_OF_RANGE = (("Temperature", "temperature", "101"), ("Top p", "top_p", "1.5"), ("Max tokens", "max_tokens", "0"))


@pytest.mark.parametrize(("label", "name", "value"), OUT_OF_RANGE)
def test_value_out_of_range_is_told_while_it_is_typed_in_the_servers_words(tab: Tab, label: str, name: str, value: str) -> None:
    tab.open(NO_WEBSOCKET)
    field = tab.page.get_by_label(label)
    field.fill(value)
    note = tab.page.locator(f"#note-{name}")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(note).to_contain_text(f"{name} is {value}; allowed is")
    words = note.inner_text()
    tab.ask("Out of range")
    alert = tab.page.locator(".assistant [role=alert]")
    expect(alert).to_be_visible()
    assert alert.inner_text().splitlines()[0].replace(f"{value}.0", value) == words


def test_extra_body_is_checked_and_an_unreadable_one_is_not_sent(tab: Tab) -> None:
    asked = recording(tab)
    page = tab.page
    page.get_by_text("Extra body (JSON)").click()
    field, note = page.get_by_label("Further fields"), page.locator("#note-extra_body")
    field.fill('{"seed": 1,\n "top_k" 2}')
    expect(note).to_contain_text("Line 2, column")
    tab.ask("Unreadable")
    expect(page.locator(".assistant [role=alert]")).to_contain_text("Extra body is not JSON")
    assert asked == []
    field.fill("[1]")
    expect(note).to_contain_text("must be an object")
    field.fill('{"messages": []}')
    expect(note).to_contain_text("cannot set messages")
    field.fill('{"seed": 1}')
    expect(field).to_have_attribute("aria-invalid", "false")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".assistant .text")).to_contain_text("Second part")
    assert asked[0]["seed"] == 1
    tab.check_clean()


def test_presets_are_saved_chosen_and_deleted(tab: Tab) -> None:
    tab.open()
    page = tab.page
    expect(page.locator("#server-state")).to_have_text("Ready")
    preset = page.get_by_label("Preset", exact=True)
    expect(preset).to_be_disabled()
    page.get_by_label("System prompt").fill("Answer as <b>a poet</b>.")
    page.get_by_label("Temperature").fill("1.2")
    page.get_by_role("button", name="Save as…").click()
    page.get_by_label("Name of the preset").fill("<i>Poet</i>")
    page.keyboard.press("Enter")
    expect(preset).to_have_value("<i>Poet</i>")
    page.get_by_role("button", name="Reset", exact=True).click()
    expect(preset).to_have_value("")
    page.reload()
    expect(preset).to_be_enabled()
    preset.select_option("<i>Poet</i>")
    expect(page.get_by_label("System prompt")).to_have_value("Answer as <b>a poet</b>.")
    expect(page.get_by_label("Temperature")).to_have_value("1.2")
    page.get_by_role("button", name="Delete preset <i>Poet</i>").click()
    expect(preset).to_be_disabled()
    page.get_by_role("button", name="Undo").click()
    expect(preset).to_have_value("<i>Poet</i>")
    tab.check_clean()


@pytest.mark.parametrize(
    ("choice", "heard"),
    [("Nothing", ""), ("When an answer is complete", "Answer complete, 4 words"), ("Each paragraph", "First. Second part. Last")],
)
def test_screen_reader_hears_as_much_as_it_was_told_to(tab: Tab, choice: str, heard: str) -> None:
    recording(tab)
    tab.page.get_by_label("Screen reader hears").select_option(choice)
    tab.page.evaluate(
        """() => {
          window.heard = [];
          const status = document.getElementById("status");
          const note = () => window.heard.push(status.textContent);
          new MutationObserver(note).observe(status, { childList: true, characterData: true });
        }"""
    )
    tab.ask("Speak")
    tab.finish()
    tab.page.wait_for_function("(words) => window.heard.join(' ').includes(words)", arg=heard)
    said = tab.page.evaluate("() => window.heard")
    assert " ".join(words for words in said if words not in ("", "Generating")) == heard
    assert ("Generating" in said) == bool(heard), json.dumps(said)
    tab.check_clean()
