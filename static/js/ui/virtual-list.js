/**
 * A list of any length of which only the rows in sight are in the page, all of one height.
 *
 * A listbox as WAI-ARIA has it: it is focused as a whole, arrow keys move from row to row. Owns which rows exist and which one is
 * chosen. Knows nothing of what they show.
 */

import { h } from "./dom.js";

const SPARE_ROWS = 8; // on either side of what is seen
let numLists = 0;

export class VirtualList {
  #count = 0;
  #rows = new Map(); // index -> element
  #prefix = `row-${(numLists += 1)}`;
  #frame = 0;
  chosen = -1;

  /** `render(index)` gives a row's nodes, `onChoose(index)` is told which one is looked at. `rowHeight` in px. */
  constructor({ label, rowHeight, render, onChoose = () => {} }) {
    this.rowHeight = rowHeight;
    this.render = render;
    this.onChoose = onChoose;
    this.sizer = h("div", { class: "virtual-rows", role: "presentation" });
    this.element = h("div", { class: "virtual", role: "listbox", tabindex: "0", "aria-label": label }, this.sizer);
    this.element.addEventListener("scroll", () => (this.#frame ||= requestAnimationFrame(() => this.#draw())), { passive: true });
    this.element.addEventListener("keydown", (event) => this.#key(event));
    this.sizer.addEventListener("click", (event) => {
      const row = event.target.closest("[role=option]");
      if (row) this.choose(Number(row.dataset.index));
    });
    new ResizeObserver(() => this.#draw()).observe(this.element);
  }

  /** There are so many rows. `isSame`: those that were there show what they showed. A reader at the end stays there. */
  show(count, isSame = false) {
    const { scrollTop, clientHeight } = this.element;
    const wasAtEnd = this.#count > 0 && scrollTop > 0 && scrollTop + clientHeight > this.#count * this.rowHeight - 4;
    this.#count = count;
    if (!isSame) {
      this.chosen = -1;
      this.element.removeAttribute("aria-activedescendant");
      this.element.scrollTop = 0;
      this.#clear();
    }
    this.sizer.style.height = `${count * this.rowHeight}px`;
    if (isSame && wasAtEnd) this.element.scrollTop = count * this.rowHeight;
    this.#draw();
  }

  choose(index) {
    if (!this.#count) return;
    const before = this.#rows.get(this.chosen);
    before?.setAttribute("aria-selected", "false");
    this.chosen = Math.max(0, Math.min(this.#count - 1, index));
    const top = this.chosen * this.rowHeight;
    const { scrollTop, clientHeight } = this.element;
    if (top < scrollTop) this.element.scrollTop = top;
    else if (top + this.rowHeight > scrollTop + clientHeight) this.element.scrollTop = top + this.rowHeight - clientHeight;
    this.#draw();
    this.#rows.get(this.chosen)?.setAttribute("aria-selected", "true");
    this.element.setAttribute("aria-activedescendant", `${this.#prefix}-${this.chosen}`);
    this.onChoose(this.chosen);
  }

  #key(event) {
    const page = Math.max(1, Math.floor(this.element.clientHeight / this.rowHeight) - 1);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.choose(this.chosen < 0 ? (step > 0 && step < Infinity ? 0 : step > 0 ? this.#count - 1 : 0) : this.chosen + step);
  }

  #clear() {
    this.#rows.clear();
    this.sizer.replaceChildren();
  }

  #draw() {
    this.#frame = 0;
    const { scrollTop, clientHeight } = this.element;
    const first = Math.max(0, Math.floor(scrollTop / this.rowHeight) - SPARE_ROWS);
    const last = Math.min(this.#count, Math.ceil((scrollTop + clientHeight) / this.rowHeight) + SPARE_ROWS);
    for (const [index, row] of this.#rows) {
      const isWanted = (index >= first && index < last) || (index === this.chosen && index < this.#count);
      if (!isWanted) {
        row.remove();
        this.#rows.delete(index);
      } else if (row.getAttribute("aria-setsize") !== String(this.#count)) row.setAttribute("aria-setsize", String(this.#count));
    }
    const wanted = Array.from({ length: Math.max(0, last - first) }, (_, k) => first + k);
    if (this.chosen >= 0 && this.chosen < this.#count) wanted.push(this.chosen);
    for (const index of wanted) {
      if (this.#rows.has(index)) continue;
      const row = this.#row(index);
      this.#rows.set(index, row);
      this.sizer.append(row);
    }
  }

  #row(index) {
    const row = h(
      "div",
      {
        class: "virtual-row",
        role: "option",
        id: `${this.#prefix}-${index}`,
        "data-index": index,
        "aria-posinset": index + 1,
        "aria-setsize": this.#count,
        "aria-selected": String(index === this.chosen),
      },
      ...this.render(index),
    );
    row.style.top = `${index * this.rowHeight}px`;
    row.style.height = `${this.rowHeight}px`;
    return row;
  }
}
