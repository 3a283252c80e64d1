/**
 * Takes over what an older version of this page kept: a conversation for each entry in localStorage, and its pictures in a database
 * of their own. Everything is copied first; the old is deleted only after what was written has been counted.
 *
 * What cannot be read, or was written by a newer page, is left where it is.
 */

const OLD_DATABASE = "streamserve.pictures";
const OLD_TABLE = "pictures";
const FORMAT = 1;

/** Moves the conversations under these keys. Throws before anything is deleted where a part could not be written. */
export async function migrate(database, keys, prefix) {
  const found = keys.map((key) => read(key, prefix)).filter(Boolean);
  if (!found.length) return;
  const ids = new Set(found.flatMap(picturesOf));
  const old = ids.size ? await openOld() : null;
  const blobs = old ? await readOld(old, [...ids]) : new Map();
  old?.close();
  const fresh = [];
  await database.run("readwrite", ["conversations", "messages", "blobs"], (conversations, messages, table) => {
    for (const conversation of found) {
      const there = conversations.getKey(conversation.id);
      there.onsuccess = () => {
        if (there.result !== undefined) return; // taken over before, when the page went before it deleted the old
        put(conversation, conversations, messages);
        fresh.push(conversation);
      };
    }
    for (const [id, blob] of blobs) table.put({ blob, kept: Date.now() }, id);
  });
  await check(database, fresh, blobs);
  for (const { id } of found) localStorage.removeItem(prefix + id);
  if (old) indexedDB.deleteDatabase(OLD_DATABASE);
}

function read(key, prefix) {
  try {
    const conversation = JSON.parse(localStorage.getItem(key));
    const isWhole = conversation?.format === FORMAT && prefix + conversation.id === key && Array.isArray(conversation.messages);
    return isWhole ? conversation : null;
  } catch {
    return null;
  }
}

const picturesOf = ({ messages }) => messages.flatMap((message) => (message.pictures ?? []).map(({ id }) => id));

function put(conversation, conversations, messages) {
  const { messages: told, ...head } = conversation;
  conversations.put(head);
  told.forEach((message, order) => {
    const pictures = (message.pictures ?? []).map(({ id }) => id);
    messages.put({ conversation: conversation.id, order, by: "", at: 0, pictures, message }, [conversation.id, message.id]);
  });
}

/** Counts what lies in the tables now: each conversation, at least its messages, each picture. */
async function check(database, found, blobs) {
  const counts = await database.run("readonly", ["conversations", "messages", "blobs"], (conversations, messages, table) => [
    ...found.map(({ id }) => conversations.count(id)),
    ...found.map(({ id }) => messages.count(IDBKeyRange.bound([id], [id, []]))),
    ...[...blobs.keys()].map((id) => table.count(id)),
  ]);
  const wanted = [...found.map(() => 1), ...found.map(({ messages }) => new Set(messages.map(({ id }) => id)).size), ...[...blobs].map(() => 1)];
  if (counts.some(({ result }, k) => result < wanted[k])) throw new Error("not all of it was written");
}

/** The old database of pictures, or null where there is none. */
function openOld() {
  return new Promise((resolve) => {
    const request = indexedDB.open(OLD_DATABASE);
    request.onupgradeneeded = () => request.transaction.abort(); // there is none: none is made
    request.onsuccess = () => resolve(request.result.objectStoreNames.contains(OLD_TABLE) ? request.result : null);
    request.onerror = () => resolve(null);
  });
}

function readOld(old, ids) {
  return new Promise((resolve, reject) => {
    const transaction = old.transaction(OLD_TABLE, "readonly");
    const requests = ids.map((id) => [id, transaction.objectStore(OLD_TABLE).get(id)]);
    transaction.oncomplete = () => resolve(new Map(requests.filter(([, { result }]) => result).map(([id, { result }]) => [id, result])));
    transaction.onabort = () => reject(transaction.error);
  });
}
