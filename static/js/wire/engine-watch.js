/**
 * The engine at work, for every part of the page that watches it: one subscription on the socket serves them all, at the smallest
 * of their intervals; where no socket opens, GET /engine/steps is asked again and again.
 *
 * Owns who watches, and which steps each has seen: none comes twice to a watcher, also not over a new socket. What a watcher gets
 * is what GET /engine/steps answers, with the steps that are new to it, and `restarted` where the server began anew (steps count
 * from 1 again). Knows nothing of what is shown of it.
 */

export const MAX_STEPS = 600; // the engine remembers no more either
const MIN_MS = 50; // as the server allows
const MAX_MS = 10_000;
const POLL_MS = 1_000; // at least so long between requests
const RETRY_MS = 1_000;

export class EngineWatch {
  #watchers = new Set();
  #steps = []; // the last ones, for who comes later
  #latest = null;
  #last = 0; // the newest step that came
  #source = null; // the socket that is subscribed
  #timer = 0;
  #turn = 0; // a newer look for a source makes the older one end

  /** `line` has socket(), which settles to an open Socket or to null where there is none to have, and get(path). */
  constructor(line) {
    this.line = line;
  }

  /** Calls `onEngine(engine)` about every `intervalMs`, from now on; what is remembered comes at once. Returns what ends it. */
  add(intervalMs, onEngine) {
    const watcher = { intervalMs: Math.min(MAX_MS, Math.max(MIN_MS, intervalMs)), onEngine, steps: [...this.#steps], missed: 0, restarted: false, at: -Infinity };
    this.#watchers.add(watcher);
    this.#begin();
    return () => {
      if (!this.#watchers.delete(watcher)) return;
      if (this.#watchers.size) this.#begin();
      else this.#end();
    };
  }

  get #intervalMs() {
    return Math.min(...[...this.#watchers].map(({ intervalMs }) => intervalMs));
  }

  /** Finds a source at the interval that is wanted now. Called again when the socket is lost. */
  async #begin() {
    clearTimeout(this.#timer);
    this.#turn += 1;
    const turn = this.#turn;
    const socket = await this.line.socket();
    if (turn !== this.#turn || !this.#watchers.size) return;
    if (!socket) return this.#poll(turn);
    this.#source = socket;
    socket.watchEngine(this.#intervalMs, (engine) => this.#arrived(engine), () => this.#lost(socket));
  }

  #lost(socket) {
    if (socket !== this.#source) return;
    this.#source = null;
    if (this.#watchers.size) this.#timer = setTimeout(() => this.#begin(), RETRY_MS);
  }

  #end() {
    clearTimeout(this.#timer);
    this.#turn += 1;
    this.#source?.unwatchEngine();
    this.#source = null;
    this.#steps = []; // what passes unseen would make a gap
    this.#latest = null;
    this.#last = 0;
  }

  async #poll(turn) {
    const engine = await this.line.get(`engine/steps?since=${this.#last}`).catch(() => null); // the page says elsewhere what is wrong
    if (turn !== this.#turn) return;
    if (engine) this.#arrived(engine);
    this.#timer = setTimeout(() => this.#begin(), Math.max(POLL_MS, this.#intervalMs));
  }

  #arrived(engine) {
    const restarted = engine.last < this.#last;
    if (restarted) this.#steps = [];
    const at = engine.columns.indexOf("step");
    const steps = restarted ? engine.steps : engine.steps.filter((row) => row[at] > this.#last);
    const missed = this.#last ? engine.missed : 0; // what came before the first look is missed by nobody
    this.#last = engine.last;
    this.#steps = [...this.#steps, ...steps].slice(-MAX_STEPS);
    this.#latest = engine;
    for (const watcher of this.#watchers) {
      if (restarted) watcher.steps = [];
      watcher.steps = [...watcher.steps, ...steps].slice(-MAX_STEPS);
      watcher.missed += missed;
      watcher.restarted ||= restarted;
      this.#tell(watcher);
    }
  }

  #tell(watcher) {
    const now = performance.now();
    if (now - watcher.at < 0.9 * watcher.intervalMs) return; // frames come as often as the most eager one wants
    const { steps, missed, restarted } = watcher;
    Object.assign(watcher, { at: now, steps: [], missed: 0, restarted: false });
    watcher.onEngine({ ...this.#latest, steps, missed, restarted });
  }
}
