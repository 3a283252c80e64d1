/**
 * The bytes of pictures, and how they are shown.
 *
 * A message only names its pictures; their bytes lie here, under their hash, so that the same picture lies here once: in memory, and
 * from when they were sent on in the database. Where the browser refuses that, they stay in memory, and `onProblem` is told
 * what that means.
 *
 * Owns the bytes. Knows nothing of messages, of the composer or of the server.
 */

import { h } from "../ui/dom.js";
import { newId } from "./store.js";

/** @typedef {{id: string, name: string, size: number}} Picture */

export class Blobs {
  #memory = new Map(); // id -> {blob, count}: how often it was added

  constructor(database, onProblem = () => {}) {
    this.database = database;
    this.onProblem = onProblem;
  }

  /** @returns {Promise<Picture>} */
  async add(name, blob) {
    const picture = { id: await hashOf(blob), name, size: blob.size };
    const count = (this.#memory.get(picture.id)?.count ?? 0) + 1;
    this.#memory.set(picture.id, { blob, count });
    return picture;
  }

  /** The picture is gone, unless it was kept or added once more. */
  drop(picture) {
    const held = this.#memory.get(picture.id);
    if (held && (held.count -= 1) <= 0) this.#memory.delete(picture.id);
  }

  /** Makes them outlive the page. */
  async keep(pictures) {
    if (pictures.length) await (await import("./blob-keeping.js")).keep(this.#memory, this.database, pictures, this.onProblem);
  }

  /** Makes those that no kept message names end with the page; until then keep() brings them back. */
  async forget(pictures) {
    if (pictures.length) await (await import("./blob-keeping.js")).forget(this.#memory, this.database, pictures);
  }

  /** As a data: URL. Throws an Error that says which picture is not there any more. */
  async dataUrl(picture) {
    const blob = await this.find(picture.id);
    if (!blob) throw new Error(`${picture.name} is not kept in this browser any more. Edit its message, or begin a new chat.`);
    return (await import("./blob-keeping.js")).dataUrlOf(blob, picture.name);
  }

  /** A small view of it; of one that is gone its name alone. */
  thumbnail(picture) {
    const image = h("img", { class: "thumbnail", alt: picture.name, title: picture.name, draggable: "false" });
    this.find(picture.id).then((blob) => {
      if (!blob) return image.replaceWith(h("span", { class: "thumbnail gone" }, `${picture.name} (no longer here)`));
      const url = URL.createObjectURL(blob);
      image.onload = image.onerror = () => URL.revokeObjectURL(url); // it has what it shows
      image.src = url;
    });
    return image;
  }

  /** The bytes of the picture with this id, or null. @returns {Promise<Blob|null>} */
  async find(id) {
    const held = this.#memory.get(id)?.blob;
    return held ?? (await this.database.run("readonly", ["blobs"], (blobs) => blobs.get(id)).catch(() => null))?.blob ?? null;
  }
}

/** A name that the same bytes always get; over plain HTTP from another machine browsers give no hash, and it is one of its own. */
async function hashOf(blob) {
  if (!crypto.subtle) return newId();
  const digest = await crypto.subtle.digest("SHA-256", await blob.arrayBuffer());
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
