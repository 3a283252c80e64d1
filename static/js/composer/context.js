/**
 * What the next question costs: how many tokens the model would read, how many of them the cache has, and what to do when they are
 * more than it can read.
 *
 * Asks POST /cache/lookup with the body that would be sent, once nothing has been typed for a moment. Owns the count below the
 * composer, and what of a conversation is left out (`extra.from`: the first message that is sent). Knows nothing of answers.
 */

import { pathOf } from "../store/store.js";
import { byId, h } from "../ui/dom.js";
import { count } from "../ui/numbers.js";

const COUNT_MS = 300; // after the last keystroke
const MS_PER_MB = 1_000; // of pictures: they travel with each count
const KEPT_SHARE = 0.75; // of what the model reads, after old messages are left out: the rest is for answers
const NEXT = "draft-question"; // what bodyFor() calls the question that is being written

export class Context {
  #timer = 0;
  #asking = null; // aborts the count under way

  constructor(page) {
    this.page = page;
    this.line = byId("context");
    this.tooMuch = h("div", { class: "too-much", role: "status", hidden: true });
    byId("composer").before(this.tooMuch);
    page.composer.onChange = () => this.#later();
    for (const event of ["ready", "answers", "conversation"]) page.addEventListener(event, () => this.#later());
    byId("settings").addEventListener("input", () => this.#later());
    this.#later();
  }

  get #limit() {
    return this.page.config?.context_len ?? 0;
  }

  // -------------------------------------------------------------------------------------------------------------- counting

  #later() {
    clearTimeout(this.#timer);
    this.#asking?.abort();
    const { composer, pictures, chat } = this.page;
    if (!this.#limit || chat.isStreaming) return;
    if (!composer.text && !pictures.chosen.length) return this.#showUsed();
    const bytes = [...composer.earlierPictures, ...pictures.chosen].reduce((sum, { size }) => sum + size, 0);
    this.#timer = setTimeout(() => this.#count(), COUNT_MS + (bytes / 1e6) * MS_PER_MB);
  }

  async #count() {
    const asking = (this.#asking = new AbortController());
    const { chat, composer, pictures, server, conversation } = this.page;
    try {
      const sources = new Map();
      const body = await chat.bodyFor(composer.text, pictures.chosen, composer.parent, sources);
      const found = await server.post("cache/lookup", body, asking.signal);
      if (asking.signal.aborted || conversation !== this.page.conversation) return;
      this.#show(found, found.per_message?.map(({ index, tokens }) => ({ id: sources.get(body.messages[index]), tokens })));
    } catch {
      if (!asking.signal.aborted) this.#showUsed(); // sending it will say what is wrong
    }
  }

  #show({ tokens, matched }, messages) {
    this.#draw(tokens, matched, `${count(tokens)} of ${count(this.#limit)} tokens${matched ? `, ${count(matched)} cached` : ""}`);
    if (tokens >= this.#limit) this.#block(tokens, messages);
    else this.#unblock();
  }

  /** While nothing is written: what the last answer left behind. */
  #showUsed() {
    const last = pathOf(this.page.conversation).findLast((message) => message.stats?.promptTokens);
    const used = last ? last.stats.promptTokens + (last.stats.tokens ?? 0) : 0;
    this.#unblock();
    this.#draw(used, 0, used ? `${count(used)} of ${count(this.#limit)} tokens of context` : "");
  }

  #draw(tokens, matched, words) {
    const part = (name, n) => {
      const node = h("span", { class: name });
      node.style.width = `${Math.min(100, (100 * n) / this.#limit)}%`;
      return node;
    };
    const bar = tokens ? h("span", { class: "context-bar", "aria-hidden": "true" }, part("filled", tokens), part("known", matched)) : "";
    this.line.replaceChildren(bar, words);
  }

  // -------------------------------------------------------------------------------------------------- more than can be read

  #block(tokens, messages) {
    const { composer } = this.page;
    const from = this.#firstKept(tokens, messages);
    const words = `This makes ${count(tokens)} tokens, and the model reads at most ${count(this.#limit - 1)}.`;
    const leaveOut = () => this.#sendFrom(from, true);
    const offer = from
      ? h("button", { type: "button", class: "button", onclick: leaveOut }, "Leave out the oldest messages")
      : "The message alone is too long: shorten it, or begin a new chat.";
    this.tooMuch.replaceChildren(h("p", {}, words), offer);
    this.tooMuch.hidden = false;
    this.tooMuch.classList.remove("mild");
    composer.whyTooMuch = words;
    composer.showSend();
  }

  #unblock() {
    const { composer, conversation } = this.page;
    this.tooMuch.hidden = conversation.extra?.from !== NEXT;
    this.tooMuch.classList.toggle("mild", !this.tooMuch.hidden);
    if (!this.tooMuch.hidden) this.tooMuch.replaceChildren(h("p", {}, "The messages above are not sent any more, only the new one."), this.#allAgain());
    if (!composer.whyTooMuch) return;
    composer.whyTooMuch = "";
    composer.showSend();
  }

  /** The question from which on the conversation fits; null where the last one alone does not. */
  #firstKept(tokens, messages) {
    const { composer, conversation } = this.page;
    const above = pathOf({ ...conversation, head: composer.parent });
    const sizes = new Map(); // message id -> tokens
    for (const { id, tokens: size } of messages ?? []) if (id) sizes.set(id, (sizes.get(id) ?? 0) + (size ?? 0));
    const sent = above.slice(Math.max(0, above.findIndex(({ id }) => id === conversation.extra?.from)));
    const average = tokens / (sent.length + 1);
    let left = tokens;
    for (const message of sent) {
      if (message.role === "user" && left <= this.#limit * KEPT_SHARE) return message.id;
      left -= sizes.get(message.id) ?? average;
    }
    return left < this.#limit ? NEXT : null;
  }

  /** From now on the conversation is sent from this message on; null: from the first. */
  #sendFrom(id, movesFocus = false) {
    const { conversation, chat, composer } = this.page;
    conversation.extra = { ...conversation.extra, from: id ?? undefined };
    this.page.saveSoon(conversation);
    chat.redraw();
    this.#later();
    if (movesFocus) composer.focus();
  }

  // --------------------------------------------------------------------------------------------------------- as a plugin

  /** A line above the first message that is sent. */
  decorate(message, item) {
    item.querySelector(":scope > .left-out")?.remove();
    if (this.page.conversation.extra?.from !== message.id) return;
    item.prepend(h("p", { class: "left-out" }, "Messages above are not sent any more. ", this.#allAgain()));
  }

  #allAgain() {
    return h("button", { type: "button", class: "link-button", onclick: () => this.#sendFrom(null, true) }, "Send all again");
  }
}
