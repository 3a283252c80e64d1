/**
 * A log of tokens as what a reader sees: which text each token stands for, how sure the model was, where it was least sure.
 *
 * A character that is split over several tokens stands at the one that completes it; those before it stand for nothing yet. Grows
 * with its log. Knows nothing of the page.
 */

import { bytesOf } from "./log.js";

/** The least probability of each step, from the surest to the least sure. */
export const STEPS = [0.9, 0.6, 0.3, 0.1, 0];
const VISIBLE = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "⍽" };

export const probability = (logprob) => Math.exp(logprob);

/** 0 for the surest fifth, 4 for the least sure. */
export const stepOf = (logprob) => STEPS.findIndex((least) => probability(logprob) >= least);

/** "83.2 %", with as many digits as tell something. */
export function percent(p) {
  if (p > 0 && p < 0.0005) return "< 0.1 %";
  if (p < 1 && p >= 0.9995) return "> 99.9 %";
  return `${(100 * p).toFixed(p === 1 ? 0 : 1)} %`;
}

/** A token by itself, its white space made visible; its bytes where it is no text. */
export function wordText(word) {
  if (typeof word !== "string") return word.map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
  return word === "" ? "∅" : word.replace(/[ \n\t\r\u00a0]/g, (char) => VISIBLE[char]);
}

/** Uncertainty in bits, of what is known of a distribution; the rest of it counts as one more possibility. */
function entropy([, logprob, tops]) {
  const logprobs = tops.filter((_, k) => k % 2 === 1);
  if (!logprobs.length) logprobs.push(logprob);
  let rest = 1;
  let sum = 0;
  for (const one of logprobs) {
    const p = probability(one);
    rest -= p;
    sum -= (p * one) / Math.LN2;
  }
  return Math.max(0, sum - (rest > 1e-6 ? rest * Math.log2(rest) : 0));
}

export class TokenTexts {
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #isSplit = false; // the last tokens may have ended within a character

  /** @param {import("./log.js").Log} log */
  constructor(log) {
    this.log = log;
    this.texts = []; // what each token adds to the text
    this.entropies = [];
    this.numBytes = [];
    this.sumLogprob = 0;
    this.sumEntropy = 0;
    this.grow();
  }

  get length() {
    return this.texts.length;
  }

  /** Takes in what the log has gained; true if there was something. */
  grow() {
    const { list } = this.log;
    const first = this.texts.length;
    for (let k = first; k < list.length; k += 1) {
      const [word, logprob] = list[k];
      this.texts.push(this.#textOf(word));
      this.numBytes.push(bytesOf(word).length);
      this.entropies.push(entropy(list[k]));
      this.sumLogprob += logprob;
      this.sumEntropy += this.entropies[k];
    }
    return list.length > first;
  }

  #textOf(word) {
    if (typeof word === "string" && !this.#isSplit) return word;
    this.#isSplit = typeof word !== "string";
    return this.#decoder.decode(Uint8Array.from(bytesOf(word)), { stream: true });
  }

  /** The text before a token. */
  before(index) {
    return this.texts.slice(0, index).join("");
  }

  /** For each token from `from` to `to` whether it was sampled (0), guessed ahead (1) or forced (2). */
  kinds(from, to) {
    const { marks } = this.log;
    const kinds = [];
    let [at, mark, end] = [0, 0, marks[0]?.[0] ?? 0];
    for (let k = 0; k < to; k += 1) {
      while (mark < marks.length && at >= end) end += marks[(mark += 1)]?.[0] ?? 0;
      if (k >= from) kinds.push(marks[mark]?.[1] ?? 0);
      at += this.numBytes[k];
    }
    return kinds;
  }

  /** The tokens about which the model was least sure, in the order of the text. */
  leastSure(count) {
    const order = this.entropies.map((bits, k) => ({ bits, k })).filter(({ bits }) => bits > 0.5);
    return order.sort((a, b) => b.bits - a.bits).slice(0, count).map(({ k }) => k).sort((a, b) => a - b);
  }
}
