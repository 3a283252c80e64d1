"""Pictures in the playground, in a real Chromium against `streamserve serve --fake`: chosen, dropped, pasted, refused, kept.

What is sent is read off the WebSocket. The server takes at most 1 MiB a request, so that what is too large stays small.
"""

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Locator, Page, Route, WebSocket, expect

from tests.e2e.playground.browser import CHROMIUM, Tab, get_json, serve

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")

NUM_PLACES = 16  # of any picture, with --fake
COUNT_URLS = """
window.numUrls = 0;
for (const [name, by] of [["createObjectURL", 1], ["revokeObjectURL", -1]]) {
  const real = URL[name].bind(URL);
  URL[name] = (of) => ((window.numUrls += by), real(of));
}"""
NO_ROOM = """
const put = IDBObjectStore.prototype.put;
IDBObjectStore.prototype.put = function (...given) {
  if (this.name === "blobs") throw new DOMException("full", "QuotaExceededError");
  return put.apply(this, given);
};
"""
PUT_ON_CLIPBOARD = """async ([data, text]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const parts = { "image/png": bytes, ...(text && { "text/plain": text }) };
  const blobs = Object.entries(parts).map(([type, part]) => [type, new Blob([part], { type })]);
  await navigator.clipboard.write([new ClipboardItem(Object.fromEntries(blobs))]);
}"""
NUM_KEPT = """async () => {
  const opening = indexedDB.open("streamserve");
  await new Promise((resolve) => (opening.onsuccess = resolve));
  const counting = opening.result.transaction("blobs").objectStore("blobs").count();
  await new Promise((resolve) => (counting.onsuccess = resolve));
  return counting.result;
}"""


def picture(colour: str = "teal", kind: str = "PNG", *, size: tuple[int, int] = (64, 48)) -> bytes:
    image = Image.new("RGB", size, colour)
    ImageDraw.Draw(image).ellipse((size[0] / 4, size[1] / 4, size[0] / 2, size[1] / 2), fill="white")
    out = BytesIO()
    image.save(out, kind)
    return out.getvalue()


CAT, DOG = picture("teal"), picture("maroon")


@dataclass
class PictureTab(Tab):
    """A tab, and the chats it has sent."""

    chats: list[dict[str, Any]] = field(default_factory=list)

    def open(self, *init_scripts: str) -> "PictureTab":
        self.page.on("websocket", self._listen)
        self.page.on("filechooser", lambda _: None)  # intercepted from now on, not from a moment after it is waited for
        super().open(*init_scripts)
        expect(self.page.locator("#server-state")).to_have_text("Ready")
        return self

    def _listen(self, socket: WebSocket) -> None:
        def note(payload: str | bytes) -> None:
            frame = json.loads(payload)
            if frame["type"] == "chat.create":
                self.chats.append(frame["request"])

        socket.on("framesent", note)

    def finish(self) -> None:
        super().finish()
        assert self.page.locator(".assistant:last-child .error").all_inner_texts() == []

    def choose(self, **files: bytes) -> None:
        """By the button's dialog; `_` in a name stands for the dot."""
        with self.page.expect_file_chooser() as chooser:
            self.add_button.click()
        chooser.value.set_files(
            [{"name": name.replace("_", "."), "mimeType": "", "buffer": data} for name, data in files.items()]
        )

    def drag(self, kind: str, path: Path, x: int = 300) -> None:
        """What a window manager tells the browser while a file is dragged over the page."""
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        chromium = self.page.context.new_cdp_session(self.page)
        chromium.send("Input.dispatchDragEvent", {"type": kind, "x": x, "y": 300, "data": data})
        chromium.detach()

    @property
    def add_button(self) -> Locator:
        return self.page.get_by_role("button", name="Add a picture")

    @property
    def chosen(self) -> Locator:
        return self.page.locator("#chosen li")

    @property
    def note(self) -> Locator:
        return self.page.locator("#picture-note")

    @property
    def prompt(self) -> Locator:
        return self.page.get_by_label("Message", exact=True)

    def names(self) -> list[str]:
        return self.page.locator("#chosen .chip-name").all_inner_texts()

    def sent(self, turn: int = -1) -> list[Any]:
        """Of the last chat sent, a message's text, and its pictures' bytes."""
        content = self.chats[-1]["messages"][turn]["content"]
        if isinstance(content, str):
            return [content]
        return [part.get("text") or bytes_of(part["image_url"]["url"]) for part in content]


def bytes_of(url: str) -> bytes:
    head, _, data = url.partition(",")
    assert re.fullmatch(r"data:image/\w+;base64", head)
    return base64.b64decode(data, validate=True)


def is_painted(image: Locator) -> bool:
    """Whether the browser has decoded it."""
    return bool(image.evaluate("(image) => image.decode().then(() => image.naturalWidth > 0)"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(tmp_path_factory.mktemp("server") / "log.txt", "--max-body-mb", "1") as url:
        yield url


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, permissions=["clipboard-read", "clipboard-write"])
    yield context.new_page()
    context.close()


@pytest.fixture
def tab(page: Page, server: str) -> Iterator[PictureTab]:
    tab = PictureTab(page, server)
    yield tab
    tab.check_quiet()


def test_dropped_picture_is_shown_sent_and_answered(tab: PictureTab, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(CAT)
    tab.open(COUNT_URLS)
    target = tab.page.get_by_text("Drop pictures here")
    tab.drag("dragEnter", tmp_path / "cat.png")
    expect(target).to_be_visible()
    tab.drag("dragOver", tmp_path / "cat.png", x=-5)  # out of the window
    expect(target).to_be_hidden()
    tab.drag("dragOver", tmp_path / "cat.png")
    expect(target).to_be_visible()
    tab.drag("drop", tmp_path / "cat.png")
    expect(target).to_be_hidden()
    expect(tab.chosen).to_have_text(re.compile("cat.png.*1 kB"))
    assert is_painted(tab.page.get_by_role("list", name="Pictures to send").get_by_alt_text("cat.png"))
    tab.ask("What is this?")
    tab.finish()
    assert tab.sent() == [CAT, "What is this?"]
    assert tab.answers()[0]
    expect(tab.chosen).to_have_count(0)
    shown = tab.page.locator(".user").get_by_alt_text("cat.png")
    assert is_painted(shown)
    expect(tab.page.locator(".user .sent + .text")).to_have_text("What is this?")
    expect(tab.page.locator(".assistant .stats")).to_contain_text(f"{NUM_PLACES} picture tokens")
    tab.page.wait_for_function("() => window.numUrls === 0")
    tab.check_clean()


def test_pasted_picture_is_added_and_pasted_text_stays_text(tab: PictureTab) -> None:
    tab.open()
    data = base64.b64encode(CAT).decode()
    for _ in range(2):
        tab.page.evaluate(PUT_ON_CLIPBOARD, [data, ""])
        tab.prompt.press("Control+v")
    expect(tab.chosen).to_have_count(2)
    assert len(set(tab.names())) == 2
    tab.page.evaluate(PUT_ON_CLIPBOARD, [data, "a cell of a table"])
    tab.prompt.press("Control+v")
    expect(tab.prompt).to_have_value("a cell of a table")
    expect(tab.chosen).to_have_count(2)
    tab.check_clean()


def test_keys_alone_add_remove_and_send_pictures(tab: PictureTab) -> None:
    page = tab.open().page
    expect(tab.prompt).to_be_focused()
    page.keyboard.press("Shift+Tab")
    expect(tab.add_button).to_be_focused()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    names = ("cat.png", "dog.png", "cow.png")
    chooser.value.set_files([{"name": name, "mimeType": "image/png", "buffer": CAT} for name in names])
    expect(tab.chosen).to_have_count(3)
    expect(tab.prompt).to_be_focused()
    expect(page.locator("#status")).to_have_text("Added cow.png")
    for _ in range(3):
        page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("button", name="Remove dog.png")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Remove cow.png")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Remove cat.png")).to_be_focused()
    expect(page.locator("#status")).to_have_text("Removed cow.png")
    for _ in range(2):
        page.keyboard.press("Tab")
    expect(tab.prompt).to_be_focused()
    page.keyboard.press("Enter")
    tab.finish()
    assert tab.sent() == [CAT]
    expect(page.locator("#chats a")).to_have_text("cat.png")
    expect(page.locator(".user .text")).to_be_hidden()
    tab.check_clean()


def test_every_format_that_the_server_names_is_taken_by_page_and_server(tab: PictureTab) -> None:
    types = get_json(tab.url + "model_info")["image_limits"]["types"]
    kinds = [type.removeprefix("image/") for type in types]
    files = {f"a_{kind}": picture(kind=kind.upper()) for kind in kinds}
    tab.open()
    expect(tab.page.locator("#picture-file")).to_have_attribute("accept", ",".join(types))
    tab.choose(**files)
    expect(tab.chosen).to_have_count(len(kinds))
    tab.ask("Which are they?")
    tab.finish()
    assert tab.sent() == [*files.values(), "Which are they?"]
    heads = [part["image_url"]["url"].partition(";")[0] for part in tab.chats[-1]["messages"][0]["content"][:-1]]
    assert heads == [f"data:{type}" for type in types]
    expect(tab.page.locator(".assistant .stats")).to_contain_text(f"{NUM_PLACES * len(kinds)} picture tokens")


def test_files_that_cannot_be_sent_are_refused_with_the_reason(tab: PictureTab) -> None:
    tab.open()
    large = CAT + bytes(500_000 - len(CAT))
    tab.choose(huge_png=CAT + bytes(800_000), first_png=large, second_png=large, page_png=b"<html>", empty_png=b"", cat_png=CAT)
    expect(tab.note).to_have_text(
        "huge.png has 801 kB; at most 737 kB are taken. "
        "second.png has 500 kB; with the other pictures of this conversation that makes 1 MB, and at most 737 kB are taken "
        "together. "
        "page.png is no picture that the server reads; it takes PNG, JPEG, WebP, GIF, BMP. "
        "empty.png is no picture that the server reads; it takes PNG, JPEG, WebP, GIF, BMP."
    )
    expect(tab.page.get_by_role("status").filter(has_text="huge.png")).to_be_visible()
    assert tab.names() == ["first.png", "cat.png"]
    tab.ask("What are these?")
    tab.finish()
    assert tab.answers()[0]
    expect(tab.note).to_be_empty()
    tab.choose(third_png=large)
    expect(tab.note).to_contain_text("third.png has 500 kB; with the other pictures of this conversation that makes 1.01 MB")
    assert tab.page.locator(".assistant [role=alert]").count() == 0
    tab.check_clean()


def test_at_most_as_many_pictures_as_the_server_takes_are_chosen(tab: PictureTab) -> None:
    most = get_json(tab.url + "model_info")["image_limits"]["max_images"]
    tab.open()
    tab.choose(**{f"{k}_png": CAT for k in range(most + 1)})
    expect(tab.chosen).to_have_count(most)
    expect(tab.note).to_have_text(f"{most}.png is one too many: at most {most} pictures are taken in a conversation.")


def test_refusal_by_the_server_leaves_the_pictures_in_the_composer(tab: PictureTab) -> None:
    tab.open()
    tab.choose(cat_png=CAT, broken_png=CAT[: len(CAT) // 2])
    expect(tab.chosen).to_have_count(2)
    tab.ask("What are these?")
    alert = tab.page.locator(".assistant [role=alert]")
    expect(alert).to_contain_text("broken.png: messages[0].content[1].image_url.url is a PNG file that is broken")
    assert tab.names() == ["cat.png", "broken.png"]
    expect(tab.prompt).to_have_value("What are these?")
    tab.page.get_by_role("button", name="Remove broken.png").click()
    tab.prompt.press("Enter")
    tab.finish()
    assert tab.sent() == [CAT, "What are these?"]
    expect(tab.chosen).to_have_count(0)
    expect(alert).to_have_count(0)
    assert tab.answers()[0]
    tab.page.get_by_role("button", name="Previous version of message 1").click()
    expect(alert).to_have_count(0)
    expect(tab.page.locator(".assistant .error")).to_contain_text("broken.png")
    tab.check_clean()


def test_later_turns_send_earlier_pictures_again_even_after_a_reload(tab: PictureTab) -> None:
    tab.open()
    tab.choose(cat_png=CAT, dog_png=DOG)
    expect(tab.chosen).to_have_count(2)
    tab.ask("Who are they?")
    tab.finish()
    tab.ask("Which is larger?")
    tab.finish()
    assert tab.sent(0) == [CAT, DOG, "Who are they?"] and tab.sent() == ["Which is larger?"]
    figures = tab.page.locator(".assistant .stats").last.inner_text()
    assert f"{2 * NUM_PLACES} picture tokens" in figures
    cached = re.findall(r"([\d,]+) of [\d,]+ prompt tokens cached", figures)[0]
    assert int(cached) > 2 * NUM_PLACES
    tab.page.reload()
    for name in ("cat.png", "dog.png"):
        assert is_painted(tab.page.locator(".user").get_by_alt_text(name))
    tab.ask("And after a reload?")
    tab.finish()
    assert len(tab.chats) == 3 and tab.sent(0) == [CAT, DOG, "Who are they?"]
    tab.check_clean()


def test_edited_question_keeps_its_pictures_and_the_draft_its_own(tab: PictureTab) -> None:
    tab.open()
    tab.choose(cat_png=CAT)
    expect(tab.chosen).to_have_count(1)
    tab.ask("What is this?")
    tab.finish()
    tab.choose(dog_png=DOG)
    expect(tab.chosen).to_have_count(1)
    tab.page.get_by_role("button", name="Edit message 1").click()
    assert tab.names() == ["cat.png"]
    tab.page.keyboard.press("Escape")
    assert tab.names() == ["dog.png"]
    tab.page.get_by_role("button", name="New chat").click()
    expect(tab.chosen).to_have_count(0)
    tab.page.locator("#chats a").click()
    expect(tab.chosen).to_have_text(re.compile("dog.png"))
    tab.page.get_by_role("button", name="Edit message 1").click()
    tab.ask("What is it really?")
    tab.finish()
    assert tab.sent() == [CAT, "What is it really?"]
    tab.page.get_by_role("button", name="Regenerate message 2").click()
    tab.finish()
    assert tab.sent() == [CAT, "What is it really?"]
    assert is_painted(tab.page.locator(".user").get_by_alt_text("cat.png"))


def test_pictures_of_a_deleted_conversation_go_with_it_and_come_back_with_it(tab: PictureTab) -> None:
    tab.open()
    tab.choose(cat_png=CAT)
    expect(tab.chosen).to_have_count(1)
    tab.ask("What is this?")
    tab.finish()
    assert tab.page.evaluate(NUM_KEPT) == 1
    tab.page.get_by_role("button", name="Actions for What is this?").click()
    tab.page.get_by_role("menuitem", name="Delete").click()
    expect(tab.page.get_by_role("button", name="Undo")).to_be_visible()
    assert tab.page.evaluate(NUM_KEPT) == 0
    tab.page.get_by_role("button", name="Undo").click()
    assert is_painted(tab.page.locator(".user").get_by_alt_text("cat.png"))
    assert tab.page.evaluate(NUM_KEPT) == 1
    tab.check_clean()


def test_picture_that_could_not_be_kept_is_missed_aloud_after_a_reload(tab: PictureTab) -> None:
    tab.open(NO_ROOM)
    tab.choose(cat_png=CAT)
    expect(tab.chosen).to_have_count(1)
    tab.ask("What is this?")
    tab.finish()
    expect(tab.note).to_contain_text("cat.png is gone when this page is closed or loaded again: this browser's storage is full")
    tab.ask("And now?")
    tab.finish()
    assert tab.sent(0) == [CAT, "What is this?"]
    tab.page.reload()
    expect(tab.page.get_by_text("cat.png (no longer here)")).to_be_visible()
    tab.ask("And after a reload?")
    expect(tab.page.locator(".assistant [role=alert]")).to_contain_text("cat.png is not kept in this browser any more")
    assert len(tab.chats) == 2
    tab.check_clean()


def test_model_without_eyes_says_so_however_a_picture_comes(tab: PictureTab, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(CAT)

    def blind(route: Route) -> None:
        info = get_json(route.request.url)
        route.fulfill(json={**info, "image_limits": None})

    tab.page.route("**/playground/config.json", blind)
    tab.open()
    expect(tab.add_button).to_be_disabled()
    expect(tab.add_button).to_have_attribute("title", "This model takes no pictures")
    expect(tab.add_button).to_have_accessible_description("This model takes no pictures")
    tab.drag("dragEnter", tmp_path / "cat.png")
    expect(tab.page.locator("#drop")).to_have_text("This model takes no pictures")
    tab.drag("drop", tmp_path / "cat.png")
    expect(tab.note).to_have_text("This model takes no pictures.")
    tab.page.reload()
    expect(tab.add_button).to_have_attribute("title", "This model takes no pictures")
    tab.page.evaluate(PUT_ON_CLIPBOARD, [base64.b64encode(CAT).decode(), ""])
    tab.prompt.press("Control+v")
    expect(tab.note).to_have_text("This model takes no pictures.")
    expect(tab.chosen).to_have_count(0)
    tab.check_clean()
