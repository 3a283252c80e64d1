/**
 * The chunks of one answer as they came, with the time since the question was sent.
 */

import { copyText } from "../ui/copying.js";
import { h } from "../ui/dom.js";
import { count, plural } from "../ui/numbers.js";
import { VirtualList } from "../ui/virtual-list.js";
import { MAX_EVENTS } from "./recorder.js";
import { jsonText, showHidden } from "./snippets.js";

const ROW_PX = 28; // of a finger's 24 at least

const seconds = (ms) => `+${(ms / 1000).toFixed(3)} s`;

export class EventsSection {
  #record = null;
  #shown = []; // the events that the filter lets through
  #numSeen = 0; // events of the record that the filter has seen

  constructor() {
    this.words = h("p", { class: "note" });
    this.filter = h("input", { type: "search", id: "raw-filter", placeholder: "Text in an event", spellcheck: "false", oninput: () => this.#refill() });
    this.copyButton = h("button", { type: "button", class: "link-button", onclick: () => this.#copy() }, "Copy all");
    this.list = new VirtualList({ label: "Events", rowHeight: ROW_PX, render: (index) => this.#row(index), onChoose: (index) => this.#look(index) });
    this.detail = h("pre", { class: "raw-event", tabindex: "0", role: "group", "aria-label": "The chosen event", hidden: true });
    this.body = h("div", { class: "raw-list" }, h("div", { class: "raw-filter" }, h("label", { class: "hidden", for: "raw-filter" }, "Show only events that hold"), this.filter, this.copyButton), this.list.element, this.detail);
    this.element = h("div", { class: "raw-events" }, this.words, this.body);
  }

  /** Shows what was recorded of a message so far; `message` null: nothing was asked yet. */
  show(message, record) {
    this.body.hidden = !record?.numEvents;
    this.words.textContent = wordsOf(message, record);
    if (record !== this.#record) {
      this.#record = record;
      this.#refill();
    } else this.#grow();
  }

  #refill() {
    this.#shown = [];
    this.#numSeen = 0;
    this.detail.hidden = true;
    this.list.show(0);
    this.#grow();
  }

  #grow() {
    const events = this.#record?.events ?? [];
    if (events.length < this.#numSeen) return this.#refill(); // given up for newer ones
    const wanted = this.filter.value.toLowerCase();
    for (; this.#numSeen < events.length; this.#numSeen += 1) {
      const event = events[this.#numSeen];
      if (!wanted || event.text.toLowerCase().includes(wanted)) this.#shown.push(event);
    }
    this.list.show(this.#shown.length, true);
    const name = wanted ? `Copy ${count(this.#shown.length)}` : "Copy all";
    if (!this.copyButton.dataset.worked) this.copyButton.textContent = name;
    this.copyButton.setAttribute("aria-label", `${name} events`);
    this.copyButton.disabled = this.#shown.length === 0;
  }

  #row(index) {
    const { ms, text } = this.#shown[index];
    return [h("span", { class: "raw-time" }, seconds(ms)), h("span", { class: "raw-text" }, showHidden(shortOf(text)))];
  }

  #look(index) {
    const { ms, text } = this.#shown[index];
    this.detail.hidden = false;
    this.detail.textContent = `${seconds(ms)}\n${jsonText(JSON.parse(text))}`;
    this.detail.scrollTop = 0;
  }

  #copy() {
    copyText(this.#shown.map(({ ms, text }) => `{"ms":${ms.toFixed(1)},"chunk":${showHidden(text)}}\n`).join(""), this.copyButton);
  }
}

/** An event's beginning: what all events of a stream share is left out, so that what differs is seen. */
function shortOf(text) {
  const { choices, usage, ...rest } = JSON.parse(text);
  const [choice] = choices ?? [];
  if (!choice) return choices ? JSON.stringify({ ...without(rest), usage }) : text.slice(0, 400);
  const { index, ...said } = choice;
  const kept = Object.entries(said).filter(([, value]) => value !== null);
  return JSON.stringify({ ...(index > 0 && { index }), ...Object.fromEntries(kept) }).slice(0, 400);
}

/** Less what every chunk repeats. */
const without = ({ id: _id, object: _object, created: _created, model: _model, ...rest }) => rest;

function wordsOf(message, record) {
  if (!message) return "Nothing was sent yet. Send something to see the events it comes in.";
  if (!record) return "Events are kept for one visit only. Regenerate the message to see new ones.";
  const { numEvents, numChars, events, endMs } = record;
  const state = endMs ? `over after ${(endMs / 1000).toFixed(2)} s` : "under way";
  const gone = numEvents > events.length && (events.length === 0 ? " They made room for newer answers." : ` The first ${count(MAX_EVENTS)} are kept.`);
  const end = message.error ? ` The end: ${message.error}` : "";
  return `${plural(numEvents, "event")}, ${count(Math.ceil(numChars / 1000))} kB, ${state}.${gone || ""}${end}`;
}
