/**
 * All figures of one answer, for who wants to know where its time went.
 *
 * @typedef {object} Stats
 * @property {?number} tokens  of the answer, all parts of it where it was continued
 * @property {?number} promptTokens
 * @property {?number} cachedTokens  of the prompt
 * @property {number} pictureTokens  of the prompt
 * @property {number} thoughtTokens  of the answer
 * @property {number} guessedTokens
 * @property {number} wrongGuesses
 * @property {?number} firstMs  until the first token, as this page saw it
 * @property {number} decodeMs  from the first token to the last
 * @property {?object} timings  the server's own times of the last part, in llama.cpp's names
 */

import { h } from "../ui/dom.js";
import { count, plural } from "../ui/numbers.js";
import { duration, perSecond } from "./figures.js";

/** The rows: [name, value], only of what is known. */
function rowsOf({ stats, requestId }) {
  const { timings: times, promptTokens, cachedTokens, pictureTokens, tokens, thoughtTokens, guessedTokens, wrongGuesses, firstMs } = stats;
  const rows = [];
  if (promptTokens !== null) rows.push(["Prompt", `${count(promptTokens)} tokens`]);
  if (cachedTokens !== null) rows.push(["From the cache", `${count(cachedTokens)} tokens, ${Math.round((100 * cachedTokens) / (promptTokens || 1))} %`]);
  if (pictureTokens) rows.push(["Of pictures", `${count(pictureTokens)} tokens`]);
  if (times) {
    rows.push(["Waited in the queue", duration(times.queue_ms)]);
    rows.push(["Read the prompt", `${duration(times.prompt_ms)} for ${plural(times.prompt_n, "token")}${rate(times.prompt_per_second)}`]);
    rows.push(["Wrote the answer", `${duration(times.predicted_ms)} for ${plural(times.predicted_n, "token")}${rate(times.predicted_per_second)}`]);
    if (times.predicted_per_token_ms) rows.push(["Between two tokens", duration(times.predicted_per_token_ms)]);
    if (times.draft_n) rows.push(["Guesses", `${count(times.draft_n_accepted ?? 0)} of ${count(times.draft_n)} right`]);
  } else if (guessedTokens || wrongGuesses) rows.push(["Guesses", `${count(guessedTokens)} of ${count(guessedTokens + wrongGuesses)} right`]);
  if (tokens !== null) rows.push(["Answer", `${count(tokens)} tokens`]);
  if (thoughtTokens) rows.push(["Of the thought", `${count(thoughtTokens)} tokens`]);
  if (firstMs !== null) rows.push(["First token, seen here", duration(firstMs)]);
  if (requestId) rows.push(["Request", requestId]);
  return rows;
}

const rate = (perS) => (perS ? `, ${perSecond(perS)} tok/s` : "");

/** They as a list of names and values. */
export function figuresTable(message) {
  const rows = rowsOf(message).map(([name, value]) => h("div", { class: name === "Request" ? "whole" : null }, h("dt", {}, name), h("dd", {}, value)));
  return h("dl", { class: "figures" }, ...rows);
}
