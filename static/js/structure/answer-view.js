/**
 * An answer that had to have a form: as a tree where it is JSON, as plain text, and whether it is what was asked for.
 *
 * Owns what stands in the message's element instead of its Markdown. Knows nothing of requests: what the form was, and which parts
 * of the text it forced, stands in `message.extra.structure` (plugin.js).
 */

import { placeIn } from "../json/reader.js";
import { problemsOf } from "../json/schema-check.js";
import { JsonTree } from "../json/tree.js";
import { h, nodesOf } from "../ui/dom.js";
import { count, plural } from "../ui/numbers.js";
import { isJson } from "./form.js";

const TITLES = { json: "JSON object", schema: "JSON schema", regex: "Regular expression", grammar: "Grammar", choice: "One of several texts" };
const MAX_SHOWN = 8; // problems

export class StructuredView {
  #numShown = 0; // characters
  #tree = null;
  #isTree;

  constructor(message, number) {
    this.message = message;
    this.form = message.extra.structure;
    this.#isTree = isJson(this.form.kind);
    this.badge = h("span", { class: "form-badge" });
    this.plain = h("pre", { class: "structured-text", dir: "auto", hidden: this.#isTree });
    this.problems = h("ul", { class: "form-problems", hidden: true });
    this.legend = h("p", { class: "legend", hidden: true });
    const head = h("div", { class: "structured-head" }, h("span", { class: "form-kind" }, TITLES[this.form.kind]), this.badge);
    this.element = h("div", { class: "structured" }, head);
    if (this.#isTree) {
      this.#tree = new JsonTree(`Answer ${number} as a tree`);
      head.append(this.#switch(number));
      this.element.append(this.#tree.element);
    }
    this.element.append(this.plain, this.problems, this.legend);
    this.grow();
    if (message.state !== "streaming") this.finish();
  }

  #switch(number) {
    const button = (words, isTree) => h("button", { type: "button", class: "form-switch", "aria-pressed": String(isTree), "aria-label": `Show answer ${number} as ${isTree ? "a tree" : "text"}`, onclick: () => show(isTree) }, words);
    const buttons = [button("Tree", true), button("Text", false)];
    const show = (isTree) => {
      this.#tree.element.hidden = !isTree;
      this.plain.hidden = isTree;
      buttons.forEach((one, k) => one.setAttribute("aria-pressed", String((k === 0) === isTree)));
    };
    return h("div", { class: "form-switches" }, ...buttons);
  }

  /** Shows what has arrived since the last time. */
  grow() {
    const { content } = this.message;
    this.element.hidden = !content;
    for (const { text, isForced } of partsOf(content, this.form.forced ?? [], this.#numShown)) {
      this.#tree?.push(text, isForced);
      const last = this.plain.lastElementChild;
      const place = last?.classList.contains("forced") === isForced ? last : this.plain.appendChild(h("span", { class: isForced ? "forced" : "" }));
      place.append(...nodesOf(text));
    }
    this.#numShown = content.length;
    if (this.message.state === "streaming") this.#say("busy", "Being written");
  }

  /** The answer is over: says whether it is what was asked for. */
  async finish() {
    const { forcedTokens } = this.form;
    const numForced = (this.form.forced ?? []).reduce((sum, length, k) => sum + (k % 2 ? length : 0), 0);
    this.legend.hidden = numForced === 0;
    const tokens = forcedTokens ? plural(forcedTokens, "token") : `${count(numForced)} characters`;
    if (numForced) this.legend.replaceChildren(h("span", { class: "forced" }, "Dotted"), `: the form left no choice. ${tokens} cost no step of their own.`);
    const error = this.#tree?.finish() ?? null;
    const { state, finish, limit } = this.message;
    const isWhole = this.#tree ? !error : state === "done" && finish !== "length" && finish !== "abort";
    if (!isWhole && finish === "length" && state === "done") return this.#say("cut", limit ? `Cut at max_tokens ${count(limit)}` : "Cut at the token limit");
    if (!isWhole && (state !== "done" || finish === "abort")) return this.#say("cut", "Not complete");
    if (error) return this.#sayNoJson(error);
    await this.#judge();
  }

  #sayNoJson({ message, at }) {
    const { line, column } = placeIn(this.message.content, at);
    this.#say("bad", "Not JSON");
    this.#list([h("li", {}, `Line ${line}, column ${column}: `, ...nodesOf(message))]);
  }

  async #judge() {
    const { kind, schema, choice } = this.form;
    if (kind === "choice") return choice.includes(this.message.content) ? this.#say("good", "One of them") : this.#say("bad", "None of them");
    if (kind === "json") return this.#say("good", "Valid JSON");
    if (kind !== "schema") return this.#say("good", "Matches");
    try {
      const { problems, unchecked } = await problemsOf(schema, JSON.parse(this.message.content));
      if (!problems.length) return this.#say("good", unchecked ? `Valid; ${unchecked} patterns not checked here` : "Valid");
      this.#say("bad", plural(problems.length, "problem"));
      this.#list(problems.slice(0, MAX_SHOWN).map((problem) => this.#problem(problem)));
      for (const { pointer, message } of problems) this.#tree.mark(pointer, message);
    } catch (error) {
      this.#say("cut", "Valid JSON; its schema cannot be checked here");
      this.#list([h("li", {}, ...nodesOf(error.message))]);
    }
  }

  #problem({ pointer, message }) {
    const go = h("button", { type: "button", class: "link-button" }, ...nodesOf(pointer || "The whole answer"));
    go.addEventListener("click", () => {
      if (this.#tree.element.hidden) this.element.querySelector(".form-switch").click();
      this.#tree.reveal(pointer);
    });
    return h("li", {}, go, " ", ...nodesOf(message));
  }

  #list(items) {
    this.problems.replaceChildren(...items);
    this.problems.hidden = items.length === 0;
  }

  #say(state, words) {
    this.badge.dataset.state = state;
    if (this.badge.textContent !== words) this.badge.textContent = words;
  }
}

/** The text from `from` on, in parts: lengths in `forced` are of free and of forced text in turn. */
function partsOf(text, forced, from) {
  const parts = [];
  let at = 0;
  const add = (to, isForced) => {
    const start = Math.max(at, from);
    if (to > start) parts.push({ text: text.slice(start, to), isForced });
    at = to;
  };
  forced.forEach((length, k) => add(Math.min(text.length, at + length), k % 2 === 1));
  add(text.length, false);
  return parts;
}
