/**
 * Search in titles and in texts of messages.
 *
 * Every text is read once, when the search is begun, and again where its conversation changes. A conversation is found where its
 * title, or one of its messages, has all the words. Owns the list of results, which stands in the place of the conversations.
 */

import { h, nodesOf } from "../ui/dom.js";
import { plural } from "../ui/numbers.js";
import { titleOf } from "./nav.js";

const MAX_RESULTS = 100;
const BEFORE = 30; // characters of a snippet before the word
const SNIPPET = 140;

export class Search {
  #texts = new Map(); // conversation id -> {title, messages: [{id, text}]}
  #stale = new Set();
  #reading = null;
  #turn = 0;

  constructor(page, nav) {
    this.page = page;
    this.nav = nav;
    this.results = h("ul", { class: "chats results", "aria-label": "Conversations found", hidden: true });
    this.none = h("p", { class: "quiet", hidden: true });
    nav.list.after(this.results, this.none);
    page.store.addEventListener("change", ({ detail }) => this.#changed(detail));
    nav.field.addEventListener("keydown", (event) => this.#pressed(event));
    this.results.addEventListener("keydown", (event) => this.#moved(event));
    this.#reading = this.#readAll();
  }

  async #readAll() {
    for (const entry of await this.page.store.list()) await this.#read(entry.id);
  }

  async #read(id) {
    const conversation = await this.page.find(id);
    if (!conversation) return this.#texts.delete(id);
    const messages = conversation.messages.filter(({ content }) => content).map(({ id: of, content }) => ({ id: of, text: content }));
    this.#texts.set(id, { title: titleOf(conversation), messages });
  }

  #changed({ id, isRemoved }) {
    if (isRemoved) this.#texts.delete(id);
    else this.#stale.add(id);
    if (!this.results.hidden) this.show(this.nav.field.value);
  }

  /** Shows what has these words; all conversations where there are none. */
  async show(query) {
    const turn = (this.#turn += 1);
    const words = query.trim().split(/\s+/).filter(Boolean).map(patternOf);
    if (words.length) {
      await this.#reading;
      for (const id of this.#stale) await this.#read(id);
      this.#stale.clear();
    }
    if (turn !== this.#turn) return;
    const found = words.length ? await this.#find(words) : [];
    this.results.replaceChildren(...found.slice(0, MAX_RESULTS).map((one) => this.#item(one, words)));
    this.results.hidden = !found.length;
    this.nav.list.hidden = words.length > 0;
    this.none.hidden = words.length === 0 || (found.length > 0 && found.length <= MAX_RESULTS);
    this.none.textContent = found.length ? `${found.length - MAX_RESULTS} more; add a word to see fewer.` : `Nothing has “${query.trim()}”.`;
    this.nav.showWhetherEmpty();
    if (words.length) this.page.say(`${plural(found.length, "conversation")} found`);
  }

  /** In the order of the list. */
  async #find(words) {
    const found = [];
    for (const { id } of await this.page.store.list()) {
      const kept = this.#texts.get(id);
      if (!kept) continue;
      const message = kept.messages.find(({ text }) => words.every((word) => word.test(text)));
      if (message || words.every((word) => word.test(kept.title))) found.push({ id, title: kept.title, message });
    }
    return found;
  }

  #item({ id, title, message }, words) {
    const open = (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return; // to a tab of its own
      event.preventDefault();
      this.page.closeSides();
      this.page.open(id, message?.id);
    };
    const snippet = message && message.text.trim() !== title ? h("span", { class: "snippet" }, ...marked(snippetOf(message.text, words[0]), words)) : null;
    const link = h("a", { href: `#c=${id}`, class: "chat", "data-id": id, dir: "auto", onclick: open }, h("span", { class: "title" }, ...marked(title, words)), snippet);
    if (id === this.page.conversation.id) link.setAttribute("aria-current", "page");
    return h("li", {}, link);
  }

  #pressed(event) {
    if (event.isComposing) return;
    const first = this.results.querySelector("a");
    if (event.key === "Escape" && this.nav.field.value) {
      this.nav.field.value = "";
      this.show("");
      event.stopPropagation(); // it would stop an answer
      event.preventDefault();
    } else if (first && event.key === "ArrowDown") {
      first.focus();
      event.preventDefault();
    } else if (first && event.key === "Enter") {
      first.click();
      event.preventDefault();
    }
  }

  #moved(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step && event.key !== "Escape") return;
    const links = [...this.results.querySelectorAll("a")];
    const to = step ? links.indexOf(document.activeElement) + step : -1;
    (to < 0 ? this.nav.field : (links[to] ?? links.at(-1))).focus();
    event.stopPropagation();
    event.preventDefault();
  }
}

const patternOf = (word) => new RegExp(word.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"), "iu");

/** The part of a text around the first place of this word, in one line, from the beginning of a word. */
function snippetOf(text, word) {
  const at = text.search(word);
  const early = Math.max(0, at - BEFORE);
  const from = early && early + text.slice(early, at).search(/(?<=[\s.,;:!?]+)[^\s.,;:!?]|$/);
  const part = text.slice(from, from + SNIPPET).replace(/\s+/g, " ").replace(/^[\udc00-\udfff]|[\ud800-\udbff]$/g, ""); // no halves of characters
  return `${from ? "…" : ""}${part.trim()}${from + SNIPPET < text.length ? "…" : ""}`;
}

/** Nodes of this text with each place of these words marked. */
function marked(text, words) {
  const any = new RegExp(words.map(({ source }) => source).join("|"), "giu");
  const nodes = [];
  let from = 0;
  for (const { 0: word, index } of text.matchAll(any)) {
    nodes.push(...nodesOf(text.slice(from, index)), h("mark", {}, ...nodesOf(word)));
    from = index + word.length;
  }
  return [...nodes, ...nodesOf(text.slice(from))];
}
