/**
 * Words and small pieces that the parts of the cache view share.
 */

import { h, svg } from "../ui/dom.js";

export const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(share > 0.995 && share < 1 ? 1 : 0)} %`);

export const oneLine = (text) => text.replaceAll("\n", "↵");

/** How long ago a node was let go of. */
export function ageOf({ age_s, seenAt, requests }) {
  if (requests) return "now";
  const seconds = age_s + (performance.now() - seenAt) / 1000;
  if (seconds < 5) return "just now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return `${Math.round(seconds / 3600)} h ago`;
}

/** Not to be pressed now, but still there for the keyboard, which must not lose its place. */
export const setOff = (button, isOff) => button.setAttribute("aria-disabled", String(isOff));

export const isOff = (button) => button.getAttribute("aria-disabled") === "true";

const CONFIRM_MS = 6_000;

/** A button that acts when it is pressed a second time, and says so after the first. `warn()` is what it says then. */
export function confirmedButton(label, warn, action, say) {
  let timer = 0;
  const words = h("span", {}, label);
  const calm = () => {
    clearTimeout(timer);
    button.classList.remove("sure");
    words.textContent = label;
  };
  const press = () => {
    if (isOff(button)) return;
    if (button.classList.contains("sure")) {
      calm();
      return action();
    }
    button.classList.add("sure");
    words.textContent = warn();
    say(warn());
    timer = setTimeout(calm, CONFIRM_MS);
  };
  const button = h("button", { type: "button", class: "button", onclick: press, onblur: calm }, words);
  return button;
}

const SYMBOLS = {
  lock: "M6 9.500h8a1 1 0 0 1 1 1v5a1 1 0 0 1-1 1H6a1 1 0 0 1-1-1v-5a1 1 0 0 1 1-1zM7 9.500V7a3 3 0 0 1 6 0v2.500",
  pin: "M8 3.500h4l-.6 5 2.600 3H6l2.600-3zM10 11.500V17",
  salt: "M10 3l6 3.500v7L10 17l-6-3.500v-7z",
  chat: "M4 5h12v8.500H9L5.500 16.500V13.500H4z",
};

/** Puts the symbols of this view beside those of index.html, once. */
export function addSymbols() {
  const place = document.querySelector("svg.symbols");
  for (const [name, d] of Object.entries(SYMBOLS)) {
    const id = `icon-${name}`;
    if (!document.getElementById(id)) place.append(svg("symbol", { id, viewBox: "0 0 20 20" }, svg("path", { d })));
  }
}
