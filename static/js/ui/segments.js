/**
 * A row of choices of which one holds.
 */

import { h, useStyle } from "./dom.js";

/** Radio buttons that look like one control: `choices` are titles by value, `onChoose(value)` is told. */
export function segments(name, label, choices, chosen, onChoose) {
  useStyle("segments");
  const buttons = Object.entries(choices).map(([value, title]) =>
    h("label", { class: "segment" }, h("input", { type: "radio", name, value, checked: value === chosen, onchange: () => onChoose(value) }), h("span", {}, title)),
  );
  return h("fieldset", { class: "segments" }, h("legend", { class: "hidden" }, label), ...buttons);
}
