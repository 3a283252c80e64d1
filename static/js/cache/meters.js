/**
 * The cache in numbers: what its memory holds now, how much of prompts it knew, and both over the last minutes.
 *
 * Owns what is remembered of the last minutes, one entry a second. A second that was not watched is a gap. Knows what
 * GET /engine/steps answers, and nothing of the tree.
 */

import { h, svg } from "../ui/dom.js";
import { count, plural } from "../ui/numbers.js";
import { percent } from "./words.js";

const SECONDS = 300;
const WINDOW_S = 30; // prompts are rare: the share of one second would jump
const [WIDTH, HEIGHT] = [300, 36];
const PARTS = [
  { name: "pinned", title: "Pinned", about: "kept until it is unpinned" },
  { name: "used", title: "In use", about: "running requests stand on it" },
  { name: "kept", title: "Kept for reuse", about: "makes room when it is needed" },
  { name: "free", title: "Free", about: "nothing is in it" },
];

/** What each second of the last ones was like at its end. */
class Minutes {
  #seconds = new Map(); // second -> {held, seen, hit}
  #last = null; // number of the last step
  #now = 0;

  add({ now_s, columns, steps, last, load, missed }) {
    const at = Object.fromEntries(columns.map((name, k) => [name, k]));
    const isNew = this.#last !== null && (last < this.#last || now_s < this.#now);
    if (isNew) this.#seconds.clear();
    const first = steps[0]?.[at.step];
    const isWhole = this.#last !== null && !isNew && !missed && (first === undefined || first === this.#last + 1);
    let entry = isWhole ? this.#seconds.get(Math.floor(this.#now)) : null;
    let from = isWhole ? this.#now : (steps[0]?.[at.time_s] ?? now_s);
    const until = (second) => {
      // Nothing changes between steps.
      if (entry) for (let k = Math.max(Math.floor(from), Math.floor(now_s) - SECONDS); k < second; k += 1) this.#seconds.set(k, entry);
      from = second;
    };
    for (const row of steps) {
      const second = Math.floor(row[at.time_s]);
      until(second);
      entry = { held: load.total_tokens - row[at.free_tokens], seen: row[at.prompt_tokens_seen], hit: row[at.prompt_tokens_hit] };
      this.#seconds.set(second, entry);
    }
    until(Math.floor(now_s));
    this.#seconds.set(Math.floor(now_s), { seen: entry?.seen ?? null, hit: entry?.hit ?? null, held: load.total_tokens - load.free_tokens });
    this.#last = last;
    this.#now = now_s;
    for (const second of this.#seconds.keys()) if (second < now_s - SECONDS - WINDOW_S - 1) this.#seconds.delete(second);
  }

  /** The last seconds, oldest first: {held, rate}, null where unknown. */
  all() {
    const now = Math.floor(this.#now);
    return Array.from({ length: SECONDS }, (_, k) => {
      const second = now - SECONDS + 1 + k;
      const entry = this.#seconds.get(second);
      return { held: entry?.held ?? null, rate: entry ? this.#rate(second, entry) : null };
    });
  }

  #rate(second, { seen, hit }) {
    for (let back = WINDOW_S; back > 0; back -= 1) {
      const before = this.#seconds.get(second - back);
      if (before && before.seen !== null) return seen > before.seen ? (hit - before.hit) / (seen - before.seen) : null;
    }
    return null;
  }
}

/** A line over the last minutes. */
class Plot {
  constructor(title) {
    this.title = title;
    this.line = svg("path", { class: "plot-line" });
    this.area = svg("path", { class: "plot-area" });
    const base = svg("path", { class: "plot-base", d: `M0 ${HEIGHT - 0.5}H${WIDTH}` });
    this.picture = svg("svg", { class: "plot", role: "img", "aria-label": `${title}: nothing yet`, viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" }, base, this.area, this.line);
    this.now = h("strong", {}, "–");
    this.note = h("span", { class: "plot-note" });
    this.element = h("figure", { class: "plot-figure" }, h("figcaption", {}, h("span", {}, title), this.now, this.note), this.picture);
  }

  /** `values` are shares, null where there is none; `words` what they come to. */
  draw(values, { now, note, words = rangeOf(values) }) {
    const y = (value) => (HEIGHT - 1.5 - value * (HEIGHT - 3)).toFixed(1);
    const runs = [];
    values.forEach((value, k) => {
      if (value === null) return;
      if (values[k - 1] === null || k === 0) runs.push([]);
      runs.at(-1).push([(k * WIDTH) / (values.length - 1), value]);
    });
    const lineOf = (run) => `M${run.map(([x, value]) => `${x.toFixed(1)} ${y(value)}`).join("L")}${run.length === 1 ? "h1" : ""}`;
    this.line.setAttribute("d", runs.map(lineOf).join(""));
    this.area.setAttribute("d", runs.map((run) => `${lineOf(run)}L${run.at(-1)[0].toFixed(1)} ${HEIGHT}L${run[0][0].toFixed(1)} ${HEIGHT}Z`).join(""));
    this.now.textContent = now;
    this.note.textContent = note;
    this.picture.setAttribute("aria-label", `${this.title} over the last 5 minutes: ${words}`);
  }
}

function rangeOf(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? `lowest ${percent(Math.min(...known))}, highest ${percent(Math.max(...known))}` : "nothing yet";
}

export class CacheMeters {
  #minutes = new Minutes();
  #engine = null;

  constructor() {
    this.bars = PARTS.map(({ name }) => h("span", { class: `capacity-${name}` }));
    this.numbers = PARTS.map(() => h("strong", {}, "–"));
    const legend = PARTS.map(({ name, title, about }, k) =>
      h("li", { title: about }, h("span", { class: `swatch capacity-${name}`, "aria-hidden": "true" }), `${title} `, this.numbers[k]),
    );
    this.total = h("span", { class: "capacity-total" });
    this.hits = new Plot("Hit rate");
    this.memory = new Plot("Memory held");
    this.element = h(
      "section",
      { class: "cache-meters", "aria-label": "Memory and hit rate" },
      h(
        "div",
        { class: "capacity" },
        h("div", { class: "capacity-bar", "aria-hidden": "true" }, ...this.bars),
        h("ul", { class: "capacity-legend", "aria-label": "Memory, in tokens" }, ...legend, h("li", {}, this.total)),
      ),
      this.hits.element,
      this.memory.element,
    );
  }

  /** What GET /cache/tree counts. */
  showMemory({ total_tokens, free_tokens, evictable_tokens, pinned_tokens }) {
    const held = total_tokens - free_tokens - evictable_tokens; // by requests, by pins or by both
    const pinned = Math.min(pinned_tokens, held);
    [pinned, held - pinned, evictable_tokens, free_tokens].forEach((tokens, k) => {
      this.bars[k].style.flexGrow = tokens;
      this.bars[k].hidden = tokens === 0;
      this.numbers[k].textContent = count(tokens);
    });
    this.total.textContent = `of ${count(total_tokens)} tokens`;
  }

  /** What GET /engine/steps answers. */
  showEngine(engine) {
    this.#minutes.add(engine);
    this.#engine = engine;
    this.draw();
  }

  draw() {
    if (!this.#engine) return;
    const { hit_rate } = this.#engine;
    const seconds = this.#minutes.all();
    const { rate, held } = seconds.at(-1);
    this.hits.draw(seconds.map((second) => second.rate), { now: rate === null ? "idle" : percent(rate), note: `overall ${percent(hit_rate)}` });
    const peak = Math.max(0, ...seconds.map((second) => second.held ?? 0));
    this.memory.draw(
      seconds.map((second) => (second.held === null ? null : second.held / Math.max(1, peak))),
      { now: count(held), note: `peak ${plural(peak, "token")}`, words: peak ? `up to ${plural(peak, "token")}, now ${count(held)}` : "none" },
    );
  }
}
