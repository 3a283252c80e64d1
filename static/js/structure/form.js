/**
 * The form that a conversation's answers are to have: what was chosen, what of a request says so, and whether it can be.
 *
 * Owns `conversation.extra.structure`, {kind, schema, regex, grammar, choice}: texts as they were typed, one for each kind. What
 * the server says of them is checks.js. Tells the page by the event "form". Knows nothing of fields on screen.
 */

import { placeIn, readDocument } from "../json/reader.js";
import { FormChecks, placeOfParam } from "./checks.js";

export const KINDS = [
  { name: "", title: "Any text", note: "The model writes as it likes." },
  { name: "json", title: "JSON object", note: "Any JSON object. Say in the prompt what is to be in it." },
  { name: "schema", title: "JSON schema", note: "JSON of exactly this shape." },
  { name: "regex", title: "Regular expression", note: "The whole answer matches it." },
  { name: "grammar", title: "Grammar", note: "EBNF as llama.cpp writes it (root ::= …), or Lark (start: …)." },
  { name: "choice", title: "One of several texts", note: "One a line; the answer is one of them." },
];

/** Kinds whose answers are JSON. */
export const isJson = (kind) => kind === "json" || kind === "schema";

const NOTHING = Object.freeze({ kind: "", schema: "", regex: "", grammar: "", choice: "" });

/** The form of a conversation; none where a file that somebody made has something else. */
export function kept({ extra }) {
  const form = { ...NOTHING, ...extra?.structure };
  return Object.keys(NOTHING).every((field) => typeof form[field] === "string") ? form : NOTHING;
}

/** The fields of a request for a form: `{fields}`, with `places` of a schema, or `{error: {message, at}}`. */
export function requestFor({ kind, schema, regex, grammar, choice }) {
  if (kind === "json") return { fields: { response_format: { type: "json_object" } } };
  if (kind === "schema") return ofSchema(schema);
  if (kind === "regex") return regex ? { fields: { regex } } : missing("Write a regular expression.");
  if (kind === "grammar") return grammar.trim() ? { fields: { ebnf: grammar } } : missing("Write a grammar.");
  if (kind !== "choice") return { fields: {} };
  const texts = choice.split("\n").filter(Boolean);
  return texts.length ? { fields: { choice: texts } } : missing("Write at least one text.");
}

const missing = (message) => ({ error: { message, at: null } });

function ofSchema(text) {
  if (!text.trim()) return missing("Write a schema, or take a template.");
  const { value, error, places } = readDocument(text);
  if (error) return { error: { message: `Line ${error.line}, column ${error.column}: ${error.message}`, at: error.at } };
  if (!value || typeof value !== "object" || Array.isArray(value)) return { error: { message: "A schema is a JSON object.", at: 0 } };
  return { fields: { response_format: { type: "json_schema", json_schema: { name: "answer", schema: value, strict: true } } }, value, places };
}

/** Where in its text a form has what the server's `param` or message is about; null where that is not said. */
function placeOfProblem({ message, param }, form, { value, places } = {}) {
  if (places) return placeOfParam(param, "response_format.json_schema.schema", value, places);
  const text = form[form.kind] ?? "";
  const character = message.match(/at character (\d+)/);
  if (character) return Math.min(Number(character[1]), text.length);
  const [, line, column] = message.match(/\bat (\d+)\((\d+)\)/) ?? message.match(/^line (\d+) of/) ?? [];
  if (!line) return null;
  const lines = text.split("\n");
  const before = lines.slice(0, Number(line) - 1).reduce((sum, one) => sum + one.length + 1, 0);
  return Math.min(before + Number(column ?? 1) - 1, text.length);
}

/** The form of the conversation on screen, and how it stands. One for a page. */
class AnswerForm {
  constructor(page) {
    this.page = page;
    this.checks = new FormChecks(page, "form");
  }

  get value() {
    return kept(this.page.conversation);
  }

  change(part) {
    const { conversation } = this.page;
    conversation.extra = { ...conversation.extra, structure: { ...this.value, ...part } };
    this.checks.changed();
    this.page.saveSoon(conversation);
  }

  /** How it stands: {state: "" | "busy" | "good" | "wrong" | "unknown", message, at}. Has the server asked where it is not known. */
  standing() {
    const form = this.value;
    if (!form.kind) return { state: "", message: "", at: null };
    const request = requestFor(form);
    if (request.error) return { state: "wrong", ...request.error };
    if (this.checks.failure) return { state: "unknown", message: `Not checked: ${this.checks.failure.message}`, at: null };
    const problem = this.checks.of(request.fields);
    if (problem === undefined) return { state: "busy", message: "Checking…", at: null };
    if (problem === null) return { state: "good", message: "Answers can be held to this.", at: null };
    const at = placeOfProblem(problem, form, request);
    const place = at === null ? null : placeIn(form[form.kind], at);
    return { state: "wrong", message: `${place ? `Line ${place.line}, column ${place.column}: ` : ""}${shortened(problem)}`, at };
  }
}

/** Without the path that the place says already. */
function shortened({ message }) {
  return message.replace(/^response_format\.json_schema\.schema\.?/, "").replace(/^the grammar cannot be used: at \d+\(\d+\): /, "").split("\n")[0];
}

const forms = new WeakMap();

/** The one of this page. */
export function formOf(page) {
  if (!forms.has(page)) forms.set(page, new AnswerForm(page));
  return forms.get(page);
}
