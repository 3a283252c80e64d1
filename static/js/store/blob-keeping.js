/**
 * Moves the bytes of pictures between memory and the database, and reads them, for blobs.js.
 *
 * `memory` is its Map of id -> {blob, count}.
 */

const MOST_OF_QUOTA = 0.5; // a browser that runs out of room may throw everything away

export async function keep(memory, database, pictures, onProblem) {
  for (const { id, name } of pictures) {
    const held = memory.get(id);
    if (!held) continue; // kept already
    try {
      const { usage = 0, quota = Infinity } = (await navigator.storage?.estimate?.()) ?? {};
      if (usage + held.blob.size > quota * MOST_OF_QUOTA) throw new Error("half of the room that this browser gives is used");
      await database.run("readwrite", ["blobs"], (blobs) => blobs.put({ blob: held.blob, kept: Date.now() }, id));
      memory.delete(id);
    } catch (error) {
      const why = error.name === "QuotaExceededError" ? "this browser's storage is full" : error.message;
      onProblem(`${name} is gone when this page is closed or loaded again: ${why}.`);
    }
  }
}

export async function forget(memory, database, pictures) {
  for (const { id } of pictures) {
    const drop = (messages, blobs) => {
      const found = blobs.get(id);
      const uses = messages.index("pictures").count(id);
      uses.onsuccess = () => uses.result || blobs.delete(id);
      return [found, uses];
    };
    const [found, uses] = await database.run("readwrite", ["messages", "blobs"], drop).catch(() => []); // nothing can be kept here
    if (found?.result && !uses.result && !memory.has(id)) memory.set(id, { blob: found.result.blob, count: 1 });
  }
}

export function dataUrlOf(blob, name) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${name} cannot be read: ${reader.error.message}`));
    reader.readAsDataURL(blob);
  });
}
