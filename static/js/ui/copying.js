/**
 * Copying a text to the clipboard, with the outcome shown on the button for a moment and said to who cannot see it.
 */

import { byId, h } from "./dom.js";

const SHOWN_MS = 1_500;

/** Over plain HTTP from another machine browsers give no clipboard: there the text is selected and copied. */
async function write(text) {
  try {
    if (navigator.clipboard) return await navigator.clipboard.writeText(text).then(() => true);
  } catch {
    return false; // the reader does not allow it
  }
  const before = document.activeElement;
  const field = h("textarea", { class: "hidden", "aria-hidden": "true", tabindex: "-1" });
  field.value = text;
  (document.querySelector("dialog[open]") ?? document.body).append(field); // what lies below a dialog cannot be selected
  field.select();
  const worked = document.execCommand("copy");
  field.remove();
  before?.focus({ preventScroll: true });
  return worked;
}

/** `button` shows words or an icon; it shows how it went until it shows them again. */
export async function copyText(text, button) {
  const worked = await write(text);
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
