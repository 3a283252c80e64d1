"""The Engine view of the playground: what it shows of steps, requests and the last minutes is what the server says.

Load comes from other clients, over HTTP, on a server that runs two requests at once and reads prompts in pieces. Skips, saying
why, where there is no Chromium.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from decimal import ROUND_HALF_UP, Decimal
from time import monotonic, sleep
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, WebSocketRoute, expect

from tests.e2e.playground.browser import CHROMIUM, HIDE, NO_WEBSOCKET, Tab, get_json, serve, tab_on

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")

SLOW_MS = 15_000  # where a busy machine may take its time


@pytest.fixture(scope="module")
def engine_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    flags = ("--max-running-requests", "2", "--chunked-prefill-size", "32")
    with serve(tmp_path_factory.mktemp("engine") / "log.txt", *flags, step_ms=20) as url:
        yield url


@pytest.fixture
def engine_tab(chromium: Browser, engine_server: str) -> Iterator[Tab]:
    with tab_on(chromium, engine_server) as tab:
        yield tab


@contextmanager
def clients(url: str, *bodies: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Asks for completions at once, each on a connection of its own, and waits for them at the end. Yields what is answered."""
    answers: list[dict[str, Any]] = []

    def ask(body: dict[str, Any]) -> None:
        with httpx.Client(timeout=60) as client:
            answers.append(client.post(url + "v1/completions", json=body).raise_for_status().json())

    threads = [threading.Thread(target=ask, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        for thread in threads:
            thread.join()


def open_engine(tab: Tab, *init_scripts: str) -> Page:
    tab.open(*init_scripts)
    expect(tab.page.locator("#server-state")).to_have_text("Ready", timeout=SLOW_MS)
    tab.page.get_by_role("tab", name="Engine").click()
    expect(tab.page.get_by_role("heading", name="Engine", exact=True)).to_be_visible(timeout=SLOW_MS)
    return tab.page


def strip(page: Page) -> Locator:
    return page.get_by_role("slider", name="Steps of the engine")


def row_of(page: Page, name: str) -> Locator:
    return page.get_by_role("table", name="Requests that run or wait").get_by_role("row").filter(has_text=name)


def wait_until(test: Callable[[], bool]) -> None:
    end = monotonic() + 20
    while not test():
        assert monotonic() < end, "it did not come to that"
        sleep(0.03)


def steps_of(url: str) -> list[dict[str, float]]:
    engine = get_json(url + "engine/steps")
    return [dict(zip(engine["columns"], row, strict=True)) for row in engine["steps"]]


def wait_for_idle(url: str) -> None:
    wait_until(lambda: get_json(url + "engine/steps")["num_requests"] == 0)


def step_words(step: dict[str, float]) -> list[str]:
    """A row of the table of steps."""
    ms = step["ms"]
    guesses = f"{step['accepted']:.0f} of {step['drafted']:.0f} right" if step["drafted"] else "none"
    counts = [f"{step[name]:.0f}" for name in ("encodes", "jumped", "preemptions", "running", "waiting")]
    places = "1" if ms >= 100 or ms == int(ms) else "0.1" if ms >= 10 else "0.01"
    shown = f"{Decimal(ms).quantize(Decimal(places), ROUND_HALF_UP)}"  # as the browser rounds
    rows = [f"{step[name]:.0f}" for name in ("decode_rows", "prompt_rows", "prompt_tokens")]
    return [f"{step['step']:.0f}", shown, *rows, guesses, *counts, f"{step['used_tokens']:,.0f}"]


def table_rows(table: Locator) -> list[list[str]]:
    found: list[list[str]] = table.locator("tbody tr").evaluate_all(
        "(rows) => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    return found


def test_requests_are_those_of_the_server_with_their_numbers(engine_tab: Tab) -> None:
    page, url = open_engine(engine_tab), engine_tab.url
    expect(page.get_by_text("No request runs or waits.")).to_be_visible()
    hostile = "<img src=x onerror=alert(1)>"
    bodies: list[dict[str, Any]] = [
        {"prompt": f"{name} " * 20, "max_tokens": 100, "rid": name, "ignore_eos": True}
        for name in ("first", "second", "third", hostile)
    ]
    with clients(url, *bodies):
        wait_until(lambda: get_json(url + "engine/steps")["load"]["waiting"] == 2)
        wait_until(
            lambda: all(
                one["generated_tokens"] > 3 for one in get_json(url + "engine/steps")["requests"] if one["state"] == "running"
            )
        )
        for body in bodies:
            expect(row_of(page, body["rid"])).to_be_visible(timeout=SLOW_MS)
        before = {one["client_id"]: one for one in get_json(url + "engine/steps")["requests"]}
        expect(page.get_by_text("Answering", exact=True)).to_have_count(2)
        shown = {row[0]: row for row in table_rows(page.get_by_role("table", name="Requests that run or wait"))}
        after = {one["client_id"]: one for one in get_json(url + "engine/steps")["requests"]}
        assert shown.keys() == before.keys() == after.keys() == {body["rid"] for body in bodies}
        for name, (_, state, prompt_words, cached, written, age, action) in shown.items():
            request = before[name]
            assert state == ("Answering" if request["state"] == "running" else "Waiting")
            prompt = f"{request['prompt_tokens']:,}"
            assert prompt_words == (prompt if state == "Answering" else f"0 of {prompt}")
            assert int(cached) == request["cached_tokens"]
            assert request["generated_tokens"] - 50 <= int(written) <= after[name]["generated_tokens"]
            assert 0 <= float(age.removesuffix(" s")) <= after[name]["age_s"] + 0.1
            assert action == ""  # others' requests cannot be cancelled from here
        expect(page.locator(".engine-figures")).to_contain_text("2 running2 waiting")
    expect(page.get_by_text("No request runs or waits.")).to_be_visible(timeout=SLOW_MS)
    engine_tab.check_clean()


def test_facts_of_steps_equal_the_servers_rows_by_keys_and_as_a_table(engine_tab: Tab) -> None:
    page, url = open_engine(engine_tab), engine_tab.url
    with clients(url, {"prompt": "a b c d e f g " * 40, "max_tokens": 40}, {"prompt": "Repeat this", "max_tokens": 60}):
        pass
    wait_for_idle(url)
    expect(page.get_by_text("Idle", exact=True)).to_be_visible(timeout=SLOW_MS)
    steps = steps_of(url)
    strip(page).focus()
    for key, step in (
        ("ArrowLeft", steps[-1]),
        ("ArrowLeft", steps[-2]),
        ("PageUp", steps[-22]),
        ("Home", steps[0]),
        ("End", steps[-1]),
    ):
        page.keyboard.press(key)
        expect(strip(page)).to_have_attribute("aria-valuenow", f"{step['step']:.0f}")
        words = strip(page).get_attribute("aria-valuetext") or ""
        number, ms, *_ = step_words(step)
        assert words.startswith(f"Step: {number}. Took: {ms} ms")
        prompts = f"{step['prompt_tokens']:.0f} token" if step["prompt_rows"] else "Prompts: none"
        assert prompts in words and f"{step['running']:.0f} running, {step['waiting']:.0f} waiting" in words
        assert " ".join(page.locator(".facts dd").all_text_contents()) == " ".join(
            fact.split(": ")[1] for fact in words.split(". ")
        )
    page.get_by_text("Steps as a table").click()
    table = page.get_by_role("region", name="Steps as a table")
    expect(table.locator("tbody tr")).to_have_count(min(100, len(steps)))
    assert table_rows(table) == [step_words(step) for step in reversed(steps[-100:])]
    engine_tab.check_clean()


def test_pointer_chooses_the_step_below_it_and_escape_goes_on(engine_tab: Tab) -> None:
    page, url = open_engine(engine_tab), engine_tab.url
    with clients(url, {"prompt": "Once more", "max_tokens": 30}):
        pass
    wait_for_idle(url)
    expect(page.get_by_text("Idle", exact=True)).to_be_visible(timeout=SLOW_MS)
    last = steps_of(url)[-1]["step"]
    box = strip(page).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] - 8 * 3 - 4, box["y"] + 120)  # a bar is 8 pixels wide
    expect(page.locator(".facts dd").first).to_have_text(f"{last - 3:.0f}")
    page.mouse.move(5, 5)
    expect(page.locator(".facts dt").first).to_have_text("Last 600 steps" if last > 600 else f"Last {last:.0f} steps")
    page.mouse.click(box["x"] + box["width"] - 4, box["y"] + 120)
    expect(strip(page)).to_have_attribute("aria-valuenow", f"{last:.0f}")
    expect(page.get_by_role("button", name="Go on live")).to_be_visible()
    page.mouse.move(5, 5)
    page.keyboard.press("Escape")
    expect(strip(page)).to_have_attribute("aria-valuetext", "Live, no step chosen")
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    engine_tab.check_clean()


def test_pause_holds_strip_and_plots_while_requests_go_on(engine_tab: Tab) -> None:
    page, url = open_engine(engine_tab), engine_tab.url
    page.get_by_text("Steps as a table").click()
    newest = page.get_by_role("region", name="Steps as a table").locator("tbody th").first
    picture = "() => [...document.querySelectorAll('.strip canvas, .plot canvas')].map((canvas) => canvas.toDataURL())"
    with clients(url, {"prompt": "Go on and on", "max_tokens": 140, "rid": "long", "ignore_eos": True}):
        expect(row_of(page, "long")).to_contain_text("Answering", timeout=SLOW_MS)
        expect(newest).to_be_visible()
        page.get_by_role("button", name="Pause").click()
        expect(page.get_by_text("Paused. The requests below go on.")).to_be_visible()
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        held, drawn, at = newest.text_content(), page.evaluate(picture), steps_of(url)[-1]["step"]
        written = int(row_of(page, "long").locator("td").nth(3).text_content() or "")
        wait_until(lambda: steps_of(url)[-1]["step"] > at + 25)
        wait_until(lambda: int(row_of(page, "long").locator("td").nth(3).text_content() or "") > written + 10)
        assert newest.text_content() == held and page.evaluate(picture) == drawn
        page.get_by_role("button", name="Go on live").click()
        wait_until(lambda: int(newest.text_content() or "") > at + 25)
        assert page.evaluate(picture) != drawn
    engine_tab.check_clean()


def test_scrolling_back_keeps_the_steps_in_sight_until_the_end_is_reached_again(engine_tab: Tab) -> None:
    page, url = open_engine(engine_tab), engine_tab.url
    with clients(url, {"prompt": "Fill the strip", "max_tokens": 85, "ignore_eos": True}):
        pass
    with clients(url, {"prompt": "And go on", "max_tokens": 90, "rid": "more", "ignore_eos": True}):
        expect(row_of(page, "more")).to_contain_text("Answering", timeout=SLOW_MS)
        strip(page).evaluate("(node) => node.scrollTo(0, 0)")
        expect(page.get_by_role("button", name="Go on live")).to_be_visible()
        width, at = strip(page).evaluate("(node) => node.scrollWidth"), steps_of(url)[-1]["step"]
        wait_until(lambda: steps_of(url)[-1]["step"] > at + 20)
        assert strip(page).evaluate("(node) => [node.scrollLeft, node.scrollWidth]") == [0, width]
        strip(page).evaluate("(node) => node.scrollTo(node.scrollWidth, 0)")
        expect(page.get_by_role("button", name="Pause")).to_be_visible()
    engine_tab.check_clean()


def test_cancel_in_the_table_ends_that_answer_alone(engine_tab: Tab) -> None:
    page, url = open_engine(engine_tab), engine_tab.url
    with clients(url, {"prompt": "Somebody else", "max_tokens": 120, "rid": "other", "ignore_eos": True}) as answers:
        expect(row_of(page, "other")).to_be_visible(timeout=SLOW_MS)
        page.get_by_role("tab", name="Chat").click()
        engine_tab.ask("Tell me a long story")
        expect(page.locator(".assistant .text")).not_to_be_empty(timeout=SLOW_MS)
        page.get_by_role("tab", name="Engine").click()
        own = row_of(page, "Yours")
        expect(own).to_have_count(1, timeout=SLOW_MS)
        own.get_by_role("button", name="Cancel your request").focus()
        page.keyboard.press("Enter")
        expect(own).to_have_count(0)
        expect(row_of(page, "other")).to_be_visible()
        expect(page.get_by_role("heading", name="Requests")).to_be_focused()  # not lost with the button
        wait_until(lambda: [one["client_id"] for one in get_json(url + "engine/steps")["requests"]] == ["other"])
        page.get_by_role("tab", name="Chat").click()
        expect(page.locator(".assistant")).to_contain_text("Stopped by you")
        expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    assert answers[0]["usage"]["completion_tokens"] == 120
    engine_tab.check_clean()


def test_engine_is_watched_only_while_its_view_can_be_seen(engine_tab: Tab) -> None:
    sent: list[dict[str, Any]] = []
    engine_tab.page.on("websocket", lambda ws: ws.on("framesent", lambda data: sent.append(json.loads(data))))

    def kinds() -> list[str]:
        return [frame["type"] for frame in sent if frame["type"].startswith("engine.")]

    engine_tab.page.emulate_media(reduced_motion="reduce")
    engine_tab.open()
    engine_tab.ask("Hello")
    expect(engine_tab.page.locator(".assistant .text")).not_to_be_empty(timeout=SLOW_MS)
    assert kinds() == []
    page = engine_tab.page
    page.get_by_role("tab", name="Engine").click()
    expect(page.get_by_text("Live", exact=True)).to_be_visible(timeout=SLOW_MS)
    assert kinds() == ["engine.subscribe"] and [frame["interval_ms"] for frame in sent if "interval_ms" in frame] == [1_000]
    page.get_by_role("tab", name="Chat").click()
    wait_until(lambda: page.evaluate("() => 1") == 1 and kinds()[-1] == "engine.unsubscribe")
    page.get_by_role("tab", name="Engine").click()
    wait_until(lambda: page.evaluate("() => 1") == 1 and kinds()[-1] == "engine.subscribe")
    page.evaluate(HIDE, True)
    wait_until(lambda: page.evaluate("() => 1") == 1 and kinds()[-1] == "engine.unsubscribe")
    page.evaluate(HIDE, False)
    wait_until(lambda: page.evaluate("() => 1") == 1 and kinds()[-1] == "engine.subscribe")
    assert len(kinds()) == 5 and len(engine_tab.sockets()) == 1
    page.get_by_role("tab", name="Chat").click()
    page.keyboard.press("Escape")
    engine_tab.check_clean()


def test_engine_is_asked_again_and_again_where_no_socket_opens(engine_tab: Tab) -> None:
    page, url = open_engine(engine_tab, NO_WEBSOCKET), engine_tab.url
    with clients(url, {"prompt": "Without a socket", "max_tokens": 120, "rid": "polled", "ignore_eos": True}):
        expect(row_of(page, "polled")).to_contain_text("Answering", timeout=SLOW_MS)
    expect(page.get_by_text("Idle", exact=True)).to_be_visible(timeout=SLOW_MS)
    page.get_by_role("tab", name="Chat").click()
    asked = [name for name in engine_tab.requests if "engine/steps?since=" in name]
    assert len(asked) >= 2 and len(set(asked)) >= 2  # only what is new is asked for
    assert engine_tab.sockets() == []
    engine_tab.check_clean()


def test_silence_and_another_server_are_told_of(engine_tab: Tab) -> None:
    page = engine_tab.page
    is_cut, sockets = [False], []

    def between(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()
        server.on_message(lambda message: None if is_cut[0] else socket.send(message))
        sockets.append(socket)

    page.route_web_socket(re.compile("/v1/ws"), between)
    open_engine(engine_tab)
    with clients(engine_tab.url, {"prompt": "Before the end", "max_tokens": 5}):
        pass
    expect(page.locator(".facts dt").first).to_contain_text("Last", timeout=SLOW_MS)
    is_cut[0] = True
    expect(page.get_by_text("No news from the server. What is shown is old.")).to_be_visible(timeout=SLOW_MS)
    expect(page.locator(".facts dt").first).to_contain_text("Last")  # still there to be read
    strip(page).press("ArrowLeft")
    columns = get_json(engine_tab.url + "engine/steps?limit=0")["columns"]
    begun = engine_of([step_of(1, 7.0, columns)], 7.5, columns)
    sockets[0].send(json.dumps({"type": "engine", "engine": begun}))
    expect(page.locator(".facts dt").first).to_have_text("Last 1 step")
    expect(strip(page)).to_have_attribute("aria-valuetext", "Live, no step chosen")
    expect(page.locator("#status")).to_have_text("The server was started again.")
    is_cut[0] = False
    expect(page.get_by_text("Idle", exact=True)).to_be_visible(timeout=SLOW_MS)
    engine_tab.check_clean()


MODEL = """async (engines) => {
  const url = performance.getEntriesByType("resource").map(({ name }) => name).find((name) => name.endsWith("engine/history.js"));
  const { EngineHistory } = await import(url);
  const history = new EngineHistory();
  const same = engines.map((engine) => history.add(engine));
  const { steps } = history;
  return { same, numSteps: steps.length, first: steps[0]?.step, seconds: history.seconds(), numSeconds: history.numSeconds };
}"""


def engine_of(steps: list[list[float]], now_s: float, columns: list[str], seen: int = 0) -> dict[str, Any]:
    load = {"running": 0, "waiting": 0, "free_tokens": 100, "evictable_tokens": 0, "total_tokens": 100}
    return {
        "now_s": now_s,
        "columns": columns,
        "steps": steps,
        "last": steps[-1][0] if steps else seen,
        "missed": 0,
        "load": load,
        "hit_rate": 0.0,
        "num_requests": 0,
        "requests": [],
        "shows_ids": True,
    }


def step_of(number: int, time_s: float, columns: list[str]) -> list[float]:
    values = {"step": number, "time_s": time_s, "ms": 10, "decode_rows": 2, "running": 2, "free_tokens": 100}
    return [values.get(name, 0) for name in columns]


def test_what_is_remembered_is_bounded_adds_up_and_has_gaps_where_nothing_is_known(engine_tab: Tab) -> None:
    page, url = open_engine(engine_tab), engine_tab.url
    before = get_json(url + "engine/steps")
    with clients(url, *({"prompt": f"Count these {name}", "max_tokens": 37} for name in "abc")) as answers:
        pass
    wait_for_idle(url)
    now = get_json(url + f"engine/steps?since={before['last']}")
    watched = [before | {"now_s": before["now_s"] - 2, "steps": []}, now | {"now_s": now["now_s"] + 1}]  # whole seconds
    counted = page.evaluate(MODEL, watched)
    written = sum(entry["out"] for entry in counted["seconds"] if entry["out"])
    read = sum(entry["in"] for entry in counted["seconds"] if entry["in"])
    assert read == pytest.approx(
        sum(one["usage"]["prompt_tokens"] - one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in answers)
    )
    assert written == pytest.approx(sum(one["usage"]["completion_tokens"] - 1 for one in answers))

    columns = now["columns"]

    runs = [[step_of(n, n / 10, columns) for n in range(first, first + 500)] for first in range(1, 4_001, 500)]
    many = page.evaluate(MODEL, [engine_of(run, run[-1][1], columns) for run in runs])
    assert all(many["same"]) and many["numSteps"] == 600 and many["first"] == 4_000 - 599
    assert many["numSeconds"] == 300 and len(many["seconds"]) == 300
    assert {(entry["p50"], round(entry["out"], 3)) for entry in many["seconds"]} == {(10, 20)}

    early, late = (
        [step_of(n, time_s, columns) for n, time_s in run] for run in (((1, 10.5), (2, 12.5)), ((900, 21.5), (901, 22.5)))
    )
    holes = page.evaluate(MODEL, [engine_of(early, 13.5, columns), engine_of(late, 25.0, columns)])["seconds"]
    known = {25 - entry["ago"]: entry for entry in holes if entry["running"] is not None}
    assert set(known) == {10, 11, 12, 13, 21, 22, 23, 24}
    assert known[11]["p50"] is None and known[11]["out"] == 0  # no step, but watched
    assert known[22]["p50"] == 10

    again = page.evaluate(MODEL, [engine_of(late, 25.0, columns), engine_of([step_of(1, 30.0, columns)], 31.0, columns)])
    assert again["same"] == [True, False] and again["numSteps"] == 1
    engine_tab.check_clean()


def test_plots_tell_their_numbers_as_a_table_and_by_a_slider(engine_tab: Tab) -> None:
    page, url = open_engine(engine_tab), engine_tab.url
    with clients(url, {"prompt": "Some work to be plotted", "max_tokens": 60, "ignore_eos": True}):
        pass
    wait_for_idle(url)
    expect(page.get_by_text("Idle", exact=True)).to_be_visible(timeout=SLOW_MS)
    moment = page.get_by_role("slider", name="Moment in the plots")
    moment.focus()
    told = []
    for _ in range(12):
        page.keyboard.press("ArrowLeft")
        told.append(moment.get_attribute("aria-valuetext") or "")
    assert any("Requests, running: 1" in words for words in told), told
    assert page.locator(".choice .moment").text_content() == told[-1].split(".")[0].replace(" seconds ago", " s ago")
    page.keyboard.press("Escape")
    expect(page.locator(".choice .moment")).to_have_text("now")
    page.get_by_role("button", name="Table").press("Enter")
    rows = table_rows(page.get_by_role("region", name="The plots as numbers"))
    assert len(rows) in (6, 12, 30) and rows[0][0] == "1–10" and all(len(row) == 10 for row in rows)
    assert max(float(row[3]) for row in rows if row[3] != "–") > 1  # tokens written per second
    page.get_by_role("button", name="Table").press("Enter")
    expect(page.locator(".plot").first).to_be_visible()
    engine_tab.check_clean()


def test_link_to_the_view_opens_it_and_the_chat_beside_it_works(engine_tab: Tab) -> None:
    Tab.open(replace(engine_tab, url=engine_tab.url + "#v=engine"))
    expect(engine_tab.page.get_by_role("heading", name="Engine", exact=True)).to_be_visible(timeout=SLOW_MS)
    engine_tab.page.get_by_role("tab", name="Chat").click()
    engine_tab.ask("Hello")
    expect(engine_tab.page.locator(".assistant .text")).not_to_be_empty(timeout=SLOW_MS)
    engine_tab.page.keyboard.press("Escape")
    engine_tab.check_clean()


def test_phone_shows_all_of_it_without_scrolling_sideways(chromium: Browser, engine_server: str) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    tab = Tab(context.new_page(), engine_server)
    page = open_engine(tab)
    with clients(tab.url, {"prompt": "A small screen", "max_tokens": 80, "rid": "a-very-long-name-" * 6, "ignore_eos": True}):
        expect(row_of(page, "a-very-long-name")).to_be_visible(timeout=SLOW_MS)
        part = page.get_by_role("tabpanel", name="Engine")
        assert part.evaluate("(node) => node.scrollWidth - node.clientWidth") == 0
        strip(page).tap()
        expect(page.get_by_role("button", name="Go on live")).to_be_visible()
        page.get_by_role("button", name="Go on live").tap()
        expect(page.get_by_role("button", name="Pause")).to_be_visible()
    tab.check_clean()
    context.close()
