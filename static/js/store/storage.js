/**
 * Where conversations are kept: one row for each, and one for each message, so that a growing answer costs only itself and two tabs add
 * to one conversation without losing anything.
 *
 * Owns what is written when, and tells other tabs. Knows nothing of the page; store.js is its way to it. None of its methods but run()
 * throws: what cannot be written stays in memory.
 */

import { Database } from "./database.js";
import { Presets } from "./presets.js";
import { newId, recall, remember } from "./store.js";

const FORMAT = 1;
const OLD_PREFIX = "streamserve.chat."; // of conversations that an older page kept in localStorage
const ALIVE_MS = 5_000; // an answer that was written to within this time is still being written
const SWEEP_MS = 10_000; // after the start
const ORPHAN_MS = 86_400_000;

export class Storage {
  #memory = new Map(); // id -> conversation that could not be written
  #known = new Map(); // id -> Map of message id -> {print, order}, as they were written or read here
  #rows = new Map(); // id -> {base, latest}: what the fields were when they were last read or written here, and the row that is kept
  #presets = new Presets(this);
  #problem = null;
  #channel = typeof BroadcastChannel === "function" ? new BroadcastChannel("streamserve") : null;
  #tab = recall("tab", "session") || newId();
  #seen = new WeakMap(); // conversation -> ids of its messages, as they were written or read here
  #removed = new Map(); // id -> when it was deleted, here or in another tab
  #moved = null;
  #asked = false; // for storage that the browser does not clear by itself

  /** `tell(change)` hears of each change, here and in other tabs, `onProblem(words)` of what is wrong, and null once it is well. */
  constructor(tell, onProblem) {
    this.tell = tell;
    this.onProblem = onProblem;
    this.database = new Database();
    remember("tab", this.#tab, "session");
    setTimeout(() => this.#sweep(), SWEEP_MS);
    this.#channel?.addEventListener("message", ({ data: { id, isRemoved, row } }) => {
      if (isRemoved) this.#forget(id);
      else this.#removed.delete(id);
      if (row && this.#rows.has(id)) this.#rows.get(id).latest = row;
      this.tell({ id, isRemoved, isElsewhere: true });
    });
  }

  /** Titles and ids, the last used first. */
  async list() {
    const kept = await this.#try(() => this.run("readonly", ["conversations"], (conversations) => conversations.getAll()), []);
    const entries = new Map(kept.map(({ id, title, updated }) => [id, { id, title, updated }]));
    for (const { id, title, updated } of this.#memory.values()) entries.set(id, { id, title, updated });
    return [...entries.values()].sort((a, b) => b.updated - a.updated);
  }

  /** The conversation, or null. An answer that was on its way when the page closed is marked as cut off. */
  async load(id) {
    return this.#memory.get(id) ?? (await this.#try(() => this.#read(id), null));
  }

  async #read(id) {
    const found = await this.run("readonly", ["conversations", "messages"], (conversations, messages) => [
      conversations.get(id),
      messages.getAll(rowsOf(id)),
    ]);
    const [row, rows] = found.map(({ result }) => result);
    if (!row || row.format !== FORMAT) return null; // written by a newer page; left as it is
    rows.sort((a, b) => a.order - b.order || a.message.created - b.message.created);
    for (const { by, at, message } of rows) {
      const isAlive = by !== this.#tab && Math.abs(Date.now() - at) < ALIVE_MS; // clocks may be set
      if (message.state === "streaming") message.state = isAlive ? "elsewhere" : "interrupted";
    }
    const gone = [...(this.#known.get(id) ?? [])].map(([key, { order }]) => [key, { print: "", order }]); // put back they have their places
    this.#known.set(id, new Map([...gone, ...rows.map(({ order, message }) => [message.id, { print: printOf(message), order }])]));
    this.#rows.set(id, { base: printsOf(row), latest: row });
    const conversation = { ...row, messages: rows.map(({ message }) => message) };
    this.#seen.set(conversation, new Set(rows.map(({ message }) => message.id)));
    return conversation;
  }

  /**
   * Writes what changed of it; of its messages only this one, where one is given. One that was deleted meanwhile stays so, unless
   * it was used since.
   */
  async save(conversation, message = null) {
    const { id } = conversation;
    if (this.#removed.get(id) >= conversation.updated) return;
    this.#removed.delete(id);
    const isWhole = !message || !this.#known.has(id);
    const rows = this.#changed(conversation, isWhole ? conversation.messages : [message]);
    const gone = isWhole ? this.#gone(conversation) : [];
    const row = this.#rowOf(conversation);
    this.#memory.set(id, conversation);
    const write = (conversations, messages, transaction) => {
      conversations.put(row);
      for (const row of rows) messages.put(row, [id, row.message.id]);
      for (const key of gone) messages.delete([id, key]);
      transaction.commit?.();
    };
    const isKept = await this.#try(() => this.run("readwrite", ["conversations", "messages"], write).then(() => true), false);
    if (!isKept) {
      this.#known.delete(id); // the next time all of it is written
      this.#rows.delete(id);
      return this.tell({ id, isRemoved: false, isElsewhere: false });
    }
    this.#memory.delete(id);
    this.#report(null);
    this.#persist();
    if (isWhole) this.#announce({ id, isRemoved: false, row });
  }

  /** What is to be kept beside the messages: of fields that were not changed here, what another tab made of them. */
  #rowOf({ messages: _, ...fields }) {
    const { base = {}, latest = {} } = this.#rows.get(fields.id) ?? {};
    const now = printsOf(fields);
    const changed = Object.entries(fields).filter(([name]) => now[name] !== base[name]);
    const row = { ...latest, ...Object.fromEntries(changed) };
    this.#rows.set(fields.id, { base: now, latest: row });
    return row;
  }

  /** Rows of those messages that are not as they were written last. */
  #changed(conversation, messages) {
    const known = this.#known.get(conversation.id) ?? new Map();
    this.#known.set(conversation.id, known);
    let last = -1;
    for (const { order } of known.values()) last = Math.max(last, order);
    const rows = [];
    for (const message of messages) {
      const before = known.get(message.id);
      const now = { print: printOf(message), order: before?.order ?? (last += 1) };
      if (before?.print === now.print) continue;
      known.set(message.id, now);
      const pictures = (message.pictures ?? []).map((picture) => picture.id);
      rows.push({ conversation: conversation.id, order: now.order, by: this.#tab, at: Date.now(), pictures, message });
    }
    return rows;
  }

  /** Ids of messages that were there and were taken out here. What another tab added, or another copy read here, stays. */
  #gone(conversation) {
    const known = this.#known.get(conversation.id);
    const here = new Set(conversation.messages.map((message) => message.id));
    const gone = [...(this.#seen.get(conversation) ?? [])].filter((key) => !here.has(key));
    for (const key of gone) if (known.has(key)) known.get(key).print = ""; // put back it has its place again
    this.#seen.set(conversation, here);
    return gone;
  }

  /** Writes one that was removed. */
  async restore(conversation) {
    this.#removed.delete(conversation.id);
    await this.save(conversation);
  }

  #forget(id) {
    this.#memory.delete(id);
    this.#known.delete(id); // saved again it is written whole
    this.#rows.delete(id);
    this.#removed.set(id, Date.now());
  }

  async remove(id) {
    this.#forget(id);
    const erase = (conversations, messages) => {
      conversations.delete(id);
      messages.delete(rowsOf(id));
    };
    const isGone = await this.#try(() => this.run("readwrite", ["conversations", "messages"], erase).then(() => true), false);
    this.#announce({ id, isRemoved: true });
    if (isGone) for (const waiting of [...this.#memory.values()]) await this.save(waiting); // there may be room now
  }

  async preset(method, ...given) {
    return this.#presets[method](...given);
  }

  /** Deletes pictures that no message names, and none has named for long: a page went before it wrote their message. */
  async #sweep() {
    const sweep = (messages, blobs) => {
      const walk = blobs.openCursor();
      walk.onsuccess = () => {
        const at = walk.result;
        if (!at) return;
        const uses = messages.index("pictures").count(at.key);
        uses.onsuccess = () => {
          if (!uses.result && Date.now() - at.value.kept > ORPHAN_MS) blobs.delete(at.primaryKey);
          at.continue();
        };
      };
    };
    await this.run("readwrite", ["messages", "blobs"], sweep).catch(() => {}); // nothing is kept: nothing is left
  }

  // -------------------------------------------------------------------------------------------------------------- inside

  async run(mode, names, ask) {
    if (!this.#moved) this.#moved = this.#move();
    if (this.#moved !== true) await this.#moved;
    return this.database.run(mode, names, ask);
  }

  /** Takes over what an older page kept. It is looked for once; there mostly is none. */
  async #move() {
    try {
      const old = oldKeys();
      if (old.length) await (await import("./migrate.js")).migrate(this.database, old, OLD_PREFIX);
    } catch (error) {
      this.#report(`Conversations of an older version could not be taken over; they are left as they were: ${error.message}.`);
    }
    this.#moved = true;
  }

  /** Has the browser keep this page's storage where it runs short of room, as far as it does that for anybody. */
  #persist() {
    if (this.#asked) return;
    this.#asked = true;
    navigator.storage?.persist?.().catch(() => {});
  }

  #announce({ row, ...change }) {
    this.#channel?.postMessage({ ...change, row });
    this.tell({ ...change, isElsewhere: false });
  }

  async #try(action, otherwise) {
    try {
      return await action();
    } catch (error) {
      const why = error.name === "QuotaExceededError" ? "this browser's storage is full; delete some conversations" : error.message;
      this.#report(`History is not saved: ${why}.`);
      return otherwise;
    }
  }

  #report(problem) {
    if (problem === this.#problem) return;
    this.#problem = problem;
    this.onProblem(problem);
  }
}

const printsOf = (fields) => Object.fromEntries(Object.entries(fields).map(([name, value]) => [name, JSON.stringify(value)]));

/** Every row of a conversation's messages. */
const rowsOf = (id) => IDBKeyRange.bound([id], [id, []]);

/** Tells whether a message is as it was: 53 bits of a hash of all it says (cyrb53's way of mixing). */
function printOf(message) {
  const text = JSON.stringify(message);
  let a = 0xdeadbeef;
  let b = 0x41c6ce57;
  for (let k = 0; k < text.length; k += 1) {
    const code = text.charCodeAt(k);
    a = Math.imul(a ^ code, 2654435761);
    b = Math.imul(b ^ code, 1597334677);
  }
  a = Math.imul(a ^ (a >>> 16), 2246822507) ^ Math.imul(b ^ (b >>> 13), 3266489909);
  b = Math.imul(b ^ (b >>> 16), 2246822507) ^ Math.imul(a ^ (a >>> 13), 3266489909);
  return `${text.length}.${2097151 & b}.${a >>> 0}`;
}

function oldKeys() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(OLD_PREFIX));
  } catch {
    return []; // blocked storage
  }
}
