/**
 * Copying a text to the clipboard, with the outcome shown on the button for a moment and said to who cannot see it.
 */

import { byId } from "./dom.js";

const SHOWN_MS = 1_500;

/** `button` shows words or an icon; it shows how it went until it shows them again. */
export async function copyText(text, button) {
  const worked = await navigator.clipboard.writeText(text).then(
    () => true,
    () => false,
  );
  byId("status").textContent = worked ? "Copied" : "Copying is not allowed here";
  if (button.dataset.worked) return;
  const use = button.querySelector("use");
  const before = use ? use.getAttribute("href") : button.textContent;
  const show = (shown) => (use ? use.setAttribute("href", shown) : (button.textContent = shown));
  button.dataset.worked = String(worked);
  show(use ? (worked ? "#icon-check" : "#icon-close") : worked ? "Copied" : "Not allowed");
  setTimeout(() => {
    show(before);
    delete button.dataset.worked;
  }, SHOWN_MS);
}
