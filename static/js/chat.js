/**
 * The message list: one conversation on screen, and the answers that are being streamed into this and others.
 *
 * Owns the running answers, the message elements and the reading position. Knows nothing of the sidebars.
 */

import { byId, h, iconButton } from "./dom.js";
import { addMarks, hasGuesses, marksView } from "./marks.js";
import { MarkdownView } from "./render.js";
import { samplingBody } from "./settings.js";
import { addMessage, pathOf, removeMessage, showVariant, variantsOf } from "./store.js";

const STREAM_OPTIONS = { include_usage: true, continuous_usage_stats: true };
const SAVE_MS = 1_000; // how much of an answer a crash may cost
const FIGURES_MS = 250; // figures that change faster cannot be read
const NEAR_END_PX = 40;

/** An answer under way: text that arrived, and the element it goes to while its conversation is on screen. */
class Answer {
  constructor(conversation, message) {
    this.conversation = conversation;
    this.message = message;
    this.pending = ""; // arrived, not painted
    this.view = null;
    this.cancel = () => {};
    this.sentAt = performance.now();
    this.firstAt = 0;
    this.lastAt = 0;
    this.savedAt = this.sentAt;
    this.shownAt = this.sentAt;
    this.usage = null; // the server's latest count
    this.sources = new Map(); // of a turn in the body: the id of the message that it was made of
  }

  /** Counts as the server gave them last, times as this page saw them. */
  stats() {
    return {
      tokens: this.usage?.completion_tokens ?? null,
      promptTokens: this.usage?.prompt_tokens ?? null,
      pictureTokens: this.usage?.prompt_tokens_details?.image_tokens ?? 0,
      cachedTokens: this.usage?.prompt_tokens_details?.cached_tokens ?? null,
      guessedTokens: this.usage?.completion_tokens_details?.accepted_prediction_tokens ?? 0,
      wrongGuesses: this.usage?.completion_tokens_details?.rejected_prediction_tokens ?? 0,
      firstMs: this.firstAt ? this.firstAt - this.sentAt : null,
      decodeMs: this.lastAt - this.firstAt,
    };
  }
}

const count = (n) => n.toLocaleString("en");

/** "24 tok · 62 tok/s · TTFT 81 ms · 64 picture tokens · 112 of 130 prompt tokens cached", as far as it is known. */
export function statsText({ tokens, promptTokens, pictureTokens, cachedTokens, firstMs, decodeMs }) {
  const parts = [];
  if (tokens !== null) parts.push(`${count(tokens)} tok`);
  if (tokens > 1 && decodeMs > 0) {
    const rate = (tokens - 1) / (decodeMs / 1000);
    parts.push(`${rate < 10 ? rate.toFixed(1) : count(Math.round(rate))} tok/s`);
  }
  if (firstMs !== null) parts.push(`TTFT ${firstMs < 1000 ? `${Math.round(firstMs)} ms` : `${(firstMs / 1000).toFixed(2)} s`}`);
  if (pictureTokens) parts.push(`${count(pictureTokens)} picture tokens`);
  if (cachedTokens !== null) parts.push(`${count(cachedTokens)} of ${count(promptTokens)} prompt tokens cached`);
  return parts.join(" · ");
}

/** What a reader should know of how an answer ended; "" when it ended by itself. */
function endOf({ state, finish, content }) {
  if (state === "stopped") return "Stopped by you";
  if (state === "interrupted") return "Cut off by a reload";
  if (finish === "abort") return "Ended by the server";
  if (finish === "length") return "Cut at the token limit";
  return state === "done" && !content ? "Empty answer" : "";
}

/** What is sent to have this message answered: the system prompt, and the messages above it that say something. */
function askedWith(conversation, message) {
  const said = pathOf(conversation).filter((other) => other !== message && (other.role === "user" || other.content || other.extra));
  return { system: conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [], said };
}

/** The name of the picture that a refusal is about, "" where it is about none. */
function pictureIn({ param }, conversation, message) {
  const [, turn, part] = param?.match(/^messages\[(\d+)\]\.content\[(\d+)\]/) ?? [];
  const { system, said } = askedWith(conversation, message);
  return said[turn - system.length]?.pictures?.[part]?.name ?? "";
}

/**
 * What parts of the page may add to the chat, each a method they may have or lack:
 *   contribute(body, {conversation, message})  adds fields to a body before it is sent
 *   turns(message)  what the server gets for this message instead of its text: a list of messages, or nothing
 *   before(answer, body)  a promise that the question waits for; it bounds itself, to what nobody notices. answer.sources names the
 *     page's message that each of body.messages was made of
 *   opened(answer, {status, headers})  HTTP's answer began, where it came that way
 *   sent(answer, body), chunk(answer, chunk), ended(answer)  an answer's life; `answer.message` is kept, with `answer.message.extra`
 *   decorate(message, item)  the message's element was drawn
 *   under(message, item)  nodes below it: cards, notes
 *   actions(message, number)  buttons beside Copy and Regenerate
 * @typedef {object} Plugin
 */

export class Chat {
  #answers = new Map(); // conversation id -> Answer
  #plugins = [];
  #elements = new Map(); // message id -> <li>
  #isFollowing = true;
  #lastTop = 0;
  #frame = 0;

  /**
   * `page` is what this list needs of the page: extended() settles when every plugin is there, save(conversation, message) where message is all of it that is new, changed(conversation) when a stream starts or ends,
   * refused(ApiError, conversation, question), say(text) for the status region, edit(message) to take a question back to the composer.
   */
  constructor(server, blobs, page) {
    this.server = server;
    this.blobs = blobs;
    this.page = page;
    this.conversation = null;
    this.model = "";
    this.list = byId("messages");
    this.scroll = byId("scroll");
    this.jump = byId("jump");
    this.#watchReader();
    this.list.addEventListener("click", (event) => this.#copyCode(event));
  }

  /** From now on this part of the page adds to the chat. */
  use(plugin) {
    this.#plugins.push(plugin);
    if (this.conversation) this.#draw();
  }

  /** What every part that has this method gives. */
  #ask(method, ...given) {
    return this.#plugins.flatMap((plugin) => plugin[method]?.(...given) ?? []);
  }

  // ------------------------------------------------------------------------------------------------- what is on screen

  /** Draws the conversation anew, because a part of the page knows more of its messages. */
  redraw() {
    if (this.conversation) this.#draw();
  }

  show(conversation) {
    for (const answer of this.#answers.values()) answer.view = null;
    this.conversation = conversation;
    this.#draw();
    this.#follow(true);
  }

  #draw() {
    const path = pathOf(this.conversation);
    const answer = this.#answers.get(this.conversation.id);
    if (answer) answer.pending = ""; // the message's text has it, and is drawn whole below
    this.#elements.clear();
    this.list.replaceChildren(...path.map((message, k) => this.#element(message, path.slice(0, k + 1).filter(({ role }) => role === message.role).length)));
    byId("welcome").hidden = path.length > 0;
    this.list.hidden = path.length === 0;
    this.#keepEnd();
  }

  #element(message, ordinal) {
    const isAnswer = message.role === "assistant";
    const text = h("div", { class: "text", dir: "auto" });
    const item = h(
      "li",
      { class: `message ${message.role}`, "data-id": message.id },
      h("h2", { class: "hidden" }, `${isAnswer ? "Answer" : "Question"} ${ordinal}`),
      message.pictures && h("ul", { class: "sent", "aria-label": "Pictures" }, ...message.pictures.map((picture) => h("li", {}, this.blobs.thumbnail(picture)))),
      text,
      h("div", { class: "under" }),
    );
    this.#elements.set(message.id, item);
    if (isAnswer) this.#fillAnswer(message, text);
    else {
      text.textContent = message.content;
      text.hidden = !message.content; // pictures alone
    }
    this.#drawUnder(message);
    this.#ask("decorate", message, item);
    return item;
  }

  #fillAnswer(message, text) {
    const view = new MarkdownView(text);
    view.append(message.content);
    const answer = this.#answers.get(this.conversation.id);
    if (answer?.message === message) answer.view = view;
    else view.finish();
  }

  /** The line under a message: what became of it, its figures, and what can be done with it. */
  #drawUnder(message, isNews = false) {
    const item = this.#elements.get(message.id);
    if (!item) return;
    const under = item.querySelector(".under");
    const isStreaming = message.state === "streaming";
    item.setAttribute("aria-busy", String(isStreaming));
    const number = [...this.#elements.keys()].indexOf(message.id) + 1;
    under.replaceChildren(
      ...(message.error ? [h("p", { class: "error", role: isNews && "alert" }, message.error)] : []),
      ...(isStreaming ? [this.#liveFigures()] : []),
      ...(message.role === "assistant" ? this.#figures(message).filter(Boolean) : []),
      ...this.#ask("under", message, item),
      ...(isStreaming ? [] : [this.#actions(message, number)]),
    );
  }

  #liveFigures() {
    return h("p", { class: "stats" }, h("span", { class: "pulse", "aria-hidden": "true" }), h("span", { class: "live" }, "Generating"));
  }

  #figures(message) {
    if (message.state === "streaming") return [];
    const words = [endOf(message), message.stats ? statsText(message.stats) : ""].filter(Boolean).join(" · ");
    if (!words) return [];
    const { cachedTokens, promptTokens } = message.stats ?? {};
    const bar = cachedTokens === null || !promptTokens ? null : h("span", { class: "cached", "aria-hidden": "true" }, h("span"));
    if (bar) bar.firstChild.style.width = `${(100 * cachedTokens) / promptTokens}%`;
    return [h("p", { class: "stats" }, words, bar), this.#guessesButton(message)];
  }

  /** How much was guessed; pressed, it shows where. */
  #guessesButton(message) {
    const { guessedTokens, wrongGuesses, tokens } = message.stats ?? {};
    if (!guessedTokens || !hasGuesses(message.marks)) return null;
    const button = h(
      "button",
      {
        type: "button",
        class: "link-button guesses",
        "aria-pressed": String(Boolean(this.#elements.get(message.id).querySelector(".marks"))),
        title: `Of ${count(guessedTokens + wrongGuesses)} guesses ${count(guessedTokens)} were right`,
        onclick: () => this.#toggleMarks(message, button),
      },
      `${count(guessedTokens)} of ${count(tokens)} tokens guessed`,
    );
    return button;
  }

  #toggleMarks(message, button) {
    const item = this.#elements.get(message.id);
    const text = item.querySelector(".text");
    const shown = item.querySelector(".marks");
    if (shown) shown.remove();
    else text.after(marksView(message.content, message.marks));
    text.hidden = !shown;
    button.setAttribute("aria-pressed", String(!shown));
  }

  #actions(message, number) {
    const buttons = [];
    const variants = variantsOf(this.conversation, message);
    if (variants.length > 1) buttons.push(this.#variantSwitch(message, variants, number));
    if (message.content) buttons.push(iconButton("copy", `Copy message ${number}`, (event) => copy(message.content, event.currentTarget)));
    if (message.role === "user") buttons.push(iconButton("edit", `Edit message ${number}`, () => this.page.edit(message)));
    else buttons.push(this.#againButton(message, number));
    buttons.push(...this.#ask("actions", message, number));
    return h("div", { class: "actions" }, ...buttons);
  }

  /** Regenerate; where there is nothing but an error it says in words what it does. */
  #againButton(message, number) {
    const button = iconButton("again", `Regenerate message ${number}`, () => this.regenerate(message));
    if (message.state === "failed") {
      button.classList.add("worded");
      button.setAttribute("aria-label", `Try again, message ${number}`);
      button.append("Try again");
    }
    return button;
  }

  #variantSwitch(message, variants, number) {
    const at = variants.indexOf(message);
    const step = (name, label, to) => {
      const button = iconButton(name, `${label} version of message ${number}`, () => this.#switchTo(variants[to], label));
      button.disabled = to < 0 || to >= variants.length;
      return button;
    };
    const place = h("span", { class: "place" }, `${at + 1}/${variants.length}`);
    return h("div", { class: "variants" }, step("left", "Previous", at - 1), place, step("right", "Next", at + 1));
  }

  #switchTo(message, label) {
    if (this.isStreaming) return;
    showVariant(this.conversation, message);
    this.page.save(this.conversation);
    this.#draw();
    const buttons = [...this.#elements.get(message.id).querySelectorAll(".variants button")];
    (buttons.find((button) => !button.disabled && button.title.startsWith(label)) ?? buttons.find((button) => !button.disabled))?.focus();
  }

  // ------------------------------------------------------------------------------------------------- asking and answers

  get isStreaming() {
    return this.#answers.has(this.conversation?.id);
  }

  /** The conversation of a running answer is alive here and must not be read from storage. */
  living(id) {
    return this.#answers.get(id)?.conversation ?? null;
  }

  /** Adds a question below `parent` and streams its answer. */
  ask(text, parent, pictures = []) {
    if (this.isStreaming) return;
    const question = addMessage(this.conversation, parent, "user", text, { pictures });
    this.blobs.keep(pictures);
    this.#answer(question.id);
  }

  /** One more answer to the question of this one. The old one stays as a variant, unless it has no text to keep. */
  regenerate(message) {
    if (this.isStreaming) return;
    if (!message.content) removeMessage(this.conversation, message);
    this.#answer(message.parent);
  }

  regenerateLast() {
    const last = pathOf(this.conversation).at(-1);
    if (last?.role === "assistant") this.regenerate(last);
  }

  /** Stops this answer, or the one on screen. */
  stop(answer = this.#answers.get(this.conversation?.id)) {
    if (!answer) return;
    answer.message.state = "stopped";
    answer.cancel();
    this.#end(answer);
    this.page.say("Stopped");
  }

  /** Asks for one more answer below this one, as after the results of a model's calls; the message, or null while another runs. */
  answerBelow(message) {
    return this.isStreaming ? null : this.#answer(message.id);
  }

  /** Settles to the body that would be sent if this were asked now. Parts that add to a body are asked too. */
  async bodyFor(text, pictures = [], parent = this.conversation.head) {
    const { conversation } = this;
    const isAsked = Boolean(text || pictures.length);
    const question = { id: "draft-question", parent, role: "user", content: text, pictures: pictures.length ? pictures : undefined };
    const message = { id: "draft-answer", parent: isAsked ? question.id : parent, role: "assistant", content: "", state: "draft" };
    const messages = [...conversation.messages, ...(isAsked ? [question] : []), message];
    const body = await this.#body({ ...conversation, messages, head: message.id }, message);
    await this.page.extended();
    this.#ask("contribute", body, { conversation, message });
    return body;
  }

  /** Streams one more answer to this question, to exactly this body; the message, or null while another runs. */
  answerTo(body, questionId) {
    return this.isStreaming ? null : this.#answer(questionId, body);
  }

  #answer(questionId, exactBody = null) {
    const { conversation } = this;
    const message = addMessage(conversation, questionId, "assistant", "", { state: "streaming" });
    const answer = new Answer(conversation, message);
    const asked = exactBody ? Promise.resolve(exactBody) : this.#body(conversation, message, answer.sources);
    this.#answers.set(conversation.id, answer);
    this.page.save(conversation);
    this.#draw();
    this.#follow(true);
    this.page.changed(conversation);
    this.page.say("Generating");
    asked.then(
      (body) => this.#send(answer, body, Boolean(exactBody)),
      (error) => message.state === "streaming" && this.#failed(answer, error), // a picture is gone
    );
    return message;
  }

  async #send(answer, body, isExact) {
    await this.page.extended();
    if (answer.message.state !== "streaming") return; // stopped while pictures were read
    if (!isExact) this.#ask("contribute", body, answer);
    await Promise.allSettled(this.#ask("before", answer, body));
    if (answer.message.state !== "streaming") return; // stopped meanwhile
    this.#ask("sent", answer, body);
    answer.cancel = this.server.stream(body, {
      opened: (head) => this.#ask("opened", answer, head),
      chunk: (chunk) => this.#arrived(answer, chunk),
      done: (usage) => this.#done(answer, usage),
      error: (error) => this.#failed(answer, error),
      cancel: () => this.stop(answer),
    });
  }

  async #body(conversation, message, sources = new Map()) {
    const { system, said } = askedWith(conversation, message);
    const rest = { stream: true, stream_options: STREAM_OPTIONS, return_draft_marks: true, ...samplingBody(conversation.sampling) };
    const turns = await Promise.all(said.map((other) => this.#turns(other)));
    said.forEach((other, k) => turns[k].forEach((turn) => sources.set(turn, other.id)));
    const messages = [...system, ...turns.flat()];
    return { model: this.model || undefined, messages, ...rest };
  }

  /** A message as the server takes it: pictures first, as the page shows them. */
  async #turns(message) {
    const given = this.#ask("turns", message);
    if (given.length) return given;
    return message.role === "user" || message.content ? [await this.#turn(message)] : [];
  }

  async #turn({ role, content, pictures }) {
    if (!pictures) return { role, content };
    const urls = await Promise.all(pictures.map((picture) => this.blobs.dataUrl(picture)));
    const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
    return { role, content: content ? [...parts, { type: "text", text: content }] : parts };
  }

  #arrived(answer, chunk) {
    answer.usage = chunk.usage ?? answer.usage;
    this.#ask("chunk", answer, chunk);
    const choice = chunk.choices?.[0];
    if (!choice || choice.index > 0) return;
    if (choice.finish_reason) answer.message.finish = choice.finish_reason;
    const text = choice.delta?.content;
    if (!text) return;
    answer.lastAt = performance.now();
    answer.firstAt ||= answer.lastAt;
    answer.message.content += text;
    addMarks((answer.message.marks ??= []), choice.draft_marks ?? []);
    answer.pending += text;
    this.#frame ||= requestAnimationFrame(() => this.#paint());
    if (answer.lastAt - answer.savedAt > SAVE_MS) {
      answer.savedAt = answer.lastAt;
      this.page.save(answer.conversation, answer.message);
    }
  }

  /** The one writer: everything that arrived since the last frame, for all answers on screen. */
  #paint() {
    this.#frame = 0;
    for (const answer of this.#answers.values()) this.#flush(answer);
    this.#keepEnd();
  }

  #flush(answer) {
    if (!answer.view || !answer.pending) return;
    answer.view.append(answer.pending);
    answer.pending = "";
    if (answer.usage && answer.lastAt - answer.shownAt > FIGURES_MS) {
      answer.shownAt = answer.lastAt;
      this.#elements.get(answer.message.id).querySelector(".live").textContent = statsText(answer.stats());
    }
  }

  #done(answer, usage) {
    const { message } = answer;
    answer.usage = usage ?? answer.usage;
    if (message.state === "stopped") return this.#setStats(answer); // ended already, when Stop was pressed; the count may be newer
    message.state = "done";
    this.#end(answer);
    const numWords = message.content.split(/\s+/).filter(Boolean).length;
    this.page.say(`Answer complete, ${numWords} ${numWords === 1 ? "word" : "words"}`);
  }

  #failed(answer, error) {
    const { conversation, message } = answer;
    const name = pictureIn(error, conversation, message);
    message.state = "failed";
    if (name) error.message = `${name}: ${error.message}`;
    message.error = error.message;
    this.#end(answer);
    this.page.refused(error, conversation, conversation.messages.find(({ id }) => id === message.parent));
  }

  #end(answer) {
    this.#flush(answer);
    answer.view?.finish();
    this.#answers.delete(answer.conversation.id);
    this.#setStats(answer);
    this.#ask("ended", answer);
    this.page.changed(answer.conversation);
    this.#keepEnd();
  }

  #setStats(answer) {
    if (answer.usage || answer.firstAt) answer.message.stats = answer.stats();
    this.page.save(answer.conversation);
    if (answer.conversation === this.conversation) this.#drawUnder(answer.message, answer.message.state === "failed");
  }

  // ---------------------------------------------------------------------------------------------------- reading position

  /** Follows the end until the reader moves up, and again once they are back. */
  #watchReader() {
    this.scroll.addEventListener("scroll", () => this.#moved(), { passive: true });
    const leave = (event) => event.deltaY < 0 && this.scroll.scrollTop > 0 && this.#follow(false);
    this.scroll.addEventListener("wheel", leave, { passive: true });
    this.jump.addEventListener("click", () => this.#follow(true));
    new ResizeObserver(() => this.#keepEnd()).observe(this.scroll);
    new ResizeObserver(() => this.#keepEnd()).observe(this.list);
  }

  #moved() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroll;
    const left = scrollHeight - clientHeight - scrollTop;
    const movedUp = scrollTop < this.#lastTop;
    this.#lastTop = scrollTop;
    if (movedUp && left > 1) this.#follow(false);
    else if (left < NEAR_END_PX) this.#follow(true);
    this.#showJump();
  }

  #follow(isFollowing) {
    this.#isFollowing = isFollowing;
    this.#keepEnd();
  }

  #keepEnd() {
    if (this.#isFollowing) {
      this.scroll.scrollTop = this.scroll.scrollHeight;
      this.#lastTop = this.scroll.scrollTop;
    }
    this.#showJump();
  }

  #showJump() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroll;
    this.jump.hidden = this.#isFollowing || scrollHeight - clientHeight - scrollTop < NEAR_END_PX;
  }

  #copyCode(event) {
    const button = event.target.closest(".copy-code");
    if (button) copy(button.closest(".code").querySelector("code").textContent, button);
  }
}

async function copy(text, button) {
  const said = await navigator.clipboard.writeText(text).then(
    () => "Copied",
    () => "Copying is not allowed here",
  );
  byId("status").textContent = said;
  confirm(button, said === "Copied");
}

/** Shows on the button for a moment whether it worked. */
function confirm(button, worked) {
  if (button.dataset.worked) return;
  button.dataset.worked = String(worked);
  const use = button.querySelector("use");
  const before = use ? use.getAttribute("href") : button.textContent;
  const show = (iconOrText) => (use ? use.setAttribute("href", iconOrText) : (button.firstChild.data = iconOrText));
  show(use ? (worked ? "#icon-check" : "#icon-close") : worked ? "Copied" : "Not allowed");
  setTimeout(() => {
    show(before);
    delete button.dataset.worked;
  }, 1_500);
}
