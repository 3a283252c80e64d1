/**
 * One open WebSocket that carries any number of answers, each under an id, and the engine at work.
 *
 * Owns its frames, and whether it is alive. Knows nothing of what becomes of an answer when it closes.
 */

import { ApiError } from "./server.js";

const OPEN_TIMEOUT_MS = 3_000; // a proxy that swallows the upgrade must not hold a question for longer
const PING_MS = 25_000; // keeps proxies from closing an idle socket, and notices a dead one
const PROBE_MS = 3_000;

/**
 * @typedef {object} Listener  Of one answer: what may come, and then exactly one of done, error and lost.
 * @property {(name: string) => void} named
 * @property {(chunk: object, number?: number) => void} chunk
 * @property {(usage: object|null) => void} done
 * @property {(error: ApiError) => void} error
 * @property {(why: string) => void} lost  the socket closed
 */

export class Socket {
  #listeners = new Map();
  #engine = null; // who watches it
  #ping = 0;
  #probe = 0;

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
    this.heardAt = 0;
    this.onClosed = () => {};
    ws.onerror = null;
    ws.onmessage = (event) => this.#receive(JSON.parse(event.data));
    ws.onclose = (event) => this.#closed(event.reason);
    this.#ping = setInterval(() => this.#check(), PING_MS);
  }

  get isUsable() {
    return this.ws.readyState === WebSocket.OPEN;
  }

  /** Closes it without a word to the other side, which may not be there; its answers are lost at once. */
  close(reason = "") {
    this.ws.onclose = null;
    this.ws.close();
    this.#closed(reason);
  }

  /** Sends a frame that is answered under its id. @param {Listener} listener. Returns what tells the server to end it. */
  ask(frame, listener) {
    this.#listeners.set(frame.id, listener);
    this.#send(frame);
    return () => this.#send({ type: "cancel", id: frame.id });
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

  /** Gives it a moment to show that the other side is there. False where it is closed. */
  probe() {
    if (!this.isUsable) return false;
    if (this.#probe) return true;
    this.#send({ type: "ping" });
    this.#probe = setTimeout(() => {
      this.#probe = 0;
      const isHeard = performance.now() - this.heardAt < PROBE_MS / 2; // what was under way came sooner
      if (!isHeard) this.close("no answer to a ping");
    }, PROBE_MS);
    return true;
  }

  #probed() {
    clearTimeout(this.#probe);
    this.#probe = 0;
  }

  #send(frame) {
    if (this.isUsable) this.ws.send(JSON.stringify(frame));
    else this.#closed("");
  }

  /** Any frame since the last check counts as life; else a ping has until the next check to be answered. */
  #check() {
    if (!this.isAlive && this.#listeners.size) return this.close("no answer to a ping");
    this.isAlive = false;
    this.#send({ type: "ping" });
  }

  #receive(frame) {
    this.isAlive = true;
    this.heardAt = performance.now();
    if (frame.type === "pong") this.#probed();
    const on = this.#listeners.get(frame.id);
    if (frame.type === "chunk") on?.chunk(frame.chunk, frame.n);
    else if (frame.type === "engine") this.#engine?.onEngine(frame.engine);
    else if (frame.type === "stream") on?.named(frame.stream);
    else if (frame.type === "done") this.#end(frame.id, (listener) => listener.done(frame.usage ?? null));
    else if (frame.type === "error") {
      const error = ApiError.fromBody(frame);
      if (on) this.#end(frame.id, (listener) => listener.error(error));
      else if (frame.id === undefined || frame.id === null) this.#endAll((listener) => listener.error(error)); // the socket itself is refused
    }
  }

  #end(id, tell) {
    const on = this.#listeners.get(id);
    this.#listeners.delete(id);
    if (on) tell(on);
  }

  #endAll(tell) {
    for (const id of [...this.#listeners.keys()]) this.#end(id, tell);
  }

  #closed(reason) {
    clearInterval(this.#ping);
    clearTimeout(this.#probe);
    const why = reason ? `The server closed the connection: ${reason}` : "The connection to the server was lost";
    this.#endAll((listener) => listener.lost(why));
    const [engine, onClosed] = [this.#engine, this.onClosed];
    this.#engine = null;
    this.onClosed = () => {};
    engine?.onLost();
    onClosed();
  }
}
