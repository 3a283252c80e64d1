/**
 * An answer as running text, each token on the ground of its probability; any length, of which only what is near the window is in
 * the page.
 *
 * A listbox: it holds the focus on one token at a time, arrow keys move it. Owns which tokens are mounted and which one is looked
 * at. Knows nothing of what is shown of that one.
 */

import { h, nodesOf } from "../ui/dom.js";
import { percent, probability, stepOf, wordText } from "./texts.js";

const SOFT = 64; // tokens of a block, after which a line break ends it
const HARD = 400;
const LINE_PX = 26; // a guess of what is not laid out yet, as is the next
const CHARS_A_LINE = 48;
const KINDS = ["", ", guessed ahead", ", forced by the form of the answer"];

export class TokenFlow {
  #texts = null;
  #blocks = []; // {from, to, element, isMounted}
  chosen = -1;

  /** `on.look(index)`: this one is pointed at, -1: none is; `on.choose(index)`: the reader stays at this one. */
  constructor(on) {
    this.on = on;
    this.element = h("div", { class: "token-flow", role: "listbox", "aria-label": "Tokens of the answer", "aria-orientation": "horizontal" });
    this.watch = new IntersectionObserver((entries) => entries.forEach((entry) => this.#seen(entry)), { root: this.element, rootMargin: "600px 0px" });
    const of = (event) => event.target.closest?.(".token");
    this.element.addEventListener("pointerover", (event) => of(event) && this.on.look(Number(of(event).dataset.index)));
    this.element.addEventListener("pointerleave", () => this.on.look(-1));
    this.element.addEventListener("click", (event) => of(event) && this.choose(Number(of(event).dataset.index)));
    this.element.addEventListener("focusin", (event) => of(event) && this.#choose(Number(of(event).dataset.index)));
    this.element.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Shows these; the same ones once more show what they have gained. */
  show(texts) {
    if (texts !== this.#texts) {
      this.watch.disconnect();
      this.#texts = texts;
      this.#blocks = [];
      this.chosen = texts?.length ? 0 : -1;
      this.element.replaceChildren();
      this.element.scrollTop = 0;
    }
    if (texts) this.#grow();
  }

  /** Looks at this token and puts the focus on it. */
  choose(index) {
    const block = this.#blockOf(index);
    if (!block) return;
    this.#choose(index);
    this.#mount(block);
    const token = this.#elementOf(index);
    token.focus({ preventScroll: true });
    token.scrollIntoView({ block: "nearest" });
  }

  // ------------------------------------------------------------------------------------------------------------- blocks

  #grow() {
    const texts = this.#texts;
    const last = this.#blocks.at(-1);
    let from = last ? last.from : 0;
    if (last && last.to < texts.length) this.#drop(this.#blocks.pop()); // it may go on
    else if (last) return;
    while (from < texts.length) {
      const to = this.#endOf(from);
      const block = { from, to, element: h("div", { class: "token-block", role: "presentation" }), isMounted: false };
      block.element.style.height = `${this.#guess(block)}px`;
      this.#blocks.push(block);
      this.element.append(block.element);
      this.watch.observe(block.element);
      from = to;
    }
    if (this.chosen < 0) this.#choose(0);
    const chosen = this.#blockOf(this.chosen);
    if (chosen) this.#mount(chosen); // so that the listbox can be entered
  }

  #endOf(from) {
    const { texts, length } = this.#texts;
    const end = Math.min(length, from + HARD);
    for (let k = from + SOFT; k < end; k += 1) if (texts[k].includes("\n")) return k + 1;
    return end;
  }

  #guess({ from, to }) {
    const lines = this.#texts.texts.slice(from, to).join("").split("\n");
    return LINE_PX * lines.reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / CHARS_A_LINE)), 0);
  }

  #blockOf(index) {
    return this.#blocks.find(({ from, to }) => from <= index && index < to);
  }

  #seen({ target, isIntersecting }) {
    const block = this.#blocks.find(({ element }) => element === target);
    if (!block) return;
    if (isIntersecting) this.#mount(block);
    else if (block.isMounted && this.#blockOf(this.chosen) !== block) {
      target.style.height = `${target.offsetHeight}px`;
      target.replaceChildren();
      block.isMounted = false;
    }
  }

  #mount(block) {
    if (block.isMounted) return;
    block.isMounted = true;
    const kinds = this.#texts.kinds(block.from, block.to);
    block.element.style.height = "";
    block.element.replaceChildren(...kinds.map((kind, k) => this.#token(block.from + k, kind)));
  }

  #drop({ element }) {
    this.watch.unobserve(element);
    element.remove();
  }

  // -------------------------------------------------------------------------------------------------------------- tokens

  #token(index, kind) {
    const { log, texts, length } = this.#texts;
    const [word, logprob] = log.list[index];
    const text = texts[index];
    const isChosen = index === this.chosen;
    return h(
      "span",
      {
        class: `token step-${stepOf(logprob)}${kind ? ` kind-${kind}` : ""}`,
        role: "option",
        tabindex: isChosen ? "0" : "-1",
        "data-index": index,
        "data-sign": text ? (/^[\r\n]+$/.test(text) ? "⏎" : null) : wordText(word),
        "aria-selected": String(isChosen),
        "aria-posinset": index + 1,
        "aria-setsize": length,
        "aria-label": `${wordText(word)}, ${percent(probability(logprob))}${KINDS[kind]}`,
      },
      ...nodesOf(text),
    );
  }

  #elementOf(index) {
    return this.element.querySelector(`[data-index="${index}"]`);
  }

  #choose(index) {
    if (index !== this.chosen) {
      const before = this.#elementOf(this.chosen);
      before?.setAttribute("aria-selected", "false");
      if (before) before.tabIndex = -1;
      this.chosen = index;
    }
    const now = this.#elementOf(index);
    now?.setAttribute("aria-selected", "true");
    if (now) now.tabIndex = 0;
    this.on.choose(index);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.#texts?.length) return;
    const last = this.#texts.length - 1;
    const to = {
      ArrowRight: () => this.chosen + 1,
      ArrowLeft: () => this.chosen - 1,
      ArrowDown: () => this.#inLine(1),
      ArrowUp: () => this.#inLine(-1),
      Home: () => 0,
      End: () => last,
    }[event.key]?.();
    if (to === undefined) return;
    event.preventDefault();
    this.choose(Math.max(0, Math.min(last, to)));
  }

  /** The token below (1) or above (-1) the chosen one; where there is none, the one after or before it. */
  #inLine(direction) {
    const start = this.#elementOf(this.chosen)?.getClientRects()[0];
    let best = this.chosen + direction;
    if (!start) return best;
    let [line, least] = [null, Infinity];
    for (let k = this.chosen + direction; ; k += direction) {
      const block = this.#blockOf(k);
      if (!block) return best;
      this.#mount(block);
      const place = this.#elementOf(k).getClientRects()[0];
      if (!place || Math.abs(place.top - start.top) < place.height / 2) continue;
      line ??= place.top;
      if (Math.abs(place.top - line) > place.height / 2) return best; // a line further
      const distance = Math.abs(place.left - start.left);
      if (distance < least) [best, least] = [k, distance];
    }
  }
}
