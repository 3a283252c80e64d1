/**
 * Which parts of an answer were guessed before they were sampled (speculation), and a view that shows them.
 *
 * Owns the form in which marks are kept: lengths of parts in turn, the first of text that nobody guessed (0 where there is
 * none), the second of guessed text, and so on. Knows nothing of conversations or of the server.
 */

import { h, nodesOf } from "./dom.js";

/** Adds the server's `draft_marks` of a chunk to `marks`. */
export function addMarks(marks, parts) {
  for (const { text, drafted } of parts) {
    const isGuessed = marks.length % 2 === 0; // what the last length is of
    if (marks.length && isGuessed === drafted) marks[marks.length - 1] += text.length;
    else if (drafted && !marks.length) marks.push(0, text.length);
    else marks.push(text.length);
  }
}

/** Whether anything was guessed. */
export const hasGuesses = (marks) => (marks?.length ?? 0) > 1;

/** The text as the model wrote it, guessed parts underlined. */
export function marksView(text, marks) {
  let at = 0;
  const parts = marks.map((length, k) => {
    const part = text.slice(at, (at += length));
    return k % 2 ? h("mark", {}, ...nodesOf(part)) : h("span", {}, ...nodesOf(part));
  });
  return h(
    "div",
    { class: "marks" },
    h("p", { class: "legend" }, h("mark", {}, "Underlined"), " text was guessed ahead and checked by the model, several tokens in one step."),
    h("div", { class: "marked", dir: "auto" }, ...parts, ...nodesOf(text.slice(at))),
  );
}
