/**
 * The page: puts the parts together and owns what lies around the messages: top bar, sidebars, key dialog.
 *
 * Parts (page/frame.js) are made with it. They listen to its events: "conversation" (another one is shown), "ready" (the server takes
 * questions; `config` is known), "answers" (an answer began or ended in the conversation of `event.detail`).
 */

import { Chat } from "./chat/chat.js";
import { Composer, isTouch } from "./composer/composer.js";
import { Pictures } from "./composer/picking.js";
import { Nav } from "./nav/nav.js";
import { Frame } from "./page/frame.js";
import { Blobs } from "./store/blobs.js";
import { Store, newConversation, recall, remember } from "./store/store.js";
import { byId, nodesOf } from "./ui/dom.js";
import { Server } from "./wire/server.js";

const SAVE_MS = 400; // after the last keystroke

class App extends EventTarget {
  #conversation = newConversation();
  #saveTimer = 0;
  #unsaved = null; // the conversation that the timer is for
  #askAgain = ""; // the conversation whose question waits for the key
  #extend = () => {};

  constructor() {
    super();
    this.config = null; // GET /playground/config.json, once the server is ready
    this.server = new Server(recall("key", "session"));
    this.store = new Store((problem) => this.nav.warn(problem));
    this.settings = null; // the form; it is brought once the page stands
    const say = (text) => this.say(text);
    const hooks = { learn: () => this.#learnModel(), needKey: (error) => this.#askForKey(error), say, away: (why) => this.composer.block(why) };
    this.connection = import("./wire/connection.js").then(({ Connection }) => new Connection(this.server, hooks));
    this.blobs = new Blobs(this.store, (problem) => this.pictures.say(problem));
    this.pictures = new Pictures(this.blobs, {
      added: () => this.composer.changed(),
      removed: (picture) => this.composer.removedPicture(picture),
      earlier: () => this.composer.earlierPictures,
      say,
    });
    this.chat = new Chat(this.server, this.blobs, {
      extended: () => this.extended,
      save: (conversation, message) => this.#save(conversation, message),
      changed: (conversation) => this.#streamChanged(conversation),
      refused: (error, conversation, question) => this.#refused(error, conversation, question),
      say,
      find: (id) => this.find(id),
      edit: (message) => this.composer.edit(message),
    });
    this.composer = new Composer(this);
    this.nav = new Nav(this);
    this.frame = new Frame(this);
    this.extended = new Promise((resolve) => (this.#extend = resolve));
  }

  /** The conversation on screen. */
  get conversation() {
    return this.#conversation;
  }

  /** Tells who cannot see the page. */
  say(text) {
    byId("status").textContent = text;
  }

  async start() {
    this.#wireSides();
    this.#wireTheme();
    this.#wireKeys();
    this.#wireKeyDialog();
    addEventListener("hashchange", () => this.#openFromHash());
    this.frame.views.onChange = (view) => this.#showView(view);
    addEventListener("pagehide", () => {
      this.saveSoon(this.#conversation);
      this.#saveNow();
    });
    this.#look();
    await this.#openFromHash();
    await this.nav.draw();
    if (!isTouch()) this.composer.focus();
    const lost = (error) => this.say(`Settings could not be loaded: ${error.message}`);
    this.settings = await import("./settings/form.js").then(({ Settings }) => new Settings(this)).catch(lost);
    this.#extend(this.frame.extend());
  }

  // ------------------------------------------------------------------------------------------------------------- server

  /** Looks for the server, now. */
  #look() {
    const fail = () => (byId("server-state").textContent = "Not loaded: try again");
    this.connection.then((connection) => connection.look(), fail);
  }

  async #learnModel() {
    this.config = await this.server.get("playground/config.json");
    this.server.resumeMs = 1_000 * this.config.resume_window_s;
    const { model, image_limits } = this.config;
    this.chat.model = model;
    byId("model-name").replaceChildren(...nodesOf(model));
    document.title = `${model} · StreamServe`;
    this.pictures.allow(image_limits);
    this.dispatchEvent(new Event("ready"));
  }

  #refused(error, conversation, question) {
    if (conversation === this.#conversation) {
      if (error.param) this.settings?.showError(error.param, error.message);
      if (isAboutMessages(error) && question?.pictures) this.composer.takeBack(question);
    }
    if (error.status === 401) {
      this.#askAgain = conversation.id;
      this.#askForKey(error);
    }
    if (error.code === "unreachable") this.#look();
  }

  #askForKey(error) {
    if (this.server.key) byId("key-reason").textContent = error.message;
    const dialog = byId("key-dialog");
    if (!dialog.open) dialog.showModal();
  }

  #wireKeyDialog() {
    const dialog = byId("key-dialog");
    byId("key-cancel").addEventListener("click", () => dialog.close());
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.server.useKey(byId("key").value.trim());
      remember("key", this.server.key, "session");
      byId("key").value = "";
      dialog.close();
      this.#look();
      if (this.#askAgain === this.#conversation.id) this.chat.regenerateLast();
      this.#askAgain = "";
    });
  }

  // ------------------------------------------------------------------------------------------------------ conversations

  async #openFromHash() {
    const hash = new URLSearchParams(location.hash.slice(1));
    const id = hash.get("c");
    this.frame.views.show(hash.get("v") ?? "chat");
    if (this.chat.conversation && (id === this.#conversation.id || (!id && location.hash))) return;
    const found = id && (await this.find(id));
    if (new URLSearchParams(location.hash.slice(1)).get("c") !== id) return; // another one was chosen since
    this.show(found || newConversation(this.#conversation));
    if (id && !found) history.replaceState(null, "", location.pathname);
  }

  /** The hash says which view is shown, and of which conversation; never what was typed. */
  #showView(view) {
    const hash = new URLSearchParams(location.hash.slice(1));
    if (view === (hash.get("v") ?? "chat")) return;
    if (view === "chat") hash.delete("v");
    else hash.set("v", view);
    history.replaceState(null, "", String(hash) ? `#${hash}` : location.pathname);
  }

  /** Has this conversation on screen. */
  show(conversation) {
    this.#conversation = conversation;
    this.chat.show(conversation);
    this.composer.show();
    this.dispatchEvent(new Event("conversation"));
  }

  /** The conversation with this id, alive or as it is kept; null where there is none. */
  async find(id) {
    if (id === this.#conversation.id) return this.#conversation;
    this.#saveNow();
    return this.chat.living(id) ?? this.store.load(id);
  }

  /** Shows this conversation, and this message of it where one is named. */
  async open(id, messageId = null) {
    const conversation = await this.find(id);
    if (!conversation) return;
    history.pushState(null, "", `#c=${id}`);
    this.frame.views.show("chat");
    if (conversation !== this.#conversation) this.show(conversation);
    const message = conversation.messages.find((other) => other.id === messageId);
    if (message) this.chat.change("showMessage", message);
  }

  newChat() {
    history.pushState(null, "", location.pathname);
    this.show(newConversation(this.#conversation));
    this.closeSides();
    this.#toComposer();
  }

  /** Whatever view is shown. */
  #toComposer() {
    this.frame.views.show("chat");
    this.composer.focus();
  }

  async #save(conversation, message) {
    const hash = new URLSearchParams(location.hash.slice(1));
    const isNews = conversation === this.#conversation && !hash.has("c"); // another one there is on its way
    if (isNews) hash.set("c", conversation.id); // beside the view that is shown
    if (isNews) history.replaceState(null, "", `#${hash}`);
    await this.store.save(conversation, message);
  }

  /** Saves what waits for it. A conversation is kept from its first question on; until then its settings live only on the page. */
  #saveNow() {
    if (this.#unsaved?.messages.length) this.#save(this.#unsaved);
    this.#unsaved = null;
  }

  /** Saves it when nothing has been typed for a moment. */
  saveSoon(conversation) {
    if (this.#unsaved !== conversation) this.#saveNow();
    clearTimeout(this.#saveTimer);
    this.#unsaved = conversation;
    this.#saveTimer = setTimeout(() => this.#saveNow(), SAVE_MS);
  }

  #streamChanged(conversation) {
    this.dispatchEvent(new CustomEvent("answers", { detail: conversation }));
    if (conversation === this.#conversation) this.composer.changed();
  }

  // ------------------------------------------------------------------------------------------------- sidebars, keys, look

  #wireSides() {
    this.wide = matchMedia("(min-width: 1100px)"); // as in style.css
    this.middle = matchMedia("(min-width: 760px)");
    byId("skip").addEventListener("click", (event) => {
      event.preventDefault(); // the hash belongs to the conversation
      this.#toComposer();
    });
    byId("new-chat").addEventListener("click", () => this.newChat());
    byId("open-nav").addEventListener("click", () => this.#toggleSide("nav"));
    byId("show-keys").addEventListener("click", () => this.#showKeys());
    byId("open-inspector").addEventListener("click", () => this.#toggleSide("inspector"));
    for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => this.closeSides(true));
    byId("shade").addEventListener("click", () => this.closeSides(true));
    const reset = () => {
      this.#setSide("nav", this.middle.matches);
      this.#setSide("inspector", this.wide.matches && recall("inspector") !== "closed");
    };
    this.wide.addEventListener("change", reset);
    this.middle.addEventListener("change", reset);
    reset();
  }

  /** Whether this sidebar lies over the messages, instead of beside them. */
  #isOverlay(name) {
    return name === "nav" ? !this.middle.matches : !this.wide.matches;
  }

  #toggleSide(name) {
    const isOpen = byId(name).inert;
    if (isOpen && this.#isOverlay(name)) this.closeSides();
    this.#setSide(name, isOpen);
    if (name === "inspector" && !this.#isOverlay(name)) remember("inspector", isOpen ? "open" : "closed");
    if (isOpen && this.#isOverlay(name)) byId(name).querySelector(".close-side").focus();
  }

  openSide(name) {
    if (byId(name).inert) this.#toggleSide(name);
  }

  #setSide(name, isOpen) {
    const side = byId(name);
    side.inert = !isOpen;
    side.classList.toggle("closed", !isOpen);
    byId(`open-${name}`).setAttribute("aria-expanded", String(isOpen));
    byId("shade").hidden = !["nav", "inspector"].some((other) => !byId(other).inert && this.#isOverlay(other));
  }

  /** Closes the sidebars that lie over the messages; true when there was one. */
  closeSides(returnFocus = false) {
    const open = ["nav", "inspector"].filter((name) => !byId(name).inert && this.#isOverlay(name));
    for (const name of open) this.#setSide(name, false);
    if (open.length && returnFocus) byId(`open-${open[0]}`).focus();
    return open.length > 0;
  }

  #wireKeys() {
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.isComposing && !document.querySelector("dialog[open]")) return this.#escape();
      if (!(event.ctrlKey || event.metaKey)) return;
      const key = event.altKey ? `alt ${event.code}` : event.key.toLowerCase(); // Alt may make another letter of the key
      const action = {
        "alt KeyR": () => this.chat.regenerateLast(),
        "alt KeyE": () => this.chat.editLast(),
        o: event.shiftKey && (() => this.newChat()),
        k: !event.shiftKey && (() => this.nav.startSearch()),
        b: !event.shiftKey && (() => this.#toggleSide("inspector")),
        "/": () => this.#toComposer(),
      }[key];
      if (!action) return;
      event.preventDefault();
      action();
    });
  }

  async #showKeys() {
    const { showKeys } = await import("./page/keys-dialog.js");
    showKeys();
  }

  #escape() {
    if (this.closeSides(true)) return;
    if (this.chat.isStreaming) return this.chat.stop();
    if (this.composer.isEditing) this.composer.cancelEdit();
  }

  #wireTheme() {
    const themes = ["system", "light", "dark"];
    const show = (theme) => {
      document.documentElement.dataset.theme = theme;
      byId("theme").setAttribute("aria-label", `Theme: ${theme}`);
      byId("theme").title = `Theme: ${theme}`;
    };
    show(themes.includes(recall("theme")) ? recall("theme") : "system");
    byId("theme").addEventListener("click", () => {
      const next = themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length];
      remember("theme", next);
      show(next);
    });
  }
}

/** Whether the server takes the request as such but not what the messages hold. */
const isAboutMessages = ({ param, code }) => param?.startsWith("messages") || code === "request_too_large";

new App().start();
