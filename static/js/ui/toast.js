/**
 * The one short message at the bottom of the page: what was just done, with a way to take it back.
 *
 * Knows nothing of what it tells.
 */

import { byId, h, nodesOf } from "./dom.js";

const SHOWN_MS = 10_000;

let timer = 0;

/** Shows `text`, and a button `label` that does `action`, for ten seconds or until the next message. */
export function tell(text, label = "", action = () => {}) {
  const toast = byId("toast");
  const hide = () => (toast.hidden = true);
  const press = () => {
    hide();
    action();
  };
  toast.replaceChildren(h("span", {}, ...nodesOf(text)), ...(label ? [h("button", { type: "button", class: "link-button", onclick: press }, label)] : []));
  toast.hidden = false;
  clearTimeout(timer);
  timer = setTimeout(hide, SHOWN_MS);
}

/** Says that something is gone, and brings it back with `undo` if wanted. */
export const offerUndo = (text, undo) => tell(text, "Undo", undo);
