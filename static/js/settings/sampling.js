/**
 * The fields of a request that steer its answer: their names, what they take, and how what was typed becomes JSON.
 *
 * Values are kept as they were typed; an empty one is not sent, so the server's default holds. Owns these fields. Knows nothing of
 * the form that shows them (form.js).
 */

/**
 * Fields in the order shown. `parse` makes the JSON value of what was typed; `otherwise` is what holds where neither this page nor
 * the model says anything; `range` is what the server takes, `slider` the [low, high, step] that makes sense to slide over;
 * `group` a heading under which it is folded, `needs` what the model must be able to do.
 */
export const FIELDS = [
  { name: "temperature", label: "Temperature", help: "0: always the likeliest", parse: number, otherwise: 1, range: [0, 100], slider: [0, 2, 0.05] },
  { name: "top_p", label: "Top p", help: "Share of likeliest tokens", parse: number, otherwise: 1, range: [0, 1], slider: [0.05, 1, 0.05] },
  { name: "max_tokens", label: "Max tokens", help: "Longest answer", parse: number, otherwise: "no limit", range: [1, 10_000_000], step: 64 },
  { name: "seed", label: "Seed", help: "Repeats an answer", parse: number, otherwise: "random" },
  { name: "stop", label: "Stop texts", help: "One a line; \\n: line break", parse: lines, otherwise: "none" },
  { name: "reasoning_effort", label: "Effort", help: "How long to think; none: not at all", parse: (text) => text, otherwise: "", needs: "reasoning", choices: ["none", "minimal", "low", "medium", "high"], group: "Thinking" },
  { name: "max_thinking_tokens", label: "Thought limit", help: "Tokens; then the answer begins", parse: number, otherwise: "no limit", range: [0, 10_000_000], step: 64, needs: "reasoning", group: "Thinking" },
  { name: "top_k", label: "Top k", help: "0: off", parse: number, otherwise: 0, range: [0, 10_000_000], slider: [0, 100, 1], group: "More sampling" },
  { name: "min_p", label: "Min p", help: "Share of the best token", parse: number, otherwise: 0, range: [0, 1], slider: [0, 0.5, 0.01], group: "More sampling" },
  { name: "repetition_penalty", label: "Repetition penalty", help: "1: off", parse: number, otherwise: 1, range: [0, 2], slider: [0.8, 1.5, 0.01], group: "More sampling" },
  { name: "frequency_penalty", label: "Frequency penalty", help: "Each time a token came", parse: number, otherwise: 0, range: [-2, 2], slider: [-2, 2, 0.1], group: "More sampling" },
  { name: "presence_penalty", label: "Presence penalty", help: "For having come at all", parse: number, otherwise: 0, range: [-2, 2], slider: [-2, 2, 0.1], group: "More sampling" },
  { name: "min_tokens", label: "Min tokens", help: "The end comes no earlier", parse: number, otherwise: 0, range: [0, 10_000_000], step: 16, group: "More sampling" },
];

/** The name under which further fields are kept, as the JSON text of an object. */
export const EXTRA = "extra_body";

/** A number, or the text itself where it is none or would lose digits: then the server says what it wants. */
function number(text) {
  const value = Number(text);
  const isExact = Number.isFinite(value) && (!Number.isInteger(value) || Number.isSafeInteger(value));
  return isExact ? value : text.trim();
}

function lines(text) {
  const escapes = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };
  return text.split("\n").filter(Boolean).map((line) => line.replace(/\\[nt\\]/g, (escape) => escapes[escape]));
}

export const isSet = (text) => text !== undefined && text.trim() !== "";

/** The sampling fields of a chat body. Throws an Error whose `param` is EXTRA where the further fields are no JSON object. */
export function samplingBody(sampling) {
  const set = FIELDS.filter(({ name }) => isSet(sampling[name]));
  const fields = Object.fromEntries(set.map(({ name, parse }) => [name, parse(sampling[name])]));
  return isSet(sampling[EXTRA]) ? { ...fields, ...extraOf(sampling[EXTRA]) } : fields;
}

const OWNED = ["messages", "stream", "stream_options"]; // by the page

/** The object that this text stands for. */
export function extraOf(text) {
  const refuse = (message) => {
    throw Object.assign(new Error(`Extra body ${message}`), { param: EXTRA });
  };
  let value = null;
  try {
    value = JSON.parse(text);
  } catch {
    refuse("is not JSON; its field in the settings says where");
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) refuse('must be an object, as {"ignore_eos": true}');
  const owned = OWNED.find((name) => Object.hasOwn(value, name));
  if (owned) refuse(`cannot set ${owned}: the page does`);
  return value;
}
