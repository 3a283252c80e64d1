/**
 * What is known of one token, and all of them as a table.
 *
 * Knows nothing of conversations; `onBranch(word, logprob)` is told which alternative a reader wants to go on with.
 */

import { h, nodesOf } from "../ui/dom.js";
import { percent, probability, wordText } from "./texts.js";

const PAGE = 100; // rows of the table that are shown at once
const KINDS = ["", "Guessed ahead and checked by the model.", "Forced: the form of the answer left no other."];

/** A token's text, nothing in it hidden or at work. */
const shown = (word) => h("code", { class: typeof word === "string" ? "token-word" : "token-word bytes", dir: "auto" }, ...nodesOf(wordText(word)));

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

/** The alternatives of a token, the chosen one among them: {word, logprob, isChosen}. */
function alternatives([word, logprob, tops]) {
  const rows = [];
  for (let k = 0; k < tops.length; k += 2) rows.push({ word: tops[k], logprob: tops[k + 1], isChosen: same(tops[k], word) });
  if (!rows.some(({ isChosen }) => isChosen)) rows.push({ word, logprob, isChosen: true, isBeyond: rows.length > 0 });
  return rows;
}

export class TokenDetail {
  constructor(onBranch) {
    this.onBranch = onBranch;
    this.element = h("section", { class: "token-detail", "aria-label": "The chosen token" });
  }

  /** Shows a token of a log, null: none. `canBranch`: one can go on from another one in its place. */
  show(texts, index, canBranch) {
    if (!texts || index < 0) return this.element.replaceChildren();
    const entry = texts.log.list[index];
    const [word, logprob] = entry;
    const [kind] = texts.kinds(index, index + 1);
    const rows = alternatives(entry);
    this.element.replaceChildren(
      h("p", { class: "token-head" }, shown(word), h("span", {}, `${percent(probability(logprob))} · token ${(index + 1).toLocaleString("en")} of ${texts.length.toLocaleString("en")} · ${texts.entropies[index].toFixed(2)} bits`)),
      ...(KINDS[kind] ? [h("p", { class: "note" }, KINDS[kind])] : []),
      h(
        "table",
        {},
        h("caption", { class: "hidden" }, `What could stand at token ${index + 1}`),
        h("thead", {}, h("tr", {}, ...["Token", "Probability", "Log"].map((title) => h("th", { scope: "col" }, title)), h("td", {}))),
        h("tbody", {}, ...rows.map((row) => this.#row(row, canBranch))),
      ),
    );
  }

  #row({ word, logprob, isChosen, isBeyond }, canBranch) {
    const p = probability(logprob);
    const bar = h("span", { class: "token-bar", "aria-hidden": "true" }, h("span"));
    bar.firstChild.style.width = `${100 * p}%`;
    const branch = () => this.onBranch(word, logprob);
    const isOffered = canBranch && !isChosen && typeof word === "string" && word !== "";
    const button = isOffered ? h("button", { type: "button", class: "link-button", "aria-label": `Go on with ${wordText(word)} instead`, onclick: branch }, "Branch") : null;
    return h(
      "tr",
      { class: isChosen ? "is-chosen" : null },
      h("th", { scope: "row" }, shown(word), isChosen ? h("span", { class: "token-note" }, isBeyond ? "chosen, further down" : "chosen") : null),
      h("td", {}, bar, percent(p)),
      h("td", {}, logprob.toFixed(3)),
      h("td", {}, button),
    );
  }
}

/** All tokens, a page of them at a time: the same as the running text, for who cannot see that. */
export class TokenTable {
  #texts = null;
  #page = 0;

  constructor() {
    this.body = h("tbody");
    this.words = h("p", { class: "note", role: "status" });
    this.before = h("button", { type: "button", class: "button", onclick: () => this.#turn(-1) }, "Previous");
    this.after = h("button", { type: "button", class: "button", onclick: () => this.#turn(1) }, "Next");
    const head = h("thead", {}, h("tr", {}, ...["No.", "Token", "Probability", "Could have been"].map((title) => h("th", { scope: "col" }, title))));
    this.element = h("div", { class: "token-table" }, h("div", { class: "token-table-scroll", tabindex: "0", role: "group", "aria-label": "Tokens as a list" }, h("table", {}, head, this.body)), h("div", { class: "token-pages" }, this.before, this.words, this.after));
  }

  show(texts) {
    if (texts !== this.#texts) this.#page = 0;
    this.#texts = texts;
    this.#draw();
  }

  #turn(step) {
    this.#page += step;
    this.#draw();
    this.body.closest("[role=group]").scrollTop = 0;
    const button = step > 0 ? this.after : this.before;
    if (button.disabled) (step > 0 ? this.before : this.after).focus();
  }

  #draw() {
    const texts = this.#texts;
    const length = texts?.length ?? 0;
    const first = this.#page * PAGE;
    const last = Math.min(length, first + PAGE);
    const rows = [];
    for (let k = first; k < last; k += 1) {
      const [word, logprob, tops] = texts.log.list[k];
      const others = tops.filter((other, at) => at % 2 === 0 && !same(other, word)).flatMap((other) => [shown(other), " "]);
      rows.push(h("tr", {}, h("td", {}, String(k + 1)), h("th", { scope: "row" }, shown(word)), h("td", {}, percent(probability(logprob))), h("td", {}, ...others)));
    }
    this.body.replaceChildren(...rows);
    const words = length ? `${(first + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${length.toLocaleString("en")}` : "No tokens yet";
    if (this.words.textContent !== words) this.words.textContent = words;
    this.before.disabled = this.#page === 0;
    this.after.disabled = last >= length;
  }
}
