"""The pictures of the playground in README.md, made anew: the default model is served, used for a minute, and looked at.

    python bench/screenshots.py [--out docs/images]

What is seen is real: questions are typed into the page, the drawing is one of demo/scenes.py, the load comes over HTTP. Needs
Chromium and the extra "test".
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.server import Server
from demo.scenes import draw_scene

SIZE, SCALE = (1280, 800), 1.5
LONG = 120_000  # ms
MAX_BYTES = 150_000
LOADS = 7  # requests beside each other
STORIES = ("a long road", "a small blue boat", "three foxes", "the last train")


def ask(page: Page, question: str) -> None:
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible(timeout=LONG)


def new_chat(page: Page, tokens: int) -> None:
    page.get_by_role("button", name="New chat", exact=True).click()
    page.get_by_role("tab", name="Settings").click()
    page.get_by_label("Max tokens", exact=True).fill(str(tokens))
    page.get_by_role("textbox", name="Temperature").fill("0")


def talk(page: Page) -> None:
    """A drawing, asked about twice: the second time it comes from the cache."""
    for question in ("Write a haiku about rain.", "Write a poem about the sea.", "Name three fruits.", "Name three birds."):
        new_chat(page, 40)
        ask(page, question)
    new_chat(page, 120)
    with tempfile.TemporaryDirectory() as folder:
        drawing = Path(folder) / "drawing.png"
        draw_scene(Random(19), "few").picture.save(drawing)
        page.locator("#picture-file").set_input_files(drawing)
        expect(page.get_by_role("list", name="Pictures to send").get_by_role("listitem")).to_have_count(1)
        ask(page, "What is in this picture?")
    ask(page, "What colour is the star?")
    expect(page.locator(".hits", has_text="picture reused")).to_be_visible()


def grow(page: Page) -> None:
    """The tree, with the way of the conversation on screen."""
    page.get_by_role("tab", name="Cache", exact=True).click()
    page.get_by_role("button", name="Follow my chat").click()
    lit = page.get_by_role("treeitem").filter(has_text="your chat")
    expect(lit.first).to_be_visible(timeout=LONG)
    page.locator(".lit > .node-row").last.click()
    expect(page.get_by_role("button", name="Pin", exact=False)).to_be_visible()


def work(page: Page, url: str) -> None:
    """The engine, with more than one request."""
    page.get_by_role("tab", name="Engine", exact=True).click()

    def one(number: int) -> None:
        text = f"Tell a story about {STORIES[number % len(STORIES)]}. " + "Take your time. " * 12 * (number % 3)
        body = json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 260}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})) as answer:
            answer.read()

    for number in range(LOADS):
        threading.Timer(0.25 * number, one, [number]).start()
    expect(page.locator(".requests tbody tr")).to_have_count(LOADS, timeout=LONG)
    page.wait_for_timeout(1_500)  # so that the strip has something of it


def save(page: Page, path: Path) -> None:
    picture = Image.open(BytesIO(page.screenshot()))
    for quality in (90, 80, 70, 60):
        picture.save(path, "webp", quality=quality, method=6)
        if path.stat().st_size <= MAX_BYTES:
            break
    print(path, path.stat().st_size, "bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    server = Server(None)
    url = f"http://127.0.0.1:{server.port}/"
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            width, height = SIZE
            page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=SCALE)
            page.goto(url)
            expect(page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
            scenes: tuple[tuple[str, str, Callable[[], None]], ...] = (
                ("chat", "light", lambda: talk(page)),
                ("cache", "light", lambda: grow(page)),
                ("engine", "dark", lambda: work(page, url + "v1/chat/completions")),
            )
            for name, theme, scene in scenes:
                page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
                scene()
                page.mouse.move(0, 0)
                page.wait_for_timeout(600)  # what moves has come to rest
                save(page, out / f"playground-{name}.webp")
            browser.close()
    finally:
        server.close()


if __name__ == "__main__":
    main()
