/**
 * The list of the page's keys.
 */

import { h } from "../ui/dom.js";

const MAC = /Mac|iPhone|iPad/.test(navigator.platform);

/** [keys, what they do]; Ctrl is the command key where there is one. */
const KEYS = [
  [["Enter"], "Send the message"],
  [["Shift", "Enter"], "New line in the message"],
  [["Esc"], "Stop the answer, close what is open, give up an edit"],
  [["Ctrl", "Shift", "O"], "New chat"],
  [["Ctrl", "K"], "Search the conversations"],
  [["Ctrl", "/"], "Go to the message box"],
  [["Ctrl", "Alt", "R"], "Regenerate the last answer"],
  [["Ctrl", "Alt", "E"], "Edit the last question"],
  [["Ctrl", "B"], "Show or hide the settings"],
  [["Ctrl", "Enter"], "Save an edited answer as a copy"],
  [["↑", "↓"], "In a number of the settings: one step up or down"],
  [["←", "→"], "In a row of tabs: the tab beside it"],
];

let dialog = null;

/** Opens it. Closed, the focus goes back to where it was. */
export function showKeys() {
  dialog ??= build();
  if (!dialog.open) dialog.showModal();
}

function build() {
  const rows = KEYS.map(([keys, words]) => {
    const names = keys.map((key) => h("kbd", {}, MAC ? ({ Ctrl: "⌘", Alt: "⌥" }[key] ?? key) : key));
    return h("div", {}, h("dt", {}, ...names), h("dd", {}, words));
  });
  const close = h("button", { type: "submit", class: "button primary" }, "Close");
  const made = h("dialog", { class: "dialog keys-dialog", "aria-labelledby": "keys-title" }, h("h2", { id: "keys-title" }, "Keys"), h("dl", { class: "keys" }, ...rows), h("form", { method: "dialog", class: "dialog-actions" }, close));
  document.body.append(made);
  return made;
}
