"""The page on a bad network: what is cut goes on where it was cut, what is gone is said, and nothing is lost or doubled."""

import json
import urllib.request
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.playground.browser import NO_WEBSOCKET, NOTE_GROWTH, Tab, serve
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
    with chromium.new_context(viewport={"width": 1280, "height": 800}) as context:
        yield Tab(context.new_page(), network.url)


def state_of(page: Page) -> str:
    return page.locator("#server-state").inner_text()


def grows(page: Page, length: int) -> None:
    """Wait until so much of the answer is on screen."""
    page.wait_for_function("(n) => (document.querySelector('.assistant .text')?.textContent.length ?? 0) > n", arg=length)


def begin(tab: Tab, *init: str) -> str:
    """An answer under way; what is on screen of it."""
    tab.open(*init).ask(QUESTION)
    grows(tab.page, 60)
    return tab.answers()[0]


def whole_answer(url: str) -> str:
    """What the server says to the question when nothing goes wrong."""
    body = {"messages": [{"role": "user", "content": QUESTION}]}
    request = urllib.request.Request(url + "v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def shown(page: Page) -> str:
    """The text of the answer, as the server sent it: what is on screen is laid out."""
    return str(
        page.evaluate("""async () => {
      const [id] = (await indexedDB.databases()).length ? [location.hash.match(/c=(\\w+)/)[1]] : [];
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
def test_an_answer_that_was_cut_twice_is_the_answer_in_one(wire_tab: Tab, network: Network, init: tuple[str, ...]) -> None:
    before = begin(wire_tab, *init)
    wire_tab.page.evaluate(NOTE_GROWTH)
    network.drop()
    grows(wire_tab.page, len(before) + 60)
    network.cut()
    expect(wire_tab.page.locator("#server-state")).not_to_have_text("Ready")
    network.heal()
    expect(wire_tab.page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    wire_tab.finish()
    assert shown(wire_tab.page) == whole_answer(network.url)
    lengths = wire_tab.page.evaluate("() => window.lengths")
    assert lengths[0] >= len(before) - 5 and lengths[:-1] == sorted(lengths[:-1]), "the text is never cleared"
    expect(wire_tab.page.locator(".assistant [role=alert]")).to_have_count(0)
    forget_network_errors(wire_tab)
    wire_tab.check_clean()
