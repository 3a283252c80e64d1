/**
 * Adds the form of answers to the chat: the fields of each request, and how an answer that had a form is shown.
 *
 * Owns `message.extra.structure`: {kind, schema or choice as they were sent, forced: lengths of free and of forced text in turn,
 * forcedTokens}. The form itself is form.js. Knows nothing of the panel in which it is chosen.
 */

import { addMarks } from "../chat/marks.js";
import { showChip } from "../composer/chips.js";
import { StructuredView } from "./answer-view.js";
import { KINDS, formOf, kept, requestFor } from "./form.js";

export class Structure {
  #views = new WeakMap(); // a message's element -> its view
  #growing = new Set(); // answers with news
  #frame = 0;

  constructor(page) {
    this.page = page;
    this.form = formOf(page);
    for (const event of ["form", "conversation", "ready"]) page.addEventListener(event, () => this.#showChip());
    this.#showChip();
  }

  #showChip() {
    const { kind } = this.form.value;
    const { title } = KINDS.find(({ name }) => name === kind) ?? KINDS[0];
    const { state, message } = this.form.standing();
    showChip(this.page, "structure", kind ? title : "", { label: `Form of the answer: ${title}`, why: state === "wrong" ? message : "" });
  }

  // ---------------------------------------------------------------------------------------------- what chat/chat.js asks of it

  blocks() {
    const { state, message } = this.form.standing();
    return state === "wrong" ? `The form of the answer is not usable. ${message}` : [];
  }

  contribute(body, { conversation, message }) {
    if (message.state === "draft" && this.form.standing().state !== "good") return; // it is only looked at
    const { fields, error } = requestFor(kept(conversation));
    if (error && message.state === "streaming") throw new Error(`The form of the answer is not usable. ${error.message}`);
    Object.assign(body, fields);
  }

  sent({ message, continues }, body) {
    const structure = structureOf(body);
    if (continues && message.extra?.structure) return;
    if (structure) message.extra = { ...message.extra, structure: { ...structure, forced: [] } };
    else if (message.extra) delete message.extra.structure;
    this.#decorate(message);
  }

  chunk(answer, chunk) {
    const { structure } = answer.message.extra ?? {};
    if (!structure) return;
    const choice = chunk.choices?.[0];
    if (choice && choice.index === 0 && choice.draft_marks) addMarks(structure.forced, choice.draft_marks.map(({ text, forced }) => ({ text, drafted: Boolean(forced) })));
    structure.forcedTokens = chunk.usage?.completion_tokens_details?.jumped_tokens ?? structure.forcedTokens;
    this.#growing.add(answer);
    this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  #paint() {
    this.#frame = 0;
    for (const { message } of this.#growing) if (message.state === "streaming") this.#viewOf(message)?.grow();
    this.#growing.clear();
  }

  ended(answer) {
    this.#growing.delete(answer);
    const view = this.#viewOf(answer.message);
    view?.grow();
    view?.finish();
  }

  decorate(message, element) {
    if (!hasForm(message) || this.#views.has(element)) return;
    const number = element.querySelector("h2")?.textContent.replace(/\D+/g, "") ?? "";
    const view = new StructuredView(message, number);
    this.#views.set(element, view);
    element.querySelector(":scope > .text").after(view.element);
    element.classList.add("has-form");
  }

  #decorate(message) {
    const element = this.page.chat.itemOf(message)?.element;
    if (element) this.decorate(message, element);
  }

  #viewOf(message) {
    return this.#views.get(this.page.chat.itemOf(message)?.element);
  }
}

/** Whether an answer had a form; a file that somebody made may have something else there. */
function hasForm({ extra }) {
  const { kind, choice, forced } = extra?.structure ?? {};
  return KINDS.some(({ name }) => name && name === kind) && (kind !== "choice" || Array.isArray(choice)) && (forced === undefined || (Array.isArray(forced) && forced.every(Number.isFinite)));
}

/** The form that a request asks for, whoever wrote it; null where it asks for none. */
function structureOf({ response_format: format, json_schema: schema, regex, ebnf, choice }) {
  if (format?.type === "json_schema") return { kind: "schema", schema: format.json_schema?.schema ?? {} };
  if (format?.type === "json_object") return { kind: "json" };
  if (schema !== undefined && typeof schema !== "string") return { kind: "schema", schema };
  if (regex !== undefined) return { kind: "regex" };
  if (ebnf !== undefined) return { kind: "grammar" };
  return Array.isArray(choice) ? { kind: "choice", choice } : null;
}
