/**
 * What Compare holds: columns, each with settings and a conversation of its own, and how it is kept over a reload.
 *
 * Plain data, kept under one name in this browser. Owns its shape and its bound. Knows nothing of the page or of the server.
 *
 * @typedef {{question: string, content: string, reasoning: string, state: "streaming"|"done"|"stopped"|"failed"|"interrupted"|"dropped",
 *   finish?: string, error?: {message: string, param: string|null}, figures?: object, limit?: number, stream?: string}} Turn: "dropped" was too long to be
 *   kept; `stream` is the server's name of an answer that goes on when it is asked for again
 * @typedef {{id: string, system: string, sampling: Object<string, string>, turns: Turn[]}} Column
 * @typedef {{format: 1, columns: Column[], draft: string, isSameSeed: boolean, seed: string, scrollsTogether: boolean,
 *   marksDifferences: boolean, isUntouched: boolean}} State
 */

import { newId, recall, remember } from "../store/store.js";

export const MIN_COLUMNS = 2;
export const MAX_COLUMNS = 4;

const FORMAT = 1;
const NAME = "compare";
const MAX_KEPT = 200_000; // characters of all that is kept
const SEEDS = 2 ** 31;

/** The name of the column in this place. */
export const letterOf = (place) => String.fromCharCode(65 + place);

/** A seed that nobody chose. */
export const anySeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0] % SEEDS);

/** @returns {Column} with these settings and no turns */
export function newColumn({ system = "", sampling = {} }) {
  return { id: newId(), system, sampling: { ...sampling }, turns: [] };
}

/** @returns {Turn} */
export const newTurn = (question) => ({ question, content: "", reasoning: "", state: "streaming" });

/** Two columns with the settings of a conversation, the second at temperature 0 (at 1 where the first is at 0). @returns {State} */
export function startState(conversation, defaults = {}) {
  const given = conversation.sampling.temperature?.trim() || String(defaults.temperature ?? 1);
  const other = { ...conversation, sampling: { ...conversation.sampling, temperature: Number(given) === 0 ? "1" : "0" } };
  return {
    format: FORMAT,
    columns: [newColumn(conversation), newColumn(other)],
    draft: "",
    isSameSeed: false,
    seed: anySeed(),
    scrollsTogether: true,
    marksDifferences: false,
    isUntouched: true,
  };
}

/** What the model is to answer in this column: its conversation up to this turn; a question that has no answer is left out. */
export function messagesOf(column, turn) {
  const messages = column.system.trim() ? [{ role: "system", content: column.system }] : [];
  for (const { question, content } of column.turns.slice(0, column.turns.indexOf(turn)))
    if (content) messages.push({ role: "user", content: question }, { role: "assistant", content });
  return [...messages, { role: "user", content: turn.question }];
}

/** What was kept, or null. An answer that was on its way is marked as cut off, unless it can be asked for again. @returns {State|null} */
export function loadState() {
  try {
    const state = JSON.parse(recall(NAME) || "null");
    if (state?.format !== FORMAT || state.columns.length < MIN_COLUMNS || state.columns.length > MAX_COLUMNS) return null;
    for (const turn of state.columns.flatMap(({ turns }) => turns)) if (turn.state === "streaming" && !turn.stream) turn.state = "interrupted";
    return state;
  } catch {
    return null; // not what this page wrote
  }
}

/** Keeps what fits: the oldest turns are left out first, and a last answer that is too long alone is named as such. */
export function saveState(state) {
  const kept = { ...state, columns: state.columns.map((column) => ({ ...column, turns: [...column.turns] })) };
  let text = JSON.stringify(kept);
  while (text.length > MAX_KEPT) {
    const longest = kept.columns.reduce((most, column) => (sizeOf(column) > sizeOf(most) ? column : most));
    if (longest.turns.length > 1) longest.turns.shift();
    else if (longest.turns[0]?.content || longest.turns[0]?.reasoning)
      longest.turns[0] = { ...longest.turns[0], content: "", reasoning: "", state: "dropped" };
    else return false; // settings alone, or a question, are too long
    text = JSON.stringify(kept);
  }
  return remember(NAME, text);
}

const sizeOf = ({ turns }) => turns.reduce((sum, { question, content, reasoning }) => sum + question.length + content.length + reasoning.length, 0);
