/**
 * Settings kept under names: a list to choose from, a name to save under, a way to delete.
 *
 * Owns this row of the settings form, but its label. Where they are kept is the store's business; what a preset holds, the form's.
 */

import { h, iconButton } from "../ui/dom.js";
import { offerUndo } from "../ui/toast.js";

const MAX_NAME = 60;

const same = (a, b) => a.system === b.system && JSON.stringify(setOnly(a.sampling)) === JSON.stringify(setOnly(b.sampling));
const setOnly = (sampling) => Object.fromEntries(Object.entries(sampling).filter(([, value]) => value?.trim()).sort());

export class Presets {
  #kept = []; // [{name, values}]
  #values = { system: "", sampling: {} }; // what the form has

  /** `store` has list(), save(name, values) and remove(name); `use(values)` puts a preset's values into the form. */
  constructor(store, page, use) {
    this.store = store;
    this.page = page;
    this.use = use;
    this.select = h("select", { id: "preset", onchange: () => this.#chosen() });
    this.name = h("input", { type: "text", id: "preset-name", maxlength: MAX_NAME, placeholder: "Name of the preset", "aria-label": "Name of the preset", onkeydown: (event) => this.#pressed(event) });
    this.naming = h("div", { class: "preset-naming", hidden: true }, this.name, this.#button("Save", () => this.#save(), "button primary"), this.#button("Cancel", () => this.#endNaming(), "button"));
    this.saveButton = this.#button("Save as…", () => this.#beginNaming());
    this.removeButton = iconButton("trash", "Delete this preset", () => this.#remove());
    this.element = h("div", { class: "field presets" }, h("div", { class: "preset-row" }, this.select, this.saveButton, this.removeButton), this.naming);
    this.#read();
  }

  #button(words, onclick, kind = "link-button") {
    return h("button", { type: "button", class: kind, onclick }, words);
  }

  async #read() {
    this.#kept = await this.store.list();
    this.#draw();
  }

  /** The form has these now. */
  show(values) {
    this.#values = values;
    this.#draw();
  }

  get #current() {
    return this.#kept.find(({ values }) => same(values, this.#values));
  }

  #draw() {
    const current = this.#current;
    const options = this.#kept.map(({ name }) => h("option", { value: name }, name));
    this.select.replaceChildren(h("option", { value: "" }, this.#kept.length ? "None of these" : "None saved yet"), ...options);
    this.select.value = current?.name ?? "";
    this.select.disabled = !this.#kept.length;
    this.removeButton.hidden = !current;
    this.removeButton.setAttribute("aria-label", current ? `Delete preset ${current.name}` : "Delete this preset");
  }

  #chosen() {
    const preset = this.#kept.find(({ name }) => name === this.select.value);
    if (preset) this.use(preset.values);
    else this.#draw();
  }

  #beginNaming() {
    this.naming.hidden = false;
    this.name.value = this.#current?.name ?? "";
    this.name.focus();
  }

  #endNaming() {
    this.naming.hidden = true;
    this.saveButton.focus();
  }

  #pressed(event) {
    if (event.isComposing) return;
    if (event.key === "Enter") this.#save();
    else if (event.key === "Escape") this.#endNaming();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  async #save() {
    const name = this.name.value.trim();
    if (!name) return this.name.focus();
    const { system, sampling } = this.#values;
    await this.store.save(name, { system, sampling: setOnly(sampling) });
    this.#endNaming();
    await this.#read();
    this.page.say(`Saved as ${name}`);
  }

  async #remove() {
    const preset = this.#current;
    if (!preset) return;
    if (!(await this.store.remove(preset.name))) return this.page.say(`The browser could not delete ${preset.name}`);
    await this.#read();
    this.select.disabled ? this.saveButton.focus() : this.select.focus();
    offerUndo(`Deleted preset “${preset.name}”`, async () => {
      await this.store.save(preset.name, preset.values);
      await this.#read();
      this.select.focus();
    });
  }
}
