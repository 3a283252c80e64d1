/**
 * The figures of an answer in Compare, how they are written, and which column did best.
 *
 * Times are the server's own where it gave them, else what this page saw. Owns what is shown and ranked. Knows nothing of how
 * answers arrive.
 */

import { duration, perSecond } from "../chat/figures.js";
import { count } from "../ui/numbers.js";

const CLEAR = 1.05; // times the least: a lead that is worth a word

/** In the order shown; `best` gives a word to the column that has the least or the most, where that is clear. */
const FIGURES = [
  { name: "firstMs", label: "TTFT", title: "Time to the first token", show: ({ firstMs }) => duration(firstMs), best: Math.min, word: "fastest" },
  { name: "rate", label: "Tok/s", title: "Tokens per second", show: ({ rate }) => perSecond(rate), best: Math.max, word: "fastest" },
  {
    name: "cachedTokens",
    label: "Cached",
    title: "Tokens of the prompt that came from the prefix cache",
    show: ({ cachedTokens, promptTokens }) => `${count(cachedTokens)} of ${count(promptTokens)}`,
  },
  { name: "tokens", label: "Tokens", title: "Tokens of the answer", show: ({ tokens }) => count(tokens), best: Math.min, word: "shortest" },
];

/** The figures of an answer as far as they are known; a name without a value is null. */
export function figuresOf({ usage, timings, sentAt, firstAt, lastAt, isResumed }) {
  const tokens = usage?.completion_tokens ?? null;
  const seenRate = !isResumed && tokens > 1 && lastAt > firstAt ? ((tokens - 1) * 1000) / (lastAt - firstAt) : null;
  return {
    firstMs: timings ? timings.queue_ms + timings.prompt_ms : firstAt && !isResumed ? firstAt - sentAt : null,
    rate: timings?.predicted_n > 1 ? timings.predicted_per_second : seenRate,
    cachedTokens: usage?.prompt_tokens_details?.cached_tokens ?? null,
    promptTokens: usage?.prompt_tokens ?? null,
    tokens,
  };
}

/** What there is to show of these figures: [{label, title, text, word}]. `others` are the figures of all columns that are ranked. */
export function describe(figures, others = []) {
  return FIGURES.map(({ name, label, title, show, best, word }) => {
    const isKnown = figures && figures[name] !== null && figures[name] !== undefined;
    const text = isKnown ? show(figures) : "–";
    return { label, title, text, word: best && isKnown && isBest(figures, others, name, show, best) ? word : "" };
  });
}

/** "401 tokens · 424 tok/s · TTFT 14 ms · 0 of 39 cached", as far as it is known. */
export function inWords({ tokens, rate, firstMs, cachedTokens, promptTokens }) {
  const isKnown = (value) => value !== null && value !== undefined;
  const words = [
    isKnown(tokens) && `${count(tokens)} tokens`,
    isKnown(rate) && `${perSecond(rate)} tok/s`,
    isKnown(firstMs) && `TTFT ${duration(firstMs)}`,
    isKnown(cachedTokens) && `${count(cachedTokens)} of ${count(promptTokens)} cached`,
  ];
  return words.filter(Boolean).join(" · ");
}

/** Whether no other one is better, and the worst is so far away that it is no accident. */
function isBest(figures, others, name, show, best) {
  const values = others.map((other) => other[name]).filter((value) => value !== null && value !== undefined);
  if (!others.includes(figures) || Math.max(...values) < CLEAR * Math.min(...values)) return false;
  return show(figures) === show(others.find((other) => other[name] === best(...values)));
}
