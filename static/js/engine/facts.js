/**
 * Steps of the engine in words: one as facts, several as a summary, and the columns of their table.
 *
 * Owns the words. Knows nothing of how steps are drawn.
 */

import { count, plural } from "../ui/numbers.js";
import { percentile } from "./history.js";
import { figure } from "./paint.js";

export const secondsText = (s) => (s < 9.95 ? `${s.toFixed(1)} s` : s < 120 ? `${count(s)} s` : `${count(s / 60)} min`);

const guessesOf = ({ accepted, drafted }) => (drafted ? `${count(accepted)} of ${count(drafted)} right` : "none");

/** [title, what a step has there] */
export const COLUMNS = [
  ["Step", (step) => String(step.step)],
  ["ms", (step) => figure(step.ms)],
  ["Answers", (step) => count(step.decode_rows)],
  ["Prompts", (step) => count(step.prompt_rows)],
  ["Prompt tokens", (step) => count(step.prompt_tokens)],
  ["Guesses", guessesOf],
  ["Encoded", (step) => count(step.encodes)],
  ["Forced", (step) => count(step.jumped)],
  ["Sent back", (step) => count(step.preemptions)],
  ["Running", (step) => count(step.running)],
  ["Waiting", (step) => count(step.waiting)],
  ["Memory in use", (step) => count(step.used_tokens)],
];

/** What a step did, as [name, words]: only what there is to tell. */
export function factsOf(step, { nowS, totalTokens }) {
  return [
    ["Step", String(step.step)],
    ["Took", `${figure(step.ms)} ms, ${secondsText(Math.max(0, nowS - step.time_s))} ago`],
    ["Answers", step.decode_rows ? `a token for ${plural(step.decode_rows, "answer", "answers")}` : "none"],
    ["Prompts", step.prompt_rows ? `${plural(step.prompt_tokens, "token", "tokens")} of ${plural(step.prompt_rows, "prompt", "prompts")}` : "none"],
    step.drafted && ["Guesses", guessesOf(step)],
    step.jumped && ["Grammar", `forced ${plural(step.jumped, "token", "tokens")}`],
    step.encodes && ["Encoded", plural(step.encodes, "picture or sound", "pictures or sounds")],
    step.preemptions && ["Sent back", `${plural(step.preemptions, "request", "requests")} to the queue, for lack of memory`],
    ["After it", `${count(step.running)} running, ${count(step.waiting)} waiting`],
    ["Memory", `${count(step.used_tokens)}${totalTokens ? ` of ${count(totalTokens)}` : ""} tokens in use`],
  ].filter(Boolean);
}

/** All steps that are remembered, in short. */
export function summaryOf(steps) {
  if (!steps.length) return [];
  const sorted = steps.map(({ ms }) => ms).sort((a, b) => a - b);
  const share = (test) => `${count((100 * steps.filter(test).length) / steps.length)} %`;
  const sum = (name) => steps.reduce((all, step) => all + step[name], 0);
  return [
    [`Last ${plural(steps.length, "step", "steps")}`, `over ${secondsText(steps.at(-1).time_s - steps[0].time_s + steps[0].ms / 1000)}`],
    ["Half took less than", `${figure(percentile(sorted, 0.5))} ms`],
    ["Longest", `${figure(sorted.at(-1))} ms`],
    ["Answers alone", share((step) => step.decode_rows && !step.prompt_rows)],
    ["Prompts alone", share((step) => !step.decode_rows && step.prompt_rows)],
    ["Both in one", share((step) => step.decode_rows && step.prompt_rows)],
    sum("drafted") > 0 && ["Guesses", guessesOf({ drafted: sum("drafted"), accepted: sum("accepted") })],
    sum("preemptions") > 0 && ["Sent back", plural(sum("preemptions"), "request", "requests")],
  ].filter(Boolean);
}
