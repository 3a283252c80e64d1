/**
 * The page's frame: which view fills the middle (the chat or another one) and which panel the inspector shows.
 *
 * Owns the two rows of tabs. A view or a panel is a module with a class of its own, loaded when it is first looked at; what each
 * is given is the page (main.js). Knows nothing of what they show.
 *
 * @typedef {object} Part  What such a class has. It is made with the page.
 * @property {HTMLElement} element  its root, put into the page when it is first shown
 * @property {() => void} [shown]  it can be seen from now on
 * @property {() => void} [gone]  it cannot be seen any longer: timers and subscriptions end
 *
 * An entry below: {name, title, load, style}; `style` names its sheet in css/, brought with it.
 */

import { byId, h, useStyle } from "../ui/dom.js";

/** Name, title and maker of each view beside the chat. */
const VIEWS = [
  { name: "cache", title: "Cache", load: () => import("../cache/view.js").then((m) => m.CacheView), style: "cache" },
  { name: "compare", title: "Compare", load: () => import("../compare/view.js").then((m) => m.CompareView), style: "compare" },
  { name: "engine", title: "Engine", load: () => import("../engine/view.js").then((m) => m.EngineView), style: "engine" },
];

/** Of each panel beside the settings. */
const PANELS = [
  { name: "structure", title: "Schema", load: () => import("../structure/panel.js").then((m) => m.StructurePanel), style: "structure" },
  { name: "tools", title: "Tools", load: () => import("../tools/panel.js").then((m) => m.ToolsPanel), style: "tools" },
  { name: "raw", title: "Raw", load: () => import("../raw/panel.js").then((m) => m.RawPanel), style: "raw" },
  { name: "tokens", title: "Tokens", load: () => import("../tokens/panel.js").then((m) => m.TokensPanel), style: "tokens" },
];

/** A row of tabs over elements of which one is shown; arrow keys move between tabs, as WAI-ARIA's pattern has it. */
class Tabs {
  #entries = new Map(); // name -> {tab, body, load, part}
  #current = "";

  constructor(row, place, page) {
    this.row = row;
    this.place = place;
    this.page = page;
    this.onChange = () => {};
    row.addEventListener("keydown", (event) => this.#moved(event));
    page.addEventListener("ready", () => this.#entries.get(this.#current)?.body.querySelector(":scope > .lost") && this.#retry(this.#current));
  }

  /** A tab for an element that is there, or for a part that `load` brings. */
  add({ name, title, body = null, load = null, style = null }) {
    const id = `${this.row.id}-${name}`;
    const tab = h("button", { type: "button", role: "tab", id, "aria-selected": "false", tabindex: "-1", onclick: () => this.show(name) }, title);
    body ??= h("section", { class: `part ${name}`, hidden: true });
    body.id ||= `${id}-body`;
    body.setAttribute("role", "tabpanel");
    body.setAttribute("aria-labelledby", id);
    tab.setAttribute("aria-controls", body.id);
    if (!body.isConnected) this.place.append(body);
    this.row.append(tab);
    this.#entries.set(name, { tab, body, load, style, part: null });
  }

  get current() {
    return this.#current;
  }

  /** Shows this one, or the first where there is none of that name. */
  async show(name) {
    const wanted = this.#entries.has(name) ? name : this.#entries.keys().next().value;
    if (wanted === this.#current) return;
    const before = this.#entries.get(this.#current);
    this.#current = wanted;
    for (const [other, { tab, body }] of this.#entries) {
      tab.setAttribute("aria-selected", String(other === wanted));
      tab.tabIndex = other === wanted ? 0 : -1;
      body.hidden = other !== wanted;
    }
    before?.part?.gone?.();
    this.onChange(wanted);
    const part = await this.#loaded(wanted);
    if (this.#current === wanted) part?.shown?.();
  }

  async #loaded(name) {
    const entry = this.#entries.get(name);
    if (entry.part || !entry.load) return entry.part;
    try {
      const [Part] = await Promise.all([entry.load(), entry.style && useStyle(entry.style)]);
      entry.part ??= new Part(this.page);
      entry.body.replaceChildren(entry.part.element);
    } catch {
      const again = h("button", { type: "button", class: "button small", onclick: () => this.#retry(name) }, "Try again");
      const words = h("p", {}, "This part of the page could not be loaded. If the server is there and it stays so, reload the page.");
      entry.body.replaceChildren(h("div", { class: "error lost", role: "alert" }, words, again));
    }
    return entry.part;
  }

  async #retry(name) {
    const hadFocus = this.#entries.get(name).body.contains(document.activeElement);
    const part = await this.#loaded(name);
    if (this.#current !== name) return;
    part?.shown?.();
    if (hadFocus && !part) this.#entries.get(name).body.querySelector("button").focus();
    else if (hadFocus) this.#entries.get(name).tab.focus();
  }

  #moved(event) {
    const names = [...this.#entries.keys()];
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -names.length, End: names.length }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = names.indexOf(this.#current);
    const to = Math.abs(step) > 1 ? (step > 0 ? names.length - 1 : 0) : (at + step + names.length) % names.length;
    this.show(names[to]);
    this.#entries.get(names[to]).tab.focus();
  }
}

export class Frame {
  constructor(page) {
    this.page = page;
    this.views = new Tabs(byId("views"), byId("main"), page);
    this.views.add({ name: "chat", title: "Chat", body: byId("view-chat") });
    for (const view of VIEWS) this.views.add(view);
    this.panels = new Tabs(byId("panels"), byId("inspector"), page);
    this.panels.add({ name: "settings", title: "Settings", body: byId("panel-settings") });
    for (const panel of PANELS) this.panels.add(panel);
    byId("views").hidden = VIEWS.length === 0;
    byId("panels").hidden = PANELS.length === 0;
    this.panels.show("settings");
  }

  /** Brings what adds to the chat (plugins.js), as far as it can be had. */
  async extend() {
    try {
      const { extend } = await import("./plugins.js");
      await extend(this.page);
    } catch (error) {
      this.page.say(`A part of the page could not be loaded: ${error.message}`);
    }
  }
}
