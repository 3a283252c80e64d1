/**
 * One question and its answer in a column of Compare: how they look while the answer grows and afterwards.
 *
 * Owns the turn's element. Knows nothing of other columns, but that an answer can be shown by its differences from another one.
 */

import { endOf } from "../chat/figures.js";
import { MarkdownView } from "../text/render.js";
import { copyText } from "../ui/copying.js";
import { h, nodesOf } from "../ui/dom.js";
import { plural } from "../ui/numbers.js";
import { inWords } from "./figures.js";
import { differences, numWords } from "./word-diff.js";

const KINDS = { same: "span", gone: "del", new: "ins" };
const DROPPED = "This answer was too long to be kept over a reload";

export class TurnView {
  #comparedWith = null; // the text whose differences are drawn

  /** `actions`: letter() is the column's; isLast(turn); retry() asks again; field(name) leads to a field, null where there is none. */
  constructor(turn, number, actions) {
    this.turn = turn;
    this.actions = actions;
    this.reasoning = h("div", { class: "reasoning-text", dir: "auto" });
    this.thoughts = h("details", { class: "reasoning", hidden: true }, h("summary", {}, "Reasoning"), this.reasoning);
    this.text = h("div", { class: "text", dir: "auto" });
    this.compared = h("div", { class: "compared", dir: "auto", hidden: true });
    this.end = h("div", { class: "turn-end" });
    this.heading = h("h3", { class: "hidden" }, `Answer ${number}`);
    this.element = h(
      "li",
      { class: "turn assistant" },
      h("h3", { class: "hidden" }, `Question ${number}`),
      h("p", { class: "question", dir: "auto" }, turn.question),
      this.heading,
      this.thoughts,
      this.text,
      this.compared,
      this.end,
    );
    this.number = number;
    this.view = new MarkdownView(this.text);
    this.append(turn.content, turn.reasoning);
    if (turn.state !== "streaming") this.finish();
    else this.element.setAttribute("aria-busy", "true");
  }

  append(text, reasoning) {
    if (reasoning) this.reasoning.append(...nodesOf(reasoning));
    this.thoughts.hidden = !this.turn.reasoning;
    if (text) this.view.append(text);
  }

  /** The connection is lost; the answer goes on when it is there again. */
  wait(isWaiting) {
    this.end.replaceChildren(...(isWaiting ? [h("span", {}, "Connection lost, waiting for the server…")] : []));
  }

  /** The answer is complete, or there will be none. */
  finish(isNews = false) {
    this.view.finish();
    this.element.setAttribute("aria-busy", "false");
    this.drawEnd(isNews);
  }

  /** The line below: how the answer ended, and what can be done about it. */
  drawEnd(isNews = false) {
    const { turn } = this;
    if (turn.state === "streaming") return;
    const ending = turn.state === "dropped" ? DROPPED : turn.state === "failed" ? "" : endOf({ ...turn, stats: turn.figures });
    const copy = h("button", { type: "button", class: "link-button", onclick: () => copyText(turn.content, copy) }, "Copy");
    copy.setAttribute("aria-label", `Copy answer ${this.number} of column ${this.actions.letter()}`);
    const figures = turn.figures && turn.content && !this.actions.isLast(turn) ? inWords(turn.figures) : ""; // the last one's are in the column's foot
    const told = [ending, figures].filter(Boolean).join(" · ");
    this.end.replaceChildren(...[turn.error && this.#error(turn.error, isNews), told && h("span", {}, told), turn.content && copy].filter(Boolean));
  }

  #error({ message, param }, isNews) {
    const letter = this.actions.letter();
    const leads = param ? this.actions.field(param) : null;
    return h(
      "div",
      { class: "error", role: isNews && "alert" },
      h("p", {}, ...nodesOf(message)),
      h(
        "div",
        { class: "error-actions" },
        h("button", { type: "button", class: "button", "aria-label": `Try again, column ${letter}`, onclick: () => this.actions.retry() }, "Try again"),
        leads && h("button", { type: "button", class: "link-button", onclick: leads.go }, `Change ${leads.label}`),
      ),
    );
  }

  /** Shows how this answer differs from `other`, or the answer itself where that is null. */
  compare(other) {
    const isCompared = other !== null && this.turn.state !== "streaming" && Boolean(this.turn.content);
    this.text.hidden = isCompared;
    this.compared.hidden = !isCompared;
    const drawn = isCompared ? other : null;
    if (drawn === this.#comparedWith) return; // to find differences takes its time
    this.#comparedWith = drawn;
    this.compared.replaceChildren(...(isCompared ? this.#differences(other) : []));
  }

  #differences(other) {
    const parts = differences(other, this.turn.content);
    const [gone, added] = ["gone", "new"].map((kind) => parts.filter((part) => part.kind === kind).reduce((sum, { text }) => sum + numWords(text), 0));
    const told = parts.every(({ kind }) => kind === "same") ? "The same text as in column A" : `${plural(added, "word")} only here, ${plural(gone, "word")} only in column A`;
    const node = ({ kind, text }) => h(KINDS[kind], {}, ...nodesOf(text));
    return [h("p", { class: "legend" }, told), h("div", { class: "words" }, ...parts.map(node))];
  }
}
