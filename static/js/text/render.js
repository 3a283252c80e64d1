/**
 * A growing Markdown text in the page: tokens to nodes, and cheap while the text still grows.
 *
 * While an answer streams, only its tail is lexed again: a block is finished once two blocks follow it, because a line that
 * is still growing can join the block before it ("-" may become a list item) but none further up. The tail's new tokens are
 * compared with its old ones and only the differences touch the page, so nodes, selection and scroll position stay. Once the
 * text is complete it is lexed as a whole, so what a reader ends up with does not depend on how the text arrived.
 *
 * Owns which nodes are touched when. Knows nothing of Markdown (markdown.js), of colours or of formulas.
 */

import { h } from "../ui/dom.js";
import { lex } from "./markdown.js";
import { buildCode, updateCode } from "./render-code.js";
import { buildMath, updateMath } from "./render-math.js";

const NUM_UNFINISHED = 2; // blocks at the end that more text may still change
const SLOW_MS = 8; // what one text may take of a frame; one that takes longer is drawn less often
const REST = 4; // as many times the time of a slow drawing passes before the next
const MAX_REST_MS = 250;

const KINDS = { code: [buildCode, updateCode], math: [buildMath, updateMath] };

/** The node that shows a token. */
function build(token) {
  if (typeof token === "string") return document.createTextNode(token);
  if (token.kind) return KINDS[token.kind][0](token);
  return h(token.tag, token.attributes, ...token.children.map(build));
}

const sameAttributes = (a, b) => {
  const names = Object.keys(a);
  return names.length === Object.keys(b).length && names.every((name) => a[name] === b[name]);
};

/** Makes the children of `parent` from `first` on, which show `was`, show `now`; touches only what differs. */
function patch(parent, first, was, now) {
  const nodes = [...parent.childNodes].slice(first, first + was.length); // a list by index is slow where nodes come and go
  for (let k = 0; k < now.length; k += 1) {
    if (k >= was.length) parent.insertBefore(build(now[k]), parent.childNodes[first + k] ?? null);
    else if (was[k] !== now[k] && !patchNode(nodes[k], was[k], now[k])) parent.replaceChild(build(now[k]), nodes[k]);
  }
  for (const node of nodes.slice(now.length)) node.remove();
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
  if (was.kind || now.kind) return was.kind === now.kind && KINDS[now.kind][1](node, was, now);
  if (was.tag !== now.tag || !sameAttributes(was.attributes, now.attributes)) return false;
  patch(node, 0, was.children, now.children);
  return true;
}

/** A growing Markdown text inside `root`, which must be empty and belongs to this object from now on. */
export class MarkdownView {
  #root;
  #text = "";
  #held = ""; // half of a character or of a line's end, until the other half comes
  #tailAt = 0; // where in the text the blocks begin that may still change
  #links = Object.create(null); // definitions in finished blocks
  #finished = []; // tokens of finished blocks
  #shown = []; // tokens of the tail, as they stand in the page
  #notBefore = 0;
  #timer = 0;

  constructor(root) {
    this.#root = root;
  }

  append(text) {
    this.#take(text, false);
    const wait = this.#notBefore - performance.now();
    if (wait <= 0) this.#drawTail();
    else this.#timer ||= setTimeout(() => this.#drawTail(), wait);
  }

  /** The text is complete with this: nothing is open any more. */
  finish(text = "") {
    this.#take(text, true);
    clearTimeout(this.#timer);
    const now = shownOf(lex(this.#text));
    patch(this.#root, 0, [...this.#finished, ...this.#shown], now);
    this.#finished = [];
    this.#shown = now;
    this.#tailAt = 0;
  }

  #take(text, isLast) {
    const all = this.#held + text;
    const whole = isLast || !/[\r\ud800-\udbff]$/.test(all) ? all.length : all.length - 1;
    this.#held = all.slice(whole);
    this.#text += all.slice(0, whole).replace(/\r\n?/g, "\n");
  }

  #drawTail() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const started = performance.now();
    const blocks = lex(this.#text.slice(this.#tailAt), true, this.#links);
    const shown = blocks.filter(({ token }) => token);
    patch(this.#root, this.#finished.length, this.#shown, shownOf(blocks));
    this.#shown = shownOf(blocks);
    if (shown.length > NUM_UNFINISHED) this.#finishUpTo(shown.at(-NUM_UNFINISHED - 1), blocks);
    const took = performance.now() - started;
    this.#notBefore = took > SLOW_MS ? performance.now() + Math.min(REST * took, MAX_REST_MS) : 0;
  }

  #finishUpTo(last, blocks) {
    for (const block of blocks.slice(0, blocks.indexOf(last) + 1)) {
      for (const { tag, href, title } of block.links) this.#links[tag] ??= { href, title };
      if (block.token) this.#finished.push(this.#shown.shift());
    }
    this.#tailAt += last.end;
  }
}

const shownOf = (blocks) => blocks.map(({ token }) => token).filter(Boolean);
