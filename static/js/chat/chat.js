/**
 * The message list: one conversation on screen, and what can be done with its messages.
 *
 * Owns which messages are drawn, and changes the conversation as its buttons say. Answers under way are answers.js, one message's
 * element is message.js, the reading position ui/reading.js. Knows nothing of the sidebars.
 */

import { addMessage, pathOf, removeMessage } from "../store/store.js";
import { byId, h } from "../ui/dom.js";
import { Reading } from "../ui/reading.js";
import { Answer, Answers } from "./answers.js";
import { MessageItem } from "./message.js";

const MOUNTED = 200; // messages drawn at first, and once more each time the reader comes to the uppermost
const FILL_MS = 12; // what drawing Markdown may take of a frame

/**
 * What parts of the page may add to the chat, each a method they may have or lack:
 *   contribute(body, {conversation, message})  adds fields to a body before it is sent
 *   turns(message)  what the server gets for this message instead of its text: a list of messages, or nothing
 *   before(answer, body)  a promise that the question waits for; it bounds itself, to what nobody notices. answer.sources names the
 *     page's message that each of body.messages was made of
 *   opened(answer, {status, headers})  HTTP's answer began, where it came that way
 *   sent(answer, body), chunk(answer, chunk), ended(answer)  an answer's life; `answer.message` is kept, with `answer.message.extra`;
 *     one that `continues` adds to the text that its message has
 *   decorate(message, item)  the message's element was drawn, or redraw() was called: it may have seen this element before
 *   under(message, item)  nodes below it: cards, notes
 *   blocks()  why nothing can be sent now, a sentence, or nothing; the page's event "blocks" says that it may be another
 *   actions(message, number)  buttons beside Copy and Regenerate
 * @typedef {object} Plugin
 */

export class Chat {
  #answers;
  #plugins = [];
  #items = new Map(); // message id -> MessageItem
  #numMounted = MOUNTED;
  #filling = 0;

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
    this.reading = new Reading(byId("scroll"), this.list, byId("jump"));
    this.#answers = new Answers(server, page, this);
    this.earlier = h("button", { type: "button", class: "button earlier", hidden: true, onclick: () => this.mountEarlier() });
    this.list.before(this.earlier);
    this.list.addEventListener("click", ({ target }) => {
      const button = target.closest(".copy-code");
      if (button) import("../ui/copying.js").then(({ copyText }) => copyText(button.closest(".code").querySelector("code").textContent, button));
    });
    new IntersectionObserver(([entry]) => entry.isIntersecting && this.mountEarlier(), { rootMargin: "600px" }).observe(this.earlier);
  }

  /** From now on this part of the page adds to the chat. */
  use(plugin) {
    this.#plugins.push(plugin);
    this.redraw();
  }

  /** What every part that has this method gives. One that fails is missed alone; only contribute() may refuse. */
  fromPlugins(method, ...given) {
    return this.#plugins.flatMap((plugin) => {
      try {
        return plugin[method]?.(...given) ?? [];
      } catch (error) {
        if (method === "contribute") throw error;
        reportError(error);
        return [];
      }
    });
  }

  // ------------------------------------------------------------------------------------------------- what is on screen

  show(conversation) {
    this.conversation = conversation;
    this.#items.clear();
    this.#numMounted = MOUNTED;
    this.list.replaceChildren();
    this.draw();
    this.reading.follow(true);
    this.#resumeIn(conversation);
  }

  /** Goes on with the answer that a reload cut off, if the server still has it. */
  #resumeIn(conversation) {
    const message = conversation.messages.findLast(({ state, stream }) => state === "interrupted" && stream);
    if (!message || this.#answers.of(conversation)) return;
    this.#answers.resume(new Answer(conversation, message, { continues: Boolean(message.stats), isResumed: true }));
  }

  /** Asks the parts of the page anew what they add to the messages. */
  redraw() {
    for (const item of this.#items.values()) {
      item.drawUnder();
      this.fromPlugins("decorate", item.message, item.element);
    }
  }

  /** Draws this message anew: its text is another one. */
  rebuild(message) {
    const item = this.#items.get(message.id);
    if (!item) return;
    this.#items.delete(message.id);
    item.element.remove();
    this.draw();
  }

  /** The element of this message and what is in it, while it is on screen. */
  itemOf(message) {
    return this.#items.get(message.id) ?? null;
  }

  /** Brings the list to the path that is shown; what stays keeps its elements. */
  draw() {
    const path = pathOf(this.conversation);
    const numHidden = Math.max(0, path.length - this.#numMounted);
    const ordinals = { user: 0, assistant: 0 };
    const items = new Map();
    path.forEach((message, k) => {
      ordinals[message.role] += 1;
      if (k < numHidden) return;
      items.set(message.id, this.#items.get(message.id) ?? new MessageItem(message, this, k + 1, ordinals[message.role]));
    });
    for (const [id, { element }] of this.#items) if (!items.has(id)) element.remove();
    this.#items = items;
    let next = null; // placed from the end, so that what stays is not touched
    for (const { element } of [...items.values()].reverse()) {
      if (element.parentNode !== this.list || element.nextSibling !== next) this.list.insertBefore(element, next);
      next = element;
    }
    this.earlier.hidden = numHidden === 0;
    this.earlier.textContent = `Show earlier messages (${numHidden})`;
    byId("welcome").hidden = path.length > 0;
    this.list.hidden = path.length === 0;
    this.list.start = numHidden + 1;
    this.#fill();
    this.reading.keepEnd();
  }

  mountEarlier() {
    if (this.earlier.hidden) return;
    this.#numMounted += MOUNTED;
    this.draw();
  }

  /** Shows answers as Markdown, the last first, for as long as a frame has time; the others follow. */
  #fill() {
    clearTimeout(this.#filling);
    const started = performance.now();
    for (const item of [...this.#items.values()].reverse()) {
      if (item.isFilled) continue;
      if (performance.now() - started > FILL_MS) {
        this.#filling = setTimeout(() => this.#fill());
        break;
      }
      item.fill();
    }
    this.reading.keepEnd();
  }

  // -------------------------------------------------------------------------------------------------- asking and answers

  get isStreaming() {
    return this.#answers.of(this.conversation) !== null;
  }

  /** The conversation of a running answer is alive here and must not be read from storage. */
  living(id) {
    return this.#answers.living(id);
  }

  /** Says that it cannot be now where an answer is under way. */
  isBusy() {
    if (this.isStreaming) import("../ui/toast.js").then(({ tell }) => tell("An answer is under way. Stop it first."));
    return this.isStreaming;
  }

  /** Adds a question below `parent` and streams its answer. */
  ask(text, parent, pictures = []) {
    if (this.isBusy()) return;
    const question = addMessage(this.conversation, parent, "user", text, { pictures });
    if (this.conversation.extra?.from === "draft-question") this.conversation.extra.from = question.id;
    this.blobs.keep(pictures);
    this.#answer(question.id);
  }

  /** One more answer to the question of this one. The old one stays as a variant, unless it has no text to keep. */
  regenerate(message) {
    if (this.isBusy()) return;
    const isEmpty = !message.content && !message.reasoning && !this.fromPlugins("turns", message).length;
    if (isEmpty && !this.conversation.messages.some(({ parent }) => parent === message.id)) removeMessage(this.conversation, message);
    this.#answer(message.parent);
  }

  regenerateLast() {
    const last = pathOf(this.conversation).findLast(({ role }) => role === "assistant");
    if (last) this.regenerate(last);
  }

  /** Has the last question edited. */
  editLast() {
    const last = pathOf(this.conversation).findLast(({ role }) => role === "user");
    if (last) this.page.edit(last);
  }

  /** Asks for one more answer below this one, as after the results of a model's calls; the message, or null while another runs. */
  answerBelow(message) {
    return this.isStreaming ? null : this.#answer(message.id);
  }

  /** Streams one more answer to this question, to exactly this body; the message, or null while another runs. */
  answerTo(body, questionId) {
    return this.isStreaming ? null : this.#answer(questionId, body);
  }

  /** Settles to the body that would be sent if this were asked now. Parts that add to a body are asked too; `sources` is told of each
   *  of its turns the id of the message it was made of. */
  async bodyFor(text, pictures = [], parent = this.conversation.head, sources = new Map()) {
    const { conversation } = this;
    const isAsked = Boolean(text || pictures.length);
    const question = { id: "draft-question", parent, role: "user", content: text, pictures };
    const message = { id: "draft-answer", parent: isAsked ? question.id : parent, role: "assistant", content: "", state: "draft" };
    const messages = [...conversation.messages, ...(isAsked ? [question] : []), message];
    const body = await this.#body({ ...conversation, messages, head: message.id }, message, { sources });
    await this.page.extended();
    this.fromPlugins("contribute", body, { conversation, message });
    return body;
  }

  stop(conversation = this.conversation) {
    const answer = this.#answers.of(conversation);
    if (answer) this.#answers.stop(answer);
  }

  #answer(questionId, exactBody = null) {
    const { conversation } = this;
    const message = addMessage(conversation, questionId, "assistant", "", { state: "streaming" });
    const answer = new Answer(conversation, message);
    this.run(answer, exactBody);
    return message;
  }

  /** Has this answer streamed, to exactly this body or to the conversation's. */
  run(answer, exactBody = null) {
    const { conversation, message, continues, sources } = answer;
    this.#answers.run(answer, exactBody ?? this.#body(conversation, message, { continues, sources }), Boolean(exactBody));
  }

  async #body(conversation, message, how = {}) {
    const { bodyOf } = await import("./asked.js");
    const given = (other) => this.fromPlugins("turns", other);
    const dataUrl = (picture) => this.blobs.dataUrl(picture);
    return bodyOf(conversation, message, { ...how, model: this.model, given, dataUrl });
  }

  /** An answer was begun (answers.js). */
  begun({ conversation, message, continues }) {
    if (conversation === this.conversation) {
      this.draw();
      if (continues) this.itemOf(message)?.drawUnder();
      else this.reading.follow(true);
    }
    this.page.changed(conversation);
  }

  /** Answers on screen have grown (answers.js). */
  painted() {
    this.reading.keepEnd();
  }

  /** Does what changes.js has under this name; it is brought when it is first needed. Nothing once another conversation is shown. */
  async change(name, ...given) {
    const { conversation } = this;
    const changes = await import("./changes.js");
    if (conversation === this.conversation) return changes[name](this, ...given);
  }
}
