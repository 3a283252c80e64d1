/**
 * What somebody who cannot see the page hears of an answer: that it is under way, and then its end, or each paragraph, or nothing,
 * as the settings say. Never tokens.
 *
 * A plugin of the chat. Owns these words, and no more than one of them a second.
 */

import { recall } from "../store/store.js";
import { plural } from "../ui/numbers.js";

const REST_MS = 1_000; // between two announcements

const mode = () => recall("announce") || "end";

export class Announcing {
  #said = new WeakMap(); // Answer -> how much of its text is said
  #waiting = ""; // to be said
  #timer = 0;

  constructor(page) {
    this.page = page;
  }

  sent(answer) {
    this.#said.set(answer, answer.message.content.length);
    if (this.#isHeard(answer)) this.page.say("Generating");
  }

  chunk(answer) {
    if (mode() !== "paragraphs" || !this.#isHeard(answer)) return;
    const { content } = answer.message;
    const end = content.lastIndexOf("\n\n");
    if (end > (this.#said.get(answer) ?? 0)) this.#take(answer, end);
  }

  ended(answer) {
    const { message } = answer;
    if (!this.#isHeard(answer) || message.state === "failed") return; // an error tells itself
    if (mode() === "paragraphs") {
      this.#take(answer, message.content.length);
      return this.#say();
    }
    const numWords = message.content.split(/\s+/).filter(Boolean).length;
    this.page.say(message.state === "stopped" ? "Stopped" : `Answer complete, ${plural(numWords, "word")}`);
  }

  #isHeard({ conversation }) {
    return mode() !== "off" && conversation === this.page.conversation;
  }

  #take(answer, end) {
    const text = answer.message.content.slice(this.#said.get(answer) ?? 0, end);
    this.#said.set(answer, end);
    this.#waiting = `${this.#waiting} ${text.replace(/[*_`#>|~]+/g, "").replace(/\s+/g, " ").trim()}`.trim();
    this.#timer ||= setTimeout(() => this.#say(), REST_MS);
  }

  #say() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    if (this.#waiting) this.page.say(this.#waiting);
    this.#waiting = "";
  }
}
