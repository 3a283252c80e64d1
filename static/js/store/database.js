/**
 * The page's one IndexedDB database: its tables, and transactions over them.
 *
 *   conversations  id -> all of a conversation but its messages
 *   messages       [conversation, id] -> {conversation, order, by, at, pictures, message}; `pictures` are the keys of its blobs
 *   blobs          key -> {blob, kept}: the bytes of pictures
 *   presets        name -> {name, values}
 *
 * Knows nothing of what the rows mean. Every method may throw what the browser throws.
 */

const NAME = "streamserve";
const VERSION = 1;

export class Database {
  #opening = null;
  #open = null; // IDBDatabase

  /**
   * Runs `ask(...tables, transaction)` in one transaction over the tables of these names; settles when it is complete, to the result
   * of the request that `ask` returned, or to what it returned. It begins at once where the database is open: what is asked as
   * the page goes is still written.
   */
  run(mode, names, ask) {
    return this.#open ? this.#run(mode, names, ask) : this.#opened().then(() => this.#run(mode, names, ask));
  }

  #run(mode, names, ask) {
    return new Promise((resolve, reject) => {
      const transaction = this.#open.transaction(names, mode);
      transaction.onabort = () => reject(transaction.error ?? new Error("the browser gave up writing"));
      let answer;
      try {
        answer = ask(...names.map((name) => transaction.objectStore(name)), transaction);
      } catch (error) {
        transaction.abort();
        return reject(error);
      }
      transaction.oncomplete = () => resolve(answer instanceof IDBRequest ? answer.result : answer);
    });
  }

  #opened() {
    this.#opening ??= opening().then(
      (database) => {
        this.#open = database;
        database.onversionchange = () => this.#lose(); // a newer page waits for it
        database.onclose = () => this.#lose(); // the browser took it
      },
      (error) => {
        this.#lose();
        throw error;
      },
    );
    return this.#opening;
  }

  #lose() {
    this.#open?.close();
    this.#open = null;
    this.#opening = null; // tried anew the next time
  }
}

function opening() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, VERSION);
    request.onupgradeneeded = () => {
      const database = request.result;
      database.createObjectStore("conversations", { keyPath: "id" });
      database.createObjectStore("messages").createIndex("pictures", "pictures", { multiEntry: true });
      database.createObjectStore("blobs");
      database.createObjectStore("presets", { keyPath: "name" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => {
      const isNewer = request.error.name === "VersionError";
      reject(isNewer ? new Error("a newer version of this page has been used here; load the page again") : request.error);
    };
  });
}
