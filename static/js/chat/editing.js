/**
 * Changing an answer where it stands: as a copy beside it, in its place, or in its place and gone on with.
 *
 * Owns the field and its buttons. What was typed is kept with the message until it is saved or given up, so that leaving the
 * conversation or the page loses nothing. What they do is in changes.js.
 */

import { h } from "../ui/dom.js";
import { addVersion, continueAnswer, rewrite } from "./changes.js";

const KEEP_MS = 500; // after the last keystroke

export class Editor {
  #timer = 0;

  /** `ended()` is called when the field is to go. */
  constructor(message, chat, number, ended) {
    this.message = message;
    this.chat = chat;
    this.ended = ended;
    this.field = h("textarea", { class: "edit-text", dir: "auto", rows: 3, "aria-label": `Text of message ${number}` });
    this.field.value = message.edit ?? message.content;
    this.field.addEventListener("input", () => this.#keep());
    this.element = h("div", { class: "editor", onkeydown: (event) => this.#pressed(event) }, this.field, this.#buttons());
  }

  #buttons() {
    const button = (words, action, title, isPrimary = false) => h("button", { type: "button", class: `button${isPrimary ? " primary" : ""}`, title, onclick: action }, words);
    return h(
      "div",
      { class: "editor-buttons" },
      button("Save as copy", () => this.#save("copy"), "A version beside this one, which stays", true),
      button("Save in place", () => this.#save("place"), "What follows stays as it is"),
      button("Save and continue", () => this.#save("continue"), "The model goes on from the end of this text"),
      button("Cancel", () => this.#cancel(), "Escape"),
    );
  }

  /** The field is in the page. */
  begin() {
    this.#fit();
    this.field.focus({ preventScroll: true });
    this.field.setSelectionRange(this.field.value.length, this.field.value.length);
    this.field.scrollIntoView({ block: "nearest" });
  }

  #fit() {
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight + 2}px`;
  }

  #keep() {
    this.#fit();
    this.message.edit = this.field.value;
    clearTimeout(this.#timer);
    const { conversation } = this.chat;
    this.#timer = setTimeout(() => this.chat.page.save(conversation), KEEP_MS);
  }

  #pressed(event) {
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Escape") {
      event.stopPropagation(); // it would stop an answer
      this.#cancel();
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      this.#save("copy");
    }
  }

  #cancel() {
    clearTimeout(this.#timer);
    const wasChanged = this.message.edit !== undefined;
    this.message.edit = undefined;
    if (wasChanged) this.chat.page.save(this.chat.conversation);
    this.ended();
  }

  #save(way) {
    clearTimeout(this.#timer);
    const { chat, message } = this;
    const text = this.field.value;
    if (!text.trim()) return this.#cancel();
    let shown = message;
    if (way === "copy") shown = addVersion(chat, message, text);
    else rewrite(chat, message, text);
    if (way === "continue") continueAnswer(chat, message);
    else chat.itemOf(shown)?.under.querySelector("[data-action=edit]")?.focus();
  }
}
