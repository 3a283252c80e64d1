"""Thoughts in the playground: folded, timed, never sent back, and ended on demand. The server is one whose made-up model always
thinks first; a limit, or the button, ends its thought."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.e2e.playground.browser import CHROMIUM, NO_WEBSOCKET, Tab, serve, tab_on, wait_for_running

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")


@pytest.fixture(scope="module")
def thinking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(tmp_path_factory.mktemp("thinking") / "log.txt", "--reasoning-parser", "deepseek-r1", step_ms=10) as url:
        yield url


@pytest.fixture
def thinking_tab(chromium: Browser, thinking_server: str) -> Iterator[Tab]:
    with tab_on(chromium, thinking_server) as tab:
        yield tab


def limit(tab: Tab, tokens: int, thought: int) -> None:
    expect(tab.page.locator("#server-state")).to_have_text("Ready")
    tab.page.get_by_label("Max tokens").fill(str(tokens))
    tab.page.locator("summary", has_text="Thinking").click()
    tab.page.get_by_label("Thought limit").fill(str(thought))


@pytest.mark.parametrize("init_script", ["", NO_WEBSOCKET], ids=["websocket", "sse"])
def test_thought_is_folded_timed_and_apart_from_the_answer(thinking_tab: Tab, init_script: str) -> None:
    tab = thinking_tab
    tab.open(init_script)
    limit(tab, 90, 40)
    tab.ask("Think first")
    tab.finish()
    thought = tab.page.locator(".assistant details.thought")
    expect(thought.locator("summary")).to_contain_text("Thought for")
    expect(thought.locator(".thought-text")).to_be_hidden()
    thought.locator("summary").click()
    expect(thought.locator(".thought-text")).not_to_be_empty()
    assert tab.answers()[0] not in ("", thought.locator(".thought-text").inner_text())
    tab.page.locator(".figures-button").click()
    expect(tab.page.locator(".figures")).to_contain_text("40 tokens")
    tab.page.reload()
    expect(tab.page.locator(".assistant summary")).to_contain_text("Thought for")
    tab.check_clean()


def test_thought_is_not_sent_back(thinking_tab: Tab) -> None:
    tab = thinking_tab
    frames: list[str] = []
    tab.page.on("websocket", lambda socket: socket.on("framesent", lambda frame: frames.append(str(frame))))
    tab.open()
    limit(tab, 90, 40)
    tab.ask("Think first")
    tab.finish()
    tab.page.locator(".assistant summary").click()
    expect(tab.page.locator(".thought-text")).not_to_be_empty()
    thought = tab.page.locator(".thought-text").inner_text()
    tab.ask("And once more")
    tab.finish()
    [_, second] = [frame for frame in frames if "chat.create" in frame]
    assert tab.answers()[0][:20] in second and thought[:20] not in second and "reasoning" not in second
    tab.check_clean()


@pytest.mark.parametrize("init_script", ["", NO_WEBSOCKET], ids=["websocket", "sse"])
def test_thought_is_ended_by_a_button_and_the_answer_begins(thinking_tab: Tab, init_script: str) -> None:
    tab = thinking_tab
    tab.open(init_script)
    tab.ask("Think for long")
    summary = tab.page.locator(".assistant summary")
    expect(summary).to_have_text("Thinking…")
    expect(tab.page.locator(".assistant .text")).to_be_empty()
    tab.page.get_by_role("button", name="Stop thinking").click()
    expect(tab.page.locator(".assistant .text")).not_to_be_empty()
    expect(summary).to_contain_text("Thought for")
    expect(tab.page.get_by_role("button", name="Stop thinking")).to_be_hidden()
    tab.page.keyboard.press("Escape")
    wait_for_running(tab.url, False)
    tab.check_clean()


def test_open_thought_grows_while_it_is_thought(thinking_tab: Tab) -> None:
    tab = thinking_tab
    tab.open()
    tab.ask("Think aloud")
    tab.page.locator(".assistant summary").click()
    grown = "(n) => document.querySelector('.thought-text').innerText.length > n"
    tab.page.wait_for_function(grown, arg=5)
    tab.page.wait_for_function(grown, arg=40)
    tab.page.keyboard.press("Escape")
    expect(tab.page.locator(".assistant .stats")).to_contain_text("Stopped by you")
    expect(tab.page.locator(".assistant details.thought")).to_have_attribute("open", "")
    expect(tab.page.get_by_role("button", name="Continue message 2")).to_have_count(0)  # there is no text to go on from
    tab.check_clean()


def test_model_that_does_not_think_has_no_such_settings(tab: Tab) -> None:
    tab.open()
    expect(tab.page.locator("#server-state")).to_have_text("Ready")
    expect(tab.page.get_by_label("Top p")).to_be_visible()
    expect(tab.page.get_by_label("Thought limit")).to_be_hidden()
    expect(tab.page.locator("summary", has_text="Thinking")).to_be_hidden()
