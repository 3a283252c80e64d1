/**
 * Talking to the server: JSON by HTTP, and what is asked of the wire (wire.js), which is fetched behind the page's first paint.
 *
 * Owns the key and the address. Knows nothing of conversations or of the page.
 */

/** What went wrong, as the server says it. `status` 401 means: a key is needed, or another one. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "", param = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
  }

  static fromBody(body, status = 0) {
    const error = body?.error ?? body ?? {};
    const code = String(error.code ?? "");
    const needsKey = status === 401 || code === "invalid_api_key";
    const message = String(error.message ?? `The server answered ${status} without a reason`);
    return new ApiError(message, { status: needsKey ? 401 : status, code, param: error.param ?? null });
  }

  /** Of an answer that is none. */
  static async of(response) {
    return ApiError.fromBody(await response.json().catch(() => null), response.status);
  }
}

const unreachable = () => new ApiError("The server cannot be reached. Is it still running?", { code: "unreachable" });

/** One server, the one this page came from. */
export class Server {
  #wire = null; // a promise
  #numStreams = 0;
  #running = new Map(); // id of a stream's frame -> what ends it

  constructor(key = "", base = new URL(".", location.href)) {
    this.base = base;
    this.key = key;
    this.resumeMs = 0; // how long an answer goes on without a reader; 0: it cannot be resumed. connection.js learns it
    this.onLost = () => {}; // called when the connection closes: the server may be gone
  }

  /** From now on every request carries this key; a socket opened without it is given up. */
  useKey(key) {
    this.key = key;
    this.#wire?.then((wire) => wire.drop());
  }

  /** The JSON at a path. Throws ApiError. */
  get(path) {
    return this.#json(path);
  }

  /** The JSON answered to a JSON body. Throws ApiError; `signal` ends the wait with an AbortError. */
  post(path, body, signal) {
    return this.#json(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
  }

  delete(path) {
    return this.#json(path, { method: "DELETE" });
  }

  async #json(path, options = {}) {
    const response = await this.fetch(path, options);
    if (!response.ok) throw await ApiError.of(response);
    return response.json();
  }

  /** The answer to a request that carries the key, whatever its status. Throws ApiError when the server cannot be reached. */
  async fetch(path, options = {}) {
    const headers = { ...options.headers, ...(this.key ? { Authorization: `Bearer ${this.key}` } : {}) };
    try {
      return await fetch(new URL(path, this.base), { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw unreachable();
    }
  }

  /**
   * Asks for a streamed answer to a chat body, which says so itself. Calls `on.opened({status, headers})`, where there is one, when the
   * answer comes by HTTP, `on.chunk(chunk, number)` for each chunk, numbered where it can be resumed, and then exactly one of
   * `on.done(usage)` and `on.error(ApiError)`. Returns a function that cancels: the server is told at once, and chunks
   * that are already under way are dropped; `on.done` may still follow with the usage of what was made. `on.cancel()`, where there is
   * one, is how the asker itself would have it cancelled by `cancel(id)`.
   *
   * An answer whose connection is lost goes on where it was cut: `on.waiting(true)` while it cannot, `on.waiting(false)` when it does.
   * Where it cannot go on any more, the error's code is "broken_stream". `on.named(name)` tells what the server calls the answer.
   */
  stream(body, on) {
    return this.#start(on, (wire, id, guarded) => wire.ask(id, body, guarded));
  }

  /** Goes on with an answer of that name behind chunk number `after`, as a page that was reloaded does. As stream() otherwise. */
  resume(name, after, on) {
    return this.#start(on, (wire, id, guarded) => wire.resume(id, name, after, guarded));
  }

  #start(on, begin) {
    this.#numStreams += 1;
    const id = `q${this.#numStreams}`;
    let cancelled = false;
    let cancel = () => {};
    const guarded = {
      opened: (head) => on.opened?.(head),
      named: (name) => cancelled || on.named?.(name),
      waiting: (isWaiting) => cancelled || on.waiting?.(isWaiting),
      chunk: (chunk, number) => cancelled || on.chunk(chunk, number),
      done: (usage) => {
        this.#running.delete(id);
        on.done(usage);
      },
      error: (error) => (cancelled ? guarded.done(null) : this.#running.delete(id) && on.error(error)),
    };
    const end = () => {
      cancelled = true;
      cancel();
    };
    this.#running.set(id, on.cancel ?? end);
    this.#brought().then(
      (wire) => (cancelled ? guarded.done(null) : (cancel = begin(wire, id, guarded))),
      () => guarded.error(unreachable()), // the server went before its page was there as a whole
    );
    return end;
  }

  /** Ends the stream whose frame has this id, as its asker would. */
  cancel(id) {
    this.#running.get(id)?.();
  }

  #brought() {
    this.#wire ??= import("./wire.js").then(({ Wire }) => new Wire(this));
    this.#wire.catch(() => (this.#wire = null));
    return this.#wire;
  }

  /** The server answers: opens the socket before it is needed, and lets answers go on that were cut. */
  reached() {
    this.#brought().then((wire) => wire.reached(), () => this.onLost());
  }

  /** The network may have changed: makes sure that the socket is alive. False where there is none that could tell. */
  async probe() {
    return Boolean((await this.#wire)?.probe());
  }

  /**
   * Watches the engine: calls `onEngine(engine)` about every `intervalMs` with what GET /engine/steps answers, each step once, and
   * `restarted: true` where the server began anew. Goes on over lost connections. Returns what ends it.
   */
  watchEngine(intervalMs, onEngine) {
    let stop = null;
    let isOver = false;
    const begin = (wire) => wire.watchEngine(intervalMs, onEngine);
    this.#brought().then(begin).then((end) => (isOver ? end() : (stop = end)), () => {});
    return () => {
      isOver = true;
      stop?.();
    };
  }
}
