/**
 * The calls of one answer, in the chat: their arguments while they arrive, what is wrong with them, and the results.
 *
 * Owns the card's elements. What becomes of calls and results is plugin.js; how one is answered by itself is set.js.
 */

import { JsonTree } from "../json/tree.js";
import { h, nodesOf } from "../ui/dom.js";

const BADGES = { busy: "Being written", good: "Arguments fit", bad: "Arguments do not fit", cut: "Cut off" };
const MAX_SHOWN = 8; // problems of a call

/** One call. */
class CallItem {
  #numShown = 0;

  constructor(call, card, number) {
    this.call = call;
    this.card = card;
    this.name = h("span", { class: "call-name" });
    this.badge = h("span", { class: "form-badge" });
    this.tree = new JsonTree(`Arguments of call ${number}`);
    this.plain = h("pre", { class: "structured-text", hidden: true });
    this.problems = h("ul", { class: "form-problems", hidden: true });
    this.result = h("div", { class: "call-result" });
    this.element = h("li", { class: "call" }, h("div", { class: "structured-head" }, h("span", { class: "form-kind" }, "Call"), this.name, this.badge), this.tree.element, this.plain, this.problems, this.result);
    this.field = null;
    this.grow();
  }

  /** What of it is new. */
  grow() {
    const { call } = this;
    if (this.name.textContent !== call.name) this.name.replaceChildren(...nodesOf(call.name));
    this.tree.push(call.arguments.slice(this.#numShown));
    this.#numShown = call.arguments.length;
    this.#say(call.state ?? "busy");
    if (call.state && call.state !== "busy") this.#finish();
  }

  #say(state) {
    this.badge.dataset.state = state;
    const words = this.call.isUnknown ? "No such tool" : BADGES[state];
    if (this.badge.textContent !== words) this.badge.textContent = words;
  }

  #finish() {
    if (this.isFinished) return this.#drawResult();
    this.isFinished = true;
    if (this.tree.finish()) { // what was sent is shown, whatever it is
      this.tree.element.hidden = true;
      this.plain.hidden = false;
      this.plain.replaceChildren(...nodesOf(this.call.arguments));
    }
    const problems = this.call.problems ?? [];
    this.problems.hidden = problems.length === 0;
    this.problems.replaceChildren(...problems.slice(0, MAX_SHOWN).map((problem) => this.#problem(problem)));
    for (const { pointer, message } of problems) if (pointer !== null) this.tree.mark(pointer, message);
    this.#drawResult();
  }

  #problem({ pointer, message }) {
    if (pointer === null) return h("li", {}, ...nodesOf(message));
    const go = h("button", { type: "button", class: "link-button", onclick: () => this.tree.reveal(pointer) }, ...nodesOf(pointer || "The arguments"));
    return h("li", {}, go, " ", ...nodesOf(message));
  }

  #drawResult() {
    const { call, card } = this;
    if (call.state === "cut") return;
    const label = call.isError ? "Error that is sent" : "Result";
    if (card.isSent) {
      this.field = null;
      const shown = h("pre", { class: "structured-text", dir: "auto" }, ...nodesOf(call.result || "(empty)"));
      return this.result.replaceChildren(h("p", { class: "call-label" }, label), shown);
    }
    if (this.field) return;
    this.field = h("textarea", { rows: 3, spellcheck: "false", class: "plain-field", placeholder: "What the tool gives back, text or JSON" });
    this.field.value = call.result ?? "";
    this.field.addEventListener("input", () => card.edited(call, this.field.value));
    const named = h("label", {}, h("span", { class: "call-label" }, label, h("span", { class: "hidden" }, ` of ${call.name}`)), this.field);
    this.result.replaceChildren(named);
  }
}

export class ToolCard {
  #items = new Map(); // call -> CallItem

  /** `tools` does what is pressed: send(message), stop(message), reopen(message), edited(message). */
  constructor(message, tools, number) {
    this.message = message;
    this.tools = tools;
    this.list = h("ul", { class: "calls" });
    this.foot = h("div", { class: "call-foot" });
    this.element = h("section", { class: "tool-card", "aria-label": `Tool calls of answer ${number}` }, this.list, this.foot);
    this.draw();
  }

  get isSent() {
    return Boolean(this.message.extra.tools.isSent);
  }

  edited(call, text) {
    call.result = text;
    this.tools.edited(this.message);
  }

  /** Brings the card to what the message has. `loop` is {turn, isRunning, isOver}. */
  draw(loop = null) {
    this.message.extra.tools.calls.forEach((call, index) => {
      if (this.#items.has(call)) return this.#items.get(call).grow();
      const item = new CallItem(call, this, index + 1);
      this.#items.set(call, item);
      this.list.append(item.element);
    });
    if (loop) this.#drawFoot(loop);
  }

  #drawFoot({ turn, most, isRunning, isOver }) {
    const { calls } = this.message.extra.tools;
    const usable = calls.filter(({ state }) => state !== "cut");
    const hadFocus = this.foot.contains(document.activeElement);
    const button = (words, onclick, primary = false) => h("button", { type: "button", class: `button${primary ? " primary" : ""}`, onclick }, words);
    const count = h("span", { class: "call-turn" }, `Tool turn ${turn} of ${most}`);
    const parts = [];
    if (this.message.state === "streaming" || !usable.length || usable.some(({ state }) => state === "busy")) parts.push();
    else if (isRunning) parts.push(count, button("Stop", () => this.tools.stop(this.message)));
    else if (this.isSent) parts.push(count, h("button", { type: "button", class: "link-button", onclick: () => this.tools.reopen(this.message) }, usable.length > 1 ? "Change the results" : "Change the result"));
    else {
      const errors = usable.filter(({ isError }) => isError).length;
      const words = errors === usable.length ? (errors > 1 ? `Send ${errors} error results` : "Send error result") : usable.length > 1 ? `Send ${usable.length} results` : "Send result";
      parts.push(button(words, () => this.tools.send(this.message), true), count);
      if (isOver) parts.push(h("span", { class: "call-over" }, `The calls went on by themselves for ${most} turns, and stop here.`));
    }
    this.foot.replaceChildren(...parts);
    if (hadFocus) this.foot.querySelector("button")?.focus();
  }
}
