/**
 * The panel in which tools are defined, and what stands in for them.
 *
 * Owns the fields on screen. What is kept, and whether it can be, is set.js; what becomes of calls is plugin.js.
 */

import { pretty, readDocument } from "../json/reader.js";
import { CodeEditor } from "../ui/code-editor.js";
import { copyText } from "../ui/copying.js";
import { h } from "../ui/dom.js";
import { plural } from "../ui/numbers.js";
import { offerUndo } from "../ui/toast.js";
import { MAX_TURNS, MOCKS, SAMPLE, exportTools, importTools, newTool, toolSetOf } from "./set.js";

let numFields = 0;

/** A labelled field; `note` says what it is for. */
function labelled(label, field, note = null) {
  numFields += 1;
  field.id = `tool-field-${numFields}`;
  if (note) {
    note.id = `${field.id}-note`;
    field.setAttribute("aria-describedby", note.id);
  }
  return h("div", { class: "field" }, h("label", { for: field.id }, label), field, note);
}

/** One tool's fields, folded under its name. */
class ToolFields {
  constructor(panel, index, isOpen) {
    const { set } = panel;
    const tool = set.value.list[index];
    const change = (part) => set.changeTool(index, part);
    this.title = h("span", { class: "tool-title" });
    this.kind = h("span", { class: "json-count" });
    this.name = h("input", { type: "text", spellcheck: "false", autocomplete: "off", value: tool.name, oninput: ({ target }) => change({ name: target.value.trim() }) });
    this.nameNote = h("p", { class: "note" });
    this.description = h("textarea", { rows: 2, class: "plain-field", oninput: ({ target }) => change({ description: target.value }) });
    this.description.value = tool.description;
    const format = h("button", { type: "button", class: "link-button", "aria-label": `Format the parameters of tool ${index + 1}`, onclick: () => this.#format(change) }, "Format");
    this.parameters = new CodeEditor({ label: "Parameters, as a JSON schema", tools: [format], rows: 5, most: 14, onInput: (text) => change({ parameters: text }) });
    this.parameters.text = tool.parameters;
    this.mock = h("select", { onchange: ({ target }) => change({ mock: target.value }) }, ...MOCKS.map(({ name, title }) => h("option", { value: name, selected: name === tool.mock }, title)));
    this.mockNote = h("p", { class: "note" });
    this.answer = h("textarea", { rows: 3, class: "plain-field code", spellcheck: "false", oninput: ({ target }) => change({ answer: target.value }) });
    this.answer.value = tool.answer;
    this.answerField = labelled("Its result", this.answer);
    const remove = h("button", { type: "button", class: "link-button bad", onclick: () => panel.remove(index) }, "Remove this tool");
    const body = h("div", { class: "tool-fields" }, labelled("Name", this.name, this.nameNote), labelled("Description", this.description), this.parameters.element, labelled("When it is called, answer with", this.mock, this.mockNote), this.answerField, remove);
    this.details = h("details", { open: isOpen }, h("summary", {}, this.title, this.kind), body);
    this.element = h("li", { class: "tool" }, this.details);
  }

  show(tool, wrong) {
    this.title.textContent = tool.name || "Without a name";
    const mock = MOCKS.find(({ name }) => name === tool.mock) ?? MOCKS[0];
    this.kind.textContent = wrong ? "not usable" : mock.title.toLowerCase();
    this.kind.classList.toggle("wrong", Boolean(wrong));
    this.mockNote.textContent = mock.note;
    this.answerField.hidden = tool.mock === "ask";
    const isName = wrong?.field === "name";
    this.nameNote.textContent = isName ? wrong.words : "";
    this.nameNote.classList.toggle("wrong", isName);
    this.name.setAttribute("aria-invalid", String(isName));
    const isSchema = wrong?.field === "parameters";
    this.parameters.say(isSchema ? "wrong" : "", isSchema ? sentence(wrong.words) : "", isSchema ? wrong.at : null);
  }

  #format(change) {
    const { value, error } = readDocument(this.parameters.text);
    if (error) return this.parameters.goTo(error.at);
    this.parameters.text = pretty(value);
    change({ parameters: this.parameters.text });
  }
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

export class ToolsPanel {
  #fields = [];
  #shown = null; // conversation whose tools have fields

  constructor(page) {
    this.page = page;
    this.set = toolSetOf(page);
    const box = (part, words, note) => {
      const field = h("input", { type: "checkbox", onchange: ({ target }) => this.set.change({ [part]: target.checked }) });
      return { part, field, element: h("label", { class: "tool-box" }, field, h("span", {}, words, note && h("span", { class: "note" }, note))) };
    };
    this.isOn = box("isOn", "Let the model call tools");
    this.boxes = [
      box("auto", "Go on by itself", `Results that need no one are sent at once, for up to ${MAX_TURNS} turns.`),
      box("once", "Demand a call only once", "Behind a result the model decides for itself."),
      box("parallel", "Several calls at once"),
    ];
    this.choice = h("select", { onchange: ({ target }) => this.set.change({ choice: target.value }) });
    this.status = h("p", { class: "code-status", role: "status" });
    this.empty = h("p", { class: "note" }, "No tools yet. A tool is a function that the model may ask for; what it gives back is made up here.");
    this.list = h("ul", { class: "tool-list", "aria-label": "Tools" });
    const add = (words, tool) => h("button", { type: "button", class: "form-template", onclick: () => this.add([tool()]) }, words);
    const buttons = h("div", { class: "form-templates" }, add("Add a tool", () => newTool(this.#freeName("my_tool"))), add("Sample: get_weather", () => ({ ...SAMPLE, name: this.#freeName(SAMPLE.name) })));
    this.options = h("div", { class: "tool-options" }, labelled("May the model choose?", this.choice), ...this.boxes.map(({ element }) => element));
    this.element = h("div", { class: "form-panel tools-panel" }, this.isOn.element, this.status, this.list, this.empty, buttons, this.options, this.#exchange());
    for (const event of ["tools", "conversation"]) page.addEventListener(event, () => this.#show());
    this.#show();
  }

  /** Import and export, folded. */
  #exchange() {
    const field = h("textarea", { rows: 5, class: "plain-field code", spellcheck: "false" });
    const note = h("p", { class: "note", role: "status" });
    const take = () => {
      try {
        const tools = importTools(field.value);
        field.value = "";
        note.textContent = `Added ${plural(tools.length, "tool")}.`;
        this.add(tools);
      } catch (error) {
        note.textContent = error.message;
      }
    };
    const copy = h("button", { type: "button", class: "button", onclick: () => copyText(exportTools(this.set.value), copy) }, "Copy as JSON");
    const buttons = h("div", { class: "tool-buttons" }, h("button", { type: "button", class: "button", onclick: take }, "Add these"), copy);
    return h("details", { class: "tool-exchange" }, h("summary", {}, "Import and export"), labelled("Tools as JSON, in the form of OpenAI or Anthropic", field, note), buttons);
  }

  #freeName(name) {
    const names = new Set(this.set.value.list.map((tool) => tool.name));
    let free = name;
    for (let n = 2; names.has(free); n += 1) free = `${name}_${n}`;
    return free;
  }

  add(tools) {
    const { list } = this.set.value;
    this.#shown = null;
    this.opened = list.length;
    this.set.change({ list: [...list, ...tools], isOn: true });
    this.#fields.at(-tools.length)?.details.querySelector("summary").focus();
  }

  remove(index) {
    const { list } = this.set.value;
    const { conversation } = this.page;
    this.#shown = null;
    this.set.change({ list: list.filter((_, k) => k !== index) });
    (this.#fields[Math.min(index, this.#fields.length - 1)]?.details.querySelector("summary") ?? this.isOn.field).focus();
    offerUndo(`Removed ${list[index].name || "the tool"}.`, () => {
      if (conversation !== this.page.conversation) return;
      this.#shown = null;
      this.set.change({ list });
    });
  }

  #show() {
    const set = this.set.value;
    const { list } = set;
    if (this.#shown !== this.page.conversation || this.#fields.length !== list.length) this.#build(list);
    for (const { part, field } of [this.isOn, ...this.boxes]) field.checked = set[part];
    this.options.hidden = this.list.hidden = list.length === 0;
    this.empty.hidden = list.length > 0;
    this.#showChoices(list, set.choice);
    const standing = this.set.standing();
    this.status.dataset.state = standing.state === "good" ? "" : standing.state;
    this.status.textContent = standing.state === "wrong" || standing.state === "unknown" ? sentence(standing.message) : "";
    this.#fields.forEach((fields, k) => fields.show(list[k], standing.state === "wrong" && standing.tool === k ? standing : null));
  }

  #build(list) {
    const open = this.opened ?? (list.length === 1 ? 0 : -1);
    this.opened = undefined;
    this.#shown = this.page.conversation;
    this.#fields = list.map((_, index) => new ToolFields(this, index, index === open));
    this.list.replaceChildren(...this.#fields.map(({ element }) => element));
  }

  #showChoices(list, choice) {
    const given = [["auto", "Yes: call or answer"], ["required", "No: it must call a tool"], ["none", "No: it must answer"], ...list.filter(({ name }) => name).map(({ name }) => [name, `No: it must call ${name}`])];
    const key = JSON.stringify(given);
    if (this.choices !== key) this.choice.replaceChildren(...given.map(([value, words]) => h("option", { value }, words)));
    this.choices = key;
    this.choice.value = given.some(([value]) => value === choice) ? choice : "auto";
  }
}
