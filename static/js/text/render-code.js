/**
 * A block of code in the page: its head, its lines, and their colours.
 *
 * Lines are added as nodes while the block grows. A complete block of a known language is coloured when the browser has
 * nothing else to do. The text of <code> is the code, to the character, coloured or not. Knows nothing of Markdown.
 */

import { h, nodesOf } from "../ui/dom.js";

const current = new WeakMap(); // <div class="code"> -> the token that it shows
const coloured = new WeakSet(); // those whose <code> holds colours instead of lines
const whenIdle = globalThis.requestIdleCallback ?? ((task) => setTimeout(task, 50));

export function buildCode(token) {
  const name = h("span", {}, ...nodesOf(token.language || "text"));
  const code = h("code");
  const scroller = h("pre", { tabindex: "0", role: "group", "aria-label": token.language ? `Code, ${token.language}` : "Code" }, code);
  const head = h("div", { class: "code-head" }, name, h("button", { type: "button", class: "copy-code", "aria-label": "Copy code" }, "Copy"));
  const root = h("div", { class: "code" }, head, scroller);
  current.set(root, token);
  addLines(code, token.text);
  if (token.isComplete) complete(root, token);
  return root;
}

/** Shows `now` in a node that shows `was`; false when it has to be made anew. */
export function updateCode(root, was, now) {
  if (was.language !== now.language) return false;
  if (was.text === now.text && was.isComplete === now.isComplete) return true;
  const code = root.querySelector("code");
  current.set(root, now);
  if (coloured.delete(root) || !now.text.startsWith(was.text)) {
    code.replaceChildren();
    addLines(code, now.text);
  } else {
    addLines(code, now.text.slice(was.text.length));
  }
  root.querySelector(".colour-code")?.remove();
  if (now.isComplete) complete(root, now);
  return true;
}

/** Adds text behind the lines that are there; every line but the last ends in its line break. */
function addLines(code, text) {
  for (const part of text.match(/[^\n]*\n|[^\n]+/g) ?? []) {
    const last = code.lastElementChild;
    const isOpen = last && !last.textContent.endsWith("\n");
    if (isOpen) {
      last.append(...nodesOf(part));
      last.normalize();
    } else {
      code.append(h("span", { class: "line" }, ...nodesOf(part)));
    }
  }
}

/** Has the block coloured in idle time, if its language is known (code-colours.js). */
function complete(root, token) {
  if (!token.language || !token.text) return;
  const isCurrent = () => current.get(root) === token;
  const put = (nodes) => {
    coloured.add(root);
    root.querySelector("code").replaceChildren(nodes);
  };
  whenIdle(async () => {
    const colours = await import("./code-colours.js").catch((error) => console.debug("code stays without colours:", error));
    if (colours && isCurrent()) colours.complete(root, token, isCurrent, put);
  });
}
