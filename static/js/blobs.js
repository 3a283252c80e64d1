/**
 * The bytes of pictures, and how they are shown.
 *
 * A message only names its pictures; their bytes lie here: in memory, and from when they were sent on in IndexedDB, where there
 * is room for them, unlike in the storage of conversations. Where the browser refuses that, they stay in memory, and
 * `onProblem` is told what that means.
 *
 * Owns the bytes. Knows nothing of messages, of the composer or of the server.
 */

import { h } from "./dom.js";
import { newId } from "./store.js";

const DATABASE = "streamserve.pictures";
const TABLE = "pictures";

/** @typedef {{id: string, name: string, size: number}} Picture */

/** "340 kB" or "4.52 MB". Pass Math.floor for what is a limit, so that nothing over it looks equal to it. */
export function sizeText(bytes, round = Math.ceil) {
  return bytes < 999_500 ? `${round(bytes / 1e3)} kB` : `${round(bytes / 1e4) / 100} MB`;
}

export class Blobs {
  #memory = new Map(); // id -> Blob
  #database = null;

  constructor(onProblem = () => {}) {
    this.onProblem = onProblem;
  }

  /** @returns {Picture} */
  add(name, blob) {
    const picture = { id: newId(), name, size: blob.size };
    this.#memory.set(picture.id, blob);
    return picture;
  }

  /** The picture is gone, unless it was kept. */
  drop(picture) {
    this.#memory.delete(picture.id);
  }

  /** Makes them outlive the page. */
  async keep(pictures) {
    for (const { id, name } of pictures) {
      const blob = this.#memory.get(id);
      if (!blob) continue; // kept already
      try {
        await this.#do("readwrite", (table) => table.put(blob, id));
        this.#memory.delete(id);
      } catch (error) {
        const why = error.name === "QuotaExceededError" ? "this browser's storage is full" : error.message;
        this.onProblem(`${name} is gone when this page is closed or loaded again: ${why}.`);
      }
    }
  }

  /** Makes them end with the page; until then keep() brings them back. */
  async forget(pictures) {
    for (const { id } of pictures) {
      const blob = await this.#find(id);
      if (blob) this.#memory.set(id, blob);
      await this.#do("readwrite", (table) => table.delete(id)).catch(() => {}); // nothing can be kept in this browser
    }
  }

  /** As a data: URL. Throws an Error that says which picture is not there any more. */
  async dataUrl(picture) {
    const blob = await this.#find(picture.id);
    if (!blob) throw new Error(`${picture.name} is not kept in this browser any more. Edit its message, or begin a new chat.`);
    return new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(new Error(`${picture.name} cannot be read: ${reader.error.message}`));
      reader.readAsDataURL(blob);
    });
  }

  /** A small view of it; of one that is gone its name alone. */
  thumbnail(picture) {
    const image = h("img", { class: "thumbnail", alt: picture.name, title: picture.name, draggable: "false" });
    this.#find(picture.id).then((blob) => {
      if (!blob) return image.replaceWith(h("span", { class: "thumbnail gone" }, `${picture.name} (no longer here)`));
      const url = URL.createObjectURL(blob);
      image.onload = image.onerror = () => URL.revokeObjectURL(url); // it has what it shows
      image.src = url;
    });
    return image;
  }

  async #find(id) {
    return this.#memory.get(id) ?? (await this.#do("readonly", (table) => table.get(id)).catch(() => null)) ?? null;
  }

  /** The result of one request to the database. */
  async #do(mode, ask) {
    this.#database ??= openDatabase();
    const database = await this.#database;
    return new Promise((resolve, reject) => {
      const transaction = database.transaction(TABLE, mode);
      const request = ask(transaction.objectStore(TABLE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error ?? request.error);
    });
  }
}

function openDatabase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
