/**
 * The answers of Compare that are under way: all over the page's one socket, painted by one frame.
 *
 * Text that arrives is kept until the next frame, which hands it to every column in turn as long as the frame's time lasts; what
 * is left waits for the next one, and who waited is first. While nobody can see the columns nothing is painted.
 *
 * Owns the running answers. Knows nothing of what a column looks like: what it calls is in `on`.
 */

import { figuresOf } from "./figures.js";

const STREAM_OPTIONS = { include_usage: true, continuous_usage_stats: true };
const FRAME_MS = 8; // of script, for all columns together
const FIGURES_MS = 250; // figures that change faster cannot be read

/** One answer: what arrived, and what of it is not yet painted. */
class Run {
  pending = "";
  pendingReasoning = "";
  cancel = () => {};
  sentAt = performance.now();
  firstAt = 0;
  lastAt = 0;
  shownAt = 0;
  usage = null;
  timings = null;

  /** `isResumed`: it began before the page was loaded, and comes once more from its first word on. */
  constructor(turn, isResumed) {
    this.turn = turn;
    this.isResumed = isResumed;
  }
}

export class Runs {
  #runs = new Map(); // column -> Run
  #queue = []; // columns with something to paint, who waits longest first
  #frame = 0;
  #isSeen = true;

  /** `on.text(column, text, reasoning)` and `on.figures(column, figures)` paint; `on.ended(column, turn, error)` is called once for each answer,
   * `on.recounted(column, turn)` where the server's count comes after that. `on.named(turn)`: it can be resumed by `turn.stream`;
   * `on.restarted(column, turn)`: what was kept of it goes, the whole comes; `on.waiting(column, isWaiting)`: the connection is lost. */
  constructor(server, on) {
    this.server = server;
    this.on = on;
  }

  get size() {
    return this.#runs.size;
  }

  has(column) {
    return this.#runs.has(column);
  }

  /** Whether the columns can be seen. */
  see(isSeen) {
    this.#isSeen = isSeen;
    if (isSeen) this.#wantFrame();
  }

  /** Streams the answer to `body` into this turn of the column. */
  start(column, turn, body) {
    const whole = { ...body, stream: true, stream_options: STREAM_OPTIONS, return_timings: true };
    this.#begin(column, new Run(turn, false), (on) => this.server.stream(whole, on));
  }

  /** Goes on with an answer that was under way when the page was left. */
  resume(column, turn) {
    this.#begin(column, new Run(turn, true), (on) => this.server.resume(turn.stream, 0, on));
  }

  #begin(column, run, ask) {
    this.#runs.set(column, run);
    run.cancel = ask({
      named: (name) => {
        run.turn.stream = name;
        this.on.named(run.turn);
      },
      waiting: (isWaiting) => this.on.waiting(column, isWaiting),
      chunk: (chunk) => this.#arrived(column, run, chunk),
      done: (usage) => this.#done(column, run, usage),
      error: (error) => (run.isResumed && error.code === "broken_stream" ? this.#end(column, run, "interrupted") : this.#end(column, run, "failed", error)),
      cancel: () => this.#runs.get(column) === run && this.stop(column),
    });
  }

  stop(column) {
    const run = this.#runs.get(column);
    if (!run) return;
    run.cancel();
    this.#end(column, run, "stopped");
  }

  #arrived(column, run, chunk) {
    run.usage = chunk.usage ?? run.usage;
    run.timings = chunk.timings ?? run.timings;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    run.turn.finish = choice.finish_reason ?? run.turn.finish;
    const [text, reasoning] = [choice.delta?.content ?? "", choice.delta?.reasoning_content ?? ""];
    if (!text && !reasoning) return;
    if (run.isResumed && !run.firstAt) {
      run.turn.content = run.turn.reasoning = "";
      this.on.restarted(column, run.turn);
    }
    run.lastAt = performance.now();
    run.firstAt ||= run.lastAt;
    run.turn.content += text;
    run.turn.reasoning += reasoning;
    run.pending += text;
    run.pendingReasoning += reasoning;
    if (!this.#queue.includes(column)) this.#queue.push(column);
    this.#wantFrame();
  }

  #wantFrame() {
    if (this.#isSeen && this.#queue.length) this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  #paint() {
    this.#frame = 0;
    if (!this.#isSeen) return;
    const until = performance.now() + FRAME_MS;
    do this.#flush(this.#queue.shift());
    while (this.#queue.length && performance.now() < until);
    this.#wantFrame();
  }

  #flush(column) {
    const run = this.#runs.get(column);
    if (!run?.pending && !run?.pendingReasoning) return;
    this.on.text(column, run.pending, run.pendingReasoning);
    run.pending = run.pendingReasoning = "";
    if (run.lastAt - run.shownAt < FIGURES_MS) return;
    run.shownAt = run.lastAt;
    this.on.figures(column, figuresOf(run));
  }

  #done(column, run, usage) {
    run.usage = usage ?? run.usage;
    if (run.turn.state === "streaming") return this.#end(column, run, "done");
    run.turn.figures = figuresOf(run); // ended already, when Stop was pressed; the count may be newer
    this.on.recounted(column, run.turn);
  }

  #end(column, run, state, error = null) {
    if (this.#runs.get(column) !== run) return;
    this.#flush(column);
    this.#runs.delete(column);
    this.#queue = this.#queue.filter((other) => other !== column);
    run.turn.state = state;
    if (error) run.turn.error = { message: error.message, param: error.param ?? null };
    run.turn.figures = figuresOf(run);
    this.on.ended(column, run.turn, error);
  }
}
