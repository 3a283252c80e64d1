/**
 * The Engine view: what the engine does, as it does it. A strip of its steps, the requests it has, and plots of the last minutes.
 *
 * Owns when the engine is watched (only while the view can be seen), pausing, and the words for the state. What is drawn is the files'
 * beside this one. Knows nothing of the chat, but that the page can end an answer.
 */

import { h } from "../ui/dom.js";
import { count } from "../ui/numbers.js";
import { EngineHistory } from "./history.js";
import { Ink, KINDS, figure } from "./paint.js";
import { EnginePlots } from "./plots.js";
import { EngineRequests } from "./requests.js";
import { EngineStrip } from "./strip.js";

const CALM_MS = 1_000;
const INTERVAL_MS = 200;
const STALE_MS = 5_000; // the server sends something every two seconds
const RATE_S = 3;

export class EngineView {
  #stop = null;
  #isShown = false;
  #isPaused = false;
  #newsAt = 0;
  #staleTimer = 0;
  #drawnSecond = 0;

  constructor(page) {
    this.page = page;
    this.history = new EngineHistory();
    this.ink = new Ink(h("span", { class: "ink", "aria-hidden": "true" }));
    this.strip = new EngineStrip(this.history, this.ink, () => this.#showState());
    this.requests = new EngineRequests((frameId) => page.server.cancel(frameId));
    this.plots = new EnginePlots(this.history, this.ink);
    this.state = h("p", { class: "engine-state", role: "status" });
    this.figures = h("p", { class: "engine-figures" });
    this.pause = h("button", { type: "button", class: "button small", onclick: () => this.#pressed() }, "Pause");
    this.legend = h("ul", { class: "legend", "aria-label": "What the strip shows" });
    this.element = h(
      "div",
      { class: "engine" },
      h("div", { class: "part-head" }, h("h2", {}, "Engine"), this.state, this.pause),
      this.figures,
      h("section", { "aria-label": "Steps" }, h("div", { class: "part-head" }, h("h3", {}, "Steps"), h("p", { class: "note" }, "One bar a step: its height is its time, its filling what it did."), h("span", { class: "zooms" }, ...this.strip.zooms)), this.strip.element, this.legend),
      this.requests.element,
      this.plots.element,
      this.ink.probe,
    );
    document.addEventListener("visibilitychange", () => this.#watch());
  }

  shown() {
    this.#isShown = true;
    this.ink.watch(() => this.#inkChanged());
    this.#watch();
  }

  gone() {
    this.#isShown = false;
    this.ink.stop();
    this.strip.gone();
    this.plots.gone();
    this.#watch();
  }

  /** Watches the engine exactly while somebody can see it. */
  #watch() {
    const isWanted = this.#isShown && !document.hidden;
    if (isWanted && !this.#stop) {
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      this.#newsAt = performance.now();
      this.#stop = this.page.server.watchEngine(calm ? CALM_MS : INTERVAL_MS, (engine) => this.#arrived(engine));
      this.#staleTimer = setInterval(() => this.#showState(), 1_000);
      this.#showState();
    } else if (!isWanted && this.#stop) {
      this.#stop();
      this.#stop = null;
      clearInterval(this.#staleTimer);
    }
  }

  #arrived(engine) {
    this.#newsAt = performance.now();
    if (!this.history.add(engine)) {
      this.#pause(false);
      this.page.say("The server was started again.");
    }
    this.strip.update();
    this.requests.show(this.history);
    this.#showState();
    if (this.#isPaused) return;
    this.#showFigures();
    const second = Math.floor(this.history.nowS);
    if (second !== this.#drawnSecond) this.plots.update();
    this.#drawnSecond = second;
  }

  #pressed() {
    this.#pause(!this.#isPaused && !this.strip.isHeldByReader);
  }

  #pause(isPaused) {
    this.#isPaused = isPaused;
    this.strip.hold(isPaused);
    this.plots.hold(isPaused);
    this.#showState();
  }

  #inkChanged() {
    this.legend.replaceChildren(
      ...KINDS.map(({ name, title }) => h("li", {}, this.#sample((pen) => this.ink.block(pen, name, 0, 0, 14, 14)), title)),
      h("li", {}, this.#sample((pen) => stroke(pen, this.ink.colours.text, [])), "Rows in the batch"),
      h("li", {}, this.#sample((pen) => stroke(pen, this.ink.colours.second, [3, 3])), "Requests that wait"),
      h("li", {}, this.#sample((pen) => wedge(pen, this.ink.colours.bad)), "A request was sent back to the queue"),
    );
    this.strip.redraw();
    this.plots.redraw();
  }

  /** A small drawing of what a word of the legend means. */
  #sample(draw) {
    const { ratio } = this.ink;
    const canvas = h("canvas", { width: 14 * ratio, height: 14 * ratio, "aria-hidden": "true" });
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    draw(pen);
    return canvas;
  }

  #showState() {
    const { load, steps, nowS } = this.history;
    const isStale = this.#stop && performance.now() - this.#newsAt > STALE_MS;
    const isBusy = load && load.running + load.waiting > 0;
    const idleS = steps.length ? nowS - steps.at(-1).time_s : Infinity;
    const [name, words] = isStale
      ? ["stale", "No news from the server. What is shown is old."]
      : !load
        ? ["waiting", "Waiting for the first news…"]
        : this.#isPaused
          ? ["held", "Paused. The requests below go on."]
          : this.strip.isHeldByReader
            ? ["held", "The strip stands still while you look."]
            : isBusy || idleS < 1
              ? ["live", "Live"]
              : ["idle", "Idle"];
    if (this.state.textContent !== words) this.state.textContent = words;
    this.state.dataset.state = name;
    const act = name === "held" ? "Go on live" : "Pause";
    if (this.pause.textContent !== act) this.pause.textContent = act;
    this.element.setAttribute("aria-busy", String(!load));
  }

  /** The state in one line: who is there, how fast, how full. */
  #showFigures() {
    const { load, hitRate } = this.history;
    const last = this.history.seconds(RATE_S).filter((entry) => entry.out !== null);
    const rate = (name) => (last.length ? last.reduce((sum, entry) => sum + entry[name], 0) / last.length : 0);
    const used = load.total_tokens - load.free_tokens - load.evictable_tokens;
    const parts = [
      [count(load.running), "running"],
      [count(load.waiting), "waiting"],
      [figure(rate("out")), "tok/s written"],
      [figure(rate("in")), "tok/s read"],
      [`${figure((100 * used) / load.total_tokens)} %`, "of memory in use"],
      [`${figure(100 * hitRate)} %`, "of prompt tokens came from the cache"],
    ];
    this.figures.replaceChildren(...parts.map(([value, words]) => h("span", {}, h("b", {}, value), ` ${words}`)));
  }
}

function stroke(pen, colour, dash) {
  pen.strokeStyle = colour;
  pen.lineWidth = 2;
  pen.setLineDash(dash);
  pen.beginPath();
  pen.moveTo(0, 7);
  pen.lineTo(14, 7);
  pen.stroke();
}

function wedge(pen, colour) {
  pen.fillStyle = colour;
  pen.beginPath();
  pen.moveTo(7, 12);
  pen.lineTo(1, 3);
  pen.lineTo(13, 3);
  pen.fill();
}
