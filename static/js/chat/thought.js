/**
 * What a model thought before it answered: folded, with how long it took.
 *
 * Owns that element. It is built when it is first opened, and grows only while it is open.
 */

import { MarkdownView } from "../text/render.js";
import { h } from "../ui/dom.js";

export class ThoughtView {
  #view = null;
  #numShown = 0;

  constructor(message) {
    this.message = message;
    this.summary = h("summary", {});
    this.body = h("div", { class: "thought-text", dir: "auto" });
    this.element = h("details", { class: "thought", ontoggle: () => this.grow() }, this.summary, this.body);
  }

  get #isThinking() {
    return this.message.state === "streaming" && !this.message.content;
  }

  /** Shows what it has become since the last time. */
  grow() {
    const { reasoning, thoughtMs } = this.message;
    const words = this.#isThinking ? "Thinking…" : thoughtMs ? `Thought for ${(thoughtMs / 1000).toFixed(1)} s` : "Thought";
    if (this.summary.textContent !== words) this.summary.textContent = words;
    if (!this.element.open || this.#numShown === reasoning.length) return;
    this.#view ??= new MarkdownView(this.body);
    this.#view.append(reasoning.slice(this.#numShown));
    this.#numShown = reasoning.length;
    if (!this.#isThinking) this.#view.finish();
  }

  /** The thought is complete. */
  end() {
    this.grow();
    this.#view?.finish();
  }
}
