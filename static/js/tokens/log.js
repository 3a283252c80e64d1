/**
 * The tokens of answers with their probabilities: asked for where a conversation wants them, and kept with the message.
 *
 * Owns the form in which they are kept (`message.extra.tokens`) and the wish (`conversation.extra.tokens.record`). Knows nothing of
 * how they are shown.
 */

import { byId, iconButton } from "../ui/dom.js";

const MAX_TOKENS = 10_000; // kept of one answer
const NUM_ALTERNATIVES = 5;

/** What a token is: its text, or its bytes where these are no text by themselves. @typedef {string|number[]} Word */

/**
 * @typedef {object} Log
 * @property {number} before  characters of the message that come before the first token: they were not recorded
 * @property {[Word, number, (Word|number)[]][]} list  each token, its log-probability, and its alternatives: word, log-probability, …
 * @property {number} more  tokens that came after those kept
 * @property {[number, number][]} marks  from the first token on: so many bytes were 0 sampled, 1 guessed ahead, 2 forced, …
 */

const logs = new WeakMap();
const encoder = new TextEncoder();
const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** The log of a page's answers. */
export const tokenLogOf = (page) => logs.get(page) ?? null;

/** Whether this server gives probabilities. */
export const hasProbabilities = ({ config }) => (config?.max_logprobs ?? 0) > 0;

/** Whether this conversation's answers are asked for with probabilities. */
export const isWanted = (conversation) => Boolean(conversation.extra?.tokens?.record);

/** From now on they are, or not. */
export function want(page, record) {
  const { conversation } = page;
  (conversation.extra ??= {}).tokens = { record };
  if (conversation.messages.length) page.chat.page.save(conversation);
}

/** Dispatches "tokens", whose detail is the message, when more of its tokens are known. */
export class TokenLog extends EventTarget {
  #live = new Map(); // message id -> Log of a running answer

  constructor(page) {
    super();
    this.page = page;
    this.wanted = null; // the message whose tokens were asked for last
    logs.set(page, this);
  }

  /** @returns {Log|null} */
  of(message) {
    return (message && (this.#live.get(message.id) ?? keptOf(message))) ?? null;
  }

  contribute(body, { conversation }) {
    if (!isWanted(conversation) || !hasProbabilities(this.page)) return;
    body.logprobs ??= true;
    if (body.logprobs === true) body.top_logprobs ??= Math.min(NUM_ALTERNATIVES, this.page.config.max_logprobs);
  }

  sent({ message, continues }, body) {
    this.#live.delete(message.id);
    if (body.logprobs === true) this.#live.set(message.id, (continues && goesOn(message)) || newLog(continues ? message.content.length : 0));
    else if (!continues) delete message.extra?.tokens;
  }

  chunk({ message }, chunk) {
    const log = this.#live.get(message.id);
    const choice = chunk.choices?.[0];
    if (!log || !choice || choice.index > 0) return;
    for (const entry of choice.logprobs?.content ?? []) add(log, entry);
    for (const { text, drafted, forced } of choice.draft_marks ?? []) mark(log.marks, encoder.encode(text).length, forced ? 2 : drafted ? 1 : 0);
    if (choice.logprobs?.content?.length) this.dispatchEvent(new CustomEvent("tokens", { detail: message }));
  }

  ended({ message }) {
    const log = this.#live.get(message.id);
    if (!log) return;
    this.#live.delete(message.id);
    if (log.list.length) (message.extra ??= {}).tokens = log;
    this.dispatchEvent(new CustomEvent("tokens", { detail: message }));
  }

  actions(message, number) {
    if (!keptOf(message)) return [];
    return [iconButton("tokens", `Token probabilities of message ${number}`, () => this.look(message))];
  }

  /** Shows this message's tokens. */
  look(message) {
    this.wanted = message;
    if (byId("inspector").inert) byId("open-inspector").click();
    this.page.frame.panels.show("tokens");
    this.dispatchEvent(new CustomEvent("look", { detail: message }));
  }
}

const sound = new WeakMap(); // log -> whether it is one

/** The log that is kept with a message; null where there is none, or where a file that somebody made has something else. */
function keptOf({ extra }) {
  const log = extra?.tokens;
  if (log === null || typeof log !== "object") return null;
  if (!sound.has(log)) sound.set(log, isLog(log));
  return sound.get(log) ? log : null;
}

const isCount = (n) => Number.isSafeInteger(n) && n >= 0;
const isByte = (n) => Number.isInteger(n) && n >= 0 && n < 256;
const isWord = (word) => typeof word === "string" || (Array.isArray(word) && word.length < 1_000 && word.every(isByte));
const isLogprob = (n) => typeof n === "number" && n <= 0.001;

function isLog({ before, list, more, marks }) {
  const isEntry = (entry) => Array.isArray(entry) && isWord(entry[0]) && isLogprob(entry[1]) && Array.isArray(entry[2]) && areTops(entry[2]);
  const areTops = (tops) => tops.length <= 2 * NUM_ALTERNATIVES && tops.length % 2 === 0 && tops.every((one, k) => (k % 2 ? isLogprob : isWord)(one));
  const isMark = (mark) => Array.isArray(mark) && isCount(mark[0]) && [0, 1, 2].includes(mark[1]);
  return isCount(before) && isCount(more) && Array.isArray(list) && list.length <= MAX_TOKENS && list.every(isEntry) && Array.isArray(marks) && marks.every(isMark);
}

const newLog = (before) => ({ before, list: [], more: 0, marks: [] });

/** The log that an answer's goes on with: the one it has, where that reaches to the end of its text. */
function goesOn(message) {
  const { content } = message;
  const log = keptOf(message);
  if (!log || log.more) return null;
  const text = log.list.map(([word]) => bytesOf(word)).reduce((all, bytes) => (all.push(...bytes), all), []);
  return content.slice(log.before) === new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(text)) ? log : null;
}

/** The log of a text that begins like another's: its first `index` tokens, and then one of the alternatives there. */
export function branchOf(log, index, [word, logprob]) {
  const list = log.list.slice(0, index);
  const size = list.reduce((sum, [other]) => sum + bytesOf(other).length, 0);
  const marks = [];
  let at = 0;
  for (const [length, kind] of log.marks) {
    if (at < size) mark(marks, Math.min(length, size - at), kind);
    at += length;
  }
  mark(marks, bytesOf(word).length, 0);
  return { before: log.before, list: [...list, [word, logprob, log.list[index][2]]], more: 0, marks };
}

function add(log, { token, bytes, logprob, top_logprobs: tops }) {
  if (log.list.length >= MAX_TOKENS) log.more += 1;
  else log.list.push([wordOf(token, bytes), short(logprob), (tops ?? []).slice(0, NUM_ALTERNATIVES).flatMap((top) => [wordOf(top.token, top.bytes), short(top.logprob)])]);
}

function wordOf(token, bytes) {
  if (!Array.isArray(bytes)) return String(token);
  try {
    return strict.decode(Uint8Array.from(bytes));
  } catch {
    return bytes;
  }
}

/** To five digits behind the point: more than a page can show. */
const short = (logprob) => Math.round(logprob * 1e5) / 1e5;

function mark(marks, length, kind) {
  if (marks.at(-1)?.[1] === kind) marks.at(-1)[0] += length;
  else if (length) marks.push([length, kind]);
}

/** @returns {ArrayLike<number>} */
export const bytesOf = (word) => (typeof word === "string" ? encoder.encode(word) : word);
