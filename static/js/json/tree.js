/**
 * JSON as a tree in the page, built while it arrives: each character is looked at once, and what stands in the page stays.
 *
 * Owns the nodes and where each value of the text stands among them. What a form forced is marked. Knows nothing of schemas.
 */

import { h, nodesOf } from "../ui/dom.js";
import { plural } from "../ui/numbers.js";
import { JsonReader, step } from "./reader.js";

const MAX_DEPTH = 40; // deeper values are shown beside each other
const MAX_NODES = 4_000;

export class JsonTree {
  #reader;
  #path = []; // what has not ended: {pointer, kind, list, count, counter, item}
  #name = null;
  #isForced = false;
  #places = new Map(); // pointer -> element
  #numNodes = 0;

  constructor(label = "Answer as a tree") {
    this.element = h("div", { class: "json-tree", role: "group", "aria-label": label });
    this.#reader = new JsonReader({
      begin: (kind) => this.#begin(kind),
      key: (name) => (this.#name = { name, isForced: this.#isForced }),
      text: (part) => this.#grow(part),
      end: () => this.#end(),
    });
  }

  get isComplete() {
    return this.#reader.isComplete;
  }

  /** More text. `isForced`: the form left no choice about it. */
  push(text, isForced = false) {
    this.#isForced = isForced;
    this.#reader.push(text);
  }

  /** Nothing more comes. Returns what is wrong with the text as JSON, or null. */
  finish() {
    const error = this.#reader.finish();
    for (const { item } of this.#path) item?.classList.add("open");
    return error;
  }

  /** Shows a problem at its place, or at the nearest one that there is. */
  mark(pointer, message) {
    const place = this.#placeOf(pointer);
    place?.classList.add("wrong");
    if (place) place.title = message;
  }

  /** Brings the reader there. */
  reveal(pointer) {
    const place = this.#placeOf(pointer);
    if (!place) return;
    for (let at = place; at && at !== this.element; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    const target = place.querySelector("summary") ?? place;
    if (target === place) place.tabIndex = -1;
    target.focus();
    target.scrollIntoView({ block: "nearest" });
  }

  #placeOf(pointer) {
    for (let at = pointer; at; at = at.slice(0, at.lastIndexOf("/"))) if (this.#places.has(at)) return this.#places.get(at);
    return this.#places.get("") ?? null;
  }

  #begin(kind) {
    const parent = this.#path.at(-1);
    const name = this.#name;
    this.#name = null;
    const key = !parent ? null : name ? name.name : parent.count;
    const pointer = parent ? parent.pointer + step(key) : "";
    if (parent) {
      parent.count += 1;
      parent.counter && (parent.counter.textContent = parent.kind === "object" ? plural(parent.count, "field") : plural(parent.count, "item"));
    }
    this.#numNodes += 1;
    const entry = { pointer, kind, list: null, count: 0, counter: null, item: null };
    this.#path.push(entry);
    if (this.#numNodes === MAX_NODES) this.element.append(h("p", { class: "note" }, "The rest is not shown as a tree; the text has all of it."));
    if (this.#numNodes < MAX_NODES) this.#show(entry, parent, key, name);
  }

  #show(entry, parent, key, name) {
    const label = key === null ? null : h("span", { class: name ? (name.isForced ? "json-key forced" : "json-key") : "json-index" }, ...nodesOf(String(key)));
    const isContainer = entry.kind === "object" || entry.kind === "array";
    const item = h(parent ? "li" : "div", { class: `json-item ${entry.kind}` });
    if (isContainer && this.#path.length <= MAX_DEPTH) {
      entry.counter = h("span", { class: "json-count" }, entry.kind === "object" ? "no fields" : "no items");
      entry.list = h("ul", {});
      item.append(h("details", { open: true }, h("summary", {}, label, entry.counter), entry.list));
    } else {
      entry.value = isContainer ? null : h("span", { class: `json-value ${entry.kind}`, dir: entry.kind === "string" ? "auto" : null });
      entry.list = isContainer ? parent.list : null;
      item.append(...[label, entry.value].filter(Boolean));
    }
    entry.item = item;
    this.#places.set(entry.pointer, item);
    (parent?.list ?? this.element).append(item);
  }

  #grow(part) {
    const { value } = this.#path.at(-1);
    if (!value) return;
    const last = value.lastElementChild;
    const isSame = last && last.classList.contains("forced") === this.#isForced && last.tagName === "SPAN";
    const place = isSame ? last : value.appendChild(h("span", { class: this.#isForced ? "forced" : null }));
    for (const node of nodesOf(part)) {
      if (typeof node === "string" && place.lastChild?.nodeType === Node.TEXT_NODE) place.lastChild.appendData(node);
      else place.append(node);
    }
  }

  #end() {
    this.#path.pop();
  }
}
