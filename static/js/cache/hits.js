/**
 * Marks on the messages of a chat: how much of each the last question that held it took from the prefix cache, and where and why
 * the cache knew no more.
 *
 * POST /cache/lookup tells where each message stands in the prompt, and why a match ends; the answer's usage tells how much was
 * really taken, and has the last word. The lookup goes out right before the question and is waited for, but for no longer than
 * WAIT_MS: the cache is then as the question will find it. A lookup that comes later still tells the places. A question with
 * something that the server may refuse (new pictures, new tools) is looked up once the server has taken it, so that a refusal is
 * told once and pictures travel in the question first.
 *
 * Owns `message.extra.hits`. Knows nothing of the tree.
 *
 * @typedef {object} Hits  of one message
 * @property {number} start  its first token's position in the prompt
 * @property {number} tokens  from its first token to its last
 * @property {number} matched  of these, taken from the cache
 * @property {{kind: string, tokens: number, matched: number}[]} [pictures]
 * @property {{code: string, position: number, message: string, token: ?string, cached: ?string}} [stop]  the cache's knowledge ends here
 * @property {Hits} [system]  with the first message: the same of the system prompt
 */

import { h, nodesOf } from "../ui/dom.js";
import { count } from "../ui/numbers.js";

const WAIT_MS = 150; // from here on a reader might notice
const MAX_LOOKED_UP = 8_000_000; // characters of pictures and texts, sent once more
const SHAPING = ["model", "messages", "tools", "tool_choice", "chat_template_kwargs", "reasoning_effort", "cache_salt"]; // what makes the prompt

/** What the lookup is asked with: the fields of a body that make its prompt. */
export function promptOf(body) {
  return Object.fromEntries(SHAPING.filter((name) => body[name] !== undefined).map((name) => [name, body[name]]));
}

/** What is known of a question under way. */
class Question {
  found = null; // the answer of the lookup
  cached = null; // what was taken, by the usage
  isEarly = false; // looked up before it was sent

  constructor(answer, body) {
    this.answer = answer;
    this.sources = body.messages.map((turn) => answer.sources.get(turn) ?? (turn.role === "system" ? "system" : null));
    this.body = promptOf(body);
    this.form = JSON.stringify({ ...this.body, messages: undefined });
  }
}

export class Hits {
  #questions = new WeakMap(); // Answer -> Question
  #accepted = new Set(); // forms of questions that the server took, beside the plain one
  #drawn = new Map(); // message id -> {item, note}

  constructor(page) {
    this.page = page;
  }

  // -------------------------------------------------------------------------------------------------- a question's life

  before(answer, body) {
    if (!this.page.config) return null;
    const question = new Question(answer, body);
    this.#questions.set(answer, question);
    if (this.#mayBeRefused(question)) return null;
    question.isEarly = true;
    return Promise.race([this.#lookUp(question), new Promise((resolve) => setTimeout(resolve, WAIT_MS))]);
  }

  chunk(answer, { usage }) {
    if (usage?.completion_tokens) this.#taken(answer, usage); // the count before the first token says nothing yet
  }

  ended(answer) {
    if (answer.usage && answer.message.state === "done") this.#taken(answer, answer.usage);
  }

  #taken(answer, usage) {
    const question = this.#questions.get(answer);
    const cached = usage.prompt_tokens_details?.cached_tokens;
    if (!question || question.cached !== null || cached === undefined) return;
    question.cached = cached;
    this.#accepted.add(question.form);
    if (question.isEarly) this.#settle(question);
    else this.#lookUp(question);
  }

  #mayBeRefused({ answer, form, body }) {
    const asked = answer.conversation.messages.find(({ id }) => id === answer.message.parent);
    const hasNewPictures = asked?.pictures && !asked.extra?.hits;
    const isPlain = Object.keys(body).every((name) => name === "model" || name === "messages");
    return hasNewPictures || !(isPlain || this.#accepted.has(form));
  }

  async #lookUp(question) {
    const length = question.body.messages.reduce((sum, { content }) => sum + lengthOf(content), 0);
    if (length > MAX_LOOKED_UP) return;
    try {
      question.found = await this.page.server.post("cache/lookup", question.body);
      this.#settle(question);
    } catch {
      // no marks: the question itself tells what is wrong
    } finally {
      question.body = null; // it may hold pictures
    }
  }

  /** Once it is known where the messages stand and how much was taken. */
  #settle(question) {
    const { found, cached, answer, sources } = question;
    if (!found?.per_message || cached === null) return;
    const { conversation, message } = answer;
    const marks = marksOf(found, cached, sources);
    const messages = new Map(conversation.messages.map((one) => [one.id, one]));
    const [first] = [...marks.keys()].filter((id) => id !== "system");
    if (marks.has("system") && first) marks.get(first).system = marks.get("system");
    for (const [id, { item }] of this.#drawn) if (!item.isConnected) this.#drawn.delete(id);
    for (const [id, hits] of marks) {
      const marked = messages.get(id);
      if (!marked) continue;
      marked.extra = { ...marked.extra, hits };
      this.#show(marked);
    }
    if (message.state !== "streaming") this.page.store.save(conversation); // else the chat saves it
  }

  // ------------------------------------------------------------------------------------------------------------- on screen

  decorate(message, item) {
    const drawn = this.#drawn.get(message.id);
    if (drawn) drawn.item = item;
    this.#show(message);
  }

  under(message, item) {
    const note = h("div", { class: "hits" });
    this.#drawn.set(message.id, { item, note });
    this.#show(message);
    return [note];
  }

  #show(message) {
    const { item, note } = this.#drawn.get(message.id) ?? {};
    const hits = keptOf(message);
    if (!item) return;
    item.classList.toggle("has-hits", Boolean(hits?.tokens));
    note.hidden = !hits;
    if (!hits) return;
    item.style.setProperty("--reused", `${(100 * hits.matched) / (hits.tokens || 1)}%`);
    note.replaceChildren(...[...(hits.system ? lines(hits.system, "System prompt: ") : []), ...lines(hits)]);
  }
}

/** The marks that are kept with a message; null where there are none, or where a file that somebody made has something else. */
function keptOf({ extra }) {
  const isText = (text) => text === null || text === undefined || typeof text === "string";
  const isShare = (part) => Number.isFinite(part?.tokens) && Number.isFinite(part.matched);
  const isPicture = (part) => isShare(part) && typeof part.kind === "string";
  const isStop = ({ position, message, token: here, cached }) => Number.isFinite(position) && [message, here, cached].every(isText);
  const isMark = (mark) => isShare(mark) && (!mark.pictures || (Array.isArray(mark.pictures) && mark.pictures.length > 0 && mark.pictures.every(isPicture))) && (!mark.stop || isStop(mark.stop));
  const hits = extra?.hits;
  return isMark(hits) && (!hits.system || isMark(hits.system)) ? hits : null;
}

function lengthOf(content) {
  if (typeof content === "string") return content.length;
  return (content ?? []).reduce((sum, part) => sum + (part.text ?? part.image_url?.url ?? "").length, 0);
}

/** Of each message (by its id; "system") what was taken of it, of a prompt of which `cached` tokens were taken. */
function marksOf(found, cached, sources) {
  const marks = new Map();
  const matchedOf = ({ start, tokens }) => Math.min(Math.max(0, cached - start), tokens);
  for (const part of found.per_message) {
    const id = sources[part.index];
    if (!id || part.start === null) continue;
    const mark = marks.get(id) ?? { start: part.start, tokens: 0, matched: 0 };
    mark.tokens += part.tokens;
    mark.matched += matchedOf(part);
    marks.set(id, mark);
  }
  for (const picture of found.pictures) {
    const mark = marks.get(sources[picture.message]);
    if (mark) (mark.pictures ??= []).push({ kind: picture.kind, tokens: picture.tokens, matched: matchedOf(picture) });
  }
  const stop = stopOf(found, cached);
  const at = stop && [...marks.values()].find(({ start, tokens }) => cached < start + tokens);
  if (at) at.stop = stop;
  return marks;
}

/** Where and why the cache knew no more; null where it knew all. */
function stopOf({ tokens, matched, reason }, cached) {
  if (cached >= tokens - 1) return null;
  if (matched !== cached) return { code: "changed", position: cached, message: "", token: null, cached: null };
  return { code: reason.code, position: reason.position, message: reason.message, token: reason.token, cached: reason.cached_token };
}

/** A message's marks in words. */
function lines(hits, name = "") {
  const pictures = hits.pictures ? ` · ${pictureWords(hits.pictures)}` : "";
  const share = h("p", {}, `${name}${count(hits.matched)} of ${count(hits.tokens)} tokens reused${pictures}`);
  const stop = hits.stop && stopWords(hits.stop, hits);
  return stop ? [share, h("p", { class: "stop" }, ...stop)] : [share];
}

function pictureWords(pictures) {
  const kind = pictures.every((picture) => picture.kind === pictures[0].kind) ? { image: "picture", audio: "sound" }[pictures[0].kind] ?? pictures[0].kind : "part";
  const whole = pictures.filter(({ tokens, matched }) => matched === tokens).length;
  if (pictures.length > 1) return `${whole} of ${pictures.length} ${kind}s reused`;
  const [{ tokens, matched }] = pictures;
  return whole ? `${kind} reused` : matched ? `${count(matched)} of ${count(tokens)} tokens of the ${kind} reused` : `${kind} not reused`;
}

const token = (text) => h("q", { class: "token" }, ...nodesOf(text.replaceAll("\n", "↵")));

/** The words for where the match ends; null where a message is simply new. */
function stopWords({ code, position, message, token: here, cached }, { start }) {
  const at = `position ${count(position)}`;
  switch (code) {
    case "differs":
      return [`First difference at ${at}: `, token(here ?? ""), " here", ...(typeof cached !== "string" ? [""] : [", ", token(cached), " in the cache"])];
    case "evicted":
      return [`Known once up to and beyond ${at}, but evicted to make room`];
    case "new":
      return position > start ? [`New from ${at} on`] : null;
    case "changed":
      return position > start ? [`The cache knew no more from ${at} on`] : null;
    default:
      return [message];
  }
}
