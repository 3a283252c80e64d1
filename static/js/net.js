/**
 * Talking to the server: model and state by HTTP, answers over one WebSocket, or over SSE where no socket opens.
 *
 * Owns the socket. Knows nothing of conversations or of the page.
 */

const OPEN_TIMEOUT_MS = 3_000; // a proxy that swallows the upgrade must not hold a question for longer
const RETRY_SOCKET_MS = 30_000; // after a failed try, questions go over SSE at once for so long
const PING_MS = 25_000; // keeps proxies from closing an idle socket, and notices a dead one

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
}

const unreachable = () => new ApiError("The server cannot be reached. Is it still running?", { code: "unreachable" });

/** One server, the one this page came from. */
export class Server {
  #socket = null;
  #opening = null;
  #noSocketUntil = 0;
  #numStreams = 0;
  #running = new Map(); // id of a stream's frame -> what ends it
  #engine = null; // a promise of who shares out what is seen of it

  constructor(key = "", base = new URL(".", location.href)) {
    this.base = base;
    this.key = key;
    this.onLost = () => {}; // called when an open socket closes: the server may be gone
  }

  /** From now on every request carries this key; a socket opened without it is given up. */
  useKey(key) {
    this.key = key;
    this.#socket?.close();
    this.#socket = null;
  }

  /** `null` when the server takes questions, else its own words for why not yet. Throws ApiError when unreachable. */
  async whyNotReady() {
    const response = await this.#fetch("ready");
    if (response.ok) return null;
    const body = await response.json().catch(() => ({}));
    return String(body.error?.message ?? body.status ?? "starting");
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
    const response = await this.#fetch(path, options);
    if (!response.ok) throw await errorOf(response);
    return response.json();
  }

  async #fetch(path, options = {}) {
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
   * answer comes by HTTP, `on.chunk(chunk)` for each chunk and then exactly one of
   * `on.done(usage)` and `on.error(ApiError)`. Returns a function that cancels: the server is told at once, and chunks
   * that are already under way are dropped; `on.done` may still follow with the usage of what was made. `on.cancel()`, where there is
   * one, is how the asker itself would have it cancelled by `cancel(id)`.
   */
  stream(body, on) {
    this.#numStreams += 1;
    const id = `q${this.#numStreams}`;
    let cancelled = false;
    let cancel = () => {};
    const guarded = {
      opened: (head) => on.opened?.(head),
      chunk: (chunk) => cancelled || on.chunk(chunk),
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
    this.#openSocket().then((socket) => {
      if (cancelled) return guarded.done(null);
      cancel = socket ? socket.ask(id, body, guarded) : this.#streamOverSse(body, guarded);
    });
    return end;
  }

  /** Ends the stream whose frame has this id, as its asker would. */
  cancel(id) {
    this.#running.get(id)?.();
  }

  /** Opens the socket before it is needed, so that the first question does not wait for it. */
  connect() {
    return this.#openSocket();
  }

  /** The open socket, or null where there is none to have: then SSE does the work. */
  async #openSocket() {
    if (this.#socket?.isUsable) return this.#socket;
    if (performance.now() < this.#noSocketUntil) return null;
    this.#opening ??= this.#newSocket();
    this.#socket = await this.#opening;
    this.#opening = null;
    return this.#socket;
  }

  async #newSocket() {
    const url = new URL("v1/ws", this.base);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const socket = await Socket.open(url, this.key);
    if (socket) socket.onClosed = () => this.onLost();
    else this.#noSocketUntil = performance.now() + RETRY_SOCKET_MS;
    return socket;
  }

  /**
   * Watches the engine: calls `onEngine(engine)` about every `intervalMs` with what GET /engine/steps answers, each step once, and
   * `restarted: true` where the server began anew. Goes on over lost connections. Returns what ends it.
   */
  watchEngine(intervalMs, onEngine) {
    let stop = null;
    let isOver = false;
    this.#engine ??= import("./engine-watch.js").then(({ EngineWatch }) => new EngineWatch({ socket: () => this.#openSocket(), get: (path) => this.get(path) }));
    this.#engine.then((watch) => isOver || (stop = watch.add(intervalMs, onEngine)));
    return () => {
      isOver = true;
      stop?.();
    };
  }

  #streamOverSse(body, on) {
    const controller = new AbortController();
    this.#readSse(body, on, controller.signal).catch((error) => {
      if (error.name === "AbortError") on.done(null);
      else on.error(error instanceof ApiError ? error : new ApiError(`The answer broke off: ${error.message}`));
    });
    return () => controller.abort();
  }

  async #readSse(body, on, signal) {
    const response = await this.#fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    on.opened({ status: response.status, headers: [...response.headers] });
    if (!response.ok) throw await errorOf(response);
    let usage = null;
    for await (const data of sseEvents(response.body)) {
      if (data === "[DONE]") return on.done(usage);
      const chunk = JSON.parse(data);
      if (chunk.error) throw ApiError.fromBody(chunk);
      if (chunk.usage) usage = chunk.usage;
      on.chunk(chunk);
    }
    throw new ApiError("The connection closed before the answer was complete", { code: "broken_stream" });
  }
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  return ApiError.fromBody(body, response.status);
}

/** The data of each event of a byte stream. Comments (keep-alives) are passed over. */
async function* sseEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // already closed or aborted: nothing is left to cancel
  }
}

/** One open WebSocket that carries any number of answers, each under an id. */
class Socket {
  #streams = new Map();
  #engine = null; // who watches it
  #ping = 0;

  /** An open socket, or null when it does not open in time. Sends the key first where there is one. */
  static open(url, key) {
    return new Promise((resolve) => {
      let ws;
      try {
        ws = new WebSocket(url);
      } catch {
        return resolve(null); // switched off in this browser
      }
      const giveUp = () => {
        ws.close();
        resolve(null);
      };
      const timer = setTimeout(giveUp, OPEN_TIMEOUT_MS);
      ws.onerror = () => {
        clearTimeout(timer);
        resolve(null);
      };
      ws.onopen = () => {
        clearTimeout(timer);
        if (key) ws.send(JSON.stringify({ type: "auth", api_key: key }));
        resolve(new Socket(ws));
      };
    });
  }

  constructor(ws) {
    this.ws = ws;
    this.isAlive = true;
    this.onClosed = () => {};
    ws.onerror = null;
    ws.onmessage = (event) => this.#receive(JSON.parse(event.data));
    ws.onclose = (event) => this.#closed(event.reason);
    this.#ping = setInterval(() => this.#check(), PING_MS);
  }

  get isUsable() {
    return this.ws.readyState === WebSocket.OPEN;
  }

  close() {
    this.ws.close();
  }

  ask(id, request, on) {
    this.#streams.set(id, on);
    this.#send({ type: "chat.create", id, request });
    return () => this.#send({ type: "cancel", id });
  }

  /** Subscribes to the engine at work, or to another interval. `onLost` is called when this socket closes. */
  watchEngine(intervalMs, onEngine, onLost) {
    this.#engine = { onEngine, onLost };
    this.#send({ type: "engine.subscribe", interval_ms: intervalMs });
  }

  unwatchEngine() {
    this.#engine = null;
    if (this.isUsable) this.#send({ type: "engine.unsubscribe" });
  }

  #send(frame) {
    if (this.isUsable) this.ws.send(JSON.stringify(frame));
    else this.#closed("");
  }

  /** Any frame since the last check counts as life; else a ping has until the next check to be answered. */
  #check() {
    if (!this.isAlive && this.#streams.size) return this.ws.close(4000, "no answer to ping");
    this.isAlive = false;
    this.#send({ type: "ping" });
  }

  #receive(frame) {
    this.isAlive = true;
    const on = this.#streams.get(frame.id);
    if (frame.type === "chunk") on?.chunk(frame.chunk);
    else if (frame.type === "engine") this.#engine?.onEngine(frame.engine);
    else if (frame.type === "done") this.#end(frame.id, (stream) => stream.done(frame.usage ?? null));
    else if (frame.type === "error") {
      const error = ApiError.fromBody(frame);
      if (on) this.#end(frame.id, (stream) => stream.error(error));
      else if (frame.id === undefined || frame.id === null) this.#failAll(error); // the socket itself is refused
    }
  }

  #end(id, tell) {
    const on = this.#streams.get(id);
    this.#streams.delete(id);
    if (on) tell(on);
  }

  #failAll(error) {
    for (const id of [...this.#streams.keys()]) this.#end(id, (stream) => stream.error(error));
  }

  #closed(reason) {
    clearInterval(this.#ping);
    const why = reason ? `The server closed the connection: ${reason}` : "The connection to the server was lost";
    this.#failAll(new ApiError(`${why}. What had arrived is kept.`, { code: "broken_stream" }));
    this.#engine?.onLost();
    this.onClosed();
  }
}
