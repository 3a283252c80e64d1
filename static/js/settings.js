/**
 * The settings form: the system prompt and the sampling of the conversation that is shown.
 *
 * An empty field is not sent, so the server's default holds; that default is the field's placeholder. Values are checked by
 * the server alone: its refusal is shown at the field it names.
 */

import { byId, h } from "./dom.js";
import { FIELDS, isSet } from "./sampling.js";

export { FIELDS, samplingBody } from "./sampling.js";

export class Settings {
  #conversation = null;
  #inputs = new Map();
  #notes = new Map();

  constructor(page) {
    this.page = page;
    this.root = byId("settings");
    this.resetButton = byId("reset");
    this.resetButton.addEventListener("click", () => this.#reset());
    this.root.addEventListener("submit", (event) => event.preventDefault());
    this.root.append(this.#systemField(), h("div", { class: "fields" }, ...FIELDS.map((field) => this.#field(field))));
    page.addEventListener("conversation", () => this.show(page.conversation));
    page.addEventListener("ready", () => this.showDefaults(page.config.sampling_defaults));
    this.show(page.conversation);
    if (page.config) this.showDefaults(page.config.sampling_defaults);
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
    this.page.saveSoon(this.#conversation);
    this.system.focus();
  }

  #changed() {
    this.#markChanged();
    this.page.saveSoon(this.#conversation);
  }

  #markChanged() {
    for (const [name, input] of this.#inputs) input.parentElement.classList.toggle("changed", isSet(this.#conversation.sampling[name]));
    this.system.parentElement.classList.toggle("changed", isSet(this.#conversation.system));
    this.resetButton.disabled = !this.root.querySelector(".changed");
  }
}
