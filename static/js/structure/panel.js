/**
 * The panel in which the form of answers is chosen and written.
 *
 * Owns the fields on screen. What is kept, and whether it can be, is form.js; what an answer looks like then is plugin.js.
 */

import { pretty, readDocument } from "../json/reader.js";
import { CodeEditor } from "../ui/code-editor.js";
import { h } from "../ui/dom.js";
import { KINDS, formOf } from "./form.js";

const texts = (names, maxLength = 60) => Object.fromEntries(names.map((name) => [name, { type: "string", maxLength }]));
const object = (properties) => ({ type: "object", properties, required: Object.keys(properties), additionalProperties: false });

/** Beginnings for each kind: name, text, and what to ask with it. */
const TEMPLATES = {
  schema: [
    { name: "Extract", text: pretty(object({ ...texts(["name", "place"]), year: { type: "integer" } })) },
    { name: "Classify", text: pretty(object({ label: { enum: ["positive", "neutral", "negative"] }, reason: { type: "string", maxLength: 120 } })) },
    { name: "List", text: pretty(object({ items: { type: "array", items: object({ title: { type: "string", maxLength: 60 }, done: { type: "boolean" } }), maxItems: 5 } })) },
  ],
  regex: [
    { name: "Date", text: "[0-9]{4}-[0-9]{2}-[0-9]{2}" },
    { name: "One sentence", text: "[A-Z][a-z ,]{10,120}\\." },
  ],
  grammar: [
    { name: "GBNF", text: 'root ::= "The answer is " number "."\nnumber ::= [1-9] [0-9]*\n' },
    { name: "Lark", text: 'start: "The answer is " NUMBER "."\nNUMBER: /[1-9][0-9]*/\n' },
  ],
  choice: [
    { name: "Yes or no", text: "yes\nno\n" },
    { name: "A scale", text: "very bad\nbad\ngood\nvery good\n" },
  ],
};
const LABELS = { schema: "JSON schema", regex: "Regular expression", grammar: "Grammar", choice: "Texts, one a line" };

export class StructurePanel {
  constructor(page) {
    this.page = page;
    this.form = formOf(page);
    this.note = h("p", { class: "note", id: "form-note" });
    this.picker = h("select", { id: "form-kind", "aria-describedby": "form-note" }, ...KINDS.map(({ name, title }) => h("option", { value: name }, title)));
    this.picker.addEventListener("change", () => this.form.change({ kind: this.picker.value }));
    this.format = h("button", { type: "button", class: "link-button", onclick: () => this.#format() }, "Format");
    this.editor = new CodeEditor({ label: "", tools: [this.format], onInput: (text) => this.form.change({ [this.form.value.kind]: text }) });
    this.templates = h("div", { class: "form-templates", role: "group", "aria-label": "Templates" });
    this.editing = h("div", { class: "form-editing" }, this.templates, this.editor.element);
    this.plain = h("p", { class: "code-status", role: "status" });
    const pick = h("div", { class: "field" }, h("label", { for: "form-kind" }, "Form of the answer"), this.picker, this.note);
    this.element = h("div", { class: "form-panel" }, pick, this.editing, this.plain);
    for (const event of ["form", "conversation"]) page.addEventListener(event, () => this.#show());
    this.#show();
  }

  #show() {
    const form = this.form.value;
    const { kind } = form;
    const hasText = kind in TEMPLATES;
    this.picker.value = kind;
    this.note.textContent = KINDS.find(({ name }) => name === kind)?.note ?? "";
    this.editing.hidden = !hasText;
    if (this.shownKind !== kind) this.#showKind(kind, hasText);
    if (hasText) this.editor.text = form[kind];
    const { state, message, at } = this.form.standing();
    if (hasText) this.editor.say(state, message, at);
    this.plain.dataset.state = hasText ? "" : state;
    this.plain.textContent = hasText ? "" : message;
  }

  #showKind(kind, hasText) {
    this.shownKind = kind;
    if (!hasText) return;
    this.editor.label.textContent = LABELS[kind];
    const buttons = TEMPLATES[kind].map(({ name, text }) => h("button", { type: "button", class: "form-template", onclick: () => this.#take(kind, text) }, name));
    this.templates.replaceChildren(h("span", {}, "Start from"), ...buttons);
    this.format.hidden = kind !== "schema";
  }

  #take(kind, text) {
    const before = this.form.value[kind];
    if (before.trim() && before !== text) import("../ui/toast.js").then(({ offerUndo }) => offerUndo("The text was replaced.", () => this.form.change({ kind, [kind]: before })));
    this.form.change({ [kind]: text });
  }

  #format() {
    const { value, error } = readDocument(this.form.value.schema);
    if (error) this.editor.goTo(error.at);
    else this.form.change({ schema: pretty(value) });
  }
}
