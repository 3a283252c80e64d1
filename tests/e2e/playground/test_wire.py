"""The page on a bad network: what is cut goes on where it was cut, what is gone is said, and nothing is lost or doubled."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect

from tests.e2e.playground.browser import NO_WEBSOCKET, NOTE_GROWTH, Tab, free_port, get_json, serve, tab_on, wait_for_running
from tests.e2e.playground.network import Network, network_to

LONG = 30_000
QUESTION = "Tell me a long story"
TRANSPORTS = pytest.mark.parametrize("init", [(), (NO_WEBSOCKET,)], ids=["websocket", "sse"])


@pytest.fixture(scope="module")
def wire_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Answers take four seconds; what nobody reads is kept for three."""
    with serve(tmp_path_factory.mktemp("wire") / "log.txt", "--resume-window-s", "3", step_ms=10) as url:
        yield url


@pytest.fixture
def network(wire_server: str) -> Iterator[Network]:
    with network_to(wire_server) as found:
        yield found


@pytest.fixture
def wire_tab(chromium: Browser, network: Network) -> Iterator[Tab]:
    with tab_on(chromium, network.url) as tab:
        yield tab


def grows(page: Page, length: int) -> None:
    """Wait until so much of the answer is on screen."""
    page.wait_for_function("(n) => (document.querySelector('.assistant .text')?.textContent.length ?? 0) > n", arg=length)


def begin(tab: Tab, *init: str) -> str:
    """An answer under way; what is on screen of it."""
    tab.open(*init).ask(QUESTION)
    grows(tab.page, 60)
    return tab.answers()[0]


@pytest.fixture(scope="module")
def whole(wire_server: str) -> str:
    """What the server says to the question when nothing goes wrong."""
    body = {"messages": [{"role": "user", "content": QUESTION}]}
    request = urllib.request.Request(
        wire_server + "v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def kept_text(page: Page) -> str:
    """The text of the last answer as it is kept, once nothing of it is under way: what is on screen is laid out."""
    return str(
        page.evaluate("""async () => {
      const db = await new Promise((resolve) => (indexedDB.open("streamserve").onsuccess = (e) => resolve(e.target.result)));
      const all = db.transaction("messages").objectStore("messages").getAll();
      const rows = await new Promise((resolve) => (all.onsuccess = () => resolve(all.result)));
      db.close();
      return rows.map((row) => row.message).filter((message) => message.role === "assistant").at(-1).content;
    }""")
    )


def forget_network_errors(tab: Tab) -> None:
    """The browser itself reports requests that found no server."""
    tab.console = [line for line in tab.console if "net::ERR_" not in line and "WebSocket connection to" not in line]


@TRANSPORTS
def test_an_answer_that_was_cut_twice_is_the_answer_in_one(
    wire_tab: Tab, network: Network, init: tuple[str, ...], whole: str
) -> None:
    before = begin(wire_tab, *init)
    wire_tab.page.evaluate(NOTE_GROWTH)
    network.drop()
    grows(wire_tab.page, len(before) + 60)
    network.cut()
    expect(wire_tab.page.locator("#server-state")).not_to_have_text("Ready")
    network.heal()
    expect(wire_tab.page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    wire_tab.finish()
    assert kept_text(wire_tab.page) == whole
    lengths = wire_tab.page.evaluate("() => window.lengths")
    assert lengths[0] >= len(before) - 5 and lengths[:-1] == sorted(lengths[:-1]), "the text is never cleared"
    expect(wire_tab.page.locator(".assistant [role=alert]")).to_have_count(0)
    forget_network_errors(wire_tab)
    wire_tab.check_clean()


@TRANSPORTS
def test_a_reloaded_page_goes_on_with_its_answer(wire_tab: Tab, init: tuple[str, ...], whole: str) -> None:
    begin(wire_tab, *init)
    for _ in range(100):  # an answer is saved about every second
        if kept_text(wire_tab.page):
            break
        wire_tab.page.wait_for_timeout(100)
    wire_tab.page.reload()
    expect(wire_tab.page.get_by_role("button", name="Stop", exact=True)).to_be_visible(timeout=LONG)
    wire_tab.finish()
    assert kept_text(wire_tab.page) == whole
    expect(wire_tab.page.locator(".assistant .stats").first).not_to_contain_text("Cut off")
    wire_tab.check_clean()


@TRANSPORTS
def test_stop_is_for_good_also_while_the_server_cannot_be_reached(wire_tab: Tab, network: Network, init: tuple[str, ...]) -> None:
    begin(wire_tab, *init)
    network.cut()
    expect(wire_tab.page.locator("#server-state")).not_to_have_text("Ready", timeout=LONG)
    wire_tab.page.get_by_role("button", name="Stop", exact=True).click()
    expect(wire_tab.page.locator(".assistant .stats").first).to_contain_text("Stopped by you")
    kept = wire_tab.answers()[0]
    network.heal()
    expect(wire_tab.page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    wait_for_running(network.url, False)
    assert wire_tab.answers()[0] == kept


def test_after_the_grace_time_the_text_is_kept_and_can_be_continued(chromium: Browser, tmp_path: Path) -> None:
    flags = ("--resume-window-s", "0.5")
    with serve(tmp_path / "log.txt", *flags, step_ms=20) as url, network_to(url) as network, chromium.new_context() as context:
        tab = Tab(context.new_page(), network.url)
        begin(tab)
        network.cut()
        status = tab.page.locator("#server-state")
        expect(status).to_contain_text("Server not reachable, retrying in", timeout=LONG)
        wait_for_running(url, False)  # long before its end: nobody came back
        network.heal()
        tab.page.get_by_role("button", name="Retry now").click()
        expect(status).to_have_text("Ready", timeout=LONG)
        expect(tab.page.locator(".assistant [role=alert]")).to_contain_text("does not have the rest", timeout=LONG)
        assert len(tab.answers()[0]) > 50
        tab.page.get_by_role("button", name="Continue").click()
        expect(tab.page.locator(".assistant [role=alert]")).to_have_count(0)
        tab.page.get_by_role("button", name="Stop", exact=True).click()


def test_a_server_that_was_restarted_in_mid_answer_is_asked_again(wire_tab: Tab, network: Network, server: str) -> None:
    begin(wire_tab)
    network.cut()
    expect(wire_tab.page.locator("#server-state")).not_to_have_text("Ready", timeout=LONG)
    network.server_port = int(server.rstrip("/").rpartition(":")[2])  # another process, as behind a restart
    network.heal()
    expect(wire_tab.page.locator(".assistant [role=alert]")).to_contain_text("does not have the rest", timeout=LONG)
    assert len(wire_tab.answers()[0]) > 50
    wire_tab.ask("And now?")
    wire_tab.finish()
    assert wire_tab.answers()[1]


def test_a_network_that_swallows_everything_is_noticed_when_the_page_is_looked_at(
    wire_tab: Tab, network: Network, whole: str
) -> None:
    begin(wire_tab)
    network.swallow()
    wire_tab.page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
    expect(wire_tab.page.locator("#server-state")).not_to_have_text("Ready", timeout=LONG)
    network.heal()
    expect(wire_tab.page.locator("#server-state")).to_have_text("Ready", timeout=LONG)


def test_a_browser_that_goes_offline_says_so_and_comes_back_by_itself(wire_tab: Tab, network: Network, whole: str) -> None:
    begin(wire_tab)
    network.cut()
    wire_tab.page.context.set_offline(True)
    status = wire_tab.page.locator("#server-state")
    expect(status).to_contain_text("No network, retrying in", timeout=LONG)
    network.heal()
    wire_tab.page.context.set_offline(False)
    expect(status).to_have_text("Ready", timeout=LONG)
    wire_tab.finish()
    forget_network_errors(wire_tab)
    wire_tab.check_clean()


def test_a_slow_network_loses_nothing(wire_tab: Tab, network: Network, whole: str) -> None:
    wire_tab.open()
    expect(wire_tab.page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    network.delay_s = 0.15
    wire_tab.ask(QUESTION)
    grows(wire_tab.page, 5)
    network.delay_s = 0.02
    wire_tab.finish()
    assert kept_text(wire_tab.page) == whole
    wire_tab.check_clean()


def test_loading_shows_how_far_it_is_and_the_page_becomes_ready_by_itself(tab: Tab) -> None:
    answers = [
        {"phase": "weights", "done": 12_000_000_000, "total": 28_000_000_000},
        {"phase": "weights", "done": 27_500_000_000, "total": 28_000_000_000},
    ]

    def not_yet(route: Route) -> None:
        if not answers:
            route.continue_()
            return
        body = {"error": {"message": "the model is loading"}, "progress": answers[0]}
        route.fulfill(status=503, json=body)

    tab.page.route("**/ready", not_yet)
    tab.open()
    status = tab.page.locator("#server-state")
    expect(status).to_have_text("Loading model… 42 % (12 of 28 GB)")
    tab.page.get_by_label("Message", exact=True).fill("typed while it loads")
    answers.pop(0)
    expect(status).to_have_text("Loading model… 98 % (28 of 28 GB)")
    answers.pop(0)
    expect(status).to_have_text("Ready")
    expect(tab.page.get_by_label("Message", exact=True)).to_have_value("typed while it loads")
    tab.console.clear()  # the browser reports each 503
    tab.check_clean()


def test_a_full_queue_is_said_and_the_question_can_be_asked_again(chromium: Browser, tmp_path: Path) -> None:
    flags = ("--max-running-requests", "1", "--max-queued-requests", "1")
    with serve(tmp_path / "log.txt", *flags, step_ms=20) as url, chromium.new_context() as context:
        runs, waits, third = [Tab(context.new_page(), url) for _ in range(3)]
        third.open()
        waits.open()
        begin(runs)
        waits.ask("I wait")
        for _ in range(100):
            if get_json(url + "v1/loads")["waiting"]:
                break
            waits.page.wait_for_timeout(20)
        third.ask("Is there room?")
        expect(third.page.locator(".assistant [role=alert]")).to_contain_text("wait", timeout=LONG)
        for tab in (runs, waits):
            tab.page.get_by_role("button", name="Stop", exact=True).click()
        wait_for_running(url, False)
        third.page.get_by_role("button", name="Try again").click()
        grows(third.page, 20)
        expect(third.page.locator(".assistant [role=alert]")).to_have_count(0)


def test_first_load_is_small_and_a_second_one_takes_its_files_from_the_browser(tab: Tab) -> None:
    sizes: dict[str, int] = {}
    from_server: list[str] = []

    def note(request: Request) -> None:
        sizes[request.url] = request.sizes()["responseBodySize"]
        from_server.append(request.url)

    tab.page.on("requestfinished", note)
    tab.open()
    expect(tab.page.locator("#server-state")).to_have_text("Ready")
    tab.page.wait_for_load_state("networkidle")
    assert 0 < sum(sizes.values()) < 300_000, sizes
    from_server.clear()
    tab.page.reload()
    expect(tab.page.locator("#server-state")).to_have_text("Ready")
    taken = tab.page.evaluate(
        "() => performance.getEntriesByType('resource').filter((e) => e.name.includes('/static/'))"
        ".map((e) => [e.name, e.transferSize])"
    )
    assert taken and [name for name, size in taken if size > 0] == []
    tab.check_clean()


def test_a_server_that_comes_back_with_another_key_asks_for_it(chromium: Browser, tmp_path: Path) -> None:
    port = free_port()
    with chromium.new_context() as context:
        tab = Tab(context.new_page(), f"http://127.0.0.1:{port}/")
        dialog = tab.page.get_by_role("dialog")
        with serve(tmp_path / "first.txt", "--api-key", "sesame", port=port):
            tab.open()
            dialog.get_by_label("API key").fill("sesame")
            dialog.get_by_role("button", name="Use key").click()
            tab.ask(QUESTION)
            tab.finish()
            expect(dialog).to_be_hidden()
        with serve(tmp_path / "second.txt", "--api-key", "mellon", port=port):
            expect(dialog).to_be_visible(timeout=LONG)
            dialog.get_by_label("API key").fill("mellon")
            dialog.get_by_role("button", name="Use key").click()
            tab.ask("Once more")
            tab.finish()
            assert len(tab.answers()) == 2 and tab.answers()[1]
        assert all("sesame" not in url and "mellon" not in url for url in tab.requests)
