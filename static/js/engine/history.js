/**
 * What is known of the engine: its last steps, and a number of every kind for each of the last 300 seconds.
 *
 * Owns both, bounded, and which seconds were seen at all: a second of which nothing is known is null, one in which nothing
 * happened is zero. Times are of the engine's own clock. Knows nothing of the page.
 */

import { MAX_STEPS } from "../wire/engine-watch.js";

export const MAX_SECONDS = 300;
const MAX_SAMPLES = 400; // step times of one second; of more, a fair choice
const WINDOW_S = 30; // prompts are rare: the share of one second would jump
const UNKNOWN = { running: null, waiting: null, in: null, out: null, p50: null, p95: null, hits: null, guesses: null, used: null };

/** The `share`-th of sorted numbers, by nearest rank; null of none. */
export function percentile(sorted, share) {
  return sorted.length ? sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)] : null;
}

/** Tokens of answers that a step made. An answer's first one is made by its prompt's last step, and not among them. */
const tokensOut = (step) => step.decode_rows + step.accepted + step.jumped;

const levelsOf = ({ running, waiting, used_tokens, prompt_tokens_seen, prompt_tokens_hit }) => ({
  running,
  waiting,
  used: used_tokens,
  seen: prompt_tokens_seen,
  hit: prompt_tokens_hit,
});

export class EngineHistory {
  #seconds = []; // oldest first, without holes: {second, from, until, in, out, steps, ms, levels}
  #last = 0; // number of the last step

  constructor() {
    this.clear();
  }

  clear() {
    this.steps = []; // oldest first
    this.nowS = 0;
    this.load = null; // until something is told
    this.hitRate = 0;
    this.requests = [];
    this.numRequests = 0;
    this.showsIds = false;
    this.#seconds = [];
    this.#last = 0;
  }

  /** Takes in what GET /engine/steps answers. False when it comes of another server than before: then all else is forgotten. */
  add(news) {
    const isSame = this.#isSame(news);
    if (!isSame) this.clear();
    const rows = news.steps.map((row) => Object.fromEntries(news.columns.map((name, k) => [name, row[k]])));
    const steps = rows.filter(({ step }) => step > this.#last);
    const isWhole = this.load && (steps[0]?.step ?? this.#last + 1) === this.#last + 1; // no step between is forgotten
    const begin = isWhole ? this.nowS : steps.length ? steps[0].time_s - steps[0].ms / 1000 : news.now_s;
    this.#second(Math.floor(Math.max(begin, news.now_s - MAX_SECONDS)));
    for (const step of steps) this.#count(step);
    const { load } = news;
    const used = load.total_tokens - load.free_tokens - load.evictable_tokens;
    Object.assign(this.#second(Math.floor(news.now_s)).levels, { running: load.running, waiting: load.waiting, used });
    this.#watched(begin, news.now_s);
    this.#last = news.last;
    this.steps = [...this.steps, ...steps].slice(-MAX_STEPS);
    this.nowS = news.now_s;
    this.load = load;
    this.hitRate = news.hit_rate;
    this.requests = news.requests;
    this.numRequests = news.num_requests;
    this.showsIds = news.shows_ids;
    return isSame;
  }

  /** A server that was started again counts from nothing, or the same numbers mean other steps. */
  #isSame({ now_s, last, steps, columns }) {
    if (now_s < this.nowS || last < this.#last) return false;
    const [number, time, seen] = ["step", "time_s", "prompt_tokens_seen"].map((name) => columns.indexOf(name));
    const ours = this.steps.at(-1);
    const again = steps.find((row) => row[number] === this.#last);
    if (!ours || !steps.length) return true;
    return again ? again[time] === ours.time_s : steps[0][seen] >= ours.prompt_tokens_seen;
  }

  #watched(fromS, untilS) {
    for (let second = Math.max(Math.floor(fromS), this.#seconds[0].second); second <= untilS; second += 1) {
      const known = this.#second(second);
      known.from = Math.min(known.from, Math.max(fromS, second));
      known.until = Math.max(known.until, Math.min(untilS, second + 1));
    }
  }

  /** The entry of a second. New ones begin with the levels of the one before. */
  #second(second) {
    if (second - (this.#seconds.at(-1)?.second ?? -Infinity) > MAX_SECONDS) this.#seconds = [];
    for (let next = (this.#seconds.at(-1)?.second ?? second - 1) + 1; next <= second; next += 1) {
      const levels = { running: 0, waiting: 0, used: 0, seen: 0, hit: 0, drafted: 0, accepted: 0, ...this.#seconds.at(-1)?.levels };
      this.#seconds.push({ second: next, from: Infinity, until: -Infinity, in: 0, out: 0, steps: 0, ms: [], levels });
    }
    if (this.#seconds.length > MAX_SECONDS + 1) this.#seconds.splice(0, this.#seconds.length - MAX_SECONDS - 1);
    return this.#seconds[Math.max(0, second - this.#seconds[0].second)];
  }

  #count(step) {
    const end = this.#second(Math.floor(step.time_s));
    const { drafted, accepted } = end.levels; // counted here
    Object.assign(end.levels, levelsOf(step), { drafted: drafted + step.drafted, accepted: accepted + step.accepted });
    end.steps += 1;
    if (end.ms.length < MAX_SAMPLES) end.ms.push(step.ms);
    else if (Math.random() * end.steps < MAX_SAMPLES) end.ms[Math.floor(Math.random() * MAX_SAMPLES)] = step.ms;
    const lengthS = Math.max(step.ms / 1000, 1e-6);
    const begin = step.time_s - lengthS;
    // A long step's tokens belong to all the time that it took.
    for (const known of this.#seconds.slice(-Math.ceil(lengthS) - 1)) {
      const share = (Math.min(step.time_s, known.second + 1) - Math.max(begin, known.second)) / lengthS;
      if (share <= 0) continue;
      known.in += step.prompt_tokens * share;
      known.out += tokensOut(step) * share;
    }
  }

  /** How many seconds back something is known of. */
  get numSeconds() {
    return Math.floor(this.nowS) - (this.#seconds[0]?.second ?? Math.floor(this.nowS));
  }

  /**
   * The last `numSeconds` that are over, oldest first: {ago, running, waiting, in, out, p50, p95, hits, guesses, used}, each number null where it
   * is not known. `in` and `out` are tokens, p50 and p95 of the milliseconds of steps, `hits` the share of
   * prompt tokens found and `guesses` that of guesses that were right, in the last 30 seconds.
   */
  seconds(numSeconds = MAX_SECONDS) {
    const now = Math.floor(this.nowS);
    const first = this.#seconds[0]?.second ?? now;
    return Array.from({ length: numSeconds }, (_, k) => {
      const second = now - numSeconds + k;
      return { ago: now - second, ...this.#told(second - first) };
    });
  }

  #told(at) {
    const known = this.#seconds[at];
    const watched = known ? known.until - known.from : 0;
    if (!(watched > 0)) return UNKNOWN;
    const sorted = known.ms.toSorted((a, b) => a - b);
    const { running, waiting, used } = known.levels;
    const [p50, p95] = [percentile(sorted, 0.5), percentile(sorted, 0.95)];
    return { running, waiting, used, in: known.in / watched, out: known.out / watched, p50, p95, hits: this.#share(at, "hit", "seen"), guesses: this.#share(at, "accepted", "drafted") };
  }

  /** What was counted as `part`, as a share of `whole`, in the window that ends here; null where there was nothing. */
  #share(at, part, whole) {
    const { levels } = this.#seconds[at];
    const before = this.#seconds[Math.max(0, at - WINDOW_S)].levels;
    return levels[whole] > before[whole] ? (levels[part] - before[part]) / (levels[whole] - before[whole]) : null;
  }
}
