/**
 * The colours of a complete block of code, by highlight.js, which is loaded with the first block of a language that it knows.
 *
 * Owns which languages those are. The block itself is that of render-code.js.
 */

import { h, nodesOf } from "../ui/dom.js";

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

/**
 * Colours the block; a long one only when its reader asks for it. `isCurrent()` tells whether the block still shows this token,
 * `put(nodes)` has nodes in the place of its lines.
 */
export function complete(root, token, isCurrent, put) {
  if (!fileOf(token) || token.text.length > MAX_ASKED) return;
  if (token.text.length <= MAX_COLOURED) return void colour(root, token, isCurrent, put);
  const press = () => {
    button.remove();
    colour(root, token, isCurrent, put);
  };
  const button = h("button", { type: "button", class: "copy-code colour-code", onclick: press }, "Colour");
  root.querySelector(".copy-code").before(button);
}

async function colour(root, token, isCurrent, put) {
  if (!(await hasLanguage(fileOf(token)))) return;
  const code = root.querySelector("code");
  if (!isCurrent()) return; // it changed meanwhile
  const selection = document.getSelection();
  if (selection && !selection.isCollapsed && selection.containsNode(code, true)) return void setTimeout(() => isCurrent() && colour(root, token, isCurrent, put), RETRY_MS);
  const { value } = library.highlight(token.text, { language: fileOf(token), ignoreIllegals: true });
  const nodes = colouredNodes(value);
  if (nodes.textContent === token.text) put(nodes);
}

let library = null;
const languages = new Map(); // file -> Promise: whether it is there

function hasLanguage(file) {
  if (!languages.has(file)) languages.set(file, load(file));
  return languages.get(file);
}

async function load(file) {
  try {
    const folder = "../../vendor/highlight-11.12.0/";
    const [core, grammar] = await Promise.all([import("../../vendor/highlight-11.12.0/core.js"), import(`${folder}${file}.js`)]);
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
      const span = h("span", { class: className });
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
