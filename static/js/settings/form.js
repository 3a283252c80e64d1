/**
 * The settings form: the system prompt and the sampling of the conversation that is shown, presets, and what this page says aloud.
 *
 * An empty field is not sent, so the server's default holds; that default is the field's placeholder. The server checks the values;
 * what is out of its range is told at the field while it is typed, in its words, and a refusal is shown at the field it names.
 */

import { readJson } from "../json/typed.js";
import { recall, remember } from "../store/store.js";
import { byId, h, icon } from "../ui/dom.js";
import { Presets } from "./presets.js";
import { EXTRA, FIELDS, extraOf, isSet } from "./sampling.js";

const ANNOUNCED = { off: "Nothing", end: "When an answer is complete", paragraphs: "Each paragraph" };

/** What the server would say of this value; "" where it would take it. */
function wrongWith({ name, range, parse }, text) {
  if (!range || !isSet(text)) return "";
  const value = parse(text);
  const [low, high] = range;
  if (typeof value !== "number") return `${name} is ${JSON.stringify(value)}; allowed is a number`;
  return value < low || value > high ? `${name} is ${value}; allowed is ${low} to ${high}` : "";
}

/** What is wrong with further fields, and where; "" for nothing. */
function wrongWithExtra(text) {
  if (!isSet(text)) return "";
  const { error, line, column } = readJson(text);
  if (error) return `Line ${line}, column ${column}: ${error}`;
  try {
    extraOf(text);
    return "";
  } catch ({ message }) {
    return message;
  }
}

export class Settings {
  #conversation = null;
  #fields = new Map(); // name -> {field, input, slider, note, help, reset}
  #defaults = {};

  constructor(page) {
    this.page = page;
    this.root = byId("settings");
    this.resetButton = byId("reset");
    this.resetButton.addEventListener("click", () => this.#reset());
    this.root.addEventListener("submit", (event) => event.preventDefault());
    this.presets = new Presets(page.store.presets, page, (values) => this.use(values));
    this.thinking = this.#group("Thinking");
    this.presets.element.prepend(h("div", { class: "field-head" }, h("label", { for: "preset" }, "Preset"), this.resetButton));
    this.root.append(
      this.presets.element,
      this.#systemField(),
      h("div", { class: "fields" }, ...FIELDS.filter(({ group }) => !group).map((field) => this.#field(field))),
      this.thinking,
      this.#group("More sampling"),
      h("details", { class: "field-group" }, h("summary", {}, "Extra body (JSON)"), this.#extraField()),
      this.#announceField(),
    );
    page.addEventListener("conversation", () => this.show(page.conversation));
    page.addEventListener("ready", () => this.#learn());
    this.show(page.conversation);
    if (page.config) this.#learn();
  }

  // ---------------------------------------------------------------------------------------------------------- the fields

  #systemField() {
    this.system = h("textarea", { id: "system", rows: 4, dir: "auto", placeholder: "None: the model's own default" });
    this.system.addEventListener("input", () => {
      this.#conversation.system = this.system.value;
      this.#changed();
    });
    return h("div", { class: "field" }, h("label", { for: "system" }, "System prompt"), this.system);
  }

  #group(name) {
    const fields = FIELDS.filter(({ group }) => group === name);
    return h("details", { class: "field-group" }, h("summary", {}, name), h("div", { class: "fields" }, ...fields.map((field) => this.#field(field))));
  }

  #field(field) {
    const { name, label, help, choices, slider } = field;
    const common = { id: `set-${name}`, name, spellcheck: "false", "aria-describedby": `note-${name}` };
    let input;
    if (choices) input = h("select", common, h("option", { value: "" }, "Default"), ...choices.map((choice) => h("option", { value: choice }, choice)));
    else if (name === "stop") input = h("textarea", { ...common, rows: 1 });
    else input = h("input", { ...common, type: "text", inputmode: "decimal", onkeydown: (event) => this.#stepped(event, field) });
    const parts = { field, input, ...this.#frame(name, label, help) };
    input.addEventListener("input", () => this.#set(name, input.value));
    if (slider) parts.slider = this.#slider(field, input);
    this.#fields.set(name, parts);
    return h("div", { class: `field${slider ? " has-slider" : ""}` }, parts.head, input, parts.slider ?? null, parts.note);
  }

  /** Label, the button that goes back to the default, and the line below. */
  #frame(name, label, help) {
    const back = () => {
      this.#set(name, "");
      this.#fields.get(name).input.focus();
    };
    const words = h("span", { class: "hidden" }, `Back to default: ${label.toLowerCase()}`);
    const reset = h("button", { type: "button", class: "icon-button field-reset", title: "Back to default", hidden: true, onclick: back }, icon("again"), words);
    return { head: h("div", { class: "field-head" }, h("label", { for: `set-${name}` }, label), reset), reset, help, note: h("p", { id: `note-${name}`, class: "note" }, help) };
  }

  /** For pointers alone: with keys the box beside it steps up and down. */
  #slider({ name, slider: [min, max, step] }, input) {
    const slider = h("input", { type: "range", min, max, step, tabindex: "-1", "aria-hidden": "true" });
    slider.addEventListener("input", () => {
      input.value = slider.value;
      this.#set(name, slider.value);
    });
    return slider;
  }

  #stepped(event, { name, slider, range, step = slider?.[2], otherwise }) {
    const way = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!way || !step) return;
    event.preventDefault();
    const now = Number(this.#conversation.sampling[name] || this.#defaults[name] || otherwise) || 0;
    const [low, high] = range;
    this.#set(name, String(Number(Math.min(high, Math.max(low, now + way * step)).toFixed(4))));
  }

  #extraField() {
    const input = h("textarea", { id: `set-${EXTRA}`, rows: 3, spellcheck: "false", class: "mono", placeholder: '{"ignore_eos": true}', "aria-describedby": `note-${EXTRA}` });
    const parts = { field: { name: EXTRA }, input, ...this.#frame(EXTRA, "Further fields", "Added to each request of this chat; they win over the fields above") };
    input.addEventListener("input", () => this.#set(EXTRA, input.value));
    this.#fields.set(EXTRA, parts);
    return h("div", { class: "field" }, parts.head, input, parts.note);
  }

  /** Of the page, not of the conversation. */
  #announceField() {
    const options = Object.entries(ANNOUNCED).map(([value, words]) => h("option", { value }, words));
    const select = h("select", { id: "announce", onchange: () => remember("announce", select.value) }, ...options);
    select.value = recall("announce") in ANNOUNCED ? recall("announce") : "end";
    return h("div", { class: "field page-field" }, h("label", { for: "announce" }, "Screen reader hears"), select);
  }

  // --------------------------------------------------------------------------------------------------------------- values

  show(conversation) {
    this.#conversation = conversation;
    this.system.value = conversation.system;
    for (const name of this.#fields.keys()) this.#showValue(name);
    this.clearErrors();
    this.#markChanged();
  }

  #showValue(name) {
    const { input, slider, field } = this.#fields.get(name);
    const value = this.#conversation.sampling[name] ?? "";
    if (input.value !== value) input.value = value;
    if (slider) slider.value = isSet(value) ? value : (this.#defaults[name] ?? field.otherwise);
  }

  #set(name, value) {
    const { field } = this.#fields.get(name);
    this.#conversation.sampling[name] = value;
    this.#showValue(name);
    this.#mark(name, name === EXTRA ? wrongWithExtra(value) : wrongWith(field, value));
    this.#changed();
  }

  /** Has these from now on: those of a preset, or of another part of the page. */
  use({ system, sampling }) {
    this.#conversation.system = system;
    this.#conversation.sampling = { ...sampling };
    this.show(this.#conversation);
    this.page.saveSoon(this.#conversation);
  }

  /** The server's defaults stand in the empty fields; what its model cannot do is not offered. */
  #learn() {
    const { sampling_defaults: defaults, takes } = this.page.config;
    this.#defaults = defaults;
    for (const { name, otherwise } of FIELDS) this.#fields.get(name).input.placeholder = String(defaults[name] ?? otherwise);
    this.thinking.hidden = !takes.reasoning;
    for (const name of this.#fields.keys()) this.#showValue(name);
  }

  #reset() {
    this.use({ system: "", sampling: {} });
    this.system.focus();
  }

  #changed() {
    this.#markChanged();
    this.page.saveSoon(this.#conversation);
  }

  #markChanged() {
    for (const [name, { input, reset }] of this.#fields) {
      const isChanged = isSet(this.#conversation.sampling[name]);
      input.parentElement.classList.toggle("changed", isChanged);
      reset.hidden = !isChanged;
    }
    this.system.parentElement.classList.toggle("changed", isSet(this.#conversation.system));
    for (const group of this.root.querySelectorAll(".field-group")) group.classList.toggle("has-changes", Boolean(group.querySelector(".changed")));
    this.resetButton.disabled = !this.root.querySelector(".changed");
    this.presets.show({ system: this.#conversation.system, sampling: this.#conversation.sampling });
  }

  // --------------------------------------------------------------------------------------------------------------- errors

  /** Shows a refusal at the field it names; false when it names none of these. */
  showError(param, message) {
    const parts = this.#fields.get(param);
    if (!parts) return false;
    this.#mark(param, message);
    const group = parts.input.closest("details");
    if (group) group.open = true;
    return true;
  }

  clearErrors() {
    for (const name of this.#fields.keys()) this.#mark(name, "");
  }

  #mark(name, message) {
    const { input, note, help } = this.#fields.get(name);
    note.textContent = message || help;
    note.classList.toggle("wrong", Boolean(message));
    input.setAttribute("aria-invalid", String(Boolean(message)));
  }
}
