/**
 * Markdown to tokens that a page may show, safe for text that nobody checked.
 *
 * marked's lexer finds the structure; this file decides what may come of it. A token is a string (a text node),
 * {tag, attributes, children} with only the tags and attributes written below, {kind: "code", …} or {kind: "math", …}. Raw
 * HTML is text, pictures are links, links are http, https or mailto. Knows nothing of nodes or of how a text grows.
 */

import { Lexer, Tokenizer } from "../../vendor/marked-18.2.1.js";
import { visible } from "../ui/visible.js";
import { beforeMath, masked, mathBlock, mathBlockIn, mathInline } from "./markdown-math.js";
import { healed, healedInline } from "./markdown-open.js";

const MAX_DEPTH = 8; // nested quotes and lists; deeper is shown as it is written
const MAX_INLINE_DEPTH = 12; // emphasis and links in each other
const MAX_INLINE = 10_000; // characters of one paragraph that are searched for marks; longer ones are plain text
const MAX_LINE = 20_000; // characters of a line; one that is longer is a block of plain text
const OVERLONG_LINE = new RegExp(`^.{${MAX_LINE},}$`, "gm");
const MAX_URL = 2_048;

const NAMED = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", ndash: "–", mdash: "—", hellip: "…", times: "×", deg: "°", copy: "©" };
const ENTITY = new RegExp(`&(${Object.keys(NAMED).join("|")});`, "g");
const CLOSED_FENCE = /\n[ \t]*(?:`{3,}|~{3,})[ \t]*\n*$/;
const ALIGNED = { center: { class: "middle" }, right: { class: "end" } };

const element = (tag, attributes, children) => ({ tag, attributes, children });

// ------------------------------------------------------------------------------------------------------------- structure

/** marked's rules, less HTML (whose tags are text here), with formulas, and with bounds on nesting. */
class Rules extends Tokenizer {
  #depth = 0;
  #inlineDepth = 0;
  isOpen = false;

  #nested(rule, src) {
    if (this.#depth >= MAX_DEPTH) return undefined;
    this.#depth += 1;
    try {
      return rule.call(this, src);
    } finally {
      this.#depth -= 1;
    }
  }

  #nestedInline(rule, ...given) {
    if (this.#inlineDepth >= MAX_INLINE_DEPTH) return undefined;
    this.#inlineDepth += 1;
    try {
      return rule.apply(this, given);
    } finally {
      this.#inlineDepth -= 1;
    }
  }

  blockquote(src) {
    return this.#nested(super.blockquote, src);
  }

  list(src) {
    return this.#nested(super.list, src);
  }

  html() {
    return undefined;
  }

  paragraph(src) {
    const found = this.rules.block.paragraph.exec(src);
    if (!found) return undefined;
    const end = mathBlockIn(found[0], src, this.isOpen);
    return super.paragraph(src.slice(0, end < 0 ? found[0].length : end));
  }

  tag(src) {
    const found = src[0] === "<" && this.rules.inline.tag.exec(src);
    return found ? { type: "html", raw: found[0], text: found[0] } : undefined;
  }

  link(src) {
    return this.#nestedInline(super.link, src);
  }

  reflink(src, links) {
    return this.#nestedInline(super.reflink, src, links);
  }

  emStrong(...given) {
    return this.#nestedInline(super.emStrong, ...given);
  }

  del(...given) {
    return this.#nestedInline(super.del, ...given);
  }

  inlineText(src) {
    return super.inlineText(src.slice(0, beforeMath(src)));
  }
}

/** marked's tokens of a text without overlong lines. Definitions of links are read from and added to `links`. */
function structure(text, links, isOpen) {
  const tokenizer = new Rules();
  tokenizer.isOpen = isOpen;
  const extensions = { block: [(src) => mathBlock(src, isOpen)], inline: [(src) => mathInline(src, isOpen)], childTokens: {}, renderers: {} };
  const lexer = new Lexer({ gfm: true, tokenizer, extensions, hooks: { emStrongMask: masked } });
  lexer.tokens.links = links;
  lexer.blockTokens(text, lexer.tokens);
  const last = lexer.inlineQueue.length - 1;
  lexer.inlineQueue.forEach(({ src, tokens }, k) => {
    const isGrowing = isOpen && k === last && text.trimEnd().endsWith(src.trimEnd());
    if (src.length > MAX_INLINE) tokens.push({ type: "text", text: src });
    else lexer.inlineTokens(isGrowing ? healedInline(src) : src, tokens);
  });
  return lexer.tokens;
}

/**
 * All blocks of a text, as [{token, end, links}]: `end` is the index behind it, `token` null where there is nothing to show,
 * `links` the definitions of links in it. `known` are definitions from elsewhere. `isOpen`: more text may follow, so that marks still
 * open are shown as what they are likely to become.
 */
export function lex(text, isOpen = false, known = {}) {
  const links = Object.assign(Object.create(null), known);
  const blocks = [];
  let from = 0;
  for (const { index, 0: line } of text.matchAll(OVERLONG_LINE)) {
    lexPart(text.slice(from, index), false, links, from, blocks);
    from = index + line.length;
    blocks.push({ token: element("p", {}, visible(line)), end: from, links: [] });
  }
  lexPart(text.slice(from), isOpen, links, from, blocks);
  return blocks;
}

function lexPart(text, isOpen, links, offset, blocks) {
  const source = isOpen ? healed(text) : text;
  let tokens;
  try {
    tokens = structure(source, links, isOpen);
  } catch (error) {
    console.debug("shown as plain text:", error); // a text that the lexer cannot digest
    tokens = [{ type: "paragraph", raw: text, tokens: [{ type: "text", text }] }];
  }
  let end = offset;
  for (const token of tokens) {
    end += token.raw.length;
    blocks.push({ token: BLOCKS[token.type]?.(token, isOpen && token === tokens.at(-1)) ?? null, end, links: token.type === "def" ? [token] : [] });
  }
}

// ---------------------------------------------------------------------------------------------------------------- blocks

const BLOCKS = {
  paragraph: ({ tokens }) => element("p", {}, inline(tokens)),
  text: ({ tokens, text }) => element("p", {}, tokens ? inline(tokens) : visible(text)),
  heading: ({ depth, tokens }) => element(`h${Math.min(depth + 2, 6)}`, {}, inline(tokens)),
  hr: () => element("hr", {}, []),
  blockquote: ({ tokens }, isLast) => element("blockquote", {}, blocksOf(tokens, isLast)),
  code,
  list,
  table,
  math: ({ source, isComplete }) => ({ kind: "math", source, isBlock: true, isComplete }),
};

function blocksOf(tokens, isLast) {
  return tokens.map((token, k) => BLOCKS[token.type]?.(token, isLast && k === tokens.length - 1)).filter(Boolean);
}

function code({ lang, text, raw, codeBlockStyle }, isLast) {
  const language = (lang ?? "").trim().split(/\s/)[0].slice(0, 40);
  const isComplete = !isLast || (codeBlockStyle !== "indented" && CLOSED_FENCE.test(raw));
  return { kind: "code", language, text, isComplete };
}

function list({ ordered, start, items }, isLast) {
  const attributes = ordered && start !== 1 ? { start: String(start) } : {};
  const entries = items.map((item, k) => listItem(item, isLast && k === items.length - 1));
  return element(ordered ? "ol" : "ul", attributes, entries);
}

/** Text of a tight item stands beside its marker, without the space of a paragraph. */
function listItem({ tokens, task }, isLast) {
  const children = [];
  tokens.forEach((token, k) => {
    if (token.type === "checkbox") children.push(checkbox(token), " ");
    else if (token.type === "text") children.push(...inline(token.tokens ?? [token]));
    else children.push(...blocksOf([token], isLast && k === tokens.length - 1));
  });
  return element("li", task ? { class: "task" } : {}, joined(children));
}

function checkbox({ checked }) {
  return element("span", { class: "checkbox", role: "img", "aria-label": checked ? "Done" : "To do" }, [checked ? "☑" : "☐"]);
}

function table({ header, rows, align }) {
  const row = (tag, cells) => element("tr", {}, cells.map((cell, k) => element(tag, ALIGNED[align[k]] ?? {}, inline(cell.tokens))));
  const head = element("thead", {}, [row("th", header)]);
  const body = element("tbody", {}, rows.map((cells) => row("td", cells)));
  return element("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, [element("table", {}, [head, body])]);
}

// ---------------------------------------------------------------------------------------------------------------- inline

const INLINE = {
  text: ({ text, tokens }) => (tokens ? inline(tokens) : visible(decoded(text))),
  escape: ({ text }) => [text],
  html: ({ raw }) => (/^<br *\/?>$/i.test(raw) ? [element("br", {}, [])] : visible(raw)),
  strong: ({ tokens }) => [element("strong", {}, inline(tokens))],
  em: ({ tokens }) => [element("em", {}, inline(tokens))],
  del: ({ tokens }) => [element("del", {}, inline(tokens))],
  codespan: ({ text }) => [element("code", {}, visible(text))],
  br: () => [element("br", {}, [])],
  checkbox: (token) => [checkbox(token), " "],
  math: ({ source, isBlock, isComplete }) => [{ kind: "math", source, isBlock, isComplete }],
  link,
  image,
};

function inline(tokens) {
  return joined(tokens.flatMap((token) => INLINE[token.type]?.(token) ?? visible(token.raw)));
}

/** Neighbouring strings as one: a text is one node, however the lexer came to it. */
function joined(tokens) {
  const all = [];
  for (const token of tokens) {
    if (typeof token === "string" && typeof all.at(-1) === "string") all[all.length - 1] += token;
    else if (token !== "") all.push(token);
  }
  return all;
}

const decoded = (text) => (text.includes("&") ? text.replace(ENTITY, (_, name) => NAMED[name]) : text);

function link({ href, text, tokens, raw }) {
  const url = safeUrl(href);
  return url ? [anchor(url, inline(tokens).map(unlinked), text)] : visible(raw);
}

/** A token without links in it: a link holds none, and a picture, which is one here, becomes words in it. */
function unlinked(token) {
  if (!token.children) return token;
  const children = token.children.map(unlinked);
  return token.tag === "a" ? element("span", { class: "picture-link" }, children) : { ...token, children };
}

/** No picture of an answer is ever fetched: its address could carry a secret away. */
function image({ href, text, raw }) {
  const url = safeUrl(href);
  return url ? [anchor(url, visible(`Image: ${text || "untitled"}`), "", "picture-link")] : visible(raw);
}

/** A link that always shows where it goes: the host stands behind a label that is not that address itself. */
function anchor(url, children, label, className) {
  const place = url.host || url.pathname;
  const isSaid = !url.username && (hostOf(label) === place || label === place);
  const shown = isSaid ? children : [...children, element("span", { class: "host" }, [`(${place})`])];
  const attributes = { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" };
  return element("a", className ? { ...attributes, class: className } : attributes, shown.length ? shown : [url.href]);
}

const hostOf = (label) => (/^https?:\/\//i.test(label) && URL.canParse(label) ? new URL(label).host : "");

/** The address if it is absolute and of a harmless kind, else null. */
function safeUrl(href) {
  if (href.length > MAX_URL || !/^(?:https?:\/\/|mailto:)/i.test(href) || !URL.canParse(href)) return null;
  return new URL(href);
}
