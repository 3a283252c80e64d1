/**
 * How unsure the model was along an answer: one line, its peaks kept however long the answer is.
 *
 * The same is told in words beside it, and each token's number when it is looked at.
 */

import { h, svg } from "../ui/dom.js";

const WIDTH = 300; // points drawn at most
const HEIGHT = 40;

export class TokenChart {
  #length = 0;

  /** `onPick(index)` is told where somebody points and clicks; keys move in the text instead. */
  constructor(onPick) {
    this.line = svg("polyline", { class: "token-line", "vector-effect": "non-scaling-stroke" });
    this.mark = svg("line", { class: "token-mark", y1: "0", y2: String(HEIGHT), "vector-effect": "non-scaling-stroke" });
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true", class: "token-chart" }, this.mark, this.line);
    this.scale = h("span", { class: "token-scale", "aria-hidden": "true" });
    this.element = h("div", { class: "token-curve" }, this.svg, this.scale);
    this.svg.addEventListener("click", ({ offsetX }) => this.#length && onPick(Math.min(this.#length - 1, Math.floor((offsetX / this.svg.clientWidth) * this.#length))));
  }

  show(entropies) {
    this.#length = entropies.length;
    const count = Math.min(WIDTH, entropies.length);
    const peaks = Array.from({ length: count }, () => 0);
    entropies.forEach((bits, k) => {
      const at = Math.floor((k * count) / entropies.length);
      peaks[at] = Math.max(peaks[at], bits);
    });
    const top = Math.max(1, ...peaks);
    const points = peaks.map((bits, k) => `${(((k + 0.5) * WIDTH) / count).toFixed(1)},${(HEIGHT - 1 - ((HEIGHT - 2) * bits) / top).toFixed(1)}`);
    this.line.setAttribute("points", points.join(" "));
    this.scale.textContent = `${top.toFixed(1)} bits`;
  }

  point(index) {
    const x = index < 0 || !this.#length ? -10 : ((index + 0.5) * WIDTH) / this.#length;
    for (const name of ["x1", "x2"]) this.mark.setAttribute(name, x.toFixed(1));
  }
}
