"""A look at every view and panel of the playground that only a server can fill: each shows what the server answered to it."""

import json
import re
import subprocess
import sys

from playwright.sync_api import FilePayload, Page, expect

from tests.e2e.playground.browser import Tab

LONG = 30_000  # ms, for what a busy machine takes its time with
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)


def use_every_part(tab: Tab, question: str = "What is this?") -> None:
    """Asks in the chat, with a picture, and then uses each view and panel once. Answers have 8 tokens at most."""
    for use in (use_chat, use_cache, use_engine, use_compare, use_schema, use_tools, use_raw, use_tokens):
        use(tab, question)


def use_chat(tab: Tab, question: str) -> None:
    page = tab.page
    expect(page.locator("#server-state")).to_have_text("Ready", timeout=LONG)
    page.get_by_label("Max tokens").fill("8")
    page.locator("#picture-file").set_input_files(FilePayload(name="dot.png", mimeType="image/png", buffer=PIXEL))
    expect(page.locator("#chosen li")).to_have_count(1)
    tab.ask(question)
    tab.finish()
    expect(page.locator(".assistant .stats")).to_contain_text("picture tokens")
    assert tab.answers()[0]
    image = page.locator(".user").get_by_alt_text("dot.png")
    assert image.evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 1
    expect(page.locator(".hits").first).to_contain_text("tokens reused", timeout=LONG)
    page.get_by_label("Message", exact=True).fill("And")
    expect(page.locator("#context")).to_contain_text("cached", timeout=LONG)  # counted by the server
    page.get_by_label("Message", exact=True).fill("")


def use_cache(tab: Tab, question: str) -> None:
    page = tab.page
    page.get_by_role("tab", name="Cache").click()
    page.get_by_role("treeitem").first.click(timeout=LONG)
    node = page.get_by_role("region", name="Selected node")
    node.get_by_role("button", name="Pin node").click(timeout=LONG)
    node.get_by_role("button", name="Unpin node").click(timeout=LONG)
    expect(node.get_by_role("button", name=re.compile("^Pin"))).to_be_visible(timeout=LONG)
    expect(page.get_by_role("list", name="Memory, in tokens")).to_contain_text(re.compile(r"[1-9]\d*"))


def use_engine(tab: Tab, question: str) -> None:
    page = tab.page
    page.get_by_role("tab", name="Engine").click()
    page.get_by_text("Steps as a table").click(timeout=LONG)
    expect(page.get_by_role("region", name="Steps as a table").locator("tbody tr").nth(1)).to_be_visible(timeout=LONG)


def use_compare(tab: Tab, question: str) -> None:
    page = tab.page
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("textbox", name="Question for all columns").fill(question, timeout=LONG)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Run all again")).to_be_visible(timeout=2 * LONG)
    assert all(page.locator(".column .text").all_inner_texts())
    expect(page.locator("#status")).to_have_text("2 of 2 answers complete")
    page.get_by_role("tab", name="Chat", exact=True).click()


def use_schema(tab: Tab, question: str) -> None:
    page = tab.page
    page.get_by_role("tab", name="Schema").click()
    form = page.get_by_label("Form of the answer", exact=True)
    form.select_option("schema")
    page.locator(".form-panel textarea").fill('{"type": "object"}')
    expect(page.locator(".form-panel .code-status").first).to_have_text("Answers can be held to this.", timeout=LONG)
    form.select_option("")


def use_tools(tab: Tab, question: str) -> None:
    page = tab.page
    page.get_by_role("tab", name="Tools").click()
    page.get_by_role("button", name="Sample: get_weather").click()
    page.get_by_label("May the model choose?").select_option("required")
    page.get_by_label("Parameters, as a JSON schema").fill('{"type": "object", "uniqueItems": true}')
    expect(page.locator(".tool .code-status")).to_contain_text("uniqueItems", timeout=LONG)  # the server's words
    page.get_by_role("button", name="Remove this tool").click()


def raw(page: Page, section: str) -> None:
    page.get_by_role("tab", name="Raw").click()
    page.get_by_role("radio", name=section, exact=True).check()


def use_raw(tab: Tab, question: str) -> None:
    page = tab.page
    raw(page, "Request")
    expect(page.get_by_label("Request as JSON")).to_have_value(re.compile(re.escape(question)))
    raw(page, "Events")
    expect(page.get_by_role("listbox", name="Events").get_by_role("option").nth(3)).to_be_visible()


def use_tokens(tab: Tab, question: str) -> None:
    page = tab.page
    page.get_by_role("tab", name="Tokens").click()
    page.get_by_role("button", name="Turn on and resend").click()
    tab.finish()
    tokens = page.get_by_role("listbox", name="Tokens of the answer").get_by_role("option")
    expect(tokens.nth(1)).to_be_visible(timeout=LONG)
    tokens.nth(1).hover()
    detail = page.get_by_role("region", name="The chosen token")
    expect(detail).to_contain_text("token 2 of")
    expect(detail.get_by_role("row").nth(1)).to_be_visible()


def python_program(page: Page) -> str:
    """Of the answer shown, from the panel Raw, which the page must be allowed to copy from."""
    raw(page, "Code")
    page.get_by_role("radio", name="Python", exact=True).check()
    page.get_by_role("tabpanel", name="Raw").get_by_role("button", name="Copy code").click()
    expect(page.locator("#status")).to_have_text("Copied")
    text: str = page.evaluate("() => navigator.clipboard.readText()")
    return text


def run_python(program: str, **env: str) -> str:
    """What it prints, in an environment of its own."""
    done = subprocess.run([sys.executable, "-"], input=program, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kept(page: Page) -> str:
    """All that this browser keeps for the page, as text, but for the session's own storage."""
    return json.dumps(
        page.evaluate("""async () => {
          const all = [JSON.stringify(localStorage)];
          for (const { name } of await indexedDB.databases()) {
            const opening = indexedDB.open(name);
            await new Promise((resolve) => (opening.onsuccess = resolve));
            for (const store of opening.result.objectStoreNames) {
              const reading = opening.result.transaction(store).objectStore(store).getAll();
              await new Promise((resolve) => (reading.onsuccess = resolve));
              all.push(JSON.stringify(reading.result));
            }
            opening.result.close();
          }
          return all;
        }""")
    )
