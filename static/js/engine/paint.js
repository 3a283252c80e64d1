/**
 * What drawings of the engine share: kinds of work with their words, and ink that is right for the theme and never only a colour.
 *
 * Colours come from css/engine.css by the elements of a legend, whose computed colour is what the theme, forced colours included,
 * makes of it. Knows nothing of steps over time.
 */

import { h } from "../ui/dom.js";
import { count } from "../ui/numbers.js";

/** Kinds of work in a step, from the bottom of a bar up. `pattern` tells them apart without colour. */
export const KINDS = [
  { name: "decode", title: "Answer tokens", pattern: "solid" },
  { name: "accepted", title: "Guesses that were right", pattern: "dots" },
  { name: "rejected", title: "Guesses that were wrong", pattern: "hollow" },
  { name: "jumped", title: "Tokens forced by a grammar", pattern: "lines" },
  { name: "prefill", title: "Prompt tokens", pattern: "hatch" },
  { name: "encode", title: "Pictures and sounds encoded", pattern: "cross" },
];

const TILE = 6; // css pixels

/** Letters on a canvas, as around it. */
export const FAMILY = getComputedStyle(document.body).fontFamily;

/** A pattern in this colour over the ground. */
function tile(pattern, colour, ground, ratio) {
  const size = TILE * ratio;
  const canvas = h("canvas", { width: size, height: size });
  const pen = canvas.getContext("2d");
  pen.fillStyle = pattern === "hollow" || pattern === "cross" ? ground : colour;
  pen.fillRect(0, 0, size, size);
  pen.strokeStyle = pattern === "cross" || pattern === "hollow" ? colour : ground;
  pen.fillStyle = ground;
  pen.lineWidth = 1.25 * ratio;
  const line = (...points) => {
    pen.beginPath();
    for (let k = 0; k < points.length; k += 4) {
      pen.moveTo(points[k] * size, points[k + 1] * size);
      pen.lineTo(points[k + 2] * size, points[k + 3] * size);
    }
    pen.stroke();
  };
  if (pattern === "hatch") line(-0.5, 0.5, 0.5, -0.5, 0, 1, 1, 0, 0.5, 1.5, 1.5, 0.5);
  if (pattern === "cross") line(0, 1, 1, 0, 0, 0, 1, 1);
  if (pattern === "lines") line(0, 0.25, 1, 0.25, 0, 0.75, 1, 0.75);
  if (pattern === "dots") [[0.25, 0.25], [0.75, 0.75]].forEach(([x, y]) => pen.fillRect(x * size - ratio, y * size - ratio, 2 * ratio, 2 * ratio));
  return canvas;
}

/** Ink of the theme that is on: one fill for each kind, and plain colours by name. Made anew when the theme changes. */
export class Ink {
  #ended = new AbortController();

  /** `probe`: an element inside the view; its class names set colours. */
  constructor(probe) {
    this.probe = probe;
    this.colours = {};
    this.fills = {};
  }

  /** Calls `fn` whenever the ink has changed, until the signal ends. */
  watch(fn) {
    this.#ended.abort();
    this.#ended = new AbortController();
    const { signal } = this.#ended;
    const again = () => {
      this.mix();
      fn();
    };
    for (const query of ["(prefers-color-scheme: dark)", "(forced-colors: active)", "(prefers-contrast: more)"]) {
      matchMedia(query).addEventListener("change", again, { signal });
    }
    const theme = new MutationObserver(again);
    theme.observe(document.documentElement, { attributeFilter: ["data-theme"] });
    signal.addEventListener("abort", () => theme.disconnect());
    again();
  }

  stop() {
    this.#ended.abort();
  }

  mix() {
    this.ratio = Math.min(3, Math.max(1, devicePixelRatio));
    const of = (name) => {
      this.probe.dataset.ink = name;
      return getComputedStyle(this.probe).color;
    };
    for (const name of ["ground", "text", "quiet", "line", "accent", "second", "bad", ...KINDS.map((kind) => kind.name)]) this.colours[name] = of(name);
    const pen = h("canvas").getContext("2d");
    for (const { name, pattern } of KINDS) {
      const fill = pattern === "solid" ? this.colours[name] : pen.createPattern(tile(pattern, this.colours[name], this.colours.ground, this.ratio), "repeat");
      if (pattern !== "solid") fill.setTransform(new DOMMatrix().scale(1 / this.ratio));
      this.fills[name] = fill;
    }
  }

  /** A block of one kind, with an edge where its fill alone would be too pale. */
  block(pen, name, x, y, width, height) {
    pen.fillStyle = this.fills[name];
    pen.fillRect(x, y, width, height);
    if (this.fills[name] === this.colours[name] || width < 3 || height < 3) return;
    pen.strokeStyle = this.colours[name];
    pen.lineWidth = 1;
    pen.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
  }
}

/** Makes a canvas as large as it is shown, sharp, and empty; returns its pen and size in css pixels. */
export function blank(canvas, ratio) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const [w, tall] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== tall) Object.assign(canvas, { width: w, height: tall });
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}

const ROUND = [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10];

/** The smallest round number that is not below. */
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return ROUND.map((k) => k * power).find((step) => step >= value * 0.9999);
}

/** "412", "12.3", "0.42": three figures at most. */
export const figure = (n) => (n === null ? "–" : n >= 100 || Number.isInteger(n) ? count(n) : n >= 10 ? n.toFixed(1) : n.toFixed(2));
