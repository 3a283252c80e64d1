/**
 * The view of an answer that shows which parts of it were guessed ahead (marks.js).
 */

import { h, nodesOf } from "../ui/dom.js";

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
