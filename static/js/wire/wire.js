/**
 * The answers that are under way, over whatever carries them: one WebSocket, or SSE where no socket opens. An answer outlives its
 * connection: the server keeps it for a while, and it goes on from the chunk behind the last one that came (docs/streams.md).
 *
 * Owns the socket and the answers' places. Does not look for a lost server itself: connection.js does, and calls reached().
 */

import { EngineWatch } from "./engine-watch.js";
import { ApiError } from "./server.js";
import { Socket } from "./socket.js";
import { readStream } from "./sse.js";

const RETRY_SOCKET_MS = 30_000; // after a failed try, questions go over SSE at once for so long
const SLACK_MS = 5_000; // the server may have noticed later than the page that a connection was lost
const MAX_BEGINNINGS = 3; // of an answer whose connection is lost each time before it has a name

export class Wire {
  #socket = null;
  #opening = null;
  #noSocketUntil = 0;
  #waiting = new Set(); // answers whose connection is lost
  #unwanted = new Set(); // names of streams that were ended here while the server could not be told

  constructor(server) {
    this.server = server;
    this.engine = new EngineWatch({ socket: () => this.socket(), get: (path) => server.get(path) });
  }

  /** Streams the answer to a chat body. Returns what cancels it. */
  ask(id, body, on) {
    return this.#start(new Answer(this, id, on, { body }));
  }

  /** Streams what the server has of an answer behind chunk number `after`, and what is to come of it. */
  resume(id, name, after, on) {
    return this.#start(new Answer(this, id, on, { name, after }));
  }

  #start(answer) {
    answer.go();
    return () => answer.cancel();
  }

  watchEngine(intervalMs, onEngine) {
    return this.engine.add(intervalMs, onEngine);
  }

  /** Gives up the socket; its answers are cut. */
  drop() {
    this.#socket?.close();
    this.#socket = null;
    this.#noSocketUntil = 0;
  }

  probe() {
    return this.#socket?.probe();
  }

  /** The server answers (again). */
  async reached() {
    if (this.#waiting.size || !this.#socket) this.#noSocketUntil = 0; // what failed may have failed with the server
    const open = this.socket();
    for (const name of this.#unwanted) this.#tellUnwanted(name);
    await open;
    const waiting = [...this.#waiting];
    this.#waiting.clear();
    for (const answer of waiting) answer.go();
  }

  /** The open socket, or null where there is none to have: then SSE does the work. */
  async socket() {
    if (this.#socket?.isUsable) return this.#socket;
    if (performance.now() < this.#noSocketUntil) return null;
    this.#opening ??= this.#open();
    this.#socket = await this.#opening;
    this.#opening = null;
    return this.#socket;
  }

  async #open() {
    const url = new URL("v1/ws", this.server.base);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const socket = await Socket.open(url, this.server.key);
    if (socket) socket.onClosed = () => this.server.onLost();
    else this.#noSocketUntil = performance.now() + RETRY_SOCKET_MS;
    return socket;
  }

  /** This answer goes on when the server is there again. */
  wait(answer) {
    this.#waiting.add(answer);
    this.server.onLost();
  }

  forget(answer) {
    this.#waiting.delete(answer);
  }

  /** Nobody wants the rest of this stream: the server is told, now or when it is there again. */
  end(name) {
    this.#unwanted.add(name);
    this.#tellUnwanted(name);
  }

  async #tellUnwanted(name) {
    const isHeard = await this.server.delete(`v1/streams/${encodeURIComponent(name)}`).then(
      () => true,
      (error) => error.code !== "unreachable", // unknown there: nothing is left to end
    );
    if (isHeard) this.#unwanted.delete(name);
  }
}

/** One answer, over any number of connections. */
class Answer {
  #on;
  #last = 0; // the number of the last chunk that came
  #hasBegun = false; // something of it came
  #numBeginnings = 0;
  #isOver = false;
  #isCancelled = false;
  #turn = 0; // of connections: what an older one still says is not heard
  #isSse = false;
  #stop = null; // ends what the connection carries
  #deadline = 0;

  constructor(wire, id, on, { body = null, name = null, after = 0 }) {
    this.wire = wire;
    this.id = id;
    this.body = body;
    this.name = name;
    this.#on = on;
    this.#last = after;
  }

  get #keeps() {
    return this.wire.server.resumeMs > 0 || !this.body;
  }

  /** Begins, or goes on behind what came. */
  async go() {
    this.#turn += 1;
    const turn = this.#turn;
    const socket = await this.wire.socket();
    if (this.#isOver || turn !== this.#turn) return;
    const on = this.#listener(turn);
    if (!this.name) this.#numBeginnings += 1;
    this.#isSse = !socket;
    if (socket) this.#stop = socket.ask(this.#frame(), on);
    else this.#stop = readStream(this.wire.server, { body: this.name ? null : this.body, name: this.name, after: this.#last, keeps: this.#keeps }, on);
  }

  #frame() {
    if (this.name) return { type: "stream.resume", id: this.id, stream: this.name, after: this.#last };
    return { type: "chat.create", id: this.id, request: this.#keeps ? { resumable: true, ...this.body } : this.body };
  }

  #listener(turn) {
    const heard = (act) => (...given) => turn === this.#turn && !this.#isOver && act(...given);
    return {
      opened: heard((head) => this.#numBeginnings === 1 && this.#on.opened(head)),
      named: heard((name) => this.#named(name)),
      chunk: heard((chunk, number) => this.#chunk(chunk, number)),
      done: heard((usage) => this.#end(() => this.#on.done(usage))),
      error: heard((error) => this.#failed(error)),
      lost: heard((why) => this.#lost(why)),
    };
  }

  #named(name) {
    this.#goesOn();
    if (!name || name === this.name) return;
    this.name = name;
    this.#on.named(name);
  }

  #chunk(chunk, number) {
    this.#goesOn();
    if (number !== undefined && number <= this.#last) return; // came before
    this.#last = number ?? 0;
    this.#hasBegun = true;
    this.#on.chunk(chunk, number);
  }

  #goesOn() {
    if (!this.#deadline) return;
    clearTimeout(this.#deadline);
    this.#deadline = 0;
    this.#on.waiting(false);
  }

  #failed(error) {
    const isNew = !this.name && !this.#deadline;
    if (error.code === "unreachable" && !isNew) return this.#lost(error.message);
    if (error.code === "stream_taken") error = broken("This answer is being read elsewhere, in another tab perhaps");
    if (this.name && ["not_found", "stream_gone"].includes(error.code)) error = broken("The connection was lost, and the server does not have the rest any more");
    this.#end(() => this.#on.error(error));
  }

  #lost(why) {
    if (this.#isCancelled) return this.#end(() => this.#on.done(null), true);
    const canGoOn = this.name ? this.#last > 0 || !this.#hasBegun : !this.#hasBegun && this.#numBeginnings < MAX_BEGINNINGS;
    if (!canGoOn || !this.#keeps) return this.#end(() => this.#on.error(broken(why)));
    if (!this.#deadline) {
      const giveUp = () => this.#end(() => this.#on.error(broken(`${why}, for too long to go on`)), true);
      this.#deadline = setTimeout(giveUp, this.wire.server.resumeMs + SLACK_MS);
      this.#on.waiting(true);
    }
    this.wire.wait(this);
  }

  /** Ends it, now. Over a socket its last words, with the count of what was made, still come. */
  cancel() {
    if (this.#isOver) return;
    this.#isCancelled = true;
    if (!this.#isSse && this.#stop && !this.#deadline) return this.#stop();
    if (this.#isSse) this.#stop?.();
    this.#end(() => this.#on.done(null), true);
  }

  #end(tell, isUnwanted = false) {
    if (this.#isOver) return;
    this.#isOver = true;
    clearTimeout(this.#deadline);
    this.wire.forget(this);
    if (isUnwanted && this.name) this.wire.end(this.name);
    tell();
  }
}

const broken = (why) => new ApiError(`${why}. What had arrived is kept.`, { code: "broken_stream" });
