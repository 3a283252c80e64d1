"""What the playground costs the browser: long tasks, frames while scrolling, memory, and its first load, in a headless Chromium.

    python bench/playground.py [--seconds 60] [--rate 400] [--scenes first,stream,long] [--text mixed] [--json OUT]

    first   the page is loaded with an empty cache, until it says that the server is ready
    stream  an answer of mixed Markdown (bench/markdown_feed.py) at --rate tokens a second for --seconds, while a reader scrolls
            up and down in it, and now and then looks at what comes
            (--text code: all of it one block of code; so list, table, quote, words; --panel tokens: with log-probabilities)
    long    a conversation of 20,000 tokens is imported and opened, scrolled from end to end, and gets three more answers

Tasks and frames are those of a trace of Chromium's own: a task is what the page's main thread does in one go, a frame is one
that was drawn. A task's wall time holds what it waited for a processor; its processor time does not, and is what is judged while
the machine is busy (a load over its processors when a scene began; it is printed with the scene). Frames are then judged by what
one costs all threads of the page: at 50 a second there are 20 ms for each. Memory is what is left after a forced collection.

Exit code 1 where a bound (BOUNDS) is broken.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, CDPSession, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.machine import versions
from bench.markdown_feed import KINDS, Feed, Markdown, feed_before
from bench.server import FAKE, Server

CATEGORIES = (
    "-*",
    "devtools.timeline",
    "disabled-by-default-devtools.timeline",
    "disabled-by-default-devtools.timeline.frame",
    "blink.user_timing",
)
PROFILE = "disabled-by-default-v8.cpu_profiler"
LONG_MS = 100.0
MB = 1e6
SCROLL_PX, SCROLL_PX_S = 3_000, 2_500
MESSAGES, MESSAGE_TOKENS = 40, 500  # of the long conversation: answers, and tokens of each
MORE_TOKENS = 1_200  # of each answer that it gets

# The most a figure may be, or the least where it is frames. Memory: the page alone takes 5 MB, an answer of 24,000 tokens or a
# conversation of 20,000 two to four more, and records of answers are at most 20,000 chunks of 0.4 kB in all (recorder.js), 9 MB.
# The bound is twice what these come to. One more answer of 1,200 tokens may leave 1,200 such chunks, its text and its nodes.
BOUNDS: dict[str, tuple[float, str]] = {
    "longest_ms": (LONG_MS, "longest task, ms"),
    "frames_per_s": (50.0, "frames a second while scrolling"),
    "cpu_ms_a_frame": (20.0, "processor time of each, ms"),
    "heap_mb": (32.0, "memory of scripts in the end, MB"),
    "growth_mb": (1.0, "growth of that with one more answer, MB"),
    "detached_nodes": (100.0, "nodes that no page holds any more"),
    "first_kb": (300.0, "first load, compressed kB"),
    "first_s": (1.0, "first load, s"),
}

READY = '() => document.getElementById("server-state").textContent === "Ready"'
IDLE = '() => document.getElementById("send").getAttribute("aria-label") === "Send"'
AT_END = '() => { const s = document.getElementById("scroll"); s.scrollTop = s.scrollHeight; }'
TOP = '() => document.getElementById("scroll").scrollTop < 2'
BOTTOM = '() => { const s = document.getElementById("scroll"); return s.scrollHeight - s.clientHeight - s.scrollTop < 2; }'
FIRST_PAINT = """() => new Promise((resolve) => {
  new PerformanceObserver((list) => resolve(list.getEntries().at(-1).startTime)).observe({ type: "paint", buffered: true });
})"""
FILLED = """() => {
  const [first] = document.querySelectorAll(".assistant");
  return document.querySelectorAll(".message").length >= 2 && (!first || first.querySelector(".text > *") !== null);
}"""


@dataclass
class Scene:
    """What was found in one part of the run."""

    name: str
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_quiet(self) -> bool:
        return self.load <= len(os.sched_getaffinity(0))


# ------------------------------------------------------------------------------------------------------------------ traces


class Trace:
    """The events of one tab's main thread and of its frames. Times are in milliseconds."""

    def __init__(self, data: bytes) -> None:
        events = [event for event in json.loads(data)["traceEvents"] if event.get("ph") in ("X", "I", "i", "R", "n", "M")]
        marks = [event for event in events if event["name"].startswith("bench-")]
        self.pid = marks[-1]["pid"]  # a tab's first page is another process's
        self.thread = next(
            event["tid"]
            for event in events
            if event["name"] == "thread_name" and event["pid"] == self.pid and event["args"]["name"] == "CrRendererMain"
        )
        own = [event for event in events if event["pid"] == self.pid]
        main = [event for event in own if event["tid"] == self.thread and event["ph"] == "X"]
        self.tasks = [event for event in main if event["name"] == "RunTask"]
        self._run = [
            event for event in own if event["ph"] == "X" and event["name"] in ("RunTask", "RasterTask")
        ]  # of all threads
        self._inner = [event for event in main if event["name"] != "RunTask"]
        self._drawn = sorted(event["ts"] / 1e3 for event in own if event["name"] == "DrawFrame")
        self._marks = sorted((event["ts"] / 1e3, event["name"]) for event in marks)

    def tasks_into(self, scene: Scene) -> None:
        """Longest task and number of long ones, by wall and by processor time, and what the worst did."""
        wall = max((event["dur"] / 1e3 for event in self.tasks), default=0.0)
        worst = max(self.tasks, key=lambda event: event.get("tdur", 0), default={"ts": 0, "dur": 0, "tdur": 0})
        used = worst.get("tdur", 0) / 1e3
        scene.figures |= {
            "longest_wall_ms": wall,
            "longest_cpu_ms": used,
            "over_100_wall": sum(event["dur"] > LONG_MS * 1e3 for event in self.tasks),
            "over_100_cpu": sum(event.get("tdur", 0) > LONG_MS * 1e3 for event in self.tasks),
            "over_50_cpu": sum(event.get("tdur", 0) > 50e3 for event in self.tasks),
            "main_thread_s": sum(event.get("tdur", 0) for event in self.tasks) / 1e6,
            "longest_ms": wall if scene.is_quiet else used,
        }
        for task in sorted(self.tasks, key=lambda event: -event.get("tdur", 0))[:4]:
            inner = [e for e in self._inner if task["ts"] <= e["ts"] and e["ts"] + e["dur"] <= task["ts"] + task["dur"]]
            inner.sort(key=lambda event: -event.get("tdur", 0))
            said = ", ".join(f"{e['name']} {e.get('tdur', 0) / 1e3:.0f}" for e in inner[:5])
            scene.notes.append(f"task of {task['dur'] / 1e3:.0f} ms, {task.get('tdur', 0) / 1e3:.0f} of a processor: {said}")

    def frames_into(self, scene: Scene) -> None:
        """Frames drawn between each pair of marks of scrolling."""
        spans = zip(
            [at for at, name in self._marks if name == "bench-scroll"],
            [at for at, name in self._marks if name == "bench-scrolled"],
            strict=False,
        )
        num, took, used, gaps = 0, 0.0, 0.0, [0.0]
        for begin, end in spans:
            used += sum(event.get("tdur", 0) / 1e3 for event in self._run if begin <= event["ts"] / 1e3 <= end)
            inside = [at for at in self._drawn if begin <= at <= end]
            if len(inside) > 1:
                num, took = num + len(inside) - 1, took + inside[-1] - inside[0]
                gaps += [b - a for a, b in pairwise(inside)]
        scene.figures |= {
            "frames_per_s": 1e3 * num / took if took else 0.0,
            "cpu_ms_a_frame": used / num if num else 0.0,
            "longest_gap_ms": max(gaps),
            "gaps_over_50": float(sum(gap > 50 for gap in gaps)),
        }


# -------------------------------------------------------------------------------------------------------------------- a tab


class Tab:
    """One tab, driven as a reader would."""

    def __init__(self, browser: Browser, url: str, trace_folder: Path | None) -> None:
        self.browser, self.url, self.folder = browser, url, trace_folder
        self.page: Page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.cdp: CDPSession = self.page.context.new_cdp_session(self.page)

    def open(self) -> None:
        self.page.goto(self.url)
        self.page.wait_for_function(READY, timeout=60_000)
        self.page.wait_for_timeout(1_000)  # what is brought behind the first paint

    def close(self) -> None:
        self.page.context.close()

    def ask(self, text: str) -> None:
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def wait_idle(self, limit_s: float) -> None:
        self.page.wait_for_function(IDLE, timeout=1_000 * limit_s)

    def mark(self, name: str) -> None:
        self.page.evaluate("(name) => { performance.mark(name); }", f"bench-{name}")

    def scroll(self, px: int) -> None:
        """By the wheel, downwards where positive, as far as the list goes."""
        self.mark("scroll")
        gesture = {"x": 600, "y": 400, "yDistance": -px, "speed": SCROLL_PX_S, "gestureSourceType": "mouse"}
        self.cdp.send("Input.synthesizeScrollGesture", gesture)
        self.mark("scrolled")

    @contextmanager
    def traced(self, scene: Scene, *also: Callable[[Trace, Scene], None]) -> Iterator[None]:
        categories = [*CATEGORIES, *([PROFILE] if self.folder else [])]
        self.browser.start_tracing(page=self.page, categories=categories)
        self.mark("begin")
        try:
            yield
        finally:
            data = self.browser.stop_tracing()
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{scene.name}.json").write_bytes(data)
        trace = Trace(data)
        for into in (Trace.tasks_into, *also):
            into(trace, scene)

    def memory(self) -> dict[str, float]:
        """What is left after a forced collection."""
        for _ in range(2):
            self.cdp.send("HeapProfiler.collectGarbage")
        counts = self.cdp.send("Memory.getDOMCounters")
        self.cdp.send("DOM.enable")
        trees = self.cdp.send("DOM.getDetachedDomNodes")["detachedNodes"]
        self.cdp.send("DOM.disable")
        return {
            "heap_mb": self.cdp.send("Runtime.getHeapUsage")["usedSize"] / MB,
            "nodes": counts["nodes"],
            "listeners": counts["jsEventListeners"],
            "detached_nodes": float(sum(_size(tree["treeNode"]) for tree in trees)),
        }


def _size(node: dict[str, Any]) -> int:
    return 1 + sum(_size(child) for child in node.get("children", ()))


# ------------------------------------------------------------------------------------------------------------------- scenes


def first(browser: Browser, feed: Feed, folder: Path | None, arguments: argparse.Namespace) -> Iterator[Scene]:
    """The first load, into an empty cache."""
    scene = Scene("first load")
    tab = Tab(browser, feed.url, folder)
    kinds: dict[str, str] = {}
    sizes: dict[str, float] = {}
    tab.cdp.send("Network.enable")
    tab.cdp.on("Network.responseReceived", lambda event: kinds.__setitem__(event["requestId"], event["type"]))
    tab.cdp.on("Network.loadingFinished", lambda event: sizes.__setitem__(event["requestId"], event["encodedDataLength"]))
    with tab.traced(scene):
        started = time.perf_counter()
        tab.page.goto(tab.url, wait_until="commit")
        tab.page.wait_for_function(READY, timeout=60_000)
        ready = time.perf_counter() - started
        paint = tab.page.evaluate(FIRST_PAINT)
        tab.page.wait_for_timeout(2_000)
        tab.mark("end")
    script = sum(size for id, size in sizes.items() if kinds.get(id) == "Script")
    scene.figures |= {
        "first_kb": sum(sizes.values()) / 1e3,
        "script_kb": script / 1e3,
        "requests": len(sizes),
        "first_s": ready,
        "paint_s": paint / 1e3,
    }
    tab.close()
    yield scene


def stream(browser: Browser, feed: Feed, folder: Path | None, arguments: argparse.Namespace) -> Iterator[Scene]:
    """A long fast answer with a reader in it."""
    scene = Scene("stream")
    tab = Tab(browser, feed.url, folder)
    tab.open()
    if arguments.panel:
        tab.page.get_by_role("tab", name=arguments.panel.capitalize()).click()
    if arguments.panel == "tokens":
        tab.page.get_by_role("switch", name="Record token probabilities").click()
    feed.num_tokens, feed.rate, feed.late_s = int(arguments.rate * arguments.seconds), arguments.rate, 0.0
    feed.kind = arguments.text
    with tab.traced(scene, Trace.frames_into):
        tab.ask("Write a long text.")
        ends = time.monotonic() + arguments.seconds
        tab.page.wait_for_timeout(min(4_000, 100 * arguments.seconds))
        while time.monotonic() < ends - 3:
            for px in (-SCROLL_PX, SCROLL_PX // 2, -SCROLL_PX // 2):
                tab.scroll(px)
            tab.page.evaluate(AT_END)  # and a look at what comes
            tab.page.wait_for_timeout(1_000)
        tab.wait_idle(120 + arguments.seconds)
        tab.page.wait_for_timeout(2_000)  # what follows a finished answer
        tab.mark("end")
    scene.figures |= tab.memory() | {"late_ms": 1e3 * feed.late_s}
    _note_faults(tab, scene)
    feed.kind = "mixed"
    tab.close()
    yield scene


def long(browser: Browser, feed: Feed, folder: Path | None, arguments: argparse.Namespace) -> Iterator[Scene]:
    """A long conversation."""
    opened = Scene("long, opened")
    tab = Tab(browser, feed.url, folder)
    tab.open()
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "long.json"
        file.write_text(json.dumps(_conversation()))
        tab.page.locator("#import-file").set_input_files(str(file))
        link = tab.page.locator("#chats a").first
        link.wait_for(timeout=30_000)
    with tab.traced(opened):
        link.click()
        tab.page.wait_for_function(FILLED, timeout=60_000)
        tab.page.wait_for_timeout(3_000)  # colours, marks
        tab.mark("end")
    yield opened
    scrolled = Scene("long, scrolled")
    with tab.traced(scrolled, Trace.frames_into):
        for px, is_there in ((-SCROLL_PX, TOP), (SCROLL_PX, BOTTOM)):
            while not tab.page.evaluate(is_there):
                tab.scroll(px)
        tab.mark("end")
    scrolled.figures |= tab.memory()
    yield scrolled
    before = 0.0
    for k in range(3):
        more = Scene(f"long, answer {k + 1}")
        feed.num_tokens, feed.rate, feed.late_s = MORE_TOKENS, arguments.rate, 0.0
        with tab.traced(more):
            tab.ask("And on?")
            tab.page.wait_for_timeout(500)
            tab.wait_idle(120)
            tab.page.wait_for_timeout(1_500)
            tab.mark("end")
        more.figures |= tab.memory() | {"late_ms": 1e3 * feed.late_s}
        if before:
            more.figures["growth_mb"] = more.figures["heap_mb"] - before
        before = more.figures["heap_mb"]
        _note_faults(tab, more)
        yield more
    tab.close()


def _conversation() -> dict[str, Any]:
    """As a file that the page imports."""
    text = Markdown(7)
    messages: list[dict[str, Any]] = []
    for k in range(MESSAGES):
        for role, content in (("user", f"Question {k}: what of it?"), ("assistant", "".join(text.tokens(MESSAGE_TOKENS)))):
            parent = messages[-1]["id"] if messages else None
            messages.append(
                {"id": f"m{len(messages)}", "parent": parent, "role": role, "content": content, "created": 1, "state": "done"}
            )
    head = {"id": "long", "title": "Long", "created": 1, "updated": 1, "system": "", "sampling": {}, "draft": ""}
    return {
        "format": "streamserve.chat",
        "version": 1,
        "conversations": [{**head, "head": messages[-1]["id"], "messages": messages}],
    }


def _note_faults(tab: Tab, scene: Scene) -> None:
    if tab.wrong or tab.page.locator(".message .error").count():
        scene.notes.append(f"FAULT: {tab.wrong or tab.page.locator('.message .error').first.inner_text()}")


SCENES = {"first": first, "stream": stream, "long": long}

# --------------------------------------------------------------------------------------------------------------- the report


def is_broken(scene: Scene, name: str, value: float) -> bool:
    """Whether a figure is beyond its bound."""
    if name not in BOUNDS or (not scene.is_quiet and name in ("frames_per_s", "first_s")):
        return False
    bound = BOUNDS[name][0]
    return value < bound if name == "frames_per_s" else value > bound


def shown(scene: Scene) -> list[str]:
    """A scene's lines of the table."""
    judged = "wall time is judged" if scene.is_quiet else "a busy machine: processor time is judged"
    lines = [f"{scene.name}  (load {scene.load:.1f}, {judged})"]
    for name, value in scene.figures.items():
        bound = f"  bound {BOUNDS[name][0]:g}" if name in BOUNDS else ""
        lines.append(f"  {name:18s} {value:10.2f}{bound}{'  BROKEN' if is_broken(scene, name, value) else ''}")
    return [*lines, *(f"  {note}" for note in scene.notes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=400.0)
    parser.add_argument("--scenes", default=",".join(SCENES))
    parser.add_argument("--text", choices=KINDS, default="mixed", help="what is streamed")
    parser.add_argument("--panel", choices=("schema", "tools", "raw", "tokens"), help="what stands beside it")
    parser.add_argument("--json")
    parser.add_argument(
        "--trace", type=Path, help="keep each trace in this folder, with a profile of the scripts, which costs time itself"
    )
    arguments = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    server = Server(FAKE)
    scenes: list[Scene] = []
    try:
        with feed_before(server.port) as feed, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--enable-precise-memory-info"])
            for name in arguments.scenes.split(","):
                for scene in SCENES[name](browser, feed, arguments.trace, arguments):
                    scenes.append(scene)
                    print("\n".join(shown(scene)), flush=True)
            browser.close()
    finally:
        server.close()
    if arguments.json:
        found = [{"name": s.name, "load": s.load, "figures": s.figures, "notes": s.notes} for s in scenes]
        Path(arguments.json).write_text(json.dumps({"machine": versions(), "scenes": found}, indent=1))
    is_faulty = any(note.startswith("FAULT") for scene in scenes for note in scene.notes)
    sys.exit(is_faulty or any(is_broken(scene, name, value) for scene in scenes for name, value in scene.figures.items()))


if __name__ == "__main__":
    main()
