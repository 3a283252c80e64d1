/**
 * The engine strip: one bar for each of the last steps, as high as the step took milliseconds, filled with what it did.
 *
 * Owns the drawing, scrolling back and the chosen step. New steps come in at the right. While somebody looks closer (a pointer over
 * it, a step chosen by keys, scrolled back, or held by its owner) it shows what it showed. Only the bars in sight are drawn, and only
 * when something changed. Knows nothing of where steps come from.
 */

import { h } from "../ui/dom.js";
import { count } from "../ui/numbers.js";
import { COLUMNS, factsOf, secondsText, summaryOf } from "./facts.js";
import { blank, FAMILY, figure, KINDS, roundUp } from "./paint.js";

const WIDTHS = [3, 5, 8, 12]; // of a step with what is free beside it, in css pixels
const IDLE = 30; // width of a pause between steps
const IDLE_S = 0.1; // shorter ones are no pauses
const GUTTER = 54; // left, for the numbers of the axis
const BATCH = { top: 18, bottom: 58 };
const TIME = { top: 72, bottom: 190 };
const END_PX = 3;
const PAGE_STEPS = 20;
const TABLE_STEPS = 100;
const CALM_MS = 900; // words that change faster cannot be read
const HINT = "Point at a step, tap it, or use the arrow keys, to see what it did.";

/** How much of each kind of work a step had, in tokens; an encoded picture counts as 64. */
const workOf = (step) => ({
  decode: step.decode_rows,
  accepted: step.accepted,
  rejected: step.drafted - step.accepted,
  jumped: step.jumped,
  prefill: step.prompt_tokens,
  encode: step.encodes * 64,
});

/** The pause before a step in which the engine had nothing to do, in seconds. */
function idleBefore(step, before) {
  const idle = before ? step.time_s - step.ms / 1000 - before.time_s : 0;
  return idle >= IDLE_S && step.step === before.step + 1 ? idle : 0;
}

export class EngineStrip {
  #steps = []; // what is shown
  #places = []; // left edge of each
  #width = 0;
  #chosen = null; // number of a step
  #hovered = null;
  #isBack = false; // scrolled
  #isHeld = false;
  #frame = 0;
  #zoom = 2; // index of WIDTHS
  #wordsAt = -Infinity; // when words were last renewed

  /** `onHold(isHeld)` is told when the strip begins or ends to stand still by itself. */
  constructor(history, ink, onHold) {
    this.history = history;
    this.ink = ink;
    this.onHold = onHold;
    this.canvas = h("canvas", { class: "strip-canvas", "aria-hidden": "true" });
    this.space = h("div", { class: "strip-space" }, this.canvas);
    this.scroller = h(
      "div",
      {
        class: "strip",
        role: "slider",
        tabindex: "0",
        "aria-label": "Steps of the engine",
        "aria-orientation": "horizontal",
        "aria-describedby": "strip-help",
        onkeydown: (event) => this.#key(event),
        onscroll: () => this.#scrolled(),
        onpointermove: (event) => this.#hover(event),
        onpointerleave: () => this.#hover(null),
        onclick: (event) => this.choose(this.#stepAt(event) ?? this.#nearest(event)),
      },
      this.space,
    );
    this.facts = h("dl", { class: "facts" });
    this.hint = h("p", { class: "note" }, HINT);
    const zoom = (title, sign, by) => h("button", { type: "button", class: "button small", "aria-label": title, title, onclick: () => this.#zoomed(by) }, sign);
    this.zooms = [zoom("Narrower bars", "−", -1), zoom("Wider bars", "+", 1)];
    this.empty = h("p", { class: "strip-empty" }, "No step yet. Send a message, or a request to the API, and each step of the engine becomes a bar here.");
    this.tableBody = h("tbody");
    this.table = h(
      "details",
      { class: "twin", ontoggle: () => this.#drawTable(true) },
      h("summary", {}, "Steps as a table"),
      h(
        "div",
        { class: "table-scroll", tabindex: "0", role: "region", "aria-label": "Steps as a table" },
        h("table", {}, h("thead", {}, h("tr", {}, ...COLUMNS.map(([title]) => h("th", { scope: "col" }, title)))), this.tableBody),
      ),
    );
    this.help = h("p", { class: "hidden", id: "strip-help" }, "Arrow keys choose a step, Page Up and Page Down jump, Home and End go to the oldest and newest, Escape goes on live.");
    this.element = h("div", { class: "strip-part" }, h("div", { class: "strip-frame" }, this.scroller, this.empty), h("div", { class: "facts-box" }, this.facts, this.hint), this.help, this.table);
    this.resized = new ResizeObserver(() => this.#layout());
    this.resized.observe(this.scroller);
    this.#describe();
  }

  get isHeldByReader() {
    return this.#isBack || this.#chosen !== null || this.#hovered !== null;
  }

  /** From now on it stands still, or goes on. */
  hold(isHeld) {
    this.#isHeld = isHeld;
    if (!isHeld) this.release();
  }

  /** Shows the newest steps again. */
  release() {
    this.#isBack = false;
    this.#chosen = null;
    this.#hovered = null;
    this.update();
    this.scroller.scrollLeft = this.scroller.scrollWidth;
    this.#told();
  }

  /** There are new steps. */
  update() {
    if (this.#isHeld || this.isHeldByReader) return;
    this.#steps = this.history.steps;
    this.empty.hidden = this.#steps.length > 0;
    this.canvas.hidden = !this.#steps.length;
    this.#layout();
    const now = performance.now();
    if (now - this.#wordsAt < CALM_MS) return;
    this.#wordsAt = now;
    this.#describe();
    this.#drawTable();
  }

  redraw() {
    if (!this.#frame) this.#frame = requestAnimationFrame(() => this.#draw());
  }

  gone() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
  }

  /** Chooses a step by its number: it is marked, its facts are shown, and the strip stands still. Null chooses none. */
  choose(number) {
    if (number === this.#chosen) return;
    this.#chosen = number;
    if (number !== null) this.#reveal(number);
    this.#told();
    if (!this.isHeldByReader) this.update();
  }

  #layout() {
    let x = 0;
    this.#places = this.#steps.map((step, k) => {
      if (idleBefore(step, this.#steps[k - 1])) x += IDLE;
      x += this.#column;
      return x - this.#column;
    });
    const inSight = this.scroller.clientWidth - GUTTER;
    this.#width = Math.max(x, inSight);
    for (let k = 0; x < inSight && k < this.#places.length; k += 1) this.#places[k] += inSight - x;
    this.space.style.width = `${this.#width + GUTTER}px`;
    this.canvas.style.width = `${this.scroller.clientWidth}px`;
    if (!this.#isBack && this.#chosen === null && this.#hovered === null) this.scroller.scrollLeft = this.#width;
    this.redraw();
  }

  #zoomed(by) {
    this.#zoom = Math.min(WIDTHS.length - 1, Math.max(0, this.#zoom + by));
    this.zooms.forEach((button, k) => button.setAttribute("aria-disabled", String(this.#zoom === (k ? WIDTHS.length - 1 : 0))));
    this.#layout();
    if (this.#chosen !== null) this.#reveal(this.#chosen);
  }

  /** Width of a step now. */
  get #column() {
    return WIDTHS[this.#zoom];
  }

  get #bar() {
    return this.#column - (this.#zoom > 1 ? 2 : 1);
  }

  // ------------------------------------------------------------------------------------------------------ looking closer

  #scrolled() {
    const isBack = this.scroller.scrollLeft < this.scroller.scrollWidth - this.scroller.clientWidth - END_PX;
    if (isBack !== this.#isBack && !(isBack && this.#isHeld)) {
      this.#isBack = isBack;
      this.#told();
      if (!this.isHeldByReader) this.update();
    }
    this.redraw();
  }

  #hover(event) {
    const number = event?.pointerType === "touch" ? null : event && this.#stepAt(event);
    if (number === this.#hovered) return;
    this.#hovered = number;
    this.#told();
    if (number === null && !this.isHeldByReader) this.update();
  }

  #xOf(event) {
    return event.clientX - this.scroller.getBoundingClientRect().left - GUTTER + this.scroller.scrollLeft;
  }

  /** A finger on a pause, or beside the first steps, means the step next to it. */
  #nearest(event) {
    const distance = (k) => Math.abs(this.#places[k] + this.#column / 2 - this.#xOf(event));
    const nearest = this.#steps.reduce((best, _, k) => (distance(k) < distance(best) ? k : best), 0);
    return this.#steps[nearest]?.step ?? null;
  }

  #stepAt(event) {
    const x = this.#xOf(event);
    const k = this.#places.findIndex((left) => x >= left - 1 && x < left + this.#column - 1);
    return k < 0 ? null : this.#steps[k].step;
  }

  #key(event) {
    const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageUp: -PAGE_STEPS, PageDown: PAGE_STEPS, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape" && this.isHeldByReader) {
      event.stopPropagation();
      this.release();
    }
    if (!by || !this.#steps.length) return;
    event.preventDefault();
    const last = this.#steps.length - 1;
    const at = this.#steps.findIndex(({ step }) => step === this.#chosen);
    const to = at < 0 && by > -Infinity ? last : Math.min(last, Math.max(0, at + by));
    this.choose(this.#steps[to].step);
  }

  #reveal(number) {
    const left = this.#places[this.#steps.findIndex(({ step }) => step === number)];
    const { scrollLeft, clientWidth } = this.scroller;
    if (left < scrollLeft) this.scroller.scrollLeft = left - this.#column * 2;
    else if (left + this.#column > scrollLeft + clientWidth - GUTTER) this.scroller.scrollLeft = left + this.#column * 3 - clientWidth + GUTTER;
  }

  #told() {
    this.#describe();
    this.#drawTable();
    this.redraw();
    this.onHold(this.isHeldByReader);
  }

  /** The facts of the step that is looked at, for eyes and ears. */
  #describe() {
    const number = this.#hovered ?? this.#chosen;
    const step = this.#steps.find((one) => one.step === number);
    const facts = step ? factsOf(step, { nowS: this.history.nowS, totalTokens: this.history.load?.total_tokens }) : summaryOf(this.#steps);
    this.facts.replaceChildren(...facts.map(([name, words]) => h("div", {}, h("dt", {}, name), h("dd", {}, words))));
    this.facts.hidden = !facts.length;
    this.hint.hidden = Boolean(step);
    const set = (name, value) => this.scroller.setAttribute(`aria-${name}`, String(value));
    const chosen = this.#steps.findIndex((one) => one.step === this.#chosen);
    set("valuemin", chosen < 0 ? 0 : this.#steps[0].step);
    set("valuemax", chosen < 0 ? 0 : this.#steps.at(-1).step);
    set("valuenow", chosen < 0 ? 0 : this.#chosen);
    set("valuetext", step && number === this.#chosen ? facts.map((fact) => fact.join(": ")).join(". ") : "Live, no step chosen");
  }

  #drawTable(isNow = false) {
    if (!this.table.open || (!isNow && !this.element.isConnected)) return;
    const rows = this.#steps.slice(-TABLE_STEPS).reverse();
    this.tableBody.replaceChildren(...rows.map((step) => h("tr", {}, ...COLUMNS.map(([, told], k) => h(k ? "td" : "th", k ? {} : { scope: "row" }, told(step))))));
  }

  // -------------------------------------------------------------------------------------------------------------- drawing

  #draw() {
    this.#frame = 0;
    if (!this.scroller.clientWidth) return;
    const { pen, width } = blank(this.canvas, this.ink.ratio);
    const from = this.scroller.scrollLeft;
    const inSight = this.#steps.map((step, k) => ({ step, k, x: this.#places[k] - from + GUTTER })).filter(({ x }) => x > GUTTER - this.#column && x < width);
    const maxMs = roundUp(Math.max(1, ...inSight.map(({ step }) => step.ms)));
    const maxRows = roundUp(Math.max(2, ...inSight.map(({ step }) => Math.max(step.decode_rows + step.prompt_rows, step.waiting))));
    const yMs = (ms) => TIME.bottom - ((TIME.bottom - TIME.top) * ms) / maxMs;
    const yRows = (rows) => BATCH.bottom - ((BATCH.bottom - BATCH.top) * Math.min(rows, maxRows)) / maxRows;
    this.#drawAxes(pen, width, maxMs, maxRows);
    pen.save();
    pen.beginPath();
    pen.rect(GUTTER, 0, width - GUTTER, TIME.bottom + 20);
    pen.clip();
    for (const bar of inSight) this.#drawBar(pen, bar, yMs);
    this.#drawLine(pen, inSight, ({ step }) => yRows(step.decode_rows + step.prompt_rows), this.ink.colours.text, []);
    if (inSight.some(({ step }) => step.waiting)) this.#drawLine(pen, inSight, ({ step }) => yRows(step.waiting), this.ink.colours.second, [3, 3]);
    this.#drawTimes(pen, inSight);
    pen.restore();
  }

  #drawAxes(pen, width, maxMs, maxRows) {
    const { line, quiet } = this.ink.colours;
    pen.font = `11px ${FAMILY}`;
    pen.fillStyle = quiet;
    pen.strokeStyle = line;
    pen.lineWidth = 1;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    const rule = (y, text) => {
      pen.beginPath();
      pen.moveTo(GUTTER, Math.round(y) + 0.5);
      pen.lineTo(width, Math.round(y) + 0.5);
      pen.stroke();
      pen.fillText(text, GUTTER - 6, y);
    };
    rule(TIME.bottom, "0");
    rule((TIME.top + TIME.bottom) / 2, figure(maxMs / 2));
    rule(TIME.top, `${figure(maxMs)} ms`);
    rule(BATCH.bottom, "0");
    rule(BATCH.top, count(maxRows));
  }

  #drawBar(pen, { step, k, x }, yMs) {
    const idle = idleBefore(step, this.#steps[k - 1]);
    if (idle) this.#drawIdle(pen, x - IDLE, idle);
    const isLookedAt = step.step === (this.#hovered ?? this.#chosen);
    if (isLookedAt) {
      pen.fillStyle = this.ink.colours.accent;
      pen.globalAlpha = 0.16;
      pen.fillRect(x - 1, BATCH.top - 8, this.#column, TIME.bottom - BATCH.top + 8);
      pen.globalAlpha = 1;
    }
    const work = workOf(step);
    const total = KINDS.reduce((sum, { name }) => sum + Math.sqrt(work[name]), 0);
    const height = Math.max(1.5, TIME.bottom - yMs(step.ms));
    let y = TIME.bottom;
    for (const { name } of KINDS) {
      const part = total ? (height * Math.sqrt(work[name])) / total : 0;
      if (part > 0) this.ink.block(pen, name, x, y - part, this.#bar, part);
      y -= part;
    }
    if (isLookedAt) {
      pen.strokeStyle = this.ink.colours.text;
      pen.lineWidth = 1.5;
      pen.strokeRect(x - 1, TIME.bottom - height - 1, this.#bar + 2, height + 1);
    }
    if (step.preemptions) this.#drawPreempted(pen, x + this.#bar / 2, TIME.bottom - height - 4);
  }

  #drawIdle(pen, x, idle) {
    const middle = x + IDLE / 2 - 1;
    pen.strokeStyle = this.ink.colours.quiet;
    pen.setLineDash([2, 4]);
    pen.beginPath();
    pen.moveTo(middle, TIME.top + 20);
    pen.lineTo(middle, TIME.bottom);
    pen.stroke();
    pen.setLineDash([]);
    pen.fillStyle = this.ink.colours.quiet;
    pen.textAlign = "center";
    pen.fillText(secondsText(idle), middle, TIME.top + 10);
  }

  #drawPreempted(pen, x, y) {
    pen.fillStyle = this.ink.colours.bad;
    pen.beginPath();
    pen.moveTo(x, y);
    pen.lineTo(x - 5, y - 8);
    pen.lineTo(x + 5, y - 8);
    pen.fill();
  }

  #drawLine(pen, inSight, y, colour, dash) {
    pen.strokeStyle = colour;
    pen.lineWidth = 1.5;
    pen.setLineDash(dash);
    pen.beginPath();
    let before = null;
    for (const bar of inSight) {
      if (!before || bar.x - before.x > this.#column) pen.moveTo(bar.x, y(bar));
      pen.lineTo(bar.x, y(bar));
      pen.lineTo(bar.x + this.#column, y(bar));
      before = bar;
    }
    pen.stroke();
    pen.setLineDash([]);
  }

  /** How long ago, now and then, below the bars. */
  #drawTimes(pen, inSight) {
    pen.fillStyle = this.ink.colours.quiet;
    pen.textAlign = "right";
    let free = Infinity;
    for (const { step, x } of inSight.toReversed()) {
      if (x + this.#bar > free || x + this.#bar < GUTTER + 40) continue;
      const ago = this.#steps.at(-1).time_s - step.time_s;
      pen.fillText(ago > 0 ? `−${secondsText(ago)}` : "newest", x + this.#bar, TIME.bottom + 11);
      free = x - 84;
    }
  }
}
