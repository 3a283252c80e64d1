/**
 * A block of code in the page: its head, its lines, and their colours.
 *
 * Lines are added as nodes while the block grows. A complete block of a known language is coloured when the browser has
 * nothing else to do. The text of <code> is the code, to the character,
 * coloured or not. Knows nothing of Markdown.
 */

import { visible } from "./text.js";

const current = new WeakMap(); // <div class="code"> -> the token that it shows
const coloured = new WeakSet(); // those whose <code> holds colours instead of lines
const whenIdle = globalThis.requestIdleCallback ?? ((task) => setTimeout(task, 50));

export function buildCode(token) {
  const root = make("div", { class: "code" });
  const head = make("div", { class: "code-head" });
  const name = make("span", {}, ...nodesOf(token.language || "text"));
  const code = make("code", {});
  const scroller = make("pre", { tabindex: "0", role: "group", "aria-label": token.language ? `Code, ${token.language}` : "Code" });
  head.append(name, make("button", { type: "button", class: "copy-code", "aria-label": "Copy code" }, "Copy"));
  scroller.append(code);
  root.append(head, scroller);
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

export function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const nodesOf = (text) => visible(text).map((part) => (typeof part === "string" ? document.createTextNode(part) : make(part.tag, part.attributes, ...part.children)));

/** Adds text behind the lines that are there; every line but the last ends in its line break. */
function addLines(code, text) {
  for (const part of text.match(/[^\n]*\n|[^\n]+/g) ?? []) {
    const last = code.lastElementChild;
    const isOpen = last && !last.textContent.endsWith("\n");
    if (isOpen) {
      last.append(...nodesOf(part));
      last.normalize();
    } else {
      const line = make("span", { class: "line" });
      line.append(...nodesOf(part));
      code.append(line);
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
