/**
 * The table of requests that run or wait.
 *
 * Owns its rows: one stays the same element for as long as its request lives, so that focus stays where it is. Requests of this page
 * are marked, and can be cancelled. Knows nothing of how.
 */

import { h, nodesOf } from "../ui/dom.js";
import { count } from "../ui/numbers.js";
import { secondsText } from "./facts.js";

function stateText({ state, prompt_tokens: prompt, computed_tokens: computed, generated_tokens: generated }) {
  if (state === "waiting") return generated ? "Sent back, waiting" : "Waiting"; // for lack of memory
  return computed < prompt ? "Reading prompt" : "Answering";
}

class Row {
  constructor(key, cancel) {
    this.bar = h("span", { class: "fill" });
    this.prompt = h("span", { class: "words" });
    const cell = (name) => h("td", { class: "number", "data-title": TITLES[name] });
    this.state = h("span", { class: "state" });
    this.name = h("th", { scope: "row" });
    this.cells = { cached: cell("cached"), generated: cell("generated"), age: cell("age") };
    this.action = h("td", { class: "action" });
    this.element = h(
      "tr",
      {},
      this.name,
      h("td", { class: "state-cell" }, this.state),
      h("td", { class: "prompt", "data-title": TITLES.prompt }, h("span", { class: "progress", "aria-hidden": "true" }, this.bar), this.prompt),
      ...Object.values(this.cells),
      this.action,
    );
    this.cancel = cancel;
    this.key = key;
  }

  show(request, number) {
    const { state, prompt_tokens: prompt, computed_tokens: computed, frame_id: frameId } = request;
    const isOwn = frameId !== undefined;
    const read = Math.min(computed, prompt);
    this.element.classList.toggle("own", isOwn);
    this.state.dataset.state = state;
    put(this.state, stateText(request));
    this.#showName(request, isOwn, number);
    this.bar.style.width = `${prompt ? (100 * read) / prompt : 0}%`;
    put(this.prompt, read < prompt ? `${count(read)} of ${count(prompt)}` : count(prompt));
    put(this.cells.cached, count(request.cached_tokens));
    put(this.cells.generated, count(request.generated_tokens));
    put(this.cells.age, secondsText(request.age_s));
    if (isOwn && !this.action.firstChild) {
      const button = h("button", { type: "button", class: "button small", "aria-label": `Cancel your request ${frameId}`, onclick: () => this.#cancelled(button, frameId) }, "Cancel");
      this.action.append(button);
    }
  }

  #showName({ id, client_id: clientId }, isOwn, number) {
    const name = clientId ?? id ?? (isOwn ? "" : `Request ${number}`);
    if (this.shown === name) return;
    this.shown = name;
    this.name.replaceChildren(...(isOwn ? [h("span", { class: "badge" }, "Yours")] : []), h("span", { class: "id" }, ...nodesOf(name.slice(0, 200))));
  }

  #cancelled(button, frameId) {
    button.setAttribute("aria-disabled", "true");
    button.textContent = "Cancelling…";
    this.cancel(frameId);
  }
}

/** Text of an element, changed only when it is another: what does not change is not laid out or told again. */
function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const TITLES = { prompt: "Prompt", cached: "Cached", generated: "Written", age: "Age" };

export class EngineRequests {
  #rows = new Map();

  /** `cancel(frameId)` ends a request of this page. */
  constructor(cancel) {
    this.cancel = cancel;
    this.body = h("tbody");
    this.caption = h("h3", { tabindex: "-1" }, "Requests");
    this.note = h("p", { class: "note" });
    const head = ["Request", "State", TITLES.prompt, TITLES.cached, TITLES.generated, TITLES.age];
    const heads = head.map((title, k) => h("th", { scope: "col", class: k > 2 && "number" }, title));
    this.tableElement = h(
      "table",
      { class: "requests", "aria-label": "Requests that run or wait" },
      h("thead", {}, h("tr", {}, ...heads, h("th", { scope: "col" }, h("span", { class: "hidden" }, "Cancel")))),
      this.body,
    );
    this.place = h("div", { class: "table-scroll" }, this.tableElement);
    this.element = h("section", { class: "requests-part", "aria-label": "Requests" }, this.caption, this.note, this.place);
  }

  show({ requests, numRequests }) {
    const isFocused = this.body.contains(document.activeElement);
    const used = new Map();
    const rows = requests.map((request, k) => this.#row(request, k, used));
    const alive = new Set(rows.map(({ key }) => key));
    const gone = [...this.#rows.values()].filter(({ key }) => !alive.has(key));
    const next = isFocused && this.#nextFocus(gone);
    for (const { key, element } of gone) {
      element.remove();
      this.#rows.delete(key);
    }
    rows.forEach(({ element }, k) => this.body.children[k] === element || this.body.insertBefore(element, this.body.children[k] ?? null));
    if (next) next.focus();
    this.place.hidden = rows.length === 0;
    const more = numRequests - rows.length;
    put(this.note, rows.length ? (more > 0 ? `And ${count(more)} more, that are not listed.` : "") : "No request runs or waits.");
    this.note.hidden = !this.note.textContent;
  }

  /** Its row; choices of one call share everything but their place among themselves. */
  #row(request, k, used) {
    const base = request.frame_id !== undefined ? `own ${request.frame_id}` : (request.id ?? `place ${k}`);
    used.set(base, (used.get(base) ?? 0) + 1);
    const key = `${base} ${used.get(base)}`;
    const row = this.#rows.get(key) ?? new Row(key, this.cancel);
    this.#rows.set(key, row);
    row.show(request, k + 1);
    return row;
  }

  /** Where focus goes when the row that has it ends: to the next request that can be cancelled, else to the heading. */
  #nextFocus(gone) {
    const isLost = gone.some(({ element }) => element.contains(document.activeElement));
    if (!isLost) return document.activeElement;
    const lost = new Set(gone.map(({ element }) => element));
    const buttons = [...this.body.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    const living = (button) => !lost.has(button.closest("tr"));
    return buttons.slice(at + 1).find(living) ?? buttons.slice(0, at).findLast(living) ?? this.caption;
  }
}
