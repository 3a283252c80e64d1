"""The page at /docs in a real Chromium: it shows every route of /openapi.json, and its forms work, under its own policy."""

import json
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.e2e.playground.browser import CHROMIUM, WATCH, get_json, serve
from tests.media.pictures import file_of, image

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(tmp_path_factory.mktemp("server") / "log.txt", "--api-key", "sesame") as url:
        yield url


def test_every_route_is_shown_and_can_be_tried(server: str) -> None:
    document = get_json(server + "openapi.json")
    num_routes = sum(len(methods) for methods in document["paths"].values())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        requests: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.add_init_script(WATCH)
        page.goto(server + "docs")
        routes = page.locator("details")
        expect(routes).to_have_count(num_routes)

        page.fill("#filter", "no such route")
        expect(page.locator("details:visible")).to_have_count(0)
        page.fill("#filter", "post /v1/chat/completions an")
        expect(page.locator("details:visible")).to_have_count(1)
        chat = page.locator("details:visible")
        chat.locator("summary").click()
        expect(chat.locator("td code", has_text=re.compile("^temperature$"))).to_be_visible()
        chat.get_by_role("button", name="Send").click()
        expect(chat.locator("pre")).to_contain_text("401")
        page.fill("#key", "sesame")
        chat.get_by_role("button", name="Send").click()
        expect(chat.locator("pre")).to_contain_text("chat.completion")
        body = chat.locator("textarea")
        body.fill(json.dumps({**json.loads(body.input_value()), "stream": True}))
        chat.get_by_role("button", name="Send").click()
        expect(chat.locator("pre")).to_contain_text("[DONE]")

        page.fill("#filter", "get /v1/models/{")
        model = page.locator("details:visible")
        model.locator("summary").click()
        model.get_by_label("model_id").fill("fake")
        model.get_by_role("button", name="Send").click()
        expect(model.locator("pre")).to_contain_text('"id": "fake"')

        page.fill("#filter", "post /v1/files")
        upload = page.locator("details:visible")
        upload.locator("summary").click()
        expect(upload.locator("td code", has_text=re.compile("^purpose$"))).to_be_visible()
        picture = {"name": "scene.png", "mimeType": "image/png", "buffer": file_of(image())}
        upload.get_by_label("file", exact=True).set_input_files(picture)  # type: ignore[arg-type]
        upload.get_by_label("purpose").fill("vision")
        upload.get_by_role("button", name="Send").click()
        expect(upload.locator("pre")).to_contain_text('"filename": "scene.png"')

        page.fill("#filter", "")
        for route in routes.all():
            if route.get_attribute("open") is None:
                route.locator("summary").first.click()
        expect(page.locator("details form")).to_have_count(num_routes)
        assert page.evaluate("window.violations") == []
        assert problems == []
        assert {url.split("/")[2] for url in requests} == {server.split("/")[2]}
        browser.close()
