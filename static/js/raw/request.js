/**
 * One request as JSON in a text box: to read, to edit, to send as it stands. Long pictures are shown by a name in angle brackets
 * and put back when it is sent.
 */

import { readJson } from "../json/typed.js";
import { copyText } from "../ui/copying.js";
import { h } from "../ui/dom.js";
import { sizeText } from "../ui/numbers.js";
import { fileName, jsonText, replaceFiles } from "./snippets.js";

export class RequestSection {
  #original = ""; // the text as it was before anybody edited it
  #files = new Map(); // name in angle brackets -> data: URL
  #why = ""; // nothing can be sent now

  /** `on.send(body)` asks; `on.edited(body)` tells of each edit: the body that the text says, null where it says none. */
  constructor(on) {
    this.on = on;
    this.words = h("p", { class: "note" });
    this.text = h("textarea", {
      class: "raw-json",
      rows: 18,
      spellcheck: "false",
      autocapitalize: "off",
      wrap: "off",
      dir: "ltr",
      "aria-label": "Request as JSON",
      "aria-describedby": "raw-state",
      oninput: () => this.#changed(),
    });
    this.state = h("p", { class: "note", id: "raw-state", role: "status" });
    this.sendButton = h("button", { type: "button", class: "button primary", onclick: () => this.#send() }, "Send this");
    this.undoButton = h("button", { type: "button", class: "link-button", onclick: () => this.#undo() }, "Undo edits");
    this.copyButton = h("button", { type: "button", class: "link-button", "aria-label": "Copy the request", onclick: () => copyText(this.text.value, this.copyButton) }, "Copy");
    this.head = h("details", { class: "raw-head", hidden: true });
    this.element = h("div", { class: "raw-request" }, this.words, this.text, this.state, h("div", { class: "raw-actions" }, this.sendButton, this.undoButton, this.copyButton), this.head);
  }

  get isEdited() {
    return this.text.value !== this.#original;
  }

  /** Edits are given up: the next body is shown whatever was typed. */
  forget() {
    this.text.value = this.#original;
  }

  /** Shows this body, unless what is there is being edited. */
  show(body, words) {
    if (this.isEdited) return this.#changed();
    this.#files.clear();
    const shown = replaceFiles(body, (url, k) => {
      const name = `<${fileName(url, k)}, ${sizeText((url.length * 3) / 4)}>`;
      this.#files.set(name, url);
      return name;
    });
    const text = jsonText(shown);
    if (text !== this.#original) this.text.value = this.#original = text;
    this.words.textContent = words;
    this.#changed();
  }

  fail(reason) {
    this.words.textContent = reason;
    if (!this.isEdited) this.text.value = this.#original = "";
    this.#changed();
  }

  /** The head of HTTP's answer, null where it came another way. */
  showHead(head) {
    this.head.hidden = !head;
    if (!head) return;
    const isOpen = this.head.open;
    this.head.replaceChildren(
      h("summary", {}, `Answer's head: HTTP ${head.status}`),
      h("dl", {}, ...head.headers.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    );
    this.head.open = isOpen;
  }

  /** Why nothing can be sent now; "" where it can. */
  block(why) {
    this.#why = why;
    this.#changed();
  }

  #read() {
    const { value, error, line, column } = readJson(this.text.value);
    if (error) return { why: `Line ${line}, column ${column}: ${error}` };
    if (value === null || typeof value !== "object" || Array.isArray(value)) return { why: "A request is an object: { … }" };
    if (value.stream !== true) return { why: '"stream" has to be true for the page to show the answer', body: this.#whole(value) };
    return { why: "", body: this.#whole(value) };
  }

  /** The body with its pictures. */
  #whole(value) {
    if (typeof value === "string") return this.#files.get(value) ?? value;
    if (Array.isArray(value)) return value.map((item) => this.#whole(item));
    if (value === null || typeof value !== "object") return value;
    for (const key of Object.keys(value)) Object.defineProperty(value, key, { value: this.#whole(value[key]), enumerable: true, configurable: true, writable: true });
    return value;
  }

  #changed() {
    const { why, body } = this.text.value ? this.#read() : { why: "", body: null };
    const { isEdited } = this;
    this.text.setAttribute("aria-invalid", String(Boolean(why)));
    this.state.classList.toggle("wrong", Boolean(why));
    const words = why || (this.#why && isEdited ? `Edited. ${this.#why}` : isEdited ? "Edited. The answer stands beside the one it had." : "");
    if (this.state.textContent !== words) this.state.textContent = words;
    this.sendButton.disabled = Boolean(why || this.#why) || !this.text.value;
    this.sendButton.title = why || this.#why;
    this.undoButton.hidden = !isEdited;
    if (isEdited) this.on.edited(body ?? null);
  }

  #undo() {
    this.text.value = this.#original;
    this.text.focus();
    this.#changed();
    const { body } = this.#read();
    if (body) this.on.edited(body);
  }

  #send() {
    const { why, body } = this.#read();
    if (!why && !this.#why) this.on.send(body);
  }
}
