/**
 * The developer's view of one answer: its request, which can be edited and sent, the events it came in, and programs that ask the
 * same.
 *
 * What was recorded is recorder.js's; each of the three sections has a file of its own.
 */

import { AnswerPicker } from "../chat/answer-picker.js";
import { addMessage } from "../store/store.js";
import { byId, h } from "../ui/dom.js";
import { segments } from "../ui/segments.js";
import { CodeSection } from "./code.js";
import { EventsSection } from "./events.js";
import { recorderOf } from "./recorder.js";
import { RequestSection } from "./request.js";

const DRAW_MS = 200; // news of a running answer are shown this often

export class RawPanel {
  #isShown = false;
  #timer = 0;
  #asked = 0; // number of the last body asked for; a later one makes it stale
  #body = null;

  constructor(page) {
    this.page = page;
    this.recorder = null;
    this.picker = new AnswerPicker(page, {
      id: "raw-of",
      label: "Request for",
      other: "What would be sent now",
      onChange: () => this.#picked(),
      isHeld: () => this.request.isEdited,
    });
    this.request = new RequestSection({
      send: (body) => this.#send(body),
      edited: (body) => this.code.show(body ?? this.#body, this.#target(), body === null),
    });
    this.events = new EventsSection();
    this.code = new CodeSection();
    this.sections = { request: this.request, events: this.events, code: this.code };
    this.element = h(
      "div",
      { class: "raw-panel" },
      this.picker.element,
      segments("raw-section", "What to show", { request: "Request", events: "Events", code: "Code" }, "request", (name) => this.#showSection(name)),
      ...Object.values(this.sections).map(({ element }) => element),
    );
    this.#showSection("request");
    page.extended.then(() => this.#attach(recorderOf(page)));
    page.addEventListener("ready", () => this.#draw());
    page.addEventListener("answers", ({ detail }) => detail === page.conversation && this.#later());
    for (const place of ["prompt", "settings"]) byId(place).addEventListener("input", () => !this.#message && this.#later());
  }

  #attach(recorder) {
    if (!recorder) return; // it could not be loaded; the page says so
    this.recorder = recorder;
    recorder.addEventListener("record", ({ detail }) => this.#recorded(detail));
    recorder.addEventListener("look", ({ detail }) => this.picker.look(detail));
    if (recorder.wanted) this.picker.look(recorder.wanted);
    else this.#draw();
  }

  shown() {
    this.#isShown = true;
    this.#draw();
  }

  gone() {
    this.#isShown = false;
  }

  /** Whose request is shown; null: the one that would be sent now. */
  get #message() {
    return this.picker.message;
  }

  #picked() {
    this.request.forget();
    this.#draw();
  }

  #recorded(message) {
    if (message !== this.#message) return;
    if (this.recorder.of(message).numEvents) this.#later();
    else this.#draw(); // it was sent just now
  }

  // --------------------------------------------------------------------------------------------------------- what is shown

  #later() {
    if (this.#isShown) this.#timer ||= setTimeout(() => this.#draw(), DRAW_MS);
  }

  #showSection(name) {
    for (const [other, { element }] of Object.entries(this.sections)) element.hidden = other !== name;
  }

  #draw() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    if (!this.#isShown) return;
    this.picker.draw();
    const record = this.recorder?.of(this.#message);
    this.events.show(this.#message, record);
    this.request.showHead(record?.head ?? null);
    this.request.block(this.page.chat.isStreaming ? "An answer is under way." : this.page.config ? "" : "The server is not ready.");
    if (record?.body) this.#showBody(record.body, sentText(record, this.#message, this.page.server.resumeMs > 0));
    else if (this.#message?.state !== "streaming") this.#showUnsent(); // else it is about to be sent
  }

  /** The request that would be sent, or that the conversation says was. */
  async #showUnsent() {
    const message = this.#message;
    const number = (this.#asked += 1);
    try {
      const { chat } = this.page;
      const pictures = this.page.pictures?.chosen ?? [];
      const body = message ? await chat.bodyFor("", [], message.parent) : await chat.bodyFor(byId("prompt").value.trim(), pictures);
      if (number === this.#asked) this.#showBody(body, message ? rebuiltText(message) : NEXT_TEXT);
    } catch (error) {
      if (number === this.#asked) this.request.fail(error.message); // a picture is gone
    }
  }

  #showBody(body, words) {
    this.#asked += 1;
    this.#body = body;
    this.request.show(body, words);
    if (!this.request.isEdited) this.code.show(body, this.#target());
  }

  #target() {
    const { base, key } = this.page.server;
    return { base: new URL(base.pathname, base.origin).href, hasKey: Boolean(key) };
  }

  // ----------------------------------------------------------------------------------------------------------------- sending

  /** Asks with exactly this body: one more answer to the question it was of, or to the one it holds. */
  #send(body) {
    const { chat, conversation } = this.page;
    const isEdited = this.request.isEdited;
    const parent = this.#message ? this.#message.parent : this.#addQuestion(body, conversation);
    this.request.forget();
    const answer = chat.answerTo(body, parent);
    if (!answer) return;
    if (isEdited) (answer.extra ??= {}).raw = { edited: true };
    this.picker.pick(answer);
  }

  #addQuestion(body, conversation) {
    const last = body.messages?.findLast?.((message) => message?.role === "user");
    const parts = Array.isArray(last?.content) ? last.content.map((part) => part?.text).filter((text) => typeof text === "string") : [last?.content];
    const text = parts.filter((part) => typeof part === "string").join("\n");
    const prompt = byId("prompt");
    if (prompt.value.trim() === text.trim()) {
      prompt.value = "";
      prompt.dispatchEvent(new Event("input", { bubbles: true }));
    }
    return addMessage(conversation, conversation.head, "user", text).id;
  }
}

const NEXT_TEXT = "Not sent yet. What you write in the message box goes into it.";

function rebuiltText(message) {
  const edited = message.extra?.raw?.edited ? " That request was edited before it was sent; this is the unedited one." : "";
  return `Built again from the conversation and today's settings: what was sent is kept for one visit only.${edited}`;
}

function sentText({ sentAt, size, head, endMs }, message, isResumable) {
  const time = new Date(sentAt).toLocaleTimeString();
  const took = endMs ? `, over after ${(endMs / 1000).toFixed(2)} s` : "";
  const way = head ? "by HTTP" : isResumable ? 'over the socket, with "resumable": true for the case that it is lost' : "over the socket";
  return `Sent at ${time} ${way}, ${size.toLocaleString("en")} characters${took}.${message.error ? ` Refused: ${message.error}` : ""}`;
}
