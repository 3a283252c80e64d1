/**
 * The Cache view: the server's prefix tree as it changes, what its memory holds, and the way of the conversation on screen in it.
 *
 * Owns when the tree is asked for: while it is seen, and when the engine has made steps or its memory is used in another way. Knows
 * its parts, the files beside this one, and the page.
 */

import { h } from "../ui/dom.js";
import { count, plural } from "../ui/numbers.js";
import { promptOf } from "./hits.js";
import { CacheMeters } from "./meters.js";
import { CacheNodePane } from "./node-pane.js";
import { CacheNodes, PAGE, ROOT } from "./nodes.js";
import { CacheTree } from "./tree.js";
import { addSymbols, confirmedButton, setOff } from "./words.js";

const WATCH_MS = 500;
const REFRESH_MS = 1_000; // at least so long between two looks at the tree
const AGES_MS = 5_000;
const FOLLOW_MS = 2_000;
const TRIAL = "Write one line about prefix caches: why is the second answer to the same question faster to begin?";

export class CacheView {
  #stop = () => {}; // ends the watch
  #isShown = false;
  #seen = ""; // of the engine, when the tree was looked at last
  #timer = 0;
  #ages = 0;
  #refreshedAt = -Infinity;
  #isFollowing = false;
  #path = []; // ids of the nodes of the conversation on screen
  #followedAt = -Infinity;
  #followTurn = 0;

  constructor(page) {
    addSymbols();
    this.page = page;
    this.meters = new CacheMeters();
    this.model = new CacheNodes((path) => page.server.get(path), (id) => id === this.tree.selected || this.tree.lit.has(id) || this.tree.holdsFocus(id));
    this.tree = new CacheTree(this.model);
    this.model.onPass = () => this.#passed();
    this.pane = new CacheNodePane(page);
    this.#build();
    this.#wire();
  }

  #build() {
    const say = (words) => this.page.say(words);
    this.follow = h("button", { type: "button", class: "button", "aria-pressed": "false", onclick: () => this.#toggleFollow() }, "Follow my chat");
    this.followNote = h("p", { class: "cache-note", role: "status" });
    this.flush = confirmedButton("Flush cache", () => "Press again to forget all that is not pinned", () => this.#flush(), say);
    this.size = h("span", { class: "cache-size" });
    this.note = h("p", { class: "cache-note", role: "status" });
    this.problem = h("div", { class: "error", role: "alert", hidden: true });
    this.why = h("p", { class: "cache-note", hidden: true });
    this.loading = h("p", { class: "cache-note" }, "Reading the tree…");
    this.trial = h("button", { type: "button", class: "button primary", onclick: () => this.#tryTwice() }, "Send a prompt twice");
    this.empty = h(
      "div",
      { class: "cache-empty", hidden: true },
      h("p", { class: "cache-empty-title" }, "Cache is empty"),
      h("p", {}, "Send the same prompt twice to see a hit."),
      this.trial,
    );
    this.treeBox = h("div", { class: "cache-scroll" }, this.loading, this.empty, this.tree.element);
    this.element = h(
      "div",
      { class: "cache-view" },
      h("div", { class: "view-head" }, h("h2", {}, "Prefix cache"), h("p", { class: "cache-note" }, "What a prompt shares with earlier ones is not read again."), this.follow, this.flush),
      this.meters.element,
      h("div", { class: "cache-tools" }, this.followNote, this.size),
      this.note,
      this.problem,
      this.why,
      h("div", { class: "cache-columns" }, this.treeBox, this.pane.element),
    );
  }

  #wire() {
    this.tree.addEventListener("select", ({ detail }) => this.#select(detail));
    this.tree.addEventListener("toggle", ({ detail }) => this.#toggle(detail));
    this.tree.addEventListener("more", ({ detail }) => this.#showMore(detail));
    this.tree.addEventListener("lost", () => this.follow.focus());
    this.pane.addEventListener("changed", () => this.#look(true));
    this.pane.addEventListener("select", ({ detail }) => this.#select(detail));
    this.page.addEventListener("ready", () => this.#isShown && this.#look(true));
    for (const event of ["conversation", "answers"]) this.page.addEventListener(event, () => this.#isShown && this.#isFollowing && this.#lookUp());
    document.addEventListener("visibilitychange", () => this.#isShown && this.#watch());
  }

  // ------------------------------------------------------------------------------------------------------- when to look

  shown() {
    this.#isShown = true;
    this.#watch();
    if (this.page.config) this.#look(true);
    if (this.#isFollowing) this.#lookUp();
  }

  gone() {
    this.#isShown = false;
    this.#watch();
  }

  /** Watches while the view is on screen. */
  #watch() {
    this.#stop();
    this.#stop = () => {};
    clearInterval(this.#ages);
    clearTimeout(this.#timer);
    if (!this.#isShown || document.hidden) return;
    this.#stop = this.page.server.watchEngine(WATCH_MS, (engine) => this.#told(engine));
    this.#ages = setInterval(() => this.#drawAges(), AGES_MS);
  }

  #told(engine) {
    this.meters.showEngine(engine);
    const { last, load } = engine;
    const now = `${last} ${load.free_tokens} ${load.evictable_tokens} ${load.total_tokens}`;
    if (now === this.#seen && this.model.summary) return;
    this.#seen = now;
    this.#lookSoon();
  }

  #lookSoon() {
    clearTimeout(this.#timer);
    const wait = this.#refreshedAt + REFRESH_MS - performance.now();
    if (wait <= 0) this.#look();
    else this.#timer = setTimeout(() => this.#look(), wait);
  }

  #drawAges() {
    this.tree.drawAges();
    this.pane.drawAge();
    this.meters.draw();
  }

  // ---------------------------------------------------------------------------------------------------------- the tree

  async #look(isHurried = false) {
    if (!this.#isShown || !this.page.config) return;
    clearTimeout(this.#timer);
    this.#refreshedAt = performance.now();
    try {
      await this.model.refresh(isHurried);
    } catch (error) {
      this.#showProblem(error);
    }
  }

  #passed() {
    this.#refreshedAt = performance.now();
    this.problem.hidden = true;
    this.#draw();
    if (!this.#isFollowing || performance.now() - this.#followedAt < FOLLOW_MS) return;
    const isPathGone = this.#path.some((id) => !this.model.nodes.has(id));
    if (isPathGone || this.page.chat.isStreaming) this.#lookUp();
  }

  #draw() {
    const { summary, nodes } = this.model;
    if (!summary) return;
    const isEmpty = summary.num_nodes === 0;
    const isOff = this.page.config.cache.reuse === false;
    this.loading.hidden = true;
    this.empty.hidden = !isEmpty || isOff;
    this.tree.element.hidden = isEmpty;
    this.why.textContent = isOff ? "The prefix cache is switched off: the server was started with --disable-radix-cache." : (summary.previews_reason ?? "");
    this.why.hidden = !this.why.textContent;
    this.size.textContent = isEmpty ? "" : `${plural(summary.num_nodes, "node")}, ${plural(summary.cached_tokens, "token")}`;
    setOff(this.flush, !this.page.config.allowed.admin || isEmpty);
    this.meters.showMemory(summary);
    this.#light();
    this.tree.draw();
    const selected = this.tree.selected;
    if (selected === null) return;
    if (nodes.has(selected)) return this.pane.show(nodes.get(selected), this.model.above(selected));
    if (!this.model.isGone(selected)) return; // among those that are not shown
    this.tree.selected = null;
    this.pane.showGone();
  }

  #select(id) {
    this.tree.selected = id;
    this.note.textContent = "";
    this.#draw();
    const isBelow = this.pane.element.getBoundingClientRect().top >= this.treeBox.getBoundingClientRect().bottom;
    if (isBelow) this.pane.element.scrollIntoView({ block: "nearest" });
  }

  #toggle(id) {
    const node = this.model.nodes.get(id);
    if (!node?.num_children) return;
    const isOpen = this.model.isOpen(id);
    const hasSelected = this.model.above(this.tree.selected).some((node) => node.id === id);
    if (isOpen) this.model.close(id);
    if (isOpen && hasSelected) this.tree.selected = id; // one that is out of sight is not looked after
    if (!isOpen) this.model.open(id);
    this.#draw();
    if (!isOpen) this.#look(true);
  }

  async #showMore(parent) {
    this.model.want(parent, this.model.wantedOf(parent) + PAGE);
    await this.#look(true);
  }

  #showProblem(error) {
    const retry = h("button", { type: "button", class: "link-button", onclick: () => this.#look(true) }, "Try again");
    if (this.problem.dataset.words === error.message && !this.problem.hidden) return;
    this.problem.dataset.words = error.message;
    this.problem.replaceChildren(`The tree cannot be read: ${error.message} `, retry);
    this.problem.hidden = false;
    this.loading.hidden = true;
  }

  async #flush() {
    try {
      const { message } = await this.page.server.post("flush_cache", {});
      this.note.textContent = `Flushed: ${message}.`;
    } catch (error) {
      this.note.textContent = `Not flushed: ${error.message}.`;
    }
    await this.#look(true);
    if (document.activeElement === document.body) this.follow.focus();
  }

  /** Asks the same twice, for who has nothing in the cache yet. */
  async #tryTwice() {
    setOff(this.trial, true);
    const ask = () => {
      const what = this.page.config.takes.chat ? { messages: [{ role: "user", content: TRIAL }] } : { prompt: TRIAL };
      return this.page.server.post(`v1/${this.page.config.takes.chat ? "chat/" : ""}completions`, { ...what, max_tokens: 16, temperature: 0 });
    };
    try {
      this.note.textContent = "Sending it for the first time…";
      await ask();
      this.note.textContent = "Sending it again…";
      const { usage } = await ask();
      const { cached_tokens } = usage.prompt_tokens_details;
      this.note.textContent = `The second time ${count(cached_tokens)} of ${count(usage.prompt_tokens)} prompt tokens came from the cache.`;
    } catch (error) {
      this.note.textContent = `That did not work: ${error.message}`;
    }
    setOff(this.trial, false);
    await this.#look(true);
  }

  // -------------------------------------------------------------------------------------------------- follow my chat

  #toggleFollow() {
    this.#isFollowing = !this.#isFollowing;
    this.follow.setAttribute("aria-pressed", String(this.#isFollowing));
    if (this.#isFollowing) return this.#lookUp();
    this.#followTurn += 1;
    this.#path = [];
    this.followNote.textContent = "";
    this.#draw();
  }

  /** Finds the way of the conversation on screen, and opens it. */
  async #lookUp() {
    this.#followTurn += 1;
    const turn = this.#followTurn;
    this.#followedAt = performance.now();
    const found = await this.#found().catch((error) => error);
    if (turn !== this.#followTurn) return;
    if (!found || found instanceof Error) {
      this.#path = [];
      this.followNote.textContent = found ? `Cannot follow: ${found.message}` : "This conversation has no messages yet.";
      return this.#draw();
    }
    const isOther = found.path.at(-1) !== this.#path.at(-1);
    this.#path = found.path;
    this.followNote.textContent = found.matched
      ? `${count(found.matched)} of ${count(found.tokens)} tokens of this conversation are in the cache.`
      : "Nothing of this conversation is in the cache.";
    this.model.open(ROOT, ...found.path.slice(0, -1));
    await this.#look(true);
    const hidden = found.path.findIndex((id) => !this.model.nodes.has(id));
    if (isOther && hidden >= 0) {
      this.model.want(found.path[hidden - 1] ?? ROOT, Infinity); // it stands further down among many
      await this.#look(true);
    }
    if (isOther && found.path.length && turn === this.#followTurn) this.tree.reveal(found.path.at(-1));
  }

  async #found() {
    const { conversation, chat, server } = this.page;
    if (!conversation.messages.length) return null;
    return server.post("cache/lookup", promptOf(await chat.bodyFor("")));
  }

  /** Lights the path, with nodes that have come in between since. */
  #light() {
    const above = this.#path.flatMap((id) => this.model.above(id).map((node) => node.id));
    this.tree.lit = new Set([...this.#path, ...above]);
  }
}
