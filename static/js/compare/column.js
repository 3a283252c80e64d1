/**
 * One column of Compare: its settings, its turns and its figures.
 *
 * Owns the column's element. Changes the settings it was given; what else is done with it is in `actions`: run(), stop(), use(),
 * duplicate(), remove(), changed(). Knows nothing of other columns, but where it stands among them and which settings differ.
 */

import { EXTRA, FIELDS } from "../settings/sampling.js";
import { h, icon, iconButton } from "../ui/dom.js";
import { Reading } from "../ui/reading.js";
import { describe } from "./figures.js";
import { TurnView } from "./turn.js";

/** What a column sets: [{name, label, help, otherwise, …}], as settings/sampling.js has them. */
export const SETTINGS = [
  { name: "system", label: "System prompt", help: "", otherwise: "none", rows: 3 },
  ...FIELDS.map((field) => ({ ...field, rows: field.name === "stop" ? 1 : 0 })),
  { name: EXTRA, label: "Extra body (JSON)", help: "An object of further fields", otherwise: "none", rows: 2 },
];

/** What is typed in a column for this setting. */
export const typedIn = (column, name) => (name === "system" ? column.system : column.sampling[name]) ?? "";

const USE = "Use these settings in the chat";
const USED = "The chat has these settings";
const USED_MS = 2_500;
const EMPTY = "Nothing asked yet. Open Settings to change what is asked with here, then ask below.";

export class ColumnView {
  #fields = new Map(); // name -> {input, note, help, label, mark}
  #turns = [];
  #letter = "";

  constructor(column, actions) {
    this.column = column;
    this.actions = actions;
    this.title = h("h2", { id: `compare-${column.id}` });
    this.runButton = h("button", { type: "button", class: "button run", onclick: () => (this.isRunning ? actions.stop() : actions.run()) });
    this.duplicateButton = iconButton("copy", "Duplicate", () => actions.duplicate());
    this.removeButton = iconButton("close", "Remove", () => actions.remove());
    this.useButton = h("button", { type: "button", class: "link-button", onclick: () => this.#use() });
    this.summary = h("span", { class: "differing" });
    this.settings = h("details", { class: "column-settings" }, h("summary", {}, h("span", {}, "Settings"), this.summary), this.#form());
    this.list = h("ol", { class: "turns" });
    this.empty = h("p", { class: "nothing" }, EMPTY);
    this.scroll = h("div", { class: "column-scroll", tabindex: "0", role: "group" }, this.empty, this.list);
    this.jump = h("button", { type: "button", class: "jump", hidden: true }, icon("down"), "Latest");
    this.figures = h("dl", { class: "column-figures" });
    this.element = h(
      "section",
      { class: "column", "aria-labelledby": this.title.id },
      h("div", { class: "column-head" }, this.title, this.runButton, this.duplicateButton, this.removeButton),
      this.settings,
      h("div", { class: "column-body" }, this.scroll, this.jump),
      h("div", { class: "column-foot" }, this.figures, this.useButton),
    );
    this.reading = new Reading(this.scroll, this.list, this.jump);
    this.isRunning = false;
    this.showSettings();
    this.showFigures(null);
  }

  // ------------------------------------------------------------------------------------------------------- its place

  /** Where it stands: "B", the second of three. */
  place(letter, number, total, canAdd, canRemove) {
    this.#letter = letter;
    this.title.replaceChildren(h("span", { class: "hidden" }, "Column "), h("span", { class: "letter" }, letter), h("span", { class: "place" }, ` ${number} of ${total}`));
    this.scroll.setAttribute("aria-label", `Answers of column ${letter}`);
    this.list.setAttribute("aria-label", `Questions and answers of column ${letter}`);
    this.#name(this.duplicateButton, `Duplicate column ${letter}`);
    this.#name(this.removeButton, `Remove column ${letter}`);
    this.jump.setAttribute("aria-label", `Latest in column ${letter}`);
    this.#showUse(USE);
    this.duplicateButton.disabled = !canAdd;
    this.removeButton.disabled = !canRemove;
    for (const turn of this.#turns) turn.drawEnd();
  }

  #use() {
    this.actions.use();
    this.#showUse(USED);
    setTimeout(() => this.#showUse(USE), USED_MS);
  }

  #showUse(words) {
    this.useButton.textContent = words;
    this.useButton.setAttribute("aria-label", `${words}, column ${this.#letter}`);
  }

  #name(button, name) {
    button.setAttribute("aria-label", name);
    button.title = name;
  }

  /** What its button does: stop, ask what is written, or ask the last question again; `canRun` is false where there is neither. */
  showRun(isRunning, isAgain, canRun) {
    this.isRunning = isRunning;
    const word = isRunning ? "Stop" : isAgain ? "Run again" : "Run";
    this.runButton.replaceChildren(icon(isRunning ? "stop" : isAgain ? "again" : "send"), word);
    this.runButton.setAttribute("aria-label", `${word}, column ${this.#letter}`);
    this.runButton.disabled = !isRunning && !canRun;
  }

  // ------------------------------------------------------------------------------------------------------- its settings

  #form() {
    const [system, ...others] = SETTINGS;
    const extra = others.pop();
    return h(
      "form",
      { class: "column-form", autocomplete: "off", onsubmit: (event) => event.preventDefault() },
      this.#field(system),
      h("div", { class: "fields" }, ...others.map((field) => this.#field(field))),
      this.#field(extra),
    );
  }

  #field({ name, label, help, rows, choices }) {
    const id = `compare-${this.column.id}-${name}`;
    const common = { id, "aria-describedby": `${id}-note`, spellcheck: name === "system" ? null : "false", dir: name === "system" && "auto" };
    const note = h("p", { id: `${id}-note`, class: "note" }, help);
    const mark = h("span", { class: "differs", hidden: true }, "differs");
    let input;
    if (choices) input = h("select", common, h("option", { value: "" }, "default"), ...choices.map((choice) => h("option", { value: choice }, choice)));
    else input = rows ? h("textarea", { ...common, rows }) : h("input", { ...common, type: "text", inputmode: "decimal" });
    input.addEventListener("input", () => {
      if (name === "system") this.column.system = input.value;
      else this.column.sampling[name] = input.value;
      this.#showNote(name, "");
      this.actions.changed();
    });
    const element = h("div", { class: "field" }, h("label", { for: id }, label, mark), input, note);
    this.#fields.set(name, { element, input, note, help, label, mark });
    return element;
  }

  /** Puts the column's settings into its fields. */
  showSettings() {
    for (const [name, { input }] of this.#fields) input.value = typedIn(this.column, name);
  }

  /** Puts what holds behind the empty fields, and hides what this model has no use for (`takes` as in config.json); the seed is not
   * this column's to choose where all have one. */
  showDefaults(defaults, takes, sharedSeed) {
    for (const { name, otherwise, needs } of SETTINGS) {
      const { element, input } = this.#fields.get(name);
      element.hidden = Boolean(needs && takes && !takes[needs]);
      input.placeholder = String(defaults[name] ?? otherwise);
    }
    const { input, note, help } = this.#fields.get("seed");
    input.disabled = sharedSeed !== null;
    input.value = sharedSeed ?? typedIn(this.column, "seed");
    if (!note.classList.contains("wrong")) note.textContent = sharedSeed === null ? help : "The same for all columns";
  }

  /** Marks the settings that are not the same in all columns: [{name, label, text}] with this column's value. */
  showDifferences(differing) {
    const names = new Set(differing.map(({ name }) => name));
    for (const [name, { mark }] of this.#fields) mark.hidden = !names.has(name);
    this.summary.replaceChildren(...differing.map(({ label, text }) => h("span", { class: "difference" }, h("span", {}, label), " ", h("b", {}, text))));
    if (!differing.length) this.summary.replaceChildren(h("span", { class: "alike" }, "same in all columns"));
  }

  #showNote(name, problem) {
    const { input, note, help } = this.#fields.get(name);
    note.textContent = problem || help;
    note.classList.toggle("wrong", Boolean(problem));
    input.setAttribute("aria-invalid", String(Boolean(problem)));
  }

  /** Where a refusal leads: {label, go} for a field of this name, null where there is none of it. */
  #leadTo(name) {
    const field = this.#fields.get(name);
    const go = () => {
      this.settings.open = true;
      field.input.focus();
    };
    return field ? { label: field.label, go } : null;
  }

  // ------------------------------------------------------------------------------------------------------- its turns

  /** Draws all turns anew. */
  showTurns() {
    this.#turns = [];
    this.list.replaceChildren();
    for (const turn of this.column.turns) this.#add(turn);
    this.showFigures(this.column.turns.at(-1)?.figures ?? null);
    this.#showEmpty();
  }

  /** A turn began, in the place of the last one where that was asked again or comes once more. */
  open(turn) {
    const replaced = this.#turns.splice(this.column.turns.indexOf(turn));
    for (const { element } of replaced) element.remove();
    for (const name of this.#fields.keys()) this.#showNote(name, "");
    this.#add(turn);
    this.showFigures(null);
    this.#showEmpty();
    this.reading.follow(true);
  }

  #add(turn) {
    const actions = {
      letter: () => this.#letter,
      isLast: (one) => one === this.column.turns.at(-1),
      retry: () => this.actions.run(true),
      field: (name) => this.#leadTo(name),
    };
    const view = new TurnView(turn, this.#turns.length + 1, actions);
    this.#turns.at(-1)?.drawEnd();
    this.#turns.push(view);
    this.list.append(view.element);
  }

  #showEmpty() {
    this.empty.hidden = this.#turns.length > 0;
    this.list.hidden = !this.#turns.length;
  }

  append(text, reasoning) {
    this.#turns.at(-1)?.append(text, reasoning);
    this.reading.keepEnd();
  }

  wait(isWaiting) {
    this.#turns.at(-1)?.wait(isWaiting);
    this.reading.keepEnd();
  }

  /** The last turn ended. */
  close(turn) {
    const view = this.#turns.find((other) => other.turn === turn);
    view?.finish(turn.state === "failed");
    if (turn.error?.param && this.#fields.has(turn.error.param)) this.#showNote(turn.error.param, turn.error.message);
    this.showFigures(turn.figures);
    this.reading.keepEnd();
  }

  /** The count of a stopped answer came. */
  recount(turn) {
    const view = this.#turns.find((other) => other.turn === turn);
    view?.drawEnd();
    if (view && view === this.#turns.at(-1)) this.showFigures(turn.figures);
  }

  /** The figures of the last answer, ranked among those of the other columns. */
  showFigures(figures, others = []) {
    const row = ({ label, title, text, word }) =>
      h("div", { title }, h("dt", {}, label), h("dd", {}, text, word && h("span", { class: "best" }, ` ${word}`)));
    this.figures.replaceChildren(...describe(figures, others).map(row));
  }

  /** Shows each answer by its differences from the one of the first column, or as it is where `texts` is null. */
  compare(texts) {
    this.#turns.forEach((view, k) => view.compare(texts?.[k] ?? null));
  }

  // ------------------------------------------------------------------------------------------------------- its position

  /** The turn at the top of what is seen, and how far into it: {turn, share}. */
  get position() {
    const top = this.scroll.scrollTop;
    const turn = this.#turns.findLastIndex(({ element }) => element.offsetTop <= top);
    const element = this.#turns[turn]?.element;
    return { turn, share: element ? (top - element.offsetTop) / element.offsetHeight : 0 };
  }

  /** Shows that place. */
  moveTo({ turn, share }) {
    const element = this.#turns[turn]?.element;
    if (element) this.scroll.scrollTop = element.offsetTop + share * element.offsetHeight;
    else if (turn < 0) this.scroll.scrollTop = 0;
  }
}
