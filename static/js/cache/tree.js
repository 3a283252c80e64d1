/**
 * The prefix tree on screen, as WAI-ARIA's tree: one row a node, a bar as long as its tokens, what holds it.
 *
 * Rows keep their elements while their nodes live, so that focus, selection and scroll position stay where they are when the tree
 * changes. Owns these elements, and the keys. Knows the nodes of nodes.js and nothing of the server.
 */

import { h, icon, nodesOf } from "../ui/dom.js";
import { count, plural } from "../ui/numbers.js";
import { PAGE, ROOT } from "./nodes.js";
import { ageOf, oneLine } from "./words.js";

const FLASH_MS = 1_400;
const TYPED_MS = 700; // letters typed so fast are one word

/** One row, of a node or of "show more". */
class Row {
  constructor(id) {
    this.id = id;
    this.text = h("span", { class: "node-text", dir: "auto" });
    this.badges = h("span", { class: "badges" });
    this.bar = h("span", { class: "node-bar", "aria-hidden": "true" }, h("span"));
    this.figures = h("span", { class: "node-figures" });
    this.twisty = h("span", { class: "twisty", "aria-hidden": "true" }, icon("right"));
    this.line = h("div", { class: "node-row" }, this.twisty, h("div", { class: "node-words" }, h("div", {}, this.text, this.badges), h("div", {}, this.bar, this.figures)));
    this.group = h("ul", { role: "group" });
    this.element = h("li", { role: "treeitem", tabindex: "-1", "data-node": id, "aria-selected": "false" }, this.line);
    this.before = null; // the node as it was drawn last
  }
}

export class CacheTree extends EventTarget {
  #rows = new Map(); // id, or "more-" + id -> Row
  #active = null; // key of the row that Tab goes to
  #typed = "";
  #typedAt = 0;
  #isFirst = true;

  /** Events: "select" and "toggle" with a node's id as `detail`, "more" with that of a parent. */
  constructor(model) {
    super();
    this.model = model;
    this.selected = null;
    this.lit = new Set();
    this.element = h("ul", { class: "cache-tree", role: "tree", "aria-label": "Prefix tree" });
    this.element.addEventListener("keydown", (event) => this.#pressed(event));
    this.element.addEventListener("click", (event) => this.#clicked(event));
    this.element.addEventListener("dblclick", (event) => this.#tell("toggle", this.#keyAt(event.target)));
    this.element.addEventListener("focusin", (event) => this.#activate(this.#keyAt(event.target)));
  }

  /** Whether the keyboard stands here. */
  holdsFocus(id) {
    return document.activeElement?.dataset.node === String(id) && this.element.contains(document.activeElement);
  }

  draw() {
    const focused = this.element.contains(document.activeElement) ? this.#keyAt(document.activeElement) : null;
    const visibleBefore = focused === null ? [] : this.#visibleKeys();
    const used = new Set();
    this.widest = Math.max(1, ...[...this.model.nodes.values()].map(({ num_tokens }) => num_tokens ?? 0));
    this.#drawChildren(this.element, ROOT, 1, used);
    for (const key of this.#rows.keys()) if (!used.has(key)) this.#rows.delete(key);
    if (!this.#rows.has(this.#active)) this.#active = this.#visibleKeys()[0] ?? null;
    if (focused !== null) this.#keepFocus(focused, visibleBefore);
    for (const [key, { element }] of this.#rows) element.tabIndex = key === this.#active ? 0 : -1;
    this.#isFirst = false;
  }

  /** Ages grow without news. */
  drawAges() {
    for (const row of this.#rows.values()) if (row.before) this.#drawFigures(row, row.before);
  }

  /** Brings a node's row into sight, without the focus. */
  reveal(id) {
    this.#rows.get(id)?.line.scrollIntoView({ block: "nearest" });
  }

  #drawChildren(list, parent, level, used) {
    const children = this.model.childrenOf(parent);
    const wanted = this.model.wantedOf(parent);
    const shown = children.slice(0, wanted);
    const total = this.model.nodes.get(parent).num_children;
    const elements = shown.map((node, k) => this.#drawNode(node, level, k + 1, Math.max(total, shown.length), used));
    if (total > shown.length) elements.push(this.#drawMore(parent, total - shown.length, level, used));
    arrange(list, elements);
  }

  #row(key) {
    if (!this.#rows.has(key)) this.#rows.set(key, new Row(key));
    return this.#rows.get(key);
  }

  #drawNode(node, level, place, total, used) {
    used.add(node.id);
    const row = this.#row(node.id);
    const { element, line } = row;
    const isOpen = Boolean(node.num_children) && this.model.isOpen(node.id);
    set(element, { "aria-level": level, "aria-posinset": place, "aria-setsize": total, "aria-expanded": node.num_children ? isOpen : null });
    set(element, { "aria-selected": node.id === this.selected });
    element.classList.toggle("lit", this.lit.has(node.id));
    if (isDifferent(row.before, node) || row.wasLit !== this.lit.has(node.id)) this.#drawWords(row, node);
    this.#drawFigures(row, node);
    row.bar.firstChild.style.width = `${Math.max(2, 100 * Math.sqrt(node.num_tokens / this.widest))}%`;
    if (isOpen) {
      if (row.group.parentNode !== element) element.append(row.group);
      this.#drawChildren(row.group, node.id, level + 1, used);
    } else row.group.remove();
    if (!this.#isFirst && !row.before) flash(line, "new");
    else if (row.before && hasNews(row.before, node)) flash(line, "changed");
    row.before = node;
    row.wasLit = this.lit.has(node.id);
    return element;
  }

  #drawWords(row, node) {
    const hasText = node.preview !== undefined;
    row.text.replaceChildren(...(hasText ? nodesOf(oneLine(node.preview)) : [`Node ${node.id}`]));
    row.text.classList.toggle("nameless", !hasText);
    const badges = [
      this.lit.has(node.id) && badge("chat", "your chat", "Part of the conversation on screen"),
      node.requests > 0 && badge("lock", count(node.requests), `Used by ${plural(node.requests, "running request")}`),
      node.is_pinned ? badge("pin", "pinned", "Pinned") : node.pins > 0 && badge("pin", "pin below", "A pin further down keeps it"),
      node.is_salted && badge("salt", "salted", "Kept apart by a cache_salt"),
    ].filter(Boolean);
    row.badges.replaceChildren(...badges);
    row.name = [
      hasText ? `“${oneLine(node.preview)}”` : `Node ${node.id}`,
      plural(node.num_tokens, "token"),
      ...badges.map(({ title }) => title),
      plural(node.hits, "hit"),
    ].join(", ");
    row.element.setAttribute("aria-label", row.name);
  }

  #drawFigures({ figures }, node) {
    const words = [plural(node.num_tokens, "token"), node.hits && plural(node.hits, "hit"), node.requests ? "in use" : ageOf(node)].filter(Boolean).join(" · ");
    if (figures.textContent !== words) figures.textContent = words;
  }

  #drawMore(parent, left, level, used) {
    const key = `more-${parent}`;
    used.add(key);
    const row = this.#row(key);
    const isRoot = parent === ROOT; // of the root it is not told how many there are
    const canShow = this.model.canWantMore(parent);
    const words = !canShow ? "The older ones are not shown" : isRoot ? `Show ${PAGE} more` : `Show ${count(Math.min(PAGE, left))} more of ${count(left)}`;
    set(row.element, { "aria-disabled": canShow ? null : true });
    row.text.textContent = words;
    row.element.classList.add("more");
    row.element.setAttribute("aria-label", words);
    set(row.element, { "aria-level": level });
    return row.element;
  }

  // ------------------------------------------------------------------------------------------------------- keys and mouse

  #keyAt(target) {
    const key = target.closest?.("[role=treeitem]")?.dataset.node;
    if (key === undefined) return null;
    return key.startsWith("more-") ? key : Number(key);
  }

  #visibleKeys() {
    return [...this.element.querySelectorAll("[role=treeitem]")].map((element) => this.#keyAt(element));
  }

  #activate(key) {
    if (key === null || key === this.#active) return;
    const before = this.#rows.get(this.#active);
    if (before) before.element.tabIndex = -1;
    this.#active = key;
    this.#rows.get(key).element.tabIndex = 0;
  }

  #focus(key, options) {
    if (!this.#rows.has(key)) return;
    this.#activate(key);
    this.#rows.get(key).element.focus({ preventScroll: true });
    if (!options?.preventScroll) this.#rows.get(key).line.scrollIntoView({ block: "nearest" });
  }

  /** After a change: where the focus was, else on what has come closest to it. */
  #keepFocus(key, visibleBefore) {
    const place = visibleBefore.indexOf(key);
    const near = [key, ...visibleBefore.slice(place + 1), ...visibleBefore.slice(0, Math.max(0, place)).reverse()];
    const found = near.find((other) => this.#rows.get(other)?.element.isConnected);
    if (found === undefined) return this.dispatchEvent(new Event("lost"));
    if (document.activeElement !== this.#rows.get(found).element) this.#focus(found, { preventScroll: found === key });
  }

  #tell(type, key) {
    if (typeof key === "string") this.dispatchEvent(new CustomEvent("more", { detail: Number(key.slice(5)) }));
    else if (key !== null) this.dispatchEvent(new CustomEvent(type, { detail: key }));
  }

  #clicked(event) {
    const key = this.#keyAt(event.target);
    if (key === null) return;
    this.#focus(key, { preventScroll: true });
    this.#tell(event.target.closest(".twisty") ? "toggle" : "select", key);
  }

  #pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const key = this.#keyAt(document.activeElement);
    const visible = this.#visibleKeys();
    const at = visible.indexOf(key);
    const expanded = this.#rows.get(key)?.element.getAttribute("aria-expanded");
    const parent = this.model.nodes.get(typeof key === "string" ? Number(key.slice(5)) : this.model.nodes.get(key)?.parent);
    const actions = {
      ArrowDown: () => this.#focus(visible[at + 1]),
      ArrowUp: () => this.#focus(visible[at - 1]),
      Home: () => this.#focus(visible[0]),
      End: () => this.#focus(visible.at(-1)),
      ArrowRight: () => (expanded === "false" ? this.#tell("toggle", key) : expanded === "true" && this.#focus(visible[at + 1])),
      ArrowLeft: () => (expanded === "true" ? this.#tell("toggle", key) : parent && this.#focus(parent.id)),
      Enter: () => this.#tell("select", key),
      " ": () => this.#tell("select", key),
      "*": () => this.#openSiblings(key),
    };
    const action = actions[event.key] ?? (event.key.length === 1 ? () => this.#type(event.key, visible, at) : null);
    if (!action) return;
    event.preventDefault();
    action();
  }

  #openSiblings(key) {
    for (const { id } of this.model.childrenOf(this.model.nodes.get(key)?.parent)) {
      if (this.#rows.get(id)?.element.getAttribute("aria-expanded") === "false") this.#tell("toggle", id);
    }
  }

  /** The next row whose text begins with what was typed. */
  #type(letter, visible, at) {
    const now = performance.now();
    this.#typed = (now - this.#typedAt < TYPED_MS ? this.#typed : "") + letter.toLowerCase();
    this.#typedAt = now;
    const from = this.#typed.length > 1 ? at : at + 1; // one letter goes on, more of them stay while they fit
    const ring = [...visible.slice(from), ...visible.slice(0, from)];
    const found = ring.find((key) => this.#rows.get(key).text.textContent.trim().toLowerCase().startsWith(this.#typed));
    if (found !== undefined) this.#focus(found);
  }
}

/** Makes these the children of a list, moving none that stands right: what has the focus would lose it. */
function arrange(list, elements) {
  const wanted = new Set(elements);
  for (const child of [...list.children]) if (!wanted.has(child)) child.remove();
  elements.forEach((element, k) => list.children[k] === element || list.insertBefore(element, list.children[k] ?? null));
}

function badge(name, text, title) {
  return h("span", { class: `badge ${name}`, title }, icon(name), text);
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null) element.removeAttribute(name);
    else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, String(value));
  }
}

const isDifferent = (before, node) => !before || hasNews(before, node) || before.preview !== node.preview || before.is_salted !== node.is_salted || before.requests !== node.requests;

const hasNews = (before, node) => before.num_tokens !== node.num_tokens || before.hits !== node.hits || before.is_pinned !== node.is_pinned || before.pins !== node.pins || before.requests < node.requests;

function flash(element, kind) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  element.classList.add(kind);
  setTimeout(() => element.classList.remove(kind), FLASH_MS);
}
