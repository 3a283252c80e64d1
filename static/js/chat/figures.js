/**
 * The figures of an answer in words: how it ended, how many tokens, how fast.
 *
 * Owns the sentences. What is counted comes from the server; where it gives no times, those of this page are used.
 */

export const count = (n) => n.toLocaleString("en");

/** "0.4 ms", "81 ms", "1.20 s" */
export function duration(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  return `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

export const perSecond = (rate) => (rate < 10 ? rate.toFixed(1) : count(Math.round(rate)));

/** "24 tok · 62 tok/s · TTFT 81 ms · 64 picture tokens · 112 of 130 prompt tokens cached", as far as it is known.  */
export function statsText({ tokens, promptTokens, pictureTokens, cachedTokens, firstMs, decodeMs, timings }) {
  const parts = [];
  if (tokens !== null) parts.push(`${count(tokens)} tok`);
  const rate = timings?.predicted_per_second || (decodeMs > 0 ? (tokens - 1) / (decodeMs / 1000) : 0);
  if (tokens > 1 && rate > 0) parts.push(`${perSecond(rate)} tok/s`);
  const first = timings ? timings.queue_ms + timings.prompt_ms : firstMs;
  if (first !== null) parts.push(`TTFT ${duration(first)}`);
  if (pictureTokens) parts.push(`${count(pictureTokens)} picture tokens`);
  if (cachedTokens !== null) parts.push(`${count(cachedTokens)} of ${count(promptTokens)} prompt tokens cached`);
  return parts.join(" · ");
}

/** What a reader should know of how an answer ended; "" when it ended by itself. */
export function endOf({ state, finish, content, reasoning, stats, limit, error }) {
  const after = stats?.tokens ? ` after ${count(stats.tokens)} tokens` : "";
  if (state === "stopped") return `Stopped by you${after}`;
  if (state === "elsewhere") return "Being written in another tab";
  if (state === "interrupted") return error ? "Cut off" : "Cut off by a reload";
  if (finish === "abort") return `Ended by the server${after}`;
  if (finish === "length") return limit ? `Cut at max_tokens ${count(limit)}` : "Cut at the token limit";
  if (state !== "done" || content || finish === "tool_calls") return "";
  return reasoning ? "No answer after the thought" : "Empty answer";
}

/** Whether an answer has text that it can go on from, and something kept it from its end. */
export const canContinue = ({ role, content, state, finish, isEdited }) =>
  role === "assistant" && Boolean(content) && state !== "streaming" && (state !== "done" || finish === "length" || finish === "abort" || Boolean(isEdited));
