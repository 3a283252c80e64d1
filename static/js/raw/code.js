/**
 * A request as a program, in the language that was chosen last.
 */

import { recall, remember } from "../store/store.js";
import { buildCode } from "../text/render-code.js";
import { copyText } from "../ui/copying.js";
import { h } from "../ui/dom.js";
import { segments } from "../ui/segments.js";
import { LANGUAGES, snippet } from "./snippets.js";

const PLACE = "code-language"; // in the browser's storage

export class CodeSection {
  #given = null; // [body, target, isStale]
  #text = "";
  #language = LANGUAGES[recall(PLACE)] ? recall(PLACE) : "curl";

  constructor() {
    this.words = h("p", { class: "note", role: "status" });
    this.files = h("ul", { class: "raw-files", "aria-label": "Files that the program reads" });
    this.place = h("div", { class: "raw-program", onclick: (event) => this.#pressed(event) });
    const titles = Object.fromEntries(Object.entries(LANGUAGES).map(([name, { title }]) => [name, title]));
    this.element = h("div", { class: "raw-code" }, segments("raw-language", "Language", titles, this.#language, (name) => this.#choose(name)), this.place, this.words, this.files);
  }

  /** `isStale`: the request is being edited and says nothing just now; this is the one before. */
  show(body, target, isStale = false) {
    this.#given = [body, target, isStale];
    this.#draw();
  }

  #choose(language) {
    this.#language = language;
    remember(PLACE, language);
    this.#draw();
  }

  #draw() {
    if (!this.#given?.[0]) return this.place.replaceChildren();
    const [body, target, isStale] = this.#given;
    const { text, files } = snippet(this.#language, body, target);
    if (text !== this.#text || !this.place.firstChild) {
      this.#text = text;
      this.place.replaceChildren(buildCode({ language: LANGUAGES[this.#language].colours, text, isComplete: true }));
    }
    const notes = [
      isStale && "The edited request has a mistake; this is the one before.",
      target.hasKey && "It reads your key from $STREAMSERVE_API_KEY; the key itself is never written here.",
      files.length > 0 && "It reads these pictures from the folder it runs in:",
    ];
    const words = notes.filter(Boolean).join(" ");
    if (this.words.textContent !== words) this.words.textContent = words;
    this.files.hidden = !files.length;
    this.files.replaceChildren(...files.map((file) => h("li", {}, h("button", { type: "button", class: "link-button", onclick: () => save(file) }, `Save ${file.name}`))));
  }

  #pressed({ target }) {
    const button = target.closest(".copy-code:not(.colour-code)");
    if (button) copyText(this.#text, button);
  }
}

/** Hands a picture to the browser as a file. */
function save({ name, url }) {
  const [head, data] = url.split(",");
  const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
  const address = URL.createObjectURL(new Blob([bytes], { type: head.slice(5).split(";")[0] }));
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
