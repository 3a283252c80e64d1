/**
 * Conversations: what they hold, and the way to where they are kept.
 *
 * A conversation is a tree of messages, so that regenerating or editing never loses what was there: `head` is the last
 * message of the path that is shown, and each message names its parent. Everything is plain data, written as JSON.
 *
 * Owns the shape of a conversation. What keeps them is storage.js. Knows nothing of the server or of the page.
 */

const FORMAT = 1;

/** @typedef {{id: string, parent: string|null, role: "user"|"assistant", content: string, created: number,
 *   state: "streaming"|"done"|"stopped"|"failed"|"interrupted"|"elsewhere", finish?: string, error?: string, stats?: object, marks?: number[], pictures?: Picture[]}} Message: `marks` as chat/marks.js has them, `pictures` as blobs.js */
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

const NOWHERE = { list: () => [], load: () => null, save() {}, remove() {}, restore() {}, run: () => Promise.reject(new Error("nothing can be kept")) };

/**
 * Keeps conversations between visits. It is brought as the page starts (storage.js), which needs none to ask something. Every method is
 * asynchronous and none throws: where the browser refuses, the page goes on from memory and `onProblem` is told once what is
 * wrong, and `null` when it is well again.
 *
 * Event "change": a conversation was written or removed; detail {id, isRemoved, isElsewhere}, the last for another tab.
 */
export class Store extends EventTarget {
  #storage = null;
  #coming;

  constructor(onProblem = () => {}) {
    super();
    const tell = (detail) => this.dispatchEvent(new CustomEvent("change", { detail }));
    this.#coming = import("./storage.js").then(
      ({ Storage }) => (this.#storage = new Storage(tell, onProblem)),
      (error) => {
        onProblem(`History is not saved: ${error.message}.`);
        return (this.#storage = NOWHERE);
      },
    );
    const presets = (method) => (...given) => this.#do("preset", method, ...given);
    this.presets = { list: presets("list"), save: presets("save"), remove: presets("remove") }; // presets.js
  }

  /** At once where it is there: what is written as the page goes is still kept. */
  #do(method, ...given) {
    return this.#storage ? this.#storage[method](...given) : this.#coming.then((storage) => storage[method](...given));
  }

  /** Titles and ids, the last used first. */
  async list() {
    return this.#do("list");
  }

  /** The conversation, or null. An answer that was on its way when the page closed is marked as cut off. */
  async load(id) {
    return this.#do("load", id);
  }

  /**
   * Writes what changed of it; of its messages only this one, where one is given. One that was deleted meanwhile stays so, unless
   * it was used since.
   */
  async save(conversation, message = null) {
    return this.#do("save", conversation, message);
  }

  async remove(id) {
    return this.#do("remove", id);
  }

  /** Writes one that was removed. */
  async restore(conversation) {
    return this.#do("restore", conversation);
  }

  /** A transaction over the database's tables (database.js). */
  async run(mode, names, ask) {
    return this.#do("run", mode, names, ask);
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
