/**
 * Markdown to DOM, safe for text that nobody checked, and cheap while the text still grows.
 *
 * Text -> tokens -> nodes. A token is a string (a text node) or {tag, attributes, children}; only the tags and attributes
 * written in this file can appear. Raw HTML is text, images are links, links are http, https or mailto.
 *
 * While an answer streams, only its tail is lexed again: a block is finished once two blocks follow it, because a line that
 * is still growing can join the block before it ("-" may become a list item) but none further up. The tail's new tokens are
 * compared with its old ones and only the differences touch the page, so nodes, selection and scroll position stay.
 */

const MAX_DEPTH = 8; // nested quotes and lists; deeper is shown as it is written
const MAX_INLINE = 20_000; // characters of one paragraph that are searched for marks; longer ones are plain text
const MAX_URL = 2_048;

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=\s|$)/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const DELIMITER_CELL = /^\s*:?-+:?\s*$/;

const element = (tag, attributes, children) => ({ tag, attributes, children });
const isBlank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;

// ---------------------------------------------------------------------------------------------------------------- blocks

/**
 * All blocks of a text: `tokens`, and in `starts` the index of the first character of each. `isOpen`: more text may follow,
 * so the last paragraph is shown as what it is likely to become.
 */
export function lex(text, isOpen = false) {
  const lines = text.split("\n");
  const blocks = lexLines(lines, 0, isOpen);
  const offsets = [0];
  for (const line of lines) offsets.push(offsets[offsets.length - 1] + line.length + 1);
  return { tokens: blocks.map((block) => block.token), starts: blocks.map((block) => offsets[block.line]) };
}

function lexLines(lines, depth, isOpen) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [token, next] = lexBlock(lines, at, depth, isOpen);
    blocks.push({ token, line: at });
    at = next;
  }
  return blocks;
}

/** The block that starts at line `at`, and the line after it. */
function lexBlock(lines, at, depth, isOpen) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return lexFence(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const title = line.slice(heading[0].length).trim().replace(/(^|\s)#+$/, "");
    return [element(`h${Math.min(heading[1].length + 2, 6)}`, {}, lexInline(title, isOpen && at + 1 === lines.length)), at + 1];
  }
  if (RULE.test(line)) return [element("hr", {}, []), at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return lexQuote(lines, at, depth, isOpen);
  if (depth < MAX_DEPTH && isItem(line)) return lexList(lines, at, depth, isOpen);
  if (isTable(lines, at)) return lexTable(lines, at);
  return lexParagraph(lines, at, isOpen);
}

function lexFence(lines, at, [, marks, info]) {
  const closes = (line) => line.trim().startsWith(marks) && line.trim() === marks[0].repeat(line.trim().length);
  const indent = Math.min(indentOf(lines[at]), 3);
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end += 1;
  const body = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line))));
  const language = info.trim().split(/\s/)[0].slice(0, 40);
  const head = element("div", { class: "code-head" }, [
    element("span", {}, [language || "text"]),
    element("button", { type: "button", class: "copy-code", "aria-label": "Copy code" }, ["Copy"]),
  ]);
  const code = element("pre", { tabindex: "0" }, [element("code", {}, body.length ? [body.join("\n")] : [])]);
  return [element("div", { class: "code" }, [head, code]), end + 1];
}

function lexQuote(lines, at, depth, isOpen) {
  let end = at;
  const inner = [];
  while (end < lines.length && !isBlank(lines[end]) && (QUOTE.test(lines[end]) || !interrupts(lines[end]))) {
    inner.push(lines[end].replace(QUOTE, ""));
    end += 1;
  }
  const children = lexLines(inner, depth + 1, isOpen && end === lines.length).map((block) => block.token);
  return [element("blockquote", {}, children), end];
}

const isItem = (line) => ITEM.test(line) && indentOf(line) < 4 && !RULE.test(line);
const isOrdered = (line) => /\d/.test(ITEM.exec(line)[2]);

function lexList(lines, at, depth, isOpen) {
  const ordered = isOrdered(lines[at]);
  const items = [];
  let next = at;
  while (next < lines.length) {
    let start = next;
    while (start < lines.length && isBlank(lines[start])) start += 1;
    if (start === lines.length || !isItem(lines[start]) || isOrdered(lines[start]) !== ordered) break;
    const [inner, end] = itemLines(lines, start);
    const blocks = lexLines(inner, depth + 1, isOpen && end === lines.length).map((block) => block.token);
    // The first paragraph of an item stands beside its marker, without the space of a paragraph.
    const children = blocks[0]?.tag === "p" ? [...blocks[0].children, ...blocks.slice(1)] : blocks;
    items.push(element("li", {}, children));
    next = end;
  }
  const first = parseInt(ITEM.exec(lines[at])[2], 10);
  const attributes = ordered && first !== 1 ? { start: String(first) } : {};
  return [element(ordered ? "ol" : "ul", attributes, items), next];
}

/** The lines of the item at `start` without its indentation, and the line after it. */
function itemLines(lines, start) {
  const [, indent, marker, gap] = ITEM.exec(lines[start]);
  const width = indent.length + marker.length + (gap.length > 4 ? 1 : Math.max(gap.length, 1));
  const enough = Math.min(width, indent.length + 2); // models often indent by two under "10."
  const inner = [lines[start].slice(width)];
  let end = start + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (isBlank(line)) inner.push("");
    else if (indentOf(line) >= enough) inner.push(line.slice(Math.min(width, indentOf(line))));
    else if (inner[inner.length - 1] !== "" && !interrupts(line) && !isItem(line)) inner.push(line.trimStart());
    else break;
  }
  return [inner, end];
}

function cellsOf(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|");
}

function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return false;
  const delimiters = cellsOf(lines[at + 1]);
  return delimiters.every((cell) => DELIMITER_CELL.test(cell)) && delimiters.length === cellsOf(lines[at]).length;
}

function lexTable(lines, at) {
  const align = cellsOf(lines[at + 1]).map((cell) => {
    const [left, right] = [cell.trim().startsWith(":"), cell.trim().endsWith(":")];
    return left && right ? { class: "middle" } : right ? { class: "end" } : {};
  });
  const row = (tag, line) => {
    const cells = cellsOf(line);
    return element("tr", {}, align.map((attributes, k) => element(tag, attributes, lexInline((cells[k] ?? "").trim()))));
  };
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const head = element("thead", {}, [row("th", lines[at])]);
  const body = element("tbody", {}, lines.slice(at + 2, end).map((line) => row("td", line)));
  return [element("div", { class: "table", tabindex: "0" }, [element("table", {}, [head, body])]), end];
}

function lexParagraph(lines, at, isOpen) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines[end]) && !isTable(lines, end)) end += 1;
  return [element("p", {}, lexInline(lines.slice(at, end).join("\n").trim(), isOpen && end === lines.length)), end];
}

/** Whether this line ends a paragraph without a blank line between. A numbered item does only if it says 1. */
function interrupts(line) {
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const item = isItem(line) && ITEM.exec(line);
  return Boolean(item) && item[3] !== "" && (!isOrdered(line) || parseInt(item[2], 10) === 1);
}

// ---------------------------------------------------------------------------------------------------------------- inline

const WORD = /[\p{L}\p{N}_]/u;
const ESCAPED = /[\\`*_~#|<>!]/;
const LINK = /!?\[([^[\]]*)\]\(\s*<?((?:[^\s<>()]|\([^\s<>()]*\))*)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
const BARE_URL = /https?:\/\/[^\s<>"'`|]+/y;
const PLAIN = /[^\\`*_~[!h]+/y;
const WRAPS = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };

/** Marks of one paragraph as tokens. With `isOpen` (the text still grows) an open ** is already shown as bold. */
export function lexInline(text, isOpen = false) {
  if (text.length > MAX_INLINE) return [text];
  return new Inline(text).run(isOpen);
}

/** One pass over a paragraph. Open emphasis is a stack of frames; each holds what stands between it and the next. */
class Inline {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.frames = [{ mark: "", children: [] }];
    this.fences = null; // backtick runs by length, in order: found once, so that many open ones cost nothing
  }

  run(isOpen) {
    while (this.at < this.text.length) this.step();
    while (this.frames.length > 1) this.giveUp(isOpen);
    return this.frames[0].children;
  }

  step() {
    const { text, at } = this;
    PLAIN.lastIndex = at;
    const plain = PLAIN.exec(text);
    if (plain) return this.take(plain[0].length, plain[0]);
    const char = text[at];
    if (char === "\\" && ESCAPED.test(text[at + 1] ?? "")) return this.take(2, text[at + 1]);
    if (char === "`") return this.code();
    if (char === "*" || char === "_" || char === "~") return this.emphasis(char);
    if (char === "[" || (char === "!" && text[at + 1] === "[")) return this.link();
    if (char === "h" && !WORD.test(text[at - 1] ?? " ")) return this.bareUrl();
    return this.take(1, char);
  }

  /** Moves on by `length` characters, which read as `token`. */
  take(length, token) {
    this.at += length;
    push(this.frames[this.frames.length - 1].children, token);
  }

  code() {
    if (!this.fences) {
      this.fences = new Map();
      for (const run of this.text.matchAll(/`+/g)) {
        if (!this.fences.has(run[0].length)) this.fences.set(run[0].length, []);
        this.fences.get(run[0].length).push(run.index);
      }
    }
    const length = runLength(this.text, this.at);
    const starts = this.fences.get(length) ?? []; // an escaped backtick can leave a run that is not listed
    while (starts.length && starts[0] <= this.at) starts.shift();
    if (!starts.length) return this.take(length, "`".repeat(length));
    const inside = this.text.slice(this.at + length, starts[0]).replaceAll("\n", " ");
    const padded = inside.startsWith(" ") && inside.endsWith(" ") && inside.trim() !== "";
    this.take(starts[0] + length - this.at, element("code", {}, [padded ? inside.slice(1, -1) : inside]));
  }

  emphasis(char) {
    const { text, at } = this;
    const length = runLength(text, at);
    const [before, after] = [text[at - 1] ?? " ", text[at + length] ?? " "];
    const inWord = char === "_" && WORD.test(before) && WORD.test(after);
    const canOpen = /\S/.test(after) && !inWord && !(char === "_" && WORD.test(before));
    const canClose = /\S/.test(before) && !inWord && !(char === "_" && WORD.test(after));
    this.at += length;
    let left = length;
    while (canClose && left > 0 && this.frames.some((frame) => frame.mark[0] === char)) {
      while (this.frames[this.frames.length - 1].mark[0] !== char) this.giveUp(false);
      const used = this.close(char, left);
      if (used === 0) break;
      left -= used;
    }
    if (left === 0) return;
    if (canOpen && (char !== "~" || left === 2)) this.frames.push({ mark: char.repeat(left), children: [] });
    else this.take(0, char.repeat(left));
  }

  /** Ends the innermost frame with up to two marks; returns how many it used. */
  close(char, num_marks) {
    const frame = this.frames[this.frames.length - 1];
    const used = Math.min(frame.mark.length, num_marks, 2);
    const tag = WRAPS[char.repeat(used)];
    if (!tag || !frame.children.length) return 0;
    const wrapped = element(tag, {}, frame.children);
    frame.mark = frame.mark.slice(used);
    frame.children = [wrapped];
    if (!frame.mark) {
      this.frames.pop();
      this.take(0, wrapped);
    }
    return used;
  }

  /** The innermost open mark never closes: it was text after all, or is bold while more text is awaited. */
  giveUp(isOpen) {
    const { mark, children } = this.frames.pop();
    if (isOpen && WRAPS[mark] === "strong" && children.length) return this.take(0, element("strong", {}, children));
    if (mark) this.take(0, mark);
    for (const child of children) this.take(0, child);
  }

  link() {
    LINK.lastIndex = this.at;
    const found = LINK.exec(this.text);
    const href = found && safeUrl(found[2]);
    if (!href) return this.take(1, this.text[this.at]);
    const isImage = found[0].startsWith("!");
    const label = isImage ? [`Image: ${found[1] || "untitled"}`] : lexInline(found[1]);
    this.take(found[0].length, anchor(href, label.length ? label : [href], found[1]));
  }

  bareUrl() {
    BARE_URL.lastIndex = this.at;
    const found = BARE_URL.exec(this.text);
    if (!found) return this.take(1, "h");
    const url = found[0].replace(/[.,;:!?)\]*_~]+$/, "");
    const href = safeUrl(url);
    this.take(url.length, href ? anchor(href, [url], url) : url);
  }
}

/** A link that always shows where it goes: the host stands behind a label that does not name it. */
function anchor(href, children, label) {
  const host = new URL(href).host;
  const shown = host && !label.includes(host) ? [...children, element("span", { class: "host" }, [`(${host})`])] : children;
  return element("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, shown);
}

/** The address if it is absolute and of a harmless kind, else null. */
function safeUrl(text) {
  if (text.length > MAX_URL || !/^(https?:\/\/|mailto:)/i.test(text) || !URL.canParse(text)) return null;
  return new URL(text).href;
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function push(tokens, token) {
  const last = tokens.length - 1;
  if (typeof token === "string" && typeof tokens[last] === "string") tokens[last] += token;
  else tokens.push(token);
}

// ----------------------------------------------------------------------------------------------------------------- nodes

function build(token) {
  if (typeof token === "string") return document.createTextNode(token);
  const node = document.createElement(token.tag);
  for (const [name, value] of Object.entries(token.attributes)) node.setAttribute(name, value);
  node.append(...token.children.map(build));
  return node;
}

const sameAttributes = (a, b) => {
  const names = Object.keys(a);
  return names.length === Object.keys(b).length && names.every((name) => a[name] === b[name]);
};

/** Makes the children of `parent` from `first` on, which show `was`, show `now`; touches only what differs. */
function patch(parent, first, was, now) {
  for (let k = 0; k < now.length; k += 1) {
    const node = parent.childNodes[first + k];
    if (k >= was.length) parent.insertBefore(build(now[k]), node ?? null);
    else if (!patchNode(node, was[k], now[k])) parent.replaceChild(build(now[k]), node);
  }
  for (let k = was.length; k > now.length; k -= 1) parent.removeChild(parent.childNodes[first + now.length]);
}

/** Updates one node in place; false when it has to be replaced. */
function patchNode(node, was, now) {
  if (typeof was === "string" || typeof now === "string") {
    if (typeof was !== typeof now) return false;
    if (now.startsWith(was)) {
      if (now.length > was.length) node.appendData(now.slice(was.length));
    } else {
      node.data = now;
    }
    return true;
  }
  if (was.tag !== now.tag || !sameAttributes(was.attributes, now.attributes)) return false;
  patch(node, 0, was.children, now.children);
  return true;
}

/** A growing Markdown text inside `root`, which must be empty and belongs to this object from now on. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.tail = ""; // text of the blocks that may still change
    this.shown = []; // their tokens as they stand in the page
    this.numFinished = 0;
  }

  append(text) {
    this.tail += text;
    this.#show(lex(this.tail, true), 2);
  }

  /** The text is complete: nothing is open any more. */
  finish() {
    this.#show(lex(this.tail, false), 0);
  }

  #show({ tokens, starts }, numUnfinished) {
    patch(this.root, this.numFinished, this.shown, tokens);
    const finished = Math.max(tokens.length - numUnfinished, 0);
    this.numFinished += finished;
    this.shown = tokens.slice(finished);
    if (finished < tokens.length) this.tail = this.tail.slice(starts[finished]); // blank so far: keep, it may be indentation
  }
}
