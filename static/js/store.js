/**
 * Conversations: what they hold, and where they are kept.
 *
 * A conversation is a tree of messages, so that regenerating or editing never loses what was there: `head` is the last
 * message of the path that is shown, and each message names its parent. Everything is plain data, written as JSON.
 *
 * Owns the shape of a conversation and its storage. Knows nothing of the server or of the page.
 */

const FORMAT = 1;
const PREFIX = "streamserve.chat.";

/** @typedef {{id: string, parent: string|null, role: "user"|"assistant", content: string, created: number,
 *   state: "streaming"|"done"|"stopped"|"failed"|"interrupted", finish?: string, error?: string, stats?: object, marks?: number[], pictures?: Picture[]}} Message: `marks` as marks.js has them, `pictures` as blobs.js */
/** @typedef {{format: 1, id: string, title: string, created: number, updated: number, system: string,
 *   sampling: Object<string, string>, draft: string, head: string|null, messages: Message[]}} Conversation */

/** A word that nothing else is called. */
export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36).padStart(2, "0")).join("");

/** An empty conversation with the system prompt and the sampling of another one. @returns {Conversation} */
export function newConversation(like = { system: "", sampling: {} }) {
  const now = Date.now();
  const kept = { system: like.system, sampling: { ...like.sampling } };
  return { format: FORMAT, id: newId(), title: "", created: now, updated: now, ...kept, draft: "", head: null, messages: [] };
}

/** Adds a message below `parent` and shows it. @returns {Message} */
export function addMessage(conversation, parent, role, content, { state = "done", pictures = [] } = {}) {
  const message = { id: newId(), parent, role, content, created: Date.now(), state, ...(pictures.length && { pictures }) };
  conversation.messages.push(message);
  conversation.head = message.id;
  conversation.updated = message.created;
  if (!conversation.title) conversation.title = titleOf(content || pictures.map(({ name }) => name).join(", "));
  return message;
}

/** Takes out a message that nothing stands below; its parent is shown. */
export function removeMessage(conversation, message) {
  conversation.messages = conversation.messages.filter((other) => other !== message);
  conversation.head = message.parent;
}

function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 58).trimEnd()}…` : line;
}

/** The messages from the first one down to the head. @returns {Message[]} */
export function pathOf(conversation) {
  const byId = new Map(conversation.messages.map((message) => [message.id, message]));
  const path = [];
  for (let at = byId.get(conversation.head); at; at = byId.get(at.parent)) path.unshift(at);
  return path;
}

/** The messages that stand in the same place, oldest first. */
export function variantsOf(conversation, message) {
  return conversation.messages.filter((other) => other.parent === message.parent && other.role === message.role);
}

/** Shows this message, and below it the newest branch. */
export function showVariant(conversation, message) {
  let at = message;
  while (at) {
    conversation.head = at.id;
    at = conversation.messages.findLast((other) => other.parent === at.id);
  }
}

/**
 * Keeps conversations between visits. Every method is asynchronous and none of them throws: when the browser refuses
 * (storage full or blocked) the page goes on from memory and `onProblem` is told once what is wrong, and `null` when it
 * is well again. A backend has list(), read(id), write(conversation) and remove(id), and may throw.
 */
export class Store {
  #memory = new Map();
  #problem = null;

  constructor(backend = new LocalBackend(), onProblem = () => {}) {
    this.backend = backend;
    this.onProblem = onProblem;
  }

  /** Titles and ids, the last used first. */
  async list() {
    const kept = await this.#try(() => this.backend.list(), []);
    const entries = new Map(kept.map((entry) => [entry.id, entry]));
    for (const { id, title, updated } of this.#memory.values()) entries.set(id, { id, title, updated });
    return [...entries.values()].sort((a, b) => b.updated - a.updated);
  }

  /** The conversation, or null. An answer that was on its way when the page closed is marked as cut off. */
  async load(id) {
    const conversation = this.#memory.get(id) ?? (await this.#try(() => this.backend.read(id), null));
    for (const message of conversation?.messages ?? []) if (message.state === "streaming") message.state = "interrupted";
    return conversation;
  }

  async save(conversation) {
    this.#memory.set(conversation.id, conversation);
    const isKept = await this.#try(() => this.backend.write(conversation).then(() => true), false);
    if (!isKept) return;
    this.#memory.delete(conversation.id);
    this.#tell(null);
  }

  async remove(id) {
    this.#memory.delete(id);
    await this.#try(() => this.backend.remove(id), null);
  }

  async #try(action, otherwise) {
    try {
      return await action();
    } catch (error) {
      const why = error.name === "QuotaExceededError" ? "this browser's storage is full; delete some conversations" : error.message;
      this.#tell(`Conversations are not saved: ${why}.`);
      return otherwise;
    }
  }

  #tell(problem) {
    if (problem === this.#problem) return;
    this.#problem = problem;
    this.onProblem(problem);
  }
}

/** A small setting of this page, or "" where none is kept or storage is blocked. `kind` is "local" or "session". */
export function recall(name, kind = "local") {
  try {
    return window[`${kind}Storage`].getItem(`streamserve.${name}`) ?? "";
  } catch {
    return ""; // blocked storage: the page works without memory
  }
}

/** Keeps a small setting; false where storage is blocked or full, which costs only the memory of it. */
export function remember(name, value, kind = "local") {
  try {
    window[`${kind}Storage`].setItem(`streamserve.${name}`, value);
    return true;
  } catch {
    return false;
  }
}

/** One localStorage entry per conversation, so that two tabs do not overwrite each other's chats. */
export class LocalBackend {
  async list() {
    const ids = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map((key) => key.slice(PREFIX.length));
    const entries = [];
    for (const id of ids) {
      const conversation = await this.read(id).catch(() => ({ title: "Unreadable conversation", updated: 0 }));
      if (conversation) entries.push({ id, title: conversation.title, updated: conversation.updated });
    }
    return entries;
  }

  async read(id) {
    const text = localStorage.getItem(PREFIX + id);
    const conversation = text === null ? null : JSON.parse(text);
    if (conversation && conversation.format !== FORMAT) return null; // written by a newer page; left as it is
    return conversation;
  }

  async write(conversation) {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
  }

  async remove(id) {
    localStorage.removeItem(PREFIX + id);
  }
}
