"""Where the playground keeps conversations, in a real Chromium: files, what an older page kept, a browser that refuses."""

import base64
import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.e2e.playground.browser import CHROMIUM, NO_STORAGE, Tab

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")

LONG = 20_000  # ms, for what a busy machine takes its time with
KEPT = """async () => {
  const opening = indexedDB.open("streamserve");
  await new Promise((resolve) => (opening.onsuccess = resolve));
  const reading = opening.result.transaction(["conversations", "messages", "blobs"]);
  const all = ["conversations", "messages", "blobs"].map((name) => reading.objectStore(name).getAll());
  await new Promise((resolve) => (reading.oncomplete = resolve));
  opening.result.close();
  const [conversations, messages, blobs] = all.map(({ result }) => result);
  const bytes = await Promise.all(blobs.map(async ({ blob }) => [blob.type, ...new Uint8Array(await blob.arrayBuffer())].join()));
  messages.sort((a, b) => a.order - b.order);
  const told = messages.map(({ conversation, message, pictures }) => [conversation, message, pictures]);
  return { conversations, messages: told, bytes: bytes.sort() };
}"""
WIPE = """async () => {
  localStorage.clear();
  const request = indexedDB.deleteDatabase("streamserve");
  await new Promise((resolve) => (request.onsuccess = resolve));
}"""
PUT_OLD = """async ([conversations, name, data]) => {
  for (const [id, text] of Object.entries(conversations)) localStorage.setItem(`streamserve.chat.${id}`, text);
  const opening = indexedDB.open("streamserve.pictures", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("pictures");
  await new Promise((resolve) => (opening.onsuccess = resolve));
  const writing = opening.result.transaction("pictures", "readwrite");
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  writing.objectStore("pictures").put(new Blob([bytes], { type: "image/png" }), name);
  await new Promise((resolve) => (writing.oncomplete = resolve));
  opening.result.close();
}"""
OLD = "() => Object.keys(localStorage).filter((key) => key.startsWith('streamserve.chat.')).sort()"
FULL = """
for (const name of ["put", "add"]) {
  const real = IDBObjectStore.prototype[name];
  IDBObjectStore.prototype[name] = function (...given) {
    if (window.isFull) throw new DOMException("full", "QuotaExceededError");
    return real.apply(this, given);
  };
}
window.isFull = true;"""


def png(colour: str) -> bytes:
    out = BytesIO()
    Image.new("RGB", (48, 32), colour).save(out, "PNG")
    return out.getvalue()


CAT, DOG = png("teal"), png("maroon")


def ready(tab: Tab) -> Page:
    expect(tab.page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    return tab.page


def choose(page: Page, name: str, data: bytes) -> None:
    expect(page.get_by_role("button", name="Add a picture")).to_be_enabled(timeout=LONG)
    page.locator("#picture-file").set_input_files([{"name": name, "mimeType": "image/png", "buffer": data}])
    expect(page.locator("#chosen")).to_contain_text(name)


def export(page: Page, tmp_path: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    return path


def give(page: Page, text: str | bytes, name: str = "chats.json") -> None:
    data = text if isinstance(text, bytes) else text.encode()
    page.locator("#import-file").set_input_files([{"name": name, "mimeType": "application/json", "buffer": data}])


def image_is_painted(page: Page, name: str) -> bool:
    image = page.locator(".user").get_by_alt_text(name)
    expect(image).to_be_visible(timeout=LONG)
    return bool(image.evaluate("(image) => image.decode().then(() => image.naturalWidth === 48)"))


def test_export_wipe_and_import_give_back_the_same(tab: Tab, tmp_path: Path) -> None:
    page = ready(tab.open())
    choose(page, "cat.png", CAT)
    tab.ask("Who is this?")
    tab.finish()
    page.get_by_label("System prompt").fill("Be brief")
    page.get_by_label("Temperature").first.fill("0.5")
    page.get_by_role("button", name="Regenerate message 2").click()
    tab.finish()
    page.get_by_role("button", name="New chat", exact=True).click()
    choose(page, "dog.png", DOG)
    choose(page, "again.png", CAT)
    tab.ask("<script>alert(1)</script> “quoted”")
    tab.finish()
    page.reload()
    ready(tab)
    before = page.evaluate(KEPT)
    assert len(before["conversations"]) == 2 and len(before["messages"]) == 5 and len(before["bytes"]) == 2
    path = export(page, tmp_path)
    file = json.loads(path.read_text())
    assert file["format"] == "streamserve.chat" and file["version"] == 1
    assert sorted(base64.b64decode(one["data"]) for one in file["pictures"].values()) == sorted([CAT, DOG])
    page.evaluate(WIPE)
    page.goto("about:blank")
    page.goto(tab.url)
    ready(tab)
    expect(page.get_by_text("No conversations yet")).to_be_visible()
    give(page, path.read_bytes())
    expect(page.locator("#chats a")).to_have_text(["<script>alert(1)</script> “quoted”", "Who is this?"], timeout=LONG)
    page.reload()
    ready(tab)
    after = page.evaluate(KEPT)
    assert after == before
    page.get_by_role("link", name="Who is this?").click()
    assert image_is_painted(page, "cat.png")
    expect(page.get_by_label("System prompt")).to_have_value("Be brief")
    expect(page.get_by_role("button", name="Previous version of message 2")).to_be_visible()
    give(page, path.read_bytes())  # once more: nothing is overwritten
    expect(page.get_by_role("link", name="Who is this? (imported)")).to_be_visible(timeout=LONG)
    expect(page.locator("#chats a")).to_have_count(4)
    assert len(page.evaluate(KEPT)["bytes"]) == 2
    tab.requests = [url for url in tab.requests if url != "about:blank"]
    tab.check_clean()


def minimal(**changes: Any) -> dict[str, Any]:
    message = {"id": "m1", "parent": None, "role": "user", "content": "Hello", "created": 1, "state": "done"}
    one = {"id": "c1", "title": "Given", "created": 1, "updated": 2, "system": "", "sampling": {}, "draft": "", "head": "m1"}
    return {"format": "streamserve.chat", "version": 1, "conversations": [{**one, "messages": [message], **changes}]}


def with_message(**changes: Any) -> dict[str, Any]:
    file = minimal()
    file["conversations"][0]["messages"][0].update(changes)
    return file


PROTOTYPE = json.dumps(minimal()).replace('"draft"', '"__proto__": {"isAdmin": true}, "draft"')
DEEP = '{"format":"streamserve.chat","version":1,"conversations":' + "[" * 200_000 + "]" * 200_000 + "}"
HOSTILE: dict[str, tuple[Any, str]] = {
    "no JSON": ("{not JSON", "it is not JSON"),
    "a list": ("[]", "it is no file of conversations"),
    "another format": ('{"format": "other", "version": 1}', "it is no file of conversations"),
    "a newer version": ({**minimal(), "version": 2}, "it has version 2 of the format; this page reads version 1"),
    "a prototype": (PROTOTYPE, "__proto__: a field cannot"),
    "depth": (DEEP, "is nested deeper than 40 levels"),
    "a ring": (with_message(parent="m1"), "messages[0].parent is"),
    "a role": (with_message(role="system"), 'conversations[0].messages[0].role is "system"'),
    "a text that is none": (with_message(content={"toString": 1}), "messages[0].content is"),
    "a field that is none": (with_message(param={"a": 1}), "messages[0].param is"),
    "figures that are none": (with_message(stats={"tokens": "many"}), "messages[0].stats is"),
    "times that are none": (with_message(stats={"tokens": 1, "timings": [{}]}), "messages[0].stats is"),
    "a title that is none": (minimal(title=["x"]), "conversations[0].title is"),
    "an id with a path": (minimal(id="../<img src=x>"), "conversations[0].id is"),
    "an SVG": (
        {**minimal(), "pictures": {"p": {"type": "image/svg+xml", "data": "PHN2Zz4="}}},
        'pictures.p.type is "image/svg+xml"',
    ),
    "a false PNG": ({**minimal(), "pictures": {"p": {"type": "image/png", "data": "PHN2Zz4="}}}, "pictures.p.data is"),
}


def test_file_with_a_fault_is_refused_with_its_place_and_nothing_of_it_is_taken(tab: Tab) -> None:
    page = ready(tab.open())
    fault = page.locator("#import-fault")
    for name, (file, reason) in HOSTILE.items():
        good = minimal()["conversations"][0] | {"id": "good", "title": "Good"}
        if isinstance(file, dict) and file["version"] == 1:
            file = {**file, "conversations": [*file["conversations"], good]}
        give(page, file if isinstance(file, str) else json.dumps(file), f"<b>{name}</b>.json")
        expect(fault).to_contain_text(f"<b>{name}</b>.json: ", timeout=LONG)
        expect(fault).to_contain_text(reason)
    page.get_by_role("button", name="Close", exact=True).click()
    expect(fault).to_have_count(0)
    expect(page.get_by_role("button", name="Import")).to_be_focused()
    assert page.evaluate(KEPT)["conversations"] == []
    assert page.evaluate("() => ({}).isAdmin") is None
    tab.check_clean()


def test_texts_of_a_file_are_only_shown(tab: Tab) -> None:
    page = ready(tab.open())
    evil = '<img src=x onerror="window.hacked = 1"> [x](javascript:window.hacked=2) \u202etxt.exe'
    file = minimal(title=evil, system=evil, draft=evil, sampling={"temperature": evil})
    answer = {"id": "m2", "parent": "m1", "role": "assistant", "content": evil, "created": 2, "state": "failed", "error": evil}
    file["conversations"][0]["messages"].append({**answer, "pictures": [{"id": "gone", "name": evil, "size": 1}]})
    file["conversations"][0]["head"] = "m2"
    give(page, json.dumps(file))
    page.get_by_role("button", name="Open").click(timeout=LONG)
    expect(page.locator(".user .text")).to_have_text("Hello", timeout=LONG)
    expect(page.locator(".assistant .error")).to_contain_text("<img src=x")
    expect(page.locator("#chats a")).to_contain_text("<img src=x")
    expect(page.locator("#chats a bdi")).to_have_attribute("data-name", "U+202E")
    assert page.evaluate("() => window.hacked") is None
    tab.check_clean()


def old(key: str, title: str, **changes: Any) -> str:
    """A conversation as an older page wrote it."""
    picture = {"id": "pic1", "name": "cat.png", "size": len(CAT)}
    question = {
        "id": key + "q",
        "parent": None,
        "role": "user",
        "content": title,
        "created": 1,
        "state": "done",
        "pictures": [picture],
    }
    answer = {"id": key + "a", "parent": key + "q", "role": "assistant", "content": "Text", "created": 1, "state": "streaming"}
    row = {"format": 1, "id": key, "title": title, "created": 1, "updated": 2, "system": "Old", "sampling": {"seed": "7"}}
    messages = [{**question, "pictures": [picture]}, answer]
    return json.dumps({**row, "draft": "", "head": key + "a", "messages": messages, **changes})


def test_what_an_older_page_kept_is_taken_over_and_only_then_deleted(tab: Tab) -> None:
    page = ready(tab.open())
    broken = {"broken": "{", "newer": old("newer", "Newer", format=2)}
    kept = {"o1": old("o1", "Old one"), "o2": old("o2", "Old two", updated=9), **broken}
    page.evaluate(PUT_OLD, [kept, "pic1", base64.b64encode(CAT).decode()])
    page.reload()
    expect(page.locator("#chats a")).to_have_text(["Old two", "Old one"], timeout=LONG)
    page.get_by_role("link", name="Old one").click()
    assert image_is_painted(page, "cat.png")
    expect(page.locator(".assistant .text")).to_have_text("Text")
    expect(page.locator(".assistant")).to_contain_text("Cut off by a reload")
    expect(page.get_by_label("System prompt")).to_have_value("Old")
    assert page.evaluate(OLD) == ["streamserve.chat.broken", "streamserve.chat.newer"]
    assert "streamserve.pictures" not in page.evaluate("async () => (await indexedDB.databases()).map(({ name }) => name)")
    page.reload()
    expect(page.locator("#chats a")).to_have_text(["Old two", "Old one"], timeout=LONG)
    tab.check_clean()


def test_nothing_old_is_deleted_where_it_cannot_be_written(tab: Tab) -> None:
    page = ready(tab.open())
    page.evaluate(PUT_OLD, [{"o1": old("o1", "Old one")}, "pic1", base64.b64encode(CAT).decode()])
    page.add_init_script(FULL)
    page.reload()
    expect(page.locator("#banner")).to_contain_text("older version could not be taken over", timeout=LONG)
    assert page.evaluate(OLD) == ["streamserve.chat.o1"]
    tab.check_clean()


def test_refused_storage_shows_a_banner_and_a_file_still_has_everything(tab: Tab, tmp_path: Path) -> None:
    page = ready(tab.open(NO_STORAGE))
    tab.ask("Forget this")
    tab.finish()
    banner = page.locator("#banner")
    expect(banner).to_contain_text("History is not saved: storage is switched off.", timeout=LONG)
    page.get_by_role("button", name="New chat", exact=True).click()
    tab.ask("And that")
    tab.finish()
    expect(page.locator("#chats a")).to_have_text(["And that", "Forget this"], timeout=LONG)
    with page.expect_download() as download:
        banner.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "all.json")
    file = json.loads((tmp_path / "all.json").read_text())
    assert [one["title"] for one in file["conversations"]] == ["And that", "Forget this"]
    assert all(len(one["messages"]) == 2 and one["messages"][1]["content"] for one in file["conversations"])
    page.get_by_role("link", name="Forget this").click()
    expect(page.locator(".user .text")).to_have_text("Forget this")
    tab.check_clean()


def test_full_storage_is_said_and_what_waited_is_written_when_there_is_room(tab: Tab) -> None:
    page = ready(tab.open(FULL))
    tab.ask("Too much")
    tab.finish()
    banner = page.locator("#banner")
    expect(banner).to_contain_text("this browser's storage is full; delete some conversations", timeout=LONG)
    assert page.evaluate(KEPT)["conversations"] == []
    page.evaluate("() => (window.isFull = false)")
    tab.ask("Once more")
    tab.finish()
    expect(banner).to_be_hidden(timeout=LONG)
    kept = page.evaluate(KEPT)
    assert [message["content"] for _, message, _ in kept["messages"] if message["role"] == "user"] == ["Too much", "Once more"]
    tab.check_clean()


def test_growing_answer_is_written_without_the_messages_before_it(slow_tab: Tab) -> None:
    note = """
    window.written = [];
    const put = IDBObjectStore.prototype.put;
    IDBObjectStore.prototype.put = function (row, ...key) {
      if (this.name === "messages") window.written.push(row.message.id + " " + row.message.state);
      return put.call(this, row, ...key);
    };"""
    page = ready(slow_tab.open(note))
    slow_tab.ask("First")
    expect(page.locator(".assistant .text")).not_to_be_empty(timeout=LONG)
    page.keyboard.press("Escape")
    expect(page.get_by_text(re.compile("Stopped by you"))).to_be_visible()
    page.evaluate("() => { window.written = []; }")
    slow_tab.ask("Second")
    page.wait_for_function("() => window.written.filter((line) => line.endsWith('streaming')).length >= 3")
    ids = page.locator(".message").evaluate_all("(items) => items.map((item) => item.dataset.id)")
    lines = page.evaluate("() => window.written")
    times = [len([line for line in lines if line.startswith(key)]) for key in ids]
    assert max(times[:2]) <= 1 < 3 <= times[3], times  # 1: what the cache knew of it was noted
    page.keyboard.press("Escape")
    slow_tab.check_clean()


def test_presets_are_kept_under_their_names(tab: Tab) -> None:
    page = ready(tab.open())
    use = """async (steps) => {
      const { Store } = await import("./static/js/store/store.js");
      const { presets } = new Store();
      for (const [method, ...given] of steps) await presets[method](...given);
      return presets.list();
    }"""
    page.evaluate(use, [["save", "b", {"seed": "1"}], ["save", "a", {"seed": "2"}], ["save", "b", {"seed": "3"}]])
    page.reload()
    assert page.evaluate(use, []) == [{"name": "a", "values": {"seed": "2"}}, {"name": "b", "values": {"seed": "3"}}]
    assert page.evaluate(use, [["remove", "a"]]) == [{"name": "b", "values": {"seed": "3"}}]
