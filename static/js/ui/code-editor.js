/**
 * A plain text field for code: line numbers, a marked line, and a status line that says what is wrong and brings one there.
 *
 * Tab moves on to the next control, as everywhere on the page. Knows nothing of what is written in it.
 */

import { h } from "./dom.js";

let numEditors = 0;

export class CodeEditor {
  #lines = 0;
  #wrong = 0;

  /** `onInput(text)` is called after each change by the user. It has `rows` to `most` lines on screen; `tools` stand beside its label. */
  constructor({ label, onInput, rows = 8, most = 20, describedBy = null, tools = [] }) {
    this.rows = rows;
    this.most = most;
    numEditors += 1;
    const id = `code-${numEditors}`;
    this.gutter = h("div", { class: "code-lines", "aria-hidden": "true" });
    const described = [`${id}-status`, describedBy].filter(Boolean).join(" ");
    this.field = h("textarea", { id, rows, spellcheck: "false", autocapitalize: "off", autocomplete: "off", wrap: "off", "aria-describedby": described });
    this.status = h("p", { class: "code-status", id: `${id}-status`, role: "status" });
    this.label = h("label", { for: id }, label);
    this.element = h("div", { class: "code-editor" }, h("div", { class: "code-editor-head" }, this.label, ...tools), this.status, h("div", { class: "code-frame" }, this.gutter, this.field));
    this.field.addEventListener("input", () => {
      this.#number();
      onInput(this.field.value);
    });
    this.field.addEventListener("scroll", () => (this.gutter.scrollTop = this.field.scrollTop), { passive: true });
    this.#number();
  }

  get text() {
    return this.field.value;
  }

  set text(text) {
    if (text !== this.field.value) this.field.value = text;
    this.#number();
  }

  /**
   * Says how it stands: `state` is "good", "wrong", "busy" or "". With `at` (a place in the text) the line is marked, and a button
   * goes there.
   */
  say(state, message = "", at = null) {
    this.status.dataset.state = state;
    const words = h("span", {}, message);
    const line = at === null ? 0 : this.field.value.slice(0, at).split("\n").length;
    const go = h("button", { type: "button", class: "link-button", onclick: () => this.goTo(at) }, `Go to line ${line}`);
    if (this.status.textContent !== message + (line ? go.textContent : "")) this.status.replaceChildren(...(message ? [words] : []), ...(line ? [go] : []));
    else if (line) this.status.replaceChildren(words, go); // the place may be another one
    this.field.setAttribute("aria-invalid", String(state === "wrong"));
    this.#wrong = state === "wrong" ? line : 0;
    this.#markLine();
  }

  /** Has the cursor at this place of the text. */
  goTo(at) {
    this.field.focus();
    this.field.setSelectionRange(at, Math.min(at + 1, this.field.value.length));
    const height = this.field.scrollHeight / Math.max(1, this.#lines);
    const line = this.field.value.slice(0, at).split("\n").length;
    this.field.scrollTop = Math.max(0, (line - 3) * height);
  }

  #number() {
    const lines = this.field.value.split("\n").length;
    if (lines === this.#lines) return;
    this.#lines = lines;
    this.field.rows = Math.max(this.rows, Math.min(lines, this.most));
    this.gutter.replaceChildren(...Array.from({ length: Math.min(lines, 5_000) }, (_, k) => h("span", {}, String(k + 1))));
    this.#markLine();
    this.gutter.scrollTop = this.field.scrollTop;
  }

  #markLine() {
    this.gutter.querySelector(".wrong")?.classList.remove("wrong");
    this.gutter.children[this.#wrong - 1]?.classList.add("wrong");
  }
}
