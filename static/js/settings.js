/**
 * The settings form: the system prompt and the sampling of the conversation that is shown.
 *
 * An empty field is not sent, so the server's default holds; that default is the field's placeholder. Values are checked by
 * the server alone: its refusal is shown at the field it names.
 */

import { byId, h } from "./dom.js";

/**
 * Fields in the order shown. `parse` makes the JSON value of what was typed; `otherwise` is what holds where neither this
 * page nor the model says anything.
 */
export const FIELDS = [
  { name: "temperature", label: "Temperature", help: "0: always the likeliest", parse: number, otherwise: 1 },
  { name: "max_tokens", label: "Max tokens", help: "Longest answer", parse: number, otherwise: "no limit" },
  { name: "top_p", label: "Top p", help: "Share of likeliest tokens", parse: number, otherwise: 1 },
  { name: "top_k", label: "Top k", help: "0: off", parse: number, otherwise: 0 },
  { name: "min_p", label: "Min p", help: "Share of the best token", parse: number, otherwise: 0 },
  { name: "repetition_penalty", label: "Repetition penalty", help: "1: off", parse: number, otherwise: 1 },
  { name: "frequency_penalty", label: "Frequency penalty", help: "Each time a token came", parse: number, otherwise: 0 },
  { name: "presence_penalty", label: "Presence penalty", help: "For having come at all", parse: number, otherwise: 0 },
  { name: "seed", label: "Seed", help: "Repeats an answer", parse: number, otherwise: "random" },
  { name: "stop", label: "Stop texts", help: "One a line; \\n: line break", parse: lines, otherwise: "none" },
];

/** A number, or the text itself where it is none or would lose digits: then the server says what it wants. */
function number(text) {
  const value = Number(text);
  const isExact = Number.isFinite(value) && (!Number.isInteger(value) || Number.isSafeInteger(value));
  return isExact ? value : text.trim();
}

function lines(text) {
  const escapes = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };
  return text.split("\n").filter(Boolean).map((line) => line.replace(/\\[nt\\]/g, (escape) => escapes[escape]));
}

const isSet = (text) => text !== undefined && text.trim() !== "";

/** The sampling fields of a chat body. */
export function samplingBody(sampling) {
  const set = FIELDS.filter(({ name }) => isSet(sampling[name]));
  return Object.fromEntries(set.map(({ name, parse }) => [name, parse(sampling[name])]));
}

export class Settings {
  #conversation = null;
  #inputs = new Map();
  #notes = new Map();

  /** `onChange(conversation)` is called after each edit. */
  constructor(onChange) {
    this.onChange = onChange;
    this.root = byId("settings");
    this.resetButton = byId("reset");
    this.resetButton.addEventListener("click", () => this.#reset());
    this.root.addEventListener("submit", (event) => event.preventDefault());
    this.root.append(this.#systemField(), h("div", { class: "fields" }, ...FIELDS.map((field) => this.#field(field))));
  }

  #systemField() {
    this.system = h("textarea", { id: "system", rows: 4, dir: "auto", placeholder: "None: the model's own default" });
    this.system.addEventListener("input", () => {
      this.#conversation.system = this.system.value;
      this.#changed();
    });
    return h("div", { class: "field" }, h("label", { for: "system" }, "System prompt"), this.system);
  }

  #field({ name, label, help }) {
    const common = { id: `set-${name}`, name, spellcheck: "false", "aria-describedby": `note-${name}` };
    const input = name === "stop" ? h("textarea", { ...common, rows: 1 }) : h("input", { ...common, type: "text", inputmode: "decimal" });
    const note = h("p", { id: `note-${name}`, class: "note" }, help);
    input.addEventListener("input", () => {
      this.#conversation.sampling[name] = input.value;
      this.#mark(name, "");
      this.#changed();
    });
    this.#inputs.set(name, input);
    this.#notes.set(name, { note, help });
    return h("div", { class: "field" }, h("label", { for: input.id }, label), input, note);
  }

  show(conversation) {
    this.#conversation = conversation;
    this.system.value = conversation.system;
    for (const [name, input] of this.#inputs) input.value = conversation.sampling[name] ?? "";
    this.clearErrors();
    this.#markChanged();
  }

  /** Puts the server's defaults behind the empty fields. */
  showDefaults(defaults) {
    for (const { name, otherwise } of FIELDS) this.#inputs.get(name).placeholder = String(defaults[name] ?? otherwise);
  }

  /** Shows a refusal at the field it names; false when it names none of these. */
  showError(param, message) {
    if (!this.#inputs.has(param)) return false;
    this.#mark(param, message);
    return true;
  }

  clearErrors() {
    for (const name of this.#inputs.keys()) this.#mark(name, "");
  }

  #mark(name, message) {
    const { note, help } = this.#notes.get(name);
    note.textContent = message || help;
    note.classList.toggle("wrong", Boolean(message));
    this.#inputs.get(name).setAttribute("aria-invalid", String(Boolean(message)));
  }

  #reset() {
    this.#conversation.system = "";
    this.#conversation.sampling = {};
    this.show(this.#conversation);
    this.onChange(this.#conversation);
    this.system.focus();
  }

  #changed() {
    this.#markChanged();
    this.onChange(this.#conversation);
  }

  #markChanged() {
    for (const [name, input] of this.#inputs) input.parentElement.classList.toggle("changed", isSet(this.#conversation.sampling[name]));
    this.system.parentElement.classList.toggle("changed", isSet(this.#conversation.system));
    this.resetButton.disabled = !this.root.querySelector(".changed");
  }
}
