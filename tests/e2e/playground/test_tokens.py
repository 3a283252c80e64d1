"""The tokens of answers in a real Chromium: asked for, shown by their probability, looked at by keys, gone on from."""

import json
import math
from collections.abc import Sequence
from typing import Any
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.e2e.playground.browser import CHROMIUM, NO_WEBSOCKET, Tab

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")

HEAD = {"object": "chat.completion.chunk", "id": "x", "created": 1, "model": "fake"}
FLOW = """() => [...document.querySelectorAll('.token-flow .token')].map((token) => token.textContent).join('')"""


def token(raw: bytes, logprob: float) -> dict[str, Any]:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return {"token": text, "bytes": list(raw), "logprob": logprob}


def entry(raw: bytes, p: float, *others: tuple[bytes, float]) -> dict[str, Any]:
    tops = sorted([(raw, p), *others], key=lambda top: -top[1])
    return {**token(raw, math.log(p)), "top_logprobs": [token(other, math.log(share)) for other, share in tops]}


def canned(*chunks: tuple[str, Sequence[dict[str, Any]], str]) -> str:
    """A stream: for each chunk its text, its tokens, and "guessed", "forced" or nothing."""
    lines = []
    for text, entries, kind in chunks:
        marks = [{"text": text, "drafted": kind == "guessed", **({"forced": True} if kind == "forced" else {})}] if text else []
        choice = {
            "index": 0,
            "delta": {"content": text},
            "logprobs": {"content": entries},
            "draft_marks": marks,
            "finish_reason": None,
        }
        lines.append(f"data: {json.dumps({**HEAD, 'choices': [choice]})}\n\n")
    return "".join(lines) + "data: [DONE]\n\n"


EMOJI = "👍".encode()
SPLIT = canned(
    ("The", [entry(b"The", 0.97, (b"A", 0.02))], ""),
    (" capital\n", [entry(b" capital", 0.55, (b" city", 0.4)), entry(b"\n", 0.2, (b" of", 0.7))], "guessed"),
    ("", [entry(EMOJI[:3], 0.5, (b"\xe4\xb8", 0.3))], ""),
    ("👍<b>", [entry(EMOJI[3:] + b"<b", 1.0), entry(b">", 0.01, (b" ", 0.9))], "forced"),
    (" \u202eok", [entry(" \u202eok".encode(), 0.85, ("\u202ecipsed".encode(), 0.1))], ""),
)


def answer_with(tab: Tab, *bodies: str) -> list[Any]:
    """Answers the page's questions with these, one after the other; what it asked is in the list."""
    asked: list[Any] = []

    def answer(route: Route) -> None:
        asked.append(json.loads(route.request.post_data or ""))
        route.fulfill(content_type="text/event-stream", body=bodies[len(asked) - 1])

    tab.page.route("**/v1/chat/completions", answer)
    return asked


def tokens_panel(page: Page) -> Locator:
    page.get_by_role("tab", name="Tokens").click()
    return page.get_by_role("tabpanel", name="Tokens")


def record(page: Page) -> Locator:
    panel = tokens_panel(page)
    panel.get_by_role("switch", name="Record token probabilities").check()
    return panel


def tokens(page: Page) -> Locator:
    return page.get_by_role("listbox", name="Tokens of the answer").get_by_role("option")


def test_probabilities_are_asked_for_only_when_they_are_turned_on(tab: Tab) -> None:
    sent: list[Any] = []
    tab.page.on("websocket", lambda socket: socket.on("framesent", lambda frame: sent.append(json.loads(frame))))
    tab.open()
    tab.ask("Without")
    tab.finish()
    panel = tokens_panel(tab.page)
    expect(panel.get_by_text("No probabilities were recorded for this answer.")).to_be_visible()
    expect(panel.get_by_role("switch")).not_to_be_checked()
    panel.get_by_role("button", name="Turn on and resend").click()
    tab.finish()
    expect(tokens(tab.page).first).to_be_visible()
    expect(tab.page.locator(".assistant .place")).to_have_text("2/2")
    first, second = (frame["request"] for frame in sent if frame["type"] == "chat.create")
    assert "logprobs" not in first and "top_logprobs" not in first
    assert second["logprobs"] is True and second["top_logprobs"] == 5
    assert {name: value for name, value in second.items() if "logprobs" not in name} == first
    tab.page.get_by_role("button", name="New chat").click()
    expect(panel.get_by_role("switch")).not_to_be_checked()
    tab.check_clean()


def test_switch_holds_for_a_question_that_is_sent_before_the_page_has_all_its_parts(tab: Tab) -> None:
    held: list[Route] = []
    tab.page.route("**/js/raw/recorder.js", lambda route: held.append(route))
    asked = answer_with(tab, SPLIT)
    tab.open(NO_WEBSOCKET)
    record(tab.page)
    tab.ask("Something odd")
    expect(tab.page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    assert asked == []
    held[0].continue_()
    tab.finish()
    expect(tokens(tab.page)).to_have_count(7)
    tab.check_clean()


def test_tokens_are_the_answers_and_their_probabilities_the_servers(tab: Tab) -> None:
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.open()
    tab.page.get_by_label("Seed").fill("5")
    tab.page.get_by_label("Max tokens").fill("90")
    panel = record(tab.page)
    tab.ask("What is said?")
    tab.finish()
    tab.page.get_by_role("button", name="Copy message 2").click()
    expect(tab.page.locator("#status")).to_have_text("Copied")
    text = tab.page.evaluate("() => navigator.clipboard.readText()")
    expect(tokens(tab.page).first).to_have_attribute("aria-setsize", "90")
    assert tab.page.evaluate(FLOW) == text != ""
    body = {
        "messages": [{"role": "user", "content": "What is said?"}],
        "seed": 5,
        "max_tokens": 90,
        "logprobs": True,
        "top_logprobs": 5,
    }
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(tab.url + "v1/chat/completions", json.dumps(body).encode(), headers), timeout=20) as answer:
        [choice] = json.load(answer)["choices"]
    assert choice["message"]["content"] == text
    panel.get_by_role("radio", name="List").check()
    rows = panel.get_by_role("group", name="Tokens as a list").get_by_role("row")
    expect(rows).to_have_count(91)
    shown = [cells[2] for cells in rows.evaluate_all("(rows) => rows.map((row) => [...row.cells].map((c) => c.innerText))")[1:]]
    assert shown == [f"{100 * math.exp(entry['logprob']):.1f} %" for entry in choice["logprobs"]["content"]]
    tab.check_clean()


def test_split_characters_hidden_ones_and_what_was_guessed_are_shown(tab: Tab) -> None:
    answer_with(tab, SPLIT)
    tab.open(NO_WEBSOCKET)
    panel = record(tab.page)
    tab.ask("Something odd")
    tab.finish()
    flow = panel.get_by_role("listbox", name="Tokens of the answer")
    expect(flow.get_by_role("option")).to_have_count(7)
    assert tab.page.evaluate(FLOW) == "The capital\n👍<b> \u202eok"
    names = flow.get_by_role("option").evaluate_all("(all) => all.map((token) => token.getAttribute('aria-label'))")
    assert names == [
        "The, 97.0 %",
        "␣capital, 55.0 %, guessed ahead",
        "⏎, 20.0 %, guessed ahead",
        "f0 9f 91, 50.0 %, forced by the form of the answer",
        "8d 3c 62, 100 %, forced by the form of the answer",
        ">, 1.0 %, forced by the form of the answer",
        "␣\u202eok, 85.0 %",
    ]
    steps = flow.get_by_role("option").evaluate_all("(all) => all.map((token) => token.className.match(/step-(.)/)[1])")
    assert steps == ["0", "2", "3", "2", "0", "4", "1"]
    lines = flow.get_by_role("option").evaluate_all("(all) => all.map((t) => getComputedStyle(t).textDecorationStyle)")
    assert len({(step, line) for step, line in zip(steps, lines, strict=True) if step != "0"}) == 4
    expect(flow.locator("bdi[data-name='U+202E']")).to_be_visible()
    flow.get_by_role("option").nth(3).hover()
    detail = panel.get_by_role("region", name="The chosen token")
    expect(detail).to_contain_text("50.0 % · token 4 of 7")
    expect(detail.get_by_role("row", name="e4 b8")).to_contain_text("30.0 %")
    tab.page.get_by_label("Message", exact=True).hover()
    expect(detail).to_contain_text("97.0 % · token 1 of 7")
    tab.check_clean()


def test_keys_move_between_tokens_and_the_least_sure_are_a_press_away(tab: Tab) -> None:
    answer_with(tab, SPLIT)
    tab.open(NO_WEBSOCKET)
    panel = record(tab.page)
    tab.ask("Something odd")
    tab.finish()
    options = tokens(tab.page)
    detail = panel.get_by_role("region", name="The chosen token")
    expect(options).to_have_count(7)
    panel.get_by_role("radio", name="Text").focus()
    tab.page.keyboard.press("Tab")
    expect(options.nth(0)).to_be_focused()
    moves = {"ArrowRight": 1, "ArrowLeft": 0, "ArrowDown": 3, "ArrowUp": 0, "End": 6, "Home": 0}
    for key, at in moves.items():
        tab.page.keyboard.press(key)
        expect(options.nth(at)).to_be_focused()
        expect(options.nth(at)).to_have_attribute("aria-selected", "true")
        expect(detail).to_contain_text(f"token {at + 1} of 7")
        assert panel.locator(".token[tabindex='0']").count() == 1
    panel.get_by_role("radio", name="List").check()
    panel.get_by_role("button", name="Token 4, f0 9f 91").click()
    expect(panel.get_by_role("radio", name="Text")).to_be_checked()
    expect(options.nth(3)).to_be_focused()
    tab.check_clean()


def test_tokens_are_kept_over_a_reload(tab: Tab) -> None:
    answer_with(tab, SPLIT)
    tab.open(NO_WEBSOCKET)
    record(tab.page)
    tab.ask("Something odd")
    tab.finish()
    tab.page.reload()
    expect(tab.page.locator("#server-state")).to_have_text("Ready")
    tab.page.get_by_role("button", name="Token probabilities of message 2").click()
    panel = tab.page.get_by_role("tabpanel", name="Tokens")
    expect(tokens(tab.page)).to_have_count(7)
    expect(panel.get_by_role("switch")).to_be_checked()
    assert tab.page.evaluate(FLOW) == "The capital\n👍<b> \u202eok"
    expect(panel.get_by_text("7 tokens, each 33.3 %")).to_be_visible()
    tab.check_clean()


def test_answer_goes_on_from_another_token_as_a_version_of_its_own(tab: Tab) -> None:
    rest = canned((" of", [entry(b" of", 0.9)], ""), (" light", [entry(b" light", 0.4, (b" love", 0.3))], ""))
    asked = answer_with(tab, SPLIT, rest)
    tab.open(NO_WEBSOCKET)
    panel = record(tab.page)
    tab.ask("Something odd")
    tab.finish()
    options = tokens(tab.page)
    options.nth(1).click()
    panel.get_by_role("button", name="Go on with ␣city instead").click()
    expect(tab.page.locator(".assistant .place")).to_have_text("2/2")
    tab.finish()
    expect(tab.page.locator(".assistant .text")).to_have_text("The city of light")
    assert asked[1]["messages"][-1] == {"role": "assistant", "content": "The city"}
    assert asked[1]["continue_final_message"] is True
    expect(options).to_have_count(4)
    assert tab.page.evaluate(FLOW) == "The city of light"
    expect(options.nth(1)).to_have_accessible_name("␣city, 40.0 %")
    tab.page.get_by_role("button", name="Previous version of message 2").click()
    expect(tab.page.locator(".assistant .text")).to_contain_text("The capital")
    tab.check_clean()


def test_long_answers_put_only_what_is_near_into_the_page(tab: Tab) -> None:
    ends = ["\n" if k % 40 == 39 else " " for k in range(10_050)]
    entries = [entry(f"w{k}{end}".encode(), 0.5, (b"x", 0.25)) for k, end in enumerate(ends)]
    texts = ["".join(one["token"] for one in entries[k : k + 50]) for k in range(0, len(entries), 50)]
    answer_with(tab, canned(*((text, entries[50 * k : 50 * k + 50], "") for k, text in enumerate(texts))))
    tab.open(NO_WEBSOCKET)
    panel = record(tab.page)
    tab.ask("A long one")
    tab.finish()
    flow = panel.get_by_role("listbox", name="Tokens of the answer")
    expect(flow.get_by_role("option").first).to_have_attribute("aria-setsize", "10000")
    expect(panel.get_by_text("10,050 tokens")).to_contain_text("The first 10,000 are kept.")
    assert flow.get_by_role("option").count() < 1_000
    flow.get_by_role("option").first.focus()
    tab.page.keyboard.press("End")
    expect(flow.locator("[data-index='9999']")).to_be_focused()
    expect(flow.locator("[data-index='5000']")).to_have_count(0)
    assert flow.get_by_role("option").count() < 1_500
    panel.get_by_role("radio", name="List").check()
    rows = panel.get_by_role("group", name="Tokens as a list").get_by_role("row")
    expect(rows).to_have_count(101)
    panel.get_by_role("button", name="Next").click()
    expect(rows.nth(1)).to_contain_text("w100")
    tab.check_clean()


def test_model_without_probabilities_is_said_to_have_none(tab: Tab) -> None:
    def answer(route: Route) -> None:
        config = route.fetch().json()
        route.fulfill(json={**config, "max_logprobs": 0})

    tab.page.route("**/playground/config.json", answer)
    tab.open()
    panel = tokens_panel(tab.page)
    expect(panel.get_by_text("This model gives no token probabilities.")).to_be_visible()
    expect(panel.get_by_role("switch")).to_be_hidden()
    tab.check_clean()
