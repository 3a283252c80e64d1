/**
 * Which answer of the conversation a panel looks at: a list of them, that follows the chat.
 *
 * Owns that choice: the newest answer, until somebody picks another or `isHeld()`. Knows nothing of what is shown of it.
 */

import { pathOf } from "../store/store.js";
import { h, useStyle } from "../ui/dom.js";
import { visible } from "../ui/visible.js";

const NONE = "none";

export class AnswerPicker {
  message = null; // null: what `other` names, or nothing

  /**
   * `label` says what of the answer is shown, `other` what else can be picked ("" for nothing). `onChange()` is told of each other
   * choice, `isHeld()` says that a new answer must not take the place of this one now.
   */
  constructor(page, { id, label, other = "", onChange, isHeld = () => false }) {
    useStyle("segments");
    this.page = page;
    this.other = other;
    this.onChange = onChange;
    this.select = h("select", { id, onchange: () => this.pick(this.#answers().find(({ message }) => message.id === this.select.value)?.message ?? null) });
    this.element = h("div", { class: "answer-picker" }, h("label", { for: id }, label), this.select);
    page.addEventListener("conversation", () => this.pick(this.#last()));
    page.addEventListener("answers", ({ detail }) => {
      const last = this.#last();
      if (detail === page.conversation && page.chat.isStreaming && last !== this.message && !isHeld()) this.pick(last);
    });
    this.message = this.#last();
  }

  pick(message) {
    this.message = message;
    this.onChange();
  }

  /** Picks this one, and puts the focus where another can be picked. */
  look(message) {
    this.pick(message);
    this.select.focus();
  }

  /** Shows what there is to pick from. One that is not in the conversation's shown branch any more gives way to the newest. */
  draw() {
    const answers = this.#answers();
    if (this.message && !answers.some(({ message }) => message === this.message)) this.message = answers.at(-1)?.message ?? null;
    const options = answers.map(({ message, title }) => ({ value: message.id, title }));
    if (this.other || !options.length) options.push({ value: NONE, title: this.other || "No answers yet" });
    const same = options.length === this.select.options.length && options.every(({ value, title }, k) => this.select.options[k].value === value && this.select.options[k].text === title);
    if (!same) this.select.replaceChildren(...options.map(({ value, title }) => h("option", { value }, title)));
    this.select.value = this.message?.id ?? NONE;
  }

  #last() {
    return this.#answers().at(-1)?.message ?? null;
  }

  #answers() {
    const path = pathOf(this.page.conversation);
    const titled = path.map((message, k) => ({ message, title: `Message ${k + 1}: ${plain(path.slice(0, k).findLast(({ role }) => role === "user")?.content ?? "")}` }));
    return titled.filter(({ message }) => message.role === "assistant");
  }
}

/** A question's beginning in one line, where nothing can hide. */
function plain(text) {
  const line = visible(text.slice(0, 60).replace(/\s+/g, " ").trim()).map((part) => (typeof part === "string" ? part : `[${part.attributes["data-name"]}]`)).join("");
  return line.length > 40 ? `${line.slice(0, 39)}…` : line || "a picture";
}
