/**
 * What was asked and what came back, to the word, for this visit: each answer's request and the chunks of it with their times.
 *
 * Records from the start, so that the developer's view has what was sent before it was first looked at. Bounded: an answer's first
 * 5,000 chunks, the last chunks and requests of all; beyond that only counts are kept. Owns these records. Knows nothing of how
 * they are shown.
 */

import { byId, h, iconButton } from "../ui/dom.js";

export const MAX_EVENTS = 5_000; // of one answer
const MAX_ALL_EVENTS = 20_000; // of all answers; the oldest answers' go first
const MAX_BODIES = 48 << 20; // characters of requests, most of them pictures

/**
 * @typedef {object} Recorded
 * @property {object|null} body  the request; null once it was given up for others
 * @property {number} size  of the body, in characters
 * @property {number} sentAt  when, as Date.now() has it
 * @property {{ms: number, text: string}[]} events  the first ones: milliseconds since it was sent, and the chunk as JSON
 * @property {number} numEvents  of all that came
 * @property {number} numChars  of all that came
 * @property {number} endMs  when it ended; 0: not yet
 * @property {{status: number, headers: [string, string][]}|null} head  of HTTP's answer, where it came that way
 */

const recorders = new WeakMap();

/** The recorder of a page. */
export const recorderOf = (page) => recorders.get(page) ?? null;

/** Dispatches "record", whose detail is the message, whenever something is recorded of it; "look" when its record is asked for. */
export class Recorder extends EventTarget {
  #records = new Map(); // message id -> Recorded, oldest first
  #begun = new WeakMap(); // Recorded -> performance.now() when it was sent

  constructor(page) {
    super();
    this.page = page;
    this.wanted = null; // the message whose record was asked for last
    recorders.set(page, this);
  }

  /** @returns {Recorded|null} */
  of(message) {
    return (message && this.#records.get(message.id)) ?? null;
  }

  sent({ message }, body) {
    const record = { body, size: JSON.stringify(body).length, sentAt: Date.now(), events: [], numEvents: 0, numChars: 0, endMs: 0, head: null };
    this.#records.delete(message.id); // asked once more: behind the others
    this.#records.set(message.id, record);
    this.#begun.set(record, performance.now());
    this.#bound();
    this.#tell(message);
  }

  opened({ message }, head) {
    const record = this.of(message);
    if (record) record.head = head;
  }

  chunk({ message }, chunk) {
    const record = this.of(message);
    if (!record) return;
    const text = JSON.stringify(chunk);
    record.numEvents += 1;
    record.numChars += text.length;
    if (record.events.length < MAX_EVENTS) record.events.push({ ms: this.#ms(record), text });
    this.#tell(message);
  }

  ended({ message }) {
    const record = this.of(message);
    if (!record) return;
    record.endMs = this.#ms(record);
    this.#bound();
    this.#tell(message);
  }

  actions(message, number) {
    if (message.role !== "assistant") return [];
    return [iconButton("raw", `Raw request and events of message ${number}`, () => this.look(message))];
  }

  under(message) {
    return message.extra?.raw?.edited ? [h("p", { class: "stats" }, "Answers an edited request")] : [];
  }

  /** Shows this message's record in the developer's view. */
  look(message) {
    this.wanted = message;
    if (byId("inspector").inert) byId("open-inspector").click();
    this.page.frame.panels.show("raw");
    this.dispatchEvent(new CustomEvent("look", { detail: message }));
  }

  #ms(record) {
    return performance.now() - this.#begun.get(record);
  }

  #tell(message) {
    this.dispatchEvent(new CustomEvent("record", { detail: message }));
  }

  /** Gives up what is oldest; never anything of the newest. */
  #bound() {
    let [numEvents, size] = [0, 0];
    for (const [k, record] of [...this.#records.values()].reverse().entries()) {
      numEvents += record.events.length;
      size += record.size;
      if (k > 0 && numEvents > MAX_ALL_EVENTS) record.events = [];
      if (k > 0 && size > MAX_BODIES) record.body = null;
    }
  }
}
