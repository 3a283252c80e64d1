/**
 * Tools in the chat: the fields of each request, the calls that a model makes, and the loop of results and further calls.
 *
 * Owns `message.extra.tools`: {calls: [{id, name, arguments, state, problems, result, isError}], isSent}; `state` is "busy", "good",
 * "bad" or "cut". What tools there are is set.js, what a call looks like card.js.
 */

import { showChip } from "../composer/chips.js";
import { readDocument } from "../json/reader.js";
import { problemsOf } from "../json/schema-check.js";
import { pathOf } from "../store/store.js";
import { plural } from "../ui/numbers.js";
import { ToolCard } from "./card.js";
import { MAX_TURNS, mockAnswer, requestFor, toolSetOf, toolsOf } from "./set.js";

const NO_RESULT = "No result was given.";

/** A message's calls; none where a file that somebody made has something else. */
function callsOf(message) {
  const calls = message?.extra?.tools?.calls;
  const isCall = (call) => ["id", "name", "arguments", "state"].every((field) => typeof call?.[field] === "string");
  return Array.isArray(calls) && calls.every(isCall) ? calls : [];
}

const usable = (message) => callsOf(message).filter(({ state }) => state === "good" || state === "bad");

export class Tools {
  #cards = new WeakMap(); // a message's element -> its card
  #growing = new Set(); // messages with news
  #frame = 0;
  #judging = new WeakSet(); // messages whose calls are being checked
  #isStopped = new WeakSet(); // messages behind which the loop does not go on by itself

  constructor(page) {
    this.page = page;
    this.set = toolSetOf(page);
    for (const event of ["tools", "conversation", "ready"]) page.addEventListener(event, () => this.#showChip());
    page.addEventListener("answers", ({ detail }) => detail === page.conversation && this.#drawCards());
    this.#showChip();
  }

  #showChip() {
    const { isOn, list } = this.set.value;
    const words = isOn && list.length ? plural(list.length, "tool") : "";
    const { state, message } = this.set.standing();
    showChip(this.page, "tools", words, { why: state === "wrong" ? message : "" });
  }

  // ---------------------------------------------------------------------------------------------- what chat/chat.js asks of it

  blocks() {
    const { state, message } = this.set.standing();
    return state === "wrong" ? `The tools are not usable. ${message}` : [];
  }

  contribute(body, { conversation, message }) {
    if (message.state === "draft" && this.set.standing().state !== "good") return; // it is only looked at
    const above = conversation.messages.find(({ id }) => id === message.parent);
    const { fields, error } = requestFor(toolsOf(conversation), usable(above).length > 0);
    if (error && message.state === "streaming") throw new Error(`The tools are not usable. ${error.message}`);
    Object.assign(body, fields);
  }

  /** A message with calls, and their results, which the model needs to be told of each. */
  turns(message) {
    const calls = usable(message);
    if (!calls.length) return [];
    const { isSent } = message.extra.tools;
    const made = calls.map(({ id, name, arguments: given }) => ({ id, type: "function", function: { name, arguments: given } }));
    const results = calls.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: isSent ? (result ?? "") : NO_RESULT }));
    return [{ role: "assistant", content: message.content || null, tool_calls: made }, ...results];
  }

  chunk({ message }, chunk) {
    const choice = chunk.choices?.[0];
    if (!choice || choice.index > 0 || !choice.delta?.tool_calls) return;
    message.extra ??= {};
    const { calls } = (message.extra.tools ??= { calls: [], isSent: false });
    for (const { index, id, function: part } of choice.delta.tool_calls) {
      const call = (calls[index] ??= { id: "", name: "", arguments: "", state: "busy" });
      call.id ||= id ?? "";
      call.name += part?.name ?? "";
      call.arguments += part?.arguments ?? "";
    }
    this.#growing.add(message);
    this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  #paint() {
    this.#frame = 0;
    for (const message of this.#growing) this.#cardOf(message)?.draw();
    this.#growing.clear();
  }

  async ended({ message, conversation }) {
    const calls = callsOf(message);
    if (!calls.length) return;
    this.#judging.add(message);
    const isWhole = message.state === "done";
    for (const call of calls) await this.#judge(call, conversation, isWhole && (message.finish !== "length" || call !== calls.at(-1)));
    this.#judging.delete(message);
    const tools = toolsOf(conversation);
    const turn = turnOf(conversation, message);
    const goesOn = isWhole && message.finish !== "length" && tools.auto && turn < MAX_TURNS && calls.every(({ state, result }) => state === "good" && result !== null);
    this.page.chat.page.save(conversation);
    if (goesOn && conversation === this.page.conversation && conversation.head === message.id && !this.#isStopped.has(message)) return this.send(message);
    this.#drawCards();
    const waiting = calls.filter(({ state }) => state === "good" || state === "bad");
    if (waiting.length && conversation === this.page.conversation) this.page.say(`${waiting.map(({ name }) => name).join(", ")}: a result is waited for`);
  }

  decorate(message, element) {
    if (!callsOf(message).length || this.#cards.has(element)) return;
    const isOver = message.state !== "streaming" && !this.#judging.has(message);
    for (const call of callsOf(message)) if (call.state === "busy" && isOver) call.state = "cut"; // a reload ended it
    const number = element.querySelector("h2")?.textContent.replace(/\D+/g, "") ?? "";
    const card = new ToolCard(message, this, number);
    this.#cards.set(element, card);
    element.querySelector(":scope > .under").before(card.element);
    card.draw(this.#loopOf(message));
  }

  // ------------------------------------------------------------------------------------------------- what the card asks of it

  /** Sends the results as they stand in the card, and has the model go on. */
  send(message) {
    if (this.page.chat.isStreaming) return this.page.say("An answer is under way. Stop it first.");
    for (const call of usable(message)) call.result ??= "";
    message.extra.tools.isSent = true;
    this.page.chat.answerBelow(message);
    this.#drawCards();
  }

  stop(message) {
    this.#isStopped.add(message);
    this.page.chat.stop();
  }

  /** Results that were sent can be changed and sent once more: another answer stands beside the first. */
  reopen(message) {
    if (this.page.chat.isStreaming) return this.page.say("An answer is under way. Stop it first.");
    message.extra.tools.isSent = false;
    this.#cardOf(message)?.draw(this.#loopOf(message));
    this.page.chat.itemOf(message)?.element.querySelector(".call-result textarea")?.focus();
    this.edited();
  }

  edited() {
    this.page.saveSoon(this.page.conversation);
  }

  // ---------------------------------------------------------------------------------------------------------------- inside

  /** Whether a call's arguments are what its tool takes, and what stands in for its result. */
  async #judge(call, conversation, isWhole) {
    if (!isWhole) return (call.state = "cut");
    const { list } = toolsOf(conversation);
    const tool = list.find(({ name }) => name === call.name);
    const { value, error } = readDocument(call.arguments);
    call.problems = error ? [{ pointer: null, message: `The arguments are not JSON. Line ${error.line}, column ${error.column}: ${error.message}` }] : tool ? await this.#problems(tool, value) : [];
    call.isUnknown = !tool;
    call.state = call.problems.length ? "bad" : "good";
    call.isError = call.state === "bad";
    call.result = call.isError ? JSON.stringify({ error: call.problems.map(({ pointer, message }) => (pointer ? `${pointer} ${message}` : message)).join("; ") }) : mockAnswer(tool, value);
  }

  async #problems({ parameters }, value) {
    const { value: schema, error } = readDocument(parameters.trim() || "{}");
    if (error) return [];
    try {
      return (await problemsOf(schema, value)).problems;
    } catch {
      return []; // a schema that only the server can check
    }
  }

  #drawCards() {
    for (const message of pathOf(this.page.conversation)) if (callsOf(message).length) this.#cardOf(message)?.draw(this.#loopOf(message));
  }

  #loopOf(message) {
    const { conversation, chat } = this.page;
    const turn = turnOf(conversation, message);
    const last = pathOf(conversation).at(-1);
    const isRunning = chat.isStreaming && last?.state === "streaming" && last.parent === message.id;
    return { turn, most: MAX_TURNS, isRunning, isOver: turn >= MAX_TURNS && toolsOf(conversation).auto };
  }

  #cardOf(message) {
    const element = this.page.chat.itemOf(message)?.element;
    if (!element) return null;
    this.decorate(message, element);
    return this.#cards.get(element) ?? null;
  }
}

/** How many answers with calls stand between the question and this one, itself counted. */
function turnOf(conversation, message) {
  const byId = new Map(conversation.messages.map((other) => [other.id, other]));
  let turn = 0;
  for (let at = message; at && at.role === "assistant"; at = byId.get(at.parent)) turn += callsOf(at).length > 0;
  return turn;
}
