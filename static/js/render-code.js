/**
 * A block of code in the page: its head, its lines, and their colours.
 *
 * Lines are added as nodes while the block grows. A complete block of a known language is coloured when the browser has
 * nothing else to do; the library for it is loaded with the first one. The text of <code> is the code, to the character,
 * coloured or not. Knows nothing of Markdown.
 */

import { visible } from "./text.js";

const MAX_COLOURED = 30_000; // characters that are coloured without being asked to; 70,000 take a tenth of a second
const MAX_ASKED = 500_000;
const RETRY_MS = 2_000;

// Names that people write behind a fence, by the file that knows the language.
const NAMES = {
  bash: "bash sh zsh shell console terminal",
  c: "c h",
  cpp: "cpp c++ cc cxx hpp cuda cu",
  csharp: "csharp cs c#",
  css: "css",
  diff: "diff patch",
  dockerfile: "dockerfile docker",
  go: "go golang",
  ini: "ini toml conf",
  java: "java",
  javascript: "javascript js jsx mjs cjs node",
  json: "json jsonc json5 jsonl",
  kotlin: "kotlin kt kts",
  markdown: "markdown md",
  php: "php",
  python: "python py python3 pycon",
  ruby: "ruby rb",
  rust: "rust rs",
  sql: "sql postgresql postgres mysql sqlite",
  typescript: "typescript ts tsx mts",
  xml: "xml html xhtml svg vue htm",
  yaml: "yaml yml",
};
const FILES = new Map(Object.entries(NAMES).flatMap(([file, names]) => names.split(" ").map((name) => [name, file])));

const fileOf = ({ language }) => FILES.get(language.toLowerCase()) ?? null;
const whenIdle = globalThis.requestIdleCallback ?? ((task) => setTimeout(task, 50));

const current = new WeakMap(); // <div class="code"> -> the token that it shows
const coloured = new WeakSet(); // those whose <code> holds colours instead of lines

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

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const nodesOf = (text) => visible(text).map((part) => (typeof part === "string" ? document.createTextNode(part) : make(part.tag, part.attributes, ...part.children)));

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

/** Colours the block in idle time; a long one only when its reader asks for it. */
function complete(root, token) {
  if (!fileOf(token) || !token.text || token.text.length > MAX_ASKED) return;
  if (token.text.length <= MAX_COLOURED) return void whenIdle(() => colour(root, token));
  const button = make("button", { type: "button", class: "copy-code colour-code" }, "Colour");
  button.addEventListener("click", () => {
    button.remove();
    colour(root, token);
  });
  root.querySelector(".copy-code").before(button);
}

async function colour(root, token) {
  if (current.get(root) !== token || !(await hasLanguage(fileOf(token)))) return;
  const code = root.querySelector("code");
  if (current.get(root) !== token) return; // it changed meanwhile
  const selection = document.getSelection();
  if (selection && !selection.isCollapsed && selection.containsNode(code, true)) return void setTimeout(() => colour(root, token), RETRY_MS);
  const { value } = library.highlight(token.text, { language: fileOf(token), ignoreIllegals: true });
  const nodes = colouredNodes(value);
  if (nodes.textContent !== token.text) return;
  coloured.add(root);
  code.replaceChildren(nodes);
}

let library = null;
const languages = new Map(); // file -> Promise: whether it is there

function hasLanguage(file) {
  if (!languages.has(file)) languages.set(file, load(file));
  return languages.get(file);
}

async function load(file) {
  try {
    const folder = "../vendor/highlight-11.12.0/";
    const [core, grammar] = await Promise.all([import("../vendor/highlight-11.12.0/core.js"), import(`${folder}${file}.js`)]);
    library = core.default;
    library.registerLanguage(file, grammar.default);
    return true;
  } catch (error) {
    languages.delete(file); // the server may be back for the next block
    console.debug("code stays without colours:", error);
    return false;
  }
}

const CHARACTERS = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#x27;": "'" };
const PIECES = /<span class="([\w -]+)">|<\/span>|[^<]+/g;

/** The library's markup, which is <span class>, its end and five entities, as nodes. */
function colouredNodes(markup) {
  const all = document.createDocumentFragment();
  const open = [all];
  for (const [piece, className] of markup.matchAll(PIECES)) {
    if (className) {
      const span = make("span", { class: className });
      open.at(-1).append(span);
      open.push(span);
    } else if (piece === "</span>") {
      open.pop();
    } else {
      open.at(-1).append(...nodesOf(piece.replace(/&(?:amp|lt|gt|quot|#x27);/g, (name) => CHARACTERS[name])));
    }
  }
  return all;
}
