/**
 * The list of conversations: the last used first, a menu for each, the search above and the files below it, and the banner that says
 * when nothing is kept.
 *
 * Owns these elements, and brings the conversation on screen up to date with what another tab wrote. What a menu's entries do
 * (actions.js), the search (search.js) and files (transfer.js) are brought when they are asked for.
 */

import { byId, h, iconButton, nodesOf } from "../ui/dom.js";

export const titleOf = ({ title }) => title || "Untitled";

export class Nav {
  #items = new Map(); // id -> {item, link, title}
  #turn = 0;
  #isStale = false; // another tab wrote to the conversation on screen, which cannot be drawn anew just now
  #search = null;

  constructor(page) {
    this.page = page;
    this.list = byId("chats");
    this.field = byId("chat-search");
    page.store.addEventListener("change", ({ detail }) => this.#changed(detail));
    page.addEventListener("conversation", () => this.#mark());
    page.addEventListener("answers", () => this.#refresh());
    addEventListener("focus", () => this.#refresh());
    this.#wireSearch();
    this.#wireFiles();
  }

  /** Shows what is kept now. An element that stays is the same as before, and keeps the focus. */
  async draw() {
    const turn = (this.#turn += 1);
    const entries = await this.page.store.list();
    if (turn !== this.#turn) return; // a later one is under way
    const focused = document.activeElement;
    const before = this.#items;
    this.#items = new Map(entries.map((entry) => [entry.id, this.#itemOf(entry, before.get(entry.id))]));
    for (const [id, { item }] of before) if (!this.#items.has(id)) item.remove();
    let next = null;
    for (const { item } of [...this.#items.values()].reverse()) {
      if (item.parentNode !== this.list || item.nextSibling !== next) this.list.insertBefore(item, next);
      next = item;
    }
    if (focused !== document.activeElement && this.list.contains(focused)) focused.focus({ preventScroll: true }); // it was moved
    this.showWhetherEmpty();
    byId("export-chats").disabled = entries.length === 0;
    this.#mark();
  }

  showWhetherEmpty() {
    byId("no-chats").hidden = this.#items.size > 0 || this.list.hidden;
  }

  #itemOf(entry, before) {
    if (before?.title === entry.title) return before;
    const title = titleOf(entry);
    const link = h("a", { href: `#c=${entry.id}`, class: "chat", "data-id": entry.id, dir: "auto", title, onclick: () => this.page.closeSides() }, ...nodesOf(title));
    const button = iconButton("dots", `Actions for ${title}`, () => this.#act((actions) => actions.openMenu(this.page, entry, button)));
    button.setAttribute("aria-haspopup", "menu");
    const item = before?.item ?? h("li", {});
    item.replaceChildren(link, button);
    return { item, link, title: entry.title };
  }

  #mark() {
    const { id } = this.page.conversation;
    for (const link of this.list.parentNode.querySelectorAll("a.chat")) {
      if (link.dataset.id === id) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  /** The element of this conversation in the list, or null. */
  itemOf(id) {
    return this.#items.get(id)?.item ?? null;
  }

  /** Has the focus on this conversation, or where it would be. */
  focus(id) {
    (this.itemOf(id)?.querySelector("a") ?? this.list.querySelector("a") ?? byId("new-chat")).focus();
  }

  /** The conversation below this one. */
  after(id) {
    return this.itemOf(id)?.nextElementSibling?.querySelector("a")?.dataset.id ?? null;
  }

  async #act(action) {
    try {
      await action(await import("./actions.js"));
    } catch (error) {
      this.page.say(error.message);
    }
  }

  // --------------------------------------------------------------------------------------------------------- other tabs

  #changed({ id, isRemoved, isElsewhere }) {
    this.draw();
    if (!isElsewhere || id !== this.page.conversation.id) return;
    if (isRemoved) return this.#act((actions) => actions.tellRemoved(this.page));
    this.#isStale = true;
    this.#refresh();
  }

  /** Has on screen what another tab made of the conversation. */
  #refresh() {
    if (this.#isStale) this.#act(async (actions) => (this.#isStale &&= !(await actions.refresh(this.page))));
  }

  // -------------------------------------------------------------------------------------------------- search and files

  #wireSearch() {
    const search = async () => {
      this.#search ??= import("./search.js").then(({ Search }) => new Search(this.page, this));
      (await this.#search).show(this.field.value);
    };
    this.field.addEventListener("focus", search);
    this.field.addEventListener("input", search);
  }

  /** Has the focus in the search field. */
  startSearch() {
    this.page.openSide("nav");
    this.field.focus();
    this.field.select();
  }

  #wireFiles() {
    const input = byId("import-file");
    byId("export-chats").addEventListener("click", () => this.#exportAll());
    byId("import-chats").addEventListener("click", () => input.click());
    input.addEventListener("change", async () => {
      const files = [...input.files];
      input.value = ""; // the same file may be chosen again
      await (await import("./transfer.js")).importFiles(this.page, files);
    });
  }

  async #exportAll() {
    await (await import("./transfer.js")).exportAll(this.page);
  }

  /** Says that conversations are not kept, with a way to have them as a file; null: they are. */
  warn(problem) {
    const banner = byId("banner");
    const button = h("button", { type: "button", class: "link-button", onclick: () => this.#exportAll() }, "Export");
    banner.replaceChildren(...(problem ? [`${problem} `, button] : []));
    banner.hidden = !problem;
  }
}
