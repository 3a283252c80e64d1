/**
 * The tokens of an answer: how likely each one was, what could have stood in its place, and where the model was least sure.
 *
 * Owns the switch that asks for probabilities, and which answer and which token are looked at. What is known of them is
 * log.js's and texts.js's.
 */

import { AnswerPicker } from "../chat/answer-picker.js";
import { h, nodesOf } from "../ui/dom.js";
import { segments } from "../ui/segments.js";
import { TokenChart } from "./chart.js";
import { TokenDetail, TokenTable } from "./detail.js";
import { TokenFlow } from "./flow.js";
import { branchOf, hasProbabilities, isWanted, tokenLogOf, want } from "./log.js";
import { STEPS, TokenTexts, percent, wordText } from "./texts.js";

const DRAW_MS = 200;
const NUM_LEAST_SURE = 5;

export class TokensPanel {
  #isShown = false;
  #timer = 0;
  #texts = null;
  #view = "text";

  constructor(page) {
    this.page = page;
    this.log = null;
    this.picker = new AnswerPicker(page, { id: "tokens-of", label: "Tokens of", onChange: () => this.#draw() });
    this.wish = h("input", { type: "checkbox", role: "switch", id: "record-tokens", "aria-describedby": "record-note", onchange: () => this.#want(this.wish.checked) });
    this.reason = h("p", { class: "token-none" });
    this.resend = h("button", { type: "button", class: "button primary", onclick: () => this.#resend() }, "Turn on and resend");
    this.flow = new TokenFlow({ look: (index) => this.#look(index), choose: (index) => this.#look(index) });
    this.table = new TokenTable();
    this.detail = new TokenDetail((word, logprob) => this.#branch(word, logprob));
    this.chart = new TokenChart((index) => this.#go(index));
    this.summary = h("p", { class: "note" });
    this.leastSure = h("ul", { class: "least-sure", "aria-label": "Where the model was least sure" });
    this.none = h("div", { class: "token-empty", hidden: true }, this.reason, this.resend);
    this.legend = h("ul", { class: "token-legend", "aria-label": "What the looks of a token mean" });
    this.text = h("div", { class: "token-text" }, this.legend, this.flow.element, this.detail.element);
    this.some = h(
      "div",
      { class: "token-some", hidden: true },
      this.chart.element,
      this.summary,
      this.leastSure,
      segments("token-view", "How to show the tokens", { text: "Text", list: "List" }, this.#view, (view) => this.#show(view)),
      this.text,
      this.table.element,
    );
    const wish = h("div", { class: "token-wish" }, this.wish, h("label", { for: "record-tokens" }, "Record token probabilities"), h("span", { class: "hidden", id: "record-note" }, "For the next answers of this chat, with five alternatives of each token."));
    this.body = h("div", { class: "token-body" }, wish, this.picker.element, this.none, this.some);
    this.refusal = h("p", { class: "token-none" });
    this.element = h("div", { class: "tokens-panel" }, this.refusal, this.body);
    page.addEventListener("ready", () => this.#draw());
    page.addEventListener("answers", ({ detail }) => detail === page.conversation && this.#later());
    page.extended.then(() => this.#attach(tokenLogOf(page)));
  }

  #attach(log) {
    if (!log) return; // it could not be loaded; the page says so
    this.log = log;
    log.addEventListener("tokens", ({ detail }) => detail === this.picker.message && this.#later());
    log.addEventListener("look", ({ detail }) => this.picker.look(detail));
    if (log.wanted) this.picker.look(log.wanted);
    else this.#draw();
  }

  shown() {
    this.#isShown = true;
    this.#draw();
  }

  gone() {
    this.#isShown = false;
  }

  // ------------------------------------------------------------------------------------------------------------ what is shown

  #later() {
    if (this.#isShown) this.#timer ||= setTimeout(() => this.#draw(), DRAW_MS);
  }

  #draw() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    if (!this.#isShown) return;
    const { config } = this.page;
    const refusal = config && !hasProbabilities(this.page) ? "This model gives no token probabilities." : "";
    this.refusal.textContent = refusal;
    this.refusal.hidden = !refusal;
    this.body.hidden = Boolean(refusal);
    this.picker.draw();
    this.wish.checked = isWanted(this.page.conversation);
    if (this.log) this.#drawTokens(); // it comes soon
  }

  #drawTokens() {
    const { message } = this.picker;
    const log = this.log.of(message);
    const hasTokens = Boolean(log?.list.length);
    this.none.hidden = hasTokens;
    this.some.hidden = !hasTokens;
    this.#drawReason(message);
    const isOther = this.#texts?.log !== log;
    if (isOther) this.#texts = hasTokens ? new TokenTexts(log) : null;
    const isNews = this.#texts?.grow() || isOther;
    if (!this.#texts) return this.flow.show(null);
    if (isNews || this.flow.chosen < 0) this.#drawNews();
    this.#show(this.#view);
  }

  #drawNews() {
    const texts = this.#texts;
    const { length } = texts;
    const words = [
      `${(length + texts.log.more).toLocaleString("en")} tokens`,
      `each ${percent(Math.exp(texts.sumLogprob / length))} likely`,
      `${(texts.sumEntropy / length).toFixed(2)} bits unsure, in the mean`,
    ];
    const more = texts.log.more ? ` The first ${length.toLocaleString("en")} are kept.` : "";
    const before = texts.log.before ? " What was written before was not recorded." : "";
    this.summary.textContent = `${words.join(", ")}.${more}${before}`;
    this.chart.show(texts.entropies);
    this.legend.replaceChildren(...legend(new Set(texts.log.marks.map(([, kind]) => kind))));
    this.#drawLeastSure();
  }

  #drawLeastSure() {
    const texts = this.#texts;
    const buttons = texts.leastSure(NUM_LEAST_SURE).map((index) => {
      const name = wordText(texts.log.list[index][0]);
      const label = `Token ${index + 1}, ${name}, ${texts.entropies[index].toFixed(1)} bits unsure`;
      return h("li", {}, h("button", { type: "button", class: "button", "aria-label": label, title: label, onclick: () => this.#go(index) }, h("span", {}, ...nodesOf(name))));
    });
    this.leastSure.hidden = !buttons.length;
    if (!this.leastSure.contains(document.activeElement)) this.leastSure.replaceChildren(...buttons);
  }

  #drawReason(message) {
    const isRunning = message?.state === "streaming";
    const wanted = isWanted(this.page.conversation);
    if (!message) this.reason.textContent = wanted ? "Send something to see its tokens here." : "Turn this on and send something: each token of the answer is shown with its probability.";
    else if (isRunning && wanted) this.reason.textContent = "Waiting for the first token…";
    else this.reason.textContent = "No probabilities were recorded for this answer.";
    this.resend.hidden = !message || isRunning;
    this.resend.textContent = wanted ? "Send again" : "Turn on and resend";
  }

  #show(view) {
    this.#view = view;
    this.text.hidden = view !== "text";
    this.table.element.hidden = view !== "list";
    if (view === "list") return this.table.show(this.#texts);
    this.flow.show(this.#texts);
    this.#look(this.flow.chosen);
  }

  /** Tells of this token; -1: of the one where the reader stays. */
  #look(index) {
    const at = index < 0 ? this.flow.chosen : index;
    this.detail.show(this.#texts, at, at === this.flow.chosen && this.picker.message?.state !== "streaming");
    this.chart.point(at);
  }

  #go(index) {
    if (this.#view !== "text") {
      this.element.querySelector("[name=token-view][value=text]").checked = true;
      this.#show("text");
    }
    this.flow.choose(index);
  }

  // -------------------------------------------------------------------------------------------------------------- asking

  #want(record) {
    want(this.page, record);
    this.#draw();
  }

  #resend() {
    want(this.page, true);
    this.page.chat.regenerate(this.picker.message);
    this.picker.select.focus();
  }

  /** A new version of the answer: the same up to this token, then the other one, then what the model goes on with. */
  async #branch(word, logprob) {
    const { chat } = this.page;
    if (chat.isBusy()) return;
    const { message } = this.picker;
    const texts = this.#texts;
    const index = this.flow.chosen;
    const before = message.content.slice(0, texts.log.before) + texts.before(index);
    want(this.page, true);
    const copy = await chat.change("addVersion", message, before + word);
    copy.isEdited = undefined;
    copy.extra = { ...copy.extra, tokens: branchOf(texts.log, index, [word, logprob]) };
    await chat.change("continueAnswer", copy);
    this.picker.pick(copy);
    this.flow.choose(index);
  }
}

/** What the grounds and lines under tokens mean, and the letters of those of some `kinds`. */
function legend(kinds) {
  const words = STEPS.map((least, k) => (k < STEPS.length - 1 ? `≥ ${least * 100} %` : `< ${STEPS[k - 1] * 100} %`));
  const looks = [...words.map((word, k) => h("span", { class: `token step-${k}` }, word)), ...(kinds.has(1) ? [h("em", {}, "guessed ahead")] : []), ...(kinds.has(2) ? [h("b", {}, "forced")] : [])];
  return looks.map((look) => h("li", {}, look));
}
