/**
 * One node of the prefix tree: its numbers, its text where that may be shown, and what can be done with it.
 *
 * Owns these elements and the requests to pin, unpin and evict. Knows nothing of how the tree is loaded.
 */

import { h, nodesOf } from "../ui/dom.js";
import { count, plural } from "../ui/numbers.js";
import { ageOf, confirmedButton, isOff, oneLine, setOff } from "./words.js";

const MAX_TEXT = 512; // tokens, as the server allows
const NO_ADMIN = "Pinning, evicting and flushing are for the holder of the server's admin key.";

export class CacheNodePane extends EventTarget {
  #node = null;
  #path = [];
  #text = null; // {id, tokens, words}: what was loaded last
  #loading = 0;
  #isBusy = false;

  /** Events: "changed" when the tree is not as it was, "select" with a node's id as `detail`. */
  constructor(page) {
    super();
    this.page = page;
    this.title = h("h2", { class: "node-title" }, "No node selected");
    this.path = h("ol", { class: "node-path", "aria-label": "Path from the top" });
    this.facts = h("dl", { class: "node-facts" });
    this.text = h("pre", { class: "node-whole", tabindex: "0", dir: "auto", role: "region", "aria-label": "Text of the node" });
    this.textNote = h("p", { class: "node-note" });
    this.pinWord = h("span", {}, "Pin");
    this.objects = [0, 1].map(() => h("span", { class: "hidden" }));
    const pin = () => isOff(this.pinButton) || this.#pin();
    this.pinButton = h("button", { type: "button", class: "button", onclick: pin }, this.pinWord, this.objects[0]);
    const say = (words) => this.page.say(words);
    this.evictButton = confirmedButton("Evict", () => this.#warning(), () => this.#evict(), say);
    this.evictButton.append(this.objects[1]);
    this.why = h("p", { class: "node-note", id: "node-why" });
    this.problem = h("p", { class: "error", role: "alert", hidden: true });
    for (const button of [this.pinButton, this.evictButton]) button.setAttribute("aria-describedby", "node-why");
    this.whole = h("div", { class: "node-filled" }, this.path, this.facts, h("div", { class: "node-actions" }, this.pinButton, this.evictButton), this.why, this.problem, this.text, this.textNote);
    this.empty = h("p", { class: "node-note" }, "Select a node of the tree to see what it holds. Arrow keys move in the tree, Enter selects.");
    this.element = h("section", { class: "cache-node", "aria-label": "Selected node" }, this.title, this.empty, this.whole);
    this.show(null, []);
  }

  get id() {
    return this.#node?.id ?? null;
  }

  /** Shows a node as the tree has it now; null: none. `path` are the nodes above it. */
  show(node, path) {
    const isOther = node?.id !== this.#node?.id;
    if (isOther) this.#tellProblem("");
    this.#node = node;
    this.#path = path;
    this.whole.hidden = !node;
    this.empty.hidden = Boolean(node);
    if (!node) {
      this.title.textContent = "No node selected";
      return;
    }
    this.title.textContent = `Node ${node.id}`;
    this.#drawPath();
    this.#drawFacts();
    this.#drawActions();
    this.#showText();
  }

  /** The node has been evicted or flushed, by somebody. */
  showGone() {
    if (!this.#node) return;
    const { id } = this.#node;
    const hadFocus = this.whole.contains(document.activeElement);
    this.show(null, []);
    this.title.textContent = `Node ${id} is gone`;
    if (hadFocus) {
      this.title.tabIndex = -1;
      this.title.focus();
    }
  }

  drawAge() {
    if (this.#node) this.#drawFacts();
  }

  #drawPath() {
    const items = this.#path.map((node) => {
      const name = node.preview === undefined ? `Node ${node.id}` : oneLine(node.preview);
      const select = () => this.dispatchEvent(new CustomEvent("select", { detail: node.id }));
      return h("li", {}, h("button", { type: "button", class: "link-button", "aria-label": `Select node ${node.id}, above this one`, onclick: select }, ...nodesOf(name)));
    });
    const key = this.#path.map(({ id, preview }) => `${id} ${preview}`).join("\n");
    if (this.pathKey === key) return;
    this.pathKey = key;
    this.path.hidden = items.length === 0;
    this.path.replaceChildren(...items);
  }

  #drawFacts() {
    const node = this.#node;
    const facts = [
      ["Tokens", `${count(node.num_tokens)}, of ${count(node.end)} from the top`],
      ["Pages", count(node.num_pages)],
      ["In use by", node.requests ? plural(node.requests, "running request") : "nobody"],
      ["Pins", node.is_pinned ? "pinned" : node.pins ? `${plural(node.pins, "pin")} further down` : "none"],
      ["Hits", count(node.hits)],
      ["Last used", ageOf(node)],
      ...(node.num_children ? [["Goes on in", plural(node.num_children, "way")]] : []),
      ...(node.is_salted ? [["Salted", "kept apart by a cache_salt"]] : []),
    ];
    const key = facts.join("\n");
    if (this.factsKey === key) return;
    this.factsKey = key;
    this.facts.replaceChildren(...facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  }

  #drawActions() {
    const { is_pinned, requests, pins } = this.#node;
    const isAdmin = Boolean(this.page.config?.allowed.admin);
    this.pinWord.textContent = is_pinned ? "Unpin" : "Pin";
    for (const object of this.objects) object.textContent = ` node ${this.#node.id}`;
    const held = requests ? `${plural(requests, "running request")} ${requests === 1 ? "stands" : "stand"} on it` : pins ? (is_pinned ? "it is pinned" : "a pin further down keeps it") : "";
    setOff(this.pinButton, !isAdmin || this.#isBusy);
    setOff(this.evictButton, !isAdmin || Boolean(held) || this.#isBusy);
    this.why.textContent = isAdmin ? (held && `Cannot be evicted now: ${held}.`) : NO_ADMIN;
    this.why.hidden = !this.why.textContent;
  }

  #warning() {
    return this.#node?.num_children ? "Press again: it goes with all below it" : "Press again to evict it";
  }

  #pin() {
    const { id, is_pinned } = this.#node;
    this.#do(
      () => (is_pinned ? this.page.server.delete(`cache/pin/${id}`) : this.page.server.post("cache/pin", { node: id })),
      ({ pinned_tokens, max_pinned_tokens }) => `Node ${id} is ${is_pinned ? "no longer " : ""}pinned. Pins hold ${count(pinned_tokens)} of at most ${count(max_pinned_tokens)} tokens.`,
    );
  }

  #evict() {
    const { id } = this.#node;
    this.#do(
      () => this.page.server.post("cache/evict", { node: id }),
      ({ num_nodes, freed_tokens }) => `Evicted ${plural(num_nodes, "node")}, ${plural(freed_tokens, "token")} freed.`,
    );
  }

  async #do(action, words) {
    if (this.#isBusy) return;
    this.#isBusy = true;
    this.#tellProblem("");
    try {
      const answer = await action();
      this.page.say(words(answer));
    } catch (error) {
      this.#tellProblem(error.message);
    }
    this.#isBusy = false;
    this.dispatchEvent(new Event("changed"));
  }

  #tellProblem(words) {
    this.problem.textContent = words;
    this.problem.hidden = !words;
  }

  async #showText() {
    const { id, num_tokens, preview } = this.#node;
    const key = `${id} ${num_tokens}`;
    if (preview === undefined) {
      this.text.hidden = true;
      this.textNote.textContent = this.page.config?.allowed.previews_reason ?? "Texts are not shown here.";
      return;
    }
    if (this.#text === key) return;
    this.#text = key;
    this.#loading += 1;
    const turn = this.#loading;
    this.text.hidden = false;
    this.text.replaceChildren(...nodesOf(preview));
    this.textNote.textContent = "";
    const found = await this.page.server.get(`cache/tree?node=${id}&depth=1&limit=1&preview=${MAX_TEXT}`).catch(() => null);
    if (turn !== this.#loading) return;
    const node = found?.nodes.find((one) => one.id === id);
    if (!node) {
      this.#text = null; // it has moved on; the next look tells
      return;
    }
    this.text.replaceChildren(...nodesOf(node.preview ?? ""));
    this.textNote.textContent = node.num_tokens > MAX_TEXT ? `The first ${count(MAX_TEXT)} of ${count(node.num_tokens)} tokens.` : "";
  }
}

