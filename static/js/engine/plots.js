/**
 * The plots of the last five minutes, small and alike, with one moment looked at in all of them; and the same numbers as a table.
 *
 * Owns the drawings and that moment. A second of which nothing is known is a gap in the line. Knows nothing of where numbers come from.
 */

import { h } from "../ui/dom.js";
import { count } from "../ui/numbers.js";
import { MAX_SECONDS } from "./history.js";
import { FAMILY, blank, figure, roundUp } from "./paint.js";

const percent = (share) => (share === null ? "–" : `${figure(share * 100)} %`);
const SPANS_S = [60, 120, MAX_SECONDS]; // the shortest that holds what is known
const TICKS = 5;
const TABLE_S = 10; // seconds that a row of the table sums up

/** Each plot: lines of one entry of history.seconds(). The second line is dashed, the first one filled below where it is alone. */
const PLOTS = [
  { title: "Requests", lines: [["running", "running"], ["waiting", "waiting"]], told: count, whole: true },
  { title: "Tokens per second", lines: [["out", "written"], ["in", "read"]], told: figure },
  { title: "Step time", unit: "ms", lines: [["p50", "half below"], ["p95", "95 % below"]], told: figure },
  { title: "Memory in use", unit: "tokens", lines: [["used", "used"]], told: count, top: (history) => history.load?.total_tokens },
  { title: "Prompt tokens from the cache", lines: [["hits", "in the last 30 s"]], told: percent, top: () => 1, none: "no prompts" },
  { title: "Guesses that were right", lines: [["guesses", "in the last 30 s"]], told: percent, top: () => 1, none: "nothing was guessed" },
];
const COLUMNS = PLOTS.flatMap(({ title, lines, told, unit }) => lines.map(([name, words]) => ({ name, told, title: `${title}, ${words}${unit ? `, ${unit}` : ""}` })));

const toldOf = (told, value) => (value === null ? "–" : told(value));

class Plot {
  constructor(plot) {
    this.plot = plot;
    this.canvas = h("canvas", { "aria-hidden": "true" });
    this.values = plot.lines.map(([, words], k) => [words, h("b"), k]);
    this.idle = h("span", { class: "idle", hidden: true }, "idle");
    this.element = h(
      "figure",
      { class: "plot" },
      h(
        "figcaption",
        {},
        h("span", { class: "plot-title" }, plot.title, plot.unit && ` (${plot.unit})`),
        h("span", { class: "plot-values" }, ...this.values.map(([words, value, k]) => h("span", { class: `line-${k}` }, h("i", { class: "key", "aria-hidden": "true" }), value, ` ${words}`))),
      ),
      this.canvas,
      this.idle,
    );
  }

  show(seconds, at, ink, top) {
    const { lines, told } = this.plot;
    const looked = seconds[at ?? seconds.length - 1];
    this.values.forEach(([, node, k]) => (node.textContent = toldOf(told, looked?.[lines[k][0]] ?? null)));
    const { pen, width, height } = blank(this.canvas, ink.ratio);
    const all = lines.flatMap(([name]) => seconds.map((entry) => entry[name])).filter((value) => value !== null);
    const high = top || roundUp(Math.max(this.plot.whole ? 2 : 1, ...all));
    this.idle.hidden = all.some((value) => value > 0) || (all.length > 0 && Boolean(this.plot.none));
    const isKnown = seconds.some(({ running }) => running !== null);
    this.idle.textContent = isKnown ? (all.length ? "idle" : (this.plot.none ?? "idle")) : "nothing known yet";
    const [up, down] = [16, height - 16];
    const x = (k) => ((k + 0.5) * width) / seconds.length;
    const y = (value) => down - ((down - up) * Math.min(value, high)) / high;
    this.#axes(pen, ink, width, up, down, seconds, toldOf(told, high), x);
    if (lines.length === 1) this.#area(pen, ink, seconds, lines[0][0], x, y, down);
    lines.forEach(([name], k) => this.#line(pen, seconds, name, x, y, k ? ink.colours.second : ink.colours.accent, k ? [4, 3] : []));
    if (at !== null) this.#cross(pen, ink, seconds[at], x(at), y, up, down);
  }

  #axes(pen, ink, width, up, down, seconds, high, x) {
    pen.font = `10.5px ${FAMILY}`;
    pen.strokeStyle = ink.colours.line;
    pen.fillStyle = ink.colours.quiet;
    pen.lineWidth = 1;
    pen.beginPath();
    for (const y of [up, down]) {
      pen.moveTo(0, Math.round(y) + 0.5);
      pen.lineTo(width, Math.round(y) + 0.5);
    }
    seconds.forEach(({ ago }, k) => {
      if (ago % (seconds.length / TICKS) || ago === seconds.length) return;
      pen.moveTo(Math.round(x(k)) + 0.5, down);
      pen.lineTo(Math.round(x(k)) + 0.5, down + 4);
    });
    pen.stroke();
    pen.textAlign = "left";
    pen.fillText(high, 0, up - 5);
    pen.fillText(`${seconds.length / 60} min ago`, 0, down + 13);
    pen.textAlign = "right";
    pen.fillText("now", width, down + 13);
  }

  #runs(seconds, name) {
    const runs = [];
    let run = null;
    seconds.forEach((entry, k) => {
      if (entry[name] === null) run = null;
      else if (run) run.push(k);
      else runs.push((run = [k]));
    });
    return runs;
  }

  #line(pen, seconds, name, x, y, colour, dash) {
    pen.strokeStyle = colour;
    pen.fillStyle = colour;
    pen.lineWidth = 1.5;
    pen.setLineDash(dash);
    for (const run of this.#runs(seconds, name)) {
      pen.beginPath();
      run.forEach((k, n) => (n ? pen.lineTo(x(k), y(seconds[k][name])) : pen.moveTo(x(k), y(seconds[k][name]))));
      pen.stroke();
      if (run.length === 1) pen.fillRect(x(run[0]) - 1, y(seconds[run[0]][name]) - 1, 2, 2); // a line of one point is none
    }
    pen.setLineDash([]);
  }

  #area(pen, ink, seconds, name, x, y, down) {
    pen.fillStyle = ink.colours.accent;
    pen.globalAlpha = 0.14;
    for (const run of this.#runs(seconds, name)) {
      pen.beginPath();
      pen.moveTo(x(run[0]), down);
      for (const k of run) pen.lineTo(x(k), y(seconds[k][name]));
      pen.lineTo(x(run.at(-1)), down);
      pen.fill();
    }
    pen.globalAlpha = 1;
  }

  #cross(pen, ink, entry, x, y, up, down) {
    pen.strokeStyle = ink.colours.text;
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(Math.round(x) + 0.5, up - 4);
    pen.lineTo(Math.round(x) + 0.5, down);
    pen.stroke();
    pen.fillStyle = ink.colours.text;
    for (const [name] of this.plot.lines) {
      if (entry[name] === null) continue;
      pen.beginPath();
      pen.arc(x, y(entry[name]), 3, 0, 7);
      pen.fill();
    }
  }
}

export class EnginePlots {
  #seconds = [];
  #at = null; // index of the moment looked at
  #isByKeys = false;
  #frame = 0;
  #isHeld = false;

  constructor(history, ink) {
    this.history = history;
    this.ink = ink;
    this.plots = PLOTS.map((plot) => new Plot(plot));
    this.moment = h("span", { class: "moment" }, "now");
    this.range = h("input", {
      type: "range",
      min: -MAX_SECONDS,
      max: -1,
      value: -1,
      "aria-label": "Moment in the plots",
      oninput: () => this.#look(this.#seconds.length + Number(this.range.value), true),
      onblur: () => this.#look(null),
      onkeydown: (event) => event.key === "Escape" && this.#at !== null && (event.stopPropagation(), this.#look(null)),
    });
    this.grid = h(
      "div",
      {
        class: "plots",
        onpointermove: (event) => this.#point(event),
        onpointerdown: (event) => this.#point(event),
        onpointerleave: () => this.#isByKeys || this.#look(null),
      },
      ...this.plots.map(({ element }) => element),
    );
    this.body = h("tbody");
    const heads = ["Seconds ago", ...COLUMNS.map(({ title }) => title)].map((title) => h("th", { scope: "col" }, title));
    const table = h("table", { "aria-label": "The plots as numbers" }, h("thead", {}, h("tr", {}, ...heads)), this.body);
    this.table = h("div", { class: "table-scroll", hidden: true, tabindex: "0", role: "region", "aria-label": "The plots as numbers" }, table);
    this.toggle = h("button", { type: "button", class: "button small", "aria-pressed": "false", onclick: () => this.#showTable(this.table.hidden) }, "Table");
    this.choice = h("label", { class: "choice" }, this.moment, this.range);
    const head = h("div", { class: "part-head" }, h("h3", {}, "Last minutes"), this.choice, this.toggle);
    this.element = h("section", { class: "plots-part", "aria-label": "Plots" }, head, this.grid, this.table);
    this.resized = new ResizeObserver(() => this.redraw());
    this.resized.observe(this.grid);
    this.#describe();
  }

  hold(isHeld) {
    this.#isHeld = isHeld;
    if (!isHeld) this.update();
  }

  /** A second is over. What is looked at stays the same moment as long as it is there. */
  update() {
    if (this.#isHeld || this.#at !== null) return;
    this.#seconds = this.history.seconds(SPANS_S.find((span) => span >= Math.min(MAX_SECONDS, this.history.numSeconds)));
    this.range.min = String(-this.#seconds.length);
    this.#describe();
    this.redraw();
    if (!this.table.hidden) this.#drawTable();
  }

  redraw() {
    if (!this.#frame) this.#frame = requestAnimationFrame(() => this.#draw());
  }

  gone() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
  }

  #draw() {
    this.#frame = 0;
    if (this.table.hidden && this.grid.clientWidth) {
      for (const plot of this.plots) plot.show(this.#seconds, this.#at, this.ink, plot.plot.top?.(this.history));
    }
  }

  #look(at, isByKeys = false) {
    this.#isByKeys = isByKeys && at !== null;
    if (at === this.#at || (at !== null && !this.#seconds.length)) return;
    this.#at = at;
    if (at === null) return this.update();
    this.#describe();
    this.redraw();
  }

  #point(event) {
    const canvas = event.target.closest(".plot")?.querySelector("canvas");
    if (!canvas || !this.#seconds.length) return this.#isByKeys || this.#look(null);
    const { left, width } = canvas.getBoundingClientRect();
    const at = Math.floor(((event.clientX - left) / width) * this.#seconds.length);
    this.#look(Math.min(this.#seconds.length - 1, Math.max(0, at)));
  }

  #describe() {
    const entry = this.#at === null ? null : this.#seconds[this.#at];
    this.moment.textContent = entry ? `${count(entry.ago)} s ago` : "now";
    const words = entry && COLUMNS.map(({ name, title, told }) => `${title}: ${entry[name] === null ? "not known" : told(entry[name])}`);
    this.range.value = String(entry ? -entry.ago : -1);
    this.range.setAttribute("aria-valuetext", entry ? `${entry.ago} seconds ago. ${words.join(". ")}` : "Now");
  }

  #showTable(isTable) {
    this.toggle.setAttribute("aria-pressed", String(isTable));
    this.table.hidden = !isTable;
    this.grid.hidden = isTable;
    this.choice.hidden = isTable;
    if (isTable) this.#drawTable();
    else this.redraw();
  }

  #drawTable() {
    const rows = [];
    for (let to = this.#seconds.length; to > 0; to -= TABLE_S) {
      const part = this.#seconds.slice(to - TABLE_S, to);
      const cells = COLUMNS.map(({ name, told }) => toldOf(told, summed(name, part.map((entry) => entry[name]).filter((value) => value !== null))));
      rows.push(h("tr", {}, h("th", { scope: "row" }, `${part.at(-1).ago}–${part[0].ago}`), ...cells.map((cell) => h("td", {}, cell))));
    }
    this.body.replaceChildren(...rows);
  }
}

/** Some seconds as one number: rates as their mean, all else as the highest; null of none. */
function summed(name, values) {
  if (!values.length) return null;
  return name === "in" || name === "out" ? values.reduce((sum, value) => sum + value, 0) / values.length : Math.max(...values);
}
