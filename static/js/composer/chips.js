/**
 * Small buttons in the composer that say what is sent with every question, and open the panel where it is set.
 *
 * Owns their row. Knows nothing of what they stand for.
 */

import { byId, h } from "../ui/dom.js";

/** Shows `words` under this name, or nothing; `why` says what is wrong with it. Pressed, `panel` is shown. */
export function showChip(page, name, words, { label = words, why = "", panel = name } = {}) {
  const row = document.getElementById("form-chips") ?? byId("composer").insertBefore(h("ul", { id: "form-chips", class: "form-chips", "aria-label": "Sent with each message", hidden: true }), byId("composer").firstChild);
  let item = row.querySelector(`[data-chip="${name}"]`);
  if (!words) item?.remove();
  else {
    item ??= row.appendChild(h("li", { "data-chip": name }, h("button", { type: "button", class: "form-chip", onclick: () => openPanel(page, panel) }), h("span", { class: "form-why" })));
    const button = item.firstChild;
    if (button.textContent !== words) button.textContent = words;
    button.dataset.state = why ? "wrong" : "";
    item.lastChild.textContent = why;
    button.setAttribute("aria-label", `${label}. Open its panel.`);
  }
  row.hidden = row.children.length === 0;
}

/** Shows a panel of the inspector, which is opened where it is closed. */
async function openPanel(page, name) {
  if (byId("inspector").inert) byId("open-inspector").click();
  await page.frame.panels.show(name);
  byId("panels").querySelector('[aria-selected="true"]')?.focus();
}
