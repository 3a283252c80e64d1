"""What can be done with messages in the playground: go on, edit, take out; how answers end, and the figures below them."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Locator, Route, expect

from tests.e2e.playground.browser import CHROMIUM, NO_WEBSOCKET, Tab, get_json

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")


def button(tab: Tab, name: str) -> Locator:
    return tab.page.get_by_role("button", name=name, exact=True)


def limit(tab: Tab, tokens: int) -> None:
    tab.page.get_by_label("Max tokens").fill(str(tokens))


def kept(tab: Tab) -> list[dict[str, Any]]:
    """The messages as the page has them in its database."""
    found: list[dict[str, Any]] = tab.page.evaluate(
        """() => new Promise((resolve) => {
          const open = indexedDB.open("streamserve");
          open.onsuccess = () => {
            const all = open.result.transaction("messages").objectStore("messages").getAll();
            all.onsuccess = () => resolve(all.result.sort((a, b) => a.order - b.order).map((row) => row.message));
          };
        })"""
    )
    return found


def answering(tab: Tab, *texts: str, then: Callable[[Route], None] | None = None) -> list[Any]:
    """Answers with these texts in turn, by SSE; returns what was asked."""
    asked: list[Any] = []

    def answer(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        asked.append(body)
        if then is not None and len(asked) > len(texts):
            return then(route)
        text = texts[min(len(asked), len(texts)) - 1]
        chunks = [{"id": f"chatcmpl-{len(asked)}", "choices": [{"index": 0, "delta": {"content": text}}]}]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "length" if "max_tokens" in body else "stop"}]})
        route.fulfill(
            content_type="text/event-stream",
            body="".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n",
        )

    tab.page.route("**/v1/chat/completions", answer)
    tab.open(NO_WEBSOCKET)
    return asked


def test_answer_that_was_cut_goes_on_in_the_same_message(tab: Tab) -> None:
    tab.open()
    limit(tab, 40)
    tab.ask("Tell me a long story")
    tab.finish()
    stats = tab.page.locator(".assistant .stats")
    expect(stats).to_contain_text("Cut at max_tokens 40")
    expect(stats).to_contain_text("40 tok ·")
    before = kept(tab)[1]["content"]
    button(tab, "Continue message 2").click()
    expect(stats).to_contain_text("80 tok ·")
    expect(tab.page.locator(".message")).to_have_count(2)
    after = kept(tab)[1]["content"]
    assert after.startswith(before) and 60 < len(after.encode()) <= 80
    cached, prompt = re.findall(r"(\d+) of (\d+) prompt tokens cached", stats.inner_text())[0]
    assert 0 < int(cached) < int(prompt)
    tab.check_clean()


def test_continuing_sends_the_text_itself_and_joins_what_comes(tab: Tab) -> None:
    asked = answering(tab, "One, two ", "and three")
    limit(tab, 5)
    tab.ask("Count")
    tab.finish()
    button(tab, "Continue message 2").click()
    expect(tab.page.locator(".assistant .text")).to_have_text("One, two and three")
    assert asked[1]["messages"] == [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, two "}]
    assert asked[1]["continue_final_message"] is True and "continue_final_message" not in asked[0]
    tab.page.reload()
    expect(tab.page.locator(".assistant .text")).to_have_text("One, two and three")
    tab.check_clean()


def test_stopped_answer_says_after_how_many_tokens_and_can_go_on(slow_tab: Tab) -> None:
    slow_tab.open()
    slow_tab.ask("Tell me a long story")
    expect(slow_tab.page.locator(".assistant .text")).not_to_be_empty()
    slow_tab.page.keyboard.press("Escape")
    expect(slow_tab.page.locator(".assistant .stats")).to_contain_text(re.compile(r"Stopped by you after \d+ tokens"))
    [before] = slow_tab.answers()
    button(slow_tab, "Continue message 2").click()
    expect(button(slow_tab, "Stop")).to_be_visible()
    slow_tab.page.wait_for_function(
        "(n) => document.querySelector('.assistant .text').innerText.length > n + 10", arg=len(before)
    )
    slow_tab.page.keyboard.press("Escape")
    assert slow_tab.answers()[0].startswith(before.rstrip())
    slow_tab.check_clean()


def test_edited_answer_is_kept_beside_the_old_one_or_in_its_place(tab: Tab) -> None:
    asked = answering(tab, "The first answer", "The second answer", ", and more")
    tab.ask("First")
    tab.finish()
    tab.ask("Second")
    tab.finish()
    expect(tab.page.locator(".message")).to_have_count(4)

    def edit(number: int, text: str, way: str) -> None:
        button(tab, f"Edit message {number}").click()
        field = tab.page.get_by_label(f"Text of message {number}")
        expect(field).to_be_focused()
        field.fill(text)
        button(tab, way).click()
        expect(field).to_have_count(0)

    edit(2, "In its place", "Save in place")
    expect(tab.page.locator(".assistant .text")).to_have_text(["In its place", "The second answer"])
    expect(tab.page.locator(".assistant .stats").first).to_contain_text("Edited")
    edit(2, "A copy", "Save as copy")
    expect(tab.page.locator(".assistant .text")).to_have_text(["A copy"])
    expect(tab.page.locator(".assistant .place")).to_have_text("2/2")
    button(tab, "Previous version of message 2").click()
    expect(tab.page.locator(".assistant .text")).to_have_text(["In its place", "The second answer"])
    edit(4, "The second", "Save and continue")
    expect(tab.page.locator(".assistant .text").last).to_have_text("The second, and more")
    assert [message["content"] for message in asked[2]["messages"]] == ["First", "In its place", "Second", "The second"]
    tab.page.reload()
    expect(tab.page.locator(".assistant .text")).to_have_text(["In its place", "The second, and more"])
    tab.check_clean()


def test_edit_that_was_not_saved_is_there_after_a_reload(tab: Tab) -> None:
    answering(tab, "An answer")
    tab.ask("A question")
    tab.finish()
    button(tab, "Edit message 2").click()
    tab.page.get_by_label("Text of message 2").fill("Half an ed")
    tab.page.wait_for_function(
        "() => new Promise((done) => { indexedDB.open('streamserve').onsuccess = ({ target }) => {"
        " target.result.transaction('messages').objectStore('messages').getAll().onsuccess = (event) =>"
        " done(event.target.result.some(({ message }) => message.edit === 'Half an ed')); }; })"
    )
    tab.page.reload()
    expect(tab.page.get_by_label("Text of message 2")).to_have_value("Half an ed")
    tab.page.get_by_label("Text of message 2").press("Escape")
    expect(tab.page.locator(".assistant .text")).to_have_text("An answer")
    expect(button(tab, "Edit message 2")).to_be_focused()
    tab.check_clean()


def test_question_saved_in_place_keeps_what_follows(tab: Tab) -> None:
    asked = answering(tab, "An answer", "Another")
    tab.ask("A qestion")
    tab.finish()
    button(tab, "Edit message 1").click()
    tab.page.get_by_label("Message", exact=True).fill("A question")
    button(tab, "Save in place").click()
    expect(tab.page.locator(".user .text")).to_have_text("A question")
    expect(tab.page.locator(".assistant .text")).to_have_text("An answer")
    expect(tab.page.locator(".place")).to_have_count(0)
    tab.ask("And now?")
    tab.finish()
    assert [message["content"] for message in asked[1]["messages"]] == ["A question", "An answer", "And now?"]
    tab.check_clean()


def test_deleted_message_goes_with_what_is_below_it_and_comes_back(tab: Tab) -> None:
    answering(tab, "One", "Two", "Two again")
    for text in ("First", "Second"):
        tab.ask(text)
        tab.finish()
    button(tab, "Regenerate message 4").click()
    tab.finish()
    button(tab, "Delete message 4").click()
    expect(tab.page.locator(".assistant .text")).to_have_text(["One", "Two"])
    expect(tab.page.locator(".place")).to_have_count(0)
    assert tab.page.evaluate("() => document.activeElement.closest('.message') !== null")
    button(tab, "Delete message 2").click()
    expect(tab.page.locator(".message")).to_have_count(1)
    expect(tab.page.get_by_text("Deleted message 2 and 2 below it")).to_be_visible()
    button(tab, "Undo").click()
    expect(tab.page.locator(".assistant .text")).to_have_text(["One", "Two"])
    tab.page.reload()
    expect(tab.page.locator(".assistant .text")).to_have_text(["One", "Two"])
    button(tab, "Delete message 1").click()
    expect(tab.page.get_by_label("Message", exact=True)).to_be_focused()
    expect(tab.page.locator("#welcome")).to_be_visible()
    tab.check_clean()


def test_refusal_names_its_field_and_trying_again_replaces_it(tab: Tab) -> None:
    error = {"error": {"message": "top_p is 2.0; allowed is 0 to 1", "param": "top_p", "code": "invalid_value"}}

    def refuse(route: Route) -> None:
        if len(asked) == 1:
            route.fulfill(status=400, json=error)
        else:
            route.fulfill(
                content_type="text/event-stream",
                body='data: {"choices":[{"index":0,"delta":{"content":"Well"}}]}\n\ndata: [DONE]\n\n',
            )

    asked = answering(tab, then=refuse)
    tab.ask("Question")
    alert = tab.page.locator(".assistant [role=alert]")
    expect(alert).to_contain_text("top_p is 2.0; allowed is 0 to 1")
    expect(alert).to_contain_text("Field: top_p")
    expect(tab.page.get_by_label("Top p")).to_have_attribute("aria-invalid", "true")
    button(tab, "Try again, message 2").click()
    expect(tab.page.locator(".assistant .text")).to_have_text("Well")
    expect(tab.page.locator(".assistant")).to_have_count(1)
    assert [line for line in tab.console if "400" not in line] == []


def test_figures_are_those_of_the_server(tab: Tab) -> None:
    tab.open()
    tab.ask("What is the capital of France?")
    tab.finish()
    [message] = [one for one in kept(tab) if one["role"] == "assistant"]
    stats, times = message["stats"], message["stats"]["timings"]
    figures = tab.page.locator(".assistant .figures-button")
    expect(figures).to_contain_text(f"{stats['cachedTokens']} of {stats['promptTokens']} prompt tokens cached")
    assert times["prompt_n"] + times["cache_n"] == stats["promptTokens"] and times["predicted_n"] == stats["tokens"]
    figures.click()
    expect(figures).to_have_attribute("aria-expanded", "true")
    table = tab.page.locator(".figures")
    expect(table).to_contain_text("Waited in the queue")
    expect(table).to_contain_text(message["requestId"])
    figures.click()
    expect(table).to_have_count(0)
    tab.check_clean()


def test_long_conversation_is_drawn_from_its_end_and_the_rest_when_it_is_reached(tab: Tab) -> None:
    tab.open()
    tab.page.evaluate(
        """async () => {
          const { Store, newConversation, addMessage } = await import("/static/js/store/store.js");
          const conversation = newConversation();
          for (let k = 0; k < 250; k += 1) {
            addMessage(conversation, conversation.head, "user", `Question ${k}`);
            addMessage(conversation, conversation.head, "assistant", `Answer **${k}**`);
          }
          await new Store().save(conversation);
          location.hash = `c=${conversation.id}`;
        }"""
    )
    expect(tab.page.locator(".assistant strong").last).to_have_text("249")
    assert tab.page.locator(".message").count() == 200
    expect(tab.page.get_by_role("heading", name="Answer 250", exact=True)).to_be_attached()
    button(tab, "Show earlier messages (300)").click()
    expect(tab.page.get_by_role("heading", name="Question 51", exact=True)).to_be_attached()
    tab.check_clean()


def test_keys_do_what_their_list_says(tab: Tab) -> None:
    asked = answering(tab, "One", "Two")
    tab.ask("Question")
    tab.finish()
    button(tab, "Keys").click()
    dialog = tab.page.get_by_role("dialog", name="Keys")
    expect(dialog).to_contain_text("Regenerate the last answer")
    tab.page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(button(tab, "Keys")).to_be_focused()
    tab.page.keyboard.press("Control+Alt+r")
    expect(tab.page.locator(".assistant .text")).to_have_text("Two")
    assert len(asked) == 2
    tab.page.keyboard.press("Control+Alt+e")
    expect(tab.page.get_by_label("Message", exact=True)).to_have_value("Question")
    tab.page.keyboard.press("Escape")
    expect(tab.page.get_by_label("Message", exact=True)).to_have_value("")
    tab.check_clean()


def test_tokens_are_counted_before_they_are_sent(tab: Tab) -> None:
    tab.open()
    tab.ask("Remember these words of mine")
    tab.finish()
    tab.page.get_by_label("Message", exact=True).fill("x" * 100)
    count = tab.page.locator("#context")
    expect(count).to_contain_text("cached")
    tokens, cached = (
        int(n.replace(",", "")) for n in re.findall(r"^([\d,]+) of 8,192 tokens, ([\d,]+) cached", count.inner_text())[0]
    )
    assert 500 < tokens < 700 and 400 < cached < tokens
    tab.check_clean()


def test_too_long_a_conversation_is_not_sent_and_its_oldest_messages_can_be_left_out(tab: Tab) -> None:
    limit_of_model = get_json(tab.url + "playground/config.json")["context_len"]
    tab.open()
    limit(tab, 4)
    for text in ("a" * 3000, "b" * 3000):
        tab.ask(text)
        tab.finish()
    prompt = tab.page.get_by_label("Message", exact=True)
    prompt.fill("c" * 3000)
    expect(tab.page.get_by_text(f"and the model reads at most {limit_of_model - 1:,}")).to_be_visible()
    expect(button(tab, "Send")).to_be_disabled()
    button(tab, "Leave out the oldest messages").click()
    expect(button(tab, "Send")).to_be_enabled()
    expect(tab.page.get_by_text("Messages above are not sent any more")).to_be_visible()
    prompt.press("Enter")
    expect(tab.page.locator(".assistant")).to_have_count(3)
    tab.finish()
    expect(tab.page.locator(".assistant").last).to_contain_text("Cut at max_tokens 4")
    button(tab, "Send all again").click()
    expect(tab.page.get_by_text("Messages above are not sent any more")).to_have_count(0)
    tab.check_clean()


@pytest.mark.parametrize("scripts", [(), (NO_WEBSOCKET,)], ids=["websocket", "sse"])
def test_question_waits_for_a_server_that_is_away_and_says_why(tab: Tab, scripts: tuple[str, ...]) -> None:
    tab.open(*scripts)
    expect(tab.page.locator("#server-state")).to_have_text("Ready")
    tab.page.get_by_label("Message", exact=True).fill("Are you there?")
    expect(button(tab, "Send")).to_be_enabled()
    tab.page.context.set_offline(True)
    expect(button(tab, "Send")).to_be_disabled(timeout=20_000)
    expect(button(tab, "Send")).to_have_attribute("title", re.compile("No network|not reachable"))
    tab.page.get_by_label("Message", exact=True).press("Enter")
    expect(tab.page.locator(".message")).to_have_count(0)
    tab.page.context.set_offline(False)
    expect(button(tab, "Send")).to_be_enabled(timeout=20_000)
    tab.page.get_by_label("Message", exact=True).press("Enter")
    expect(tab.page.locator(".assistant .text")).not_to_be_empty()


def test_what_was_never_used_works_without_a_server(tab: Tab) -> None:
    tab.open().ask("Hello")
    tab.finish()
    tab.page.wait_for_load_state("networkidle")
    tab.page.context.set_offline(True)
    button(tab, "Edit message 2").click()
    expect(button(tab, "Save as copy")).to_be_visible()
    tab.page.keyboard.press("Escape")
    tab.page.get_by_role("button", name="prompt tokens cached").click()
    expect(tab.page.locator(".figures")).to_be_visible()
    button(tab, "Delete message 2").click()
    expect(tab.page.locator(".assistant")).to_have_count(0)
    button(tab, "Undo").click()
    expect(tab.page.locator(".assistant")).to_have_count(1)
    button(tab, "Keys").click()
    expect(tab.page.get_by_role("dialog")).to_be_visible()


def test_drafts_stay_with_their_conversation_and_outlive_a_reload(tab: Tab) -> None:
    answering(tab, "An answer")
    prompt = tab.page.get_by_label("Message", exact=True)
    tab.ask("Apples")
    tab.finish()
    prompt.fill("About apples")
    button(tab, "New chat").click()
    expect(prompt).to_have_value("")
    prompt.fill("Something new")
    tab.page.reload()
    expect(prompt).to_have_value("Something new")
    tab.page.get_by_role("link", name="Apples").click()
    expect(prompt).to_have_value("About apples")
    tab.check_clean()
