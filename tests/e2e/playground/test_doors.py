"""Every view and panel of the playground where the way to the server has a door: a key, or a path prefix of a proxy."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, Response, expect

from tests.e2e.playground.browser import CHROMIUM, Tab, serve
from tests.e2e.playground.network import network_to
from tests.e2e.playground.parts import LONG, kept, python_program, raw, run_python, use_every_part

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")
CLIPBOARD = ["clipboard-read", "clipboard-write"]
KEY = "sesame"


def test_every_part_works_with_a_key_and_the_key_stays_with_the_session(locked_tab: Tab, tmp_path: Path) -> None:
    page = locked_tab.page
    page.set_viewport_size({"width": 1280, "height": 800})
    page.context.grant_permissions(CLIPBOARD)
    answers: list[Response] = []
    page.on("response", lambda response: answers.append(response))
    locked_tab.open()
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    answers.clear()  # the first of them told the page that a key is wanted
    use_every_part(locked_tab)
    raw(page, "Events")
    page.get_by_role("tabpanel", name="Raw").get_by_role("button", name="Copy all events").click()
    expect(page.locator("#status")).to_have_text("Copied")
    texts = [page.evaluate("() => navigator.clipboard.readText()")]
    raw(page, "Request")
    texts.append(page.get_by_label("Request as JSON").input_value())
    program = python_program(page)
    assert run_python(program, STREAMSERVE_API_KEY=KEY).strip()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    download.value.save_as(tmp_path / "all.json")
    texts += [program, (tmp_path / "all.json").read_text(), kept(page), page.url, page.content(), *locked_tab.requests]
    assert [text for text in texts if KEY in text] == []
    assert [answer.url for answer in answers if answer.status == 401] == []
    locked_tab.console = [line for line in locked_tab.console if "401" not in line]  # the browser reports the first refusal
    locked_tab.check_clean()


@pytest.mark.parametrize("strips", [True, False], ids=["stripped", "passed on"])
def test_every_part_works_below_a_prefix(
    chromium: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strips: bool
) -> None:
    if not strips:
        monkeypatch.setenv("STREAMSERVE_ROOT_PATH", "/llm")
    with serve(tmp_path / "log.txt") as url, network_to(url) as network, chromium.new_context(permissions=CLIPBOARD) as context:
        network.strips = b"/llm" if strips else b""
        tab = Tab(context.new_page(), network.url + "llm/").open()
        use_every_part(tab)
        assert run_python(python_program(tab.page)).strip()
        tab.page.reload()
        expect(tab.page.locator(".user").get_by_alt_text("dot.png")).to_be_visible(timeout=LONG)
        assert {asked.split("/")[3] for asked in tab.requests if not asked.startswith("blob:")} == {"llm"}
        assert [asked for asked in tab.sockets() if asked.endswith("/llm/v1/ws")]
        tab.page.goto(tab.url + "docs")
        expect(tab.page.locator("details").first).to_be_attached(timeout=LONG)
        expect(tab.page.get_by_text("/v1/chat/completions").first).to_be_visible()
        assert {asked.split("/")[3] for asked in tab.requests if not asked.startswith("blob:")} == {"llm"}
        tab.check_clean()
