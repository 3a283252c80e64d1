/**
 * One message on screen: its text, its thought, and the line under it with what became of it and what can be done with it.
 *
 * Owns the message's element. Changes no conversation: what a button does is the chat's business (chat.js), what else stands in the
 * element is that of the chat's plugins.
 */

import { variantsOf } from "../store/store.js";
import { MarkdownView } from "../text/render.js";
import { h, icon, iconButton, nodesOf } from "../ui/dom.js";
import { canContinue, count, endOf, statsText } from "./figures.js";
import { hasGuesses } from "./marks.js";

/** A button in words, with an icon; `label` is its name where the words are not enough. */
function wordedButton(name, words, label, onclick) {
  const button = iconButton(name, label, onclick);
  button.classList.add("worded");
  button.append(words);
  return button;
}

export class MessageItem {
  #view = null;
  #numShown = 0; // characters of the text that the view has
  #thought = null;
  #thinkButton = null;

  /** `number` is its place in the conversation, `ordinal` among those of its role; from 1. */
  constructor(message, chat, number, ordinal) {
    this.message = message;
    this.chat = chat;
    this.number = number;
    this.isFilled = false; // with Markdown; until then its text stands there as it is
    this.text = h("div", { class: "text", dir: "auto" });
    this.under = h("div", { class: "under" });
    const { role, pictures } = message;
    const thumbnails = pictures?.map((picture) => h("li", {}, chat.blobs.thumbnail(picture)));
    this.element = h(
      "li",
      { class: `message ${role}`, "data-id": message.id },
      h("h2", { class: "hidden" }, `${role === "assistant" ? "Answer" : "Question"} ${ordinal}`),
      thumbnails && h("ul", { class: "sent", "aria-label": "Pictures" }, ...thumbnails),
      this.text,
      this.under,
    );
    this.text.append(...nodesOf(message.content));
    if (role === "user") {
      this.isFilled = true;
      this.text.hidden = !message.content; // pictures alone
    } else if (this.isStreaming) this.fill();
    else this.#showThought();
    this.drawUnder();
    chat.fromPlugins("decorate", message, this.element);
    if (message.edit !== undefined) this.edit(); // begun before, not ended
  }

  /** Another part of the page shows the text (structure/answer-view.js). */
  get isReplaced() {
    return this.element.classList.contains("has-form");
  }

  get isStreaming() {
    return this.message.state === "streaming";
  }

  // ---------------------------------------------------------------------------------------------------------------- text

  /** Shows the text as the Markdown it is. */
  fill() {
    if (this.isFilled) return;
    this.isFilled = true;
    if (this.isReplaced) return;
    this.text.replaceChildren();
    this.#view = new MarkdownView(this.text);
    if (this.isStreaming) return this.grow();
    this.#view.finish(this.message.content);
    this.#numShown = this.message.content.length;
  }

  /** Shows what the message has become since the last time. */
  grow() {
    const { content } = this.message;
    this.#showThought();
    if (this.#numShown === content.length || this.isReplaced) return;
    this.#view?.append(content.slice(this.#numShown));
    this.#numShown = content.length;
  }

  /** The text is complete. */
  finish() {
    this.grow();
    this.#view?.finish();
    this.#thought?.end();
  }

  #showThought() {
    const { message } = this;
    if (!message.reasoning) return;
    if (this.#thought) this.#thought.grow();
    else this.#bringThought();
    if (this.#thinkButton) this.#thinkButton.hidden = Boolean(message.content);
  }

  async #bringThought() {
    const { ThoughtView } = await import("./thought.js");
    if (this.#thought) return;
    this.#thought = new ThoughtView(this.message);
    this.text.before(this.#thought.element);
    this.#thought.grow();
  }

  /** Opens a field in the text's place. */
  async edit() {
    const { Editor } = await import("./editing.js");
    if (this.editor || !this.element.isConnected) return;
    this.editor = new Editor(this.message, this.chat, this.number, () => this.#editEnded());
    this.text.hidden = true;
    this.text.after(this.editor.element);
    this.editor.begin();
  }

  #editEnded() {
    this.editor.element.remove();
    this.editor = null;
    this.text.hidden = false;
    (this.under.querySelector("[data-action=edit]") ?? this.chat.list).focus();
  }

  // --------------------------------------------------------------------------------------------------------- the line under

  /** Draws it anew; `isNews`: an error in it is to be told to who cannot see it. The focus stays on what has the same name. */
  drawUnder(isNews = false) {
    const { message, isStreaming } = this;
    const focused = this.under.contains(document.activeElement) ? document.activeElement : null;
    this.element.setAttribute("aria-busy", String(isStreaming));
    if (!isStreaming) this.#thinkButton = null; // it would hold the line it stood in
    this.under.replaceChildren(
      ...(message.error ? [this.#error(isNews)] : []),
      ...(isStreaming ? [this.#live()] : []),
      ...(message.role === "assistant" && !isStreaming ? this.#figures() : []),
      ...this.chat.fromPlugins("under", message, this.element),
      ...(isStreaming ? [] : [this.#actions()]),
    );
    if (!focused) return;
    const buttons = [...this.under.querySelectorAll("button:not(:disabled)")];
    const name = (button) => button.getAttribute("aria-label") ?? button.textContent;
    (buttons.find((button) => name(button) === name(focused)) ?? buttons[0])?.focus();
  }

  #error(isNews) {
    const { error, param, requestId } = this.message;
    const facts = [param && `Field: ${param}`, requestId && `Request: ${requestId}`].filter(Boolean);
    return h("div", { class: "error", role: isNews && "alert" }, ...nodesOf(error), facts.length ? h("p", { class: "facts" }, ...nodesOf(facts.join(" · "))) : null);
  }

  #live() {
    const end = () => this.chat.change("endThought", this.message);
    this.#thinkButton = h("button", { type: "button", class: "link-button", hidden: !this.message.reasoning, onclick: end }, "Stop thinking");
    return h("div", { class: "stats" }, h("span", { class: "pulse", "aria-hidden": "true" }), h("span", { class: "live" }, "Generating"), this.#thinkButton);
  }

  /** Shows figures while the answer grows. */
  showLive(words) {
    const live = this.under.querySelector(".live");
    if (live) live.textContent = words;
  }

  #figures() {
    const { message, number } = this;
    const { stats } = message;
    const end = [endOf(message), message.isEdited && "Edited"].filter(Boolean).join(" · ");
    const line = h("div", { class: "stats" });
    if (end) line.append(h("span", { class: "end" }, end));
    if (canContinue(message)) line.append(wordedButton("right", "Continue", `Continue message ${number}`, () => this.chat.change("continueAnswer", message)));
    const words = stats && statsText(stats);
    if (words) {
      const { cachedTokens, promptTokens } = stats;
      const bar = cachedTokens === null || !promptTokens ? null : h("span", { class: "cached", "aria-hidden": "true" }, h("span"));
      if (bar) bar.firstChild.style.width = `${(100 * cachedTokens) / promptTokens}%`;
      const toggle = (event) => this.#toggleFigures(event.currentTarget);
      const button = h("button", { type: "button", class: "figures-button", "aria-expanded": "false", title: `All figures of message ${number}`, onclick: toggle });
      button.append(words, ...(bar ? [bar] : []), icon("more"));
      line.append(button);
    }
    const guesses = this.#guessesButton();
    return [...(line.childNodes.length ? [line] : []), ...(guesses ? [guesses] : [])];
  }

  async #toggleFigures(button) {
    const { figuresTable } = await import("./figures-table.js");
    const shown = this.under.querySelector(".figures");
    if (shown) shown.remove();
    else this.under.append(figuresTable(this.message));
    button.setAttribute("aria-expanded", String(!shown));
  }

  /** How much was guessed; pressed, it shows where. */
  #guessesButton() {
    const { guessedTokens, wrongGuesses, tokens } = this.message.stats ?? {};
    if (!guessedTokens || !hasGuesses(this.message.marks)) return null;
    const properties = {
      type: "button",
      class: "link-button guesses",
      "aria-pressed": String(Boolean(this.element.querySelector(".marks"))),
      title: `Of ${count(guessedTokens + wrongGuesses)} guesses ${count(guessedTokens)} were right`,
      onclick: (event) => this.#toggleMarks(event.currentTarget),
    };
    return h("button", properties, `${count(guessedTokens)} of ${count(tokens)} tokens guessed`);
  }

  async #toggleMarks(button) {
    const { marksView } = await import("./marks-view.js");
    const shown = this.element.querySelector(".marks");
    if (shown) shown.remove();
    else this.text.after(marksView(this.message.content, this.message.marks));
    this.text.hidden = !shown;
    button.setAttribute("aria-pressed", String(!shown));
  }

  // --------------------------------------------------------------------------------------------------------------- actions

  #actions() {
    const { message, number, chat } = this;
    const buttons = [];
    const variants = variantsOf(chat.conversation, message);
    if (variants.length > 1) buttons.push(this.#variantSwitch(variants));
    if (message.content) buttons.push(iconButton("copy", `Copy message ${number}`, ({ currentTarget }) => this.#copy(currentTarget)));
    const edit = iconButton("edit", `Edit message ${number}`, () => (message.role === "user" ? chat.page.edit(message) : this.edit()));
    edit.dataset.action = "edit";
    if (message.role === "user" || message.content) buttons.push(edit);
    if (message.role === "assistant") buttons.push(this.#againButton());
    buttons.push(...chat.fromPlugins("actions", message, number));
    buttons.push(iconButton("trash", `Delete message ${number}`, () => chat.change("remove", message)));
    return h("div", { class: "actions" }, ...buttons);
  }

  async #copy(button) {
    const { copyText } = await import("../ui/copying.js");
    copyText(this.message.content, button);
  }

  /** Regenerate; where the answer failed it says in words what it does. */
  #againButton() {
    const again = () => this.chat.regenerate(this.message);
    if (this.message.state === "failed") return wordedButton("again", "Try again", `Try again, message ${this.number}`, again);
    return iconButton("again", `Regenerate message ${this.number}`, again);
  }

  #variantSwitch(variants) {
    const at = variants.indexOf(this.message);
    const step = (name, label, to) => {
      const button = iconButton(name, `${label} version of message ${this.number}`, () => this.chat.change("switchTo", variants[to], label));
      button.disabled = to < 0 || to >= variants.length;
      return button;
    };
    const place = h("span", { class: "place" }, `${at + 1}/${variants.length}`);
    return h("div", { class: "variants" }, step("left", "Previous", at - 1), place, step("right", "Next", at + 1));
  }
}
