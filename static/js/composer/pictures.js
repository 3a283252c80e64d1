/**
 * The pictures of the message being written: chosen by button, drop or paste, checked, and shown with a way to remove each.
 *
 * Owns which ones are chosen, the note beside the composer and the drop target. Knows nothing of messages or of the server; where
 * bytes lie is the business of store/blobs.js.
 */

import { byId, h, iconButton, nodesOf } from "../ui/dom.js";
import { sizeText } from "../ui/numbers.js";

/** Formats, told by the first bytes as the server does: names and types of files may be wrong. */
const FORMATS = [
  { type: "image/png", name: "PNG", magic: /^\x89PNG\r\n\x1a\n/ },
  { type: "image/jpeg", name: "JPEG", magic: /^\xff\xd8\xff/ },
  { type: "image/webp", name: "WebP", magic: /^RIFF.{4}WEBP/s },
  { type: "image/gif", name: "GIF", magic: /^GIF8[79]a/ },
  { type: "image/bmp", name: "BMP", magic: /^BM/ },
];
const MAGIC_BYTES = 12;
const OTHER_BYTES = 64 << 10; // of a request: room for its texts, and for what base64 adds to the end of each picture

export class Pictures {
  #chosen = [];
  #numReading = 0;
  #reading = Promise.resolve(); // one file after the other, in the order in which they came
  #why = "Whether the model takes pictures is not known yet"; // the reason for taking none, or ""
  #limits = null;

  /**
   * `page` is what this needs of the page: added(), removed(picture), earlier() for the pictures that are sent along with the
   * chosen ones, say(text) for the status region.
   */
  constructor(blobs, page) {
    this.blobs = blobs;
    this.page = page;
    this.button = byId("add-picture");
    this.list = byId("chosen");
    this.note = byId("picture-note");
    this.#wireButton();
    this.#wirePaste();
    this.#wireDrop();
    this.#showButton();
  }

  get chosen() {
    return this.#chosen;
  }

  /** Whether a file is still being read, which is to be sent too. */
  get isReading() {
    return this.#numReading > 0;
  }

  /** What may be sent: the server's `image_limits`, null where the model takes no pictures. */
  allow(limits) {
    this.#why = limits ? "" : "This model takes no pictures";
    const maxBytes = limits && Math.floor((limits.max_body_bytes - OTHER_BYTES) / 4) * 3;
    this.#limits = limits && {
      maxCount: limits.max_images,
      maxBytes, // of all together
      maxFileBytes: Math.min(maxBytes, limits.max_file_bytes),
      formats: FORMATS.filter(({ type }) => limits.types.includes(type)),
    };
    byId("picture-file").accept = this.#limits?.formats.map(({ type }) => type).join() ?? "";
    this.#showButton();
  }

  /** Has these chosen from now on; the list is added to and taken from. */
  show(pictures) {
    this.#chosen = pictures;
    this.say("");
    this.#draw();
  }

  /** Puts a text beside the composer. */
  say(text) {
    this.note.replaceChildren(...nodesOf(text));
  }

  // ---------------------------------------------------------------------------------------------------------- three ways

  #wireButton() {
    const input = byId("picture-file");
    this.button.addEventListener("click", () => input.click());
    input.addEventListener("change", () => {
      this.#add([...input.files]);
      input.value = ""; // the same file may be chosen again
      byId("prompt").focus();
    });
  }

  #showButton() {
    this.button.disabled = Boolean(this.#why);
    this.button.title = this.#why || "Add a picture";
    byId("no-pictures").textContent = this.#why;
    byId("drop-text").textContent = this.#why || "Drop pictures here";
  }

  #wirePaste() {
    byId("prompt").addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (!files.length || event.clipboardData.getData("text/plain")) return; // of a text copied with its picture the text is meant
      event.preventDefault();
      this.#add(files);
    });
  }

  /** The whole page is the target. What is not a file (a text, a link) is left to the browser. */
  #wireDrop() {
    const target = byId("drop");
    const on = (name, action) =>
      addEventListener(name, (event) => {
        if (!event.dataTransfer?.types.includes("Files")) return;
        event.preventDefault(); // else the browser would leave the page for the file
        action(event);
      });
    const show = ({ dataTransfer }) => {
      dataTransfer.dropEffect = "copy";
      target.hidden = false;
    };
    on("dragenter", show);
    on("dragover", show);
    on("dragleave", (event) => {
      if (event.relatedTarget === null) target.hidden = true; // they left the window
    });
    addEventListener("pointermove", () => (target.hidden = true)); // not while something is dragged: given up without a word
    on("drop", ({ dataTransfer }) => {
      target.hidden = true;
      this.#add([...dataTransfer.files]);
    });
  }

  // -------------------------------------------------------------------------------------------------------------- taking

  #add(files) {
    if (this.#why) return this.say(`${this.#why}.`);
    this.say("");
    this.#numReading += 1;
    const into = this.#chosen; // another conversation may be shown when they are read
    this.#reading = this.#reading.then(async () => {
      const wrong = [];
      for (const file of files) {
        const why = await this.#take(file, into).catch((error) => `${file.name} cannot be read: ${error.message}`);
        if (why) wrong.push(why);
      }
      this.#numReading -= 1;
      if (wrong.length) this.say(wrong.join(" "));
      if (into === this.#chosen) this.#draw();
      this.page.added();
    });
  }

  /** Adds the file to `into`, or gives the reason why not. */
  async #take(file, into) {
    const { maxCount, maxBytes, maxFileBytes, formats } = this.#limits;
    const others = [...this.page.earlier(), ...into];
    if (others.length >= maxCount) return `${file.name} is one too many: at most ${maxCount} pictures are taken in a conversation.`;
    const has = `${file.name} has ${sizeText(file.size)}`;
    if (file.size > maxFileBytes) return `${has}; at most ${sizeText(maxFileBytes, Math.floor)} are taken.`;
    const all = others.reduce((sum, { size }) => sum + size, file.size);
    if (all > maxBytes)
      return `${has}; with the other pictures of this conversation that makes ${sizeText(all)}, and at most ${sizeText(maxBytes, Math.floor)} are taken together.`;
    const bytes = await file.arrayBuffer(); // a copy: the file itself may change before it is sent again
    const head = String.fromCharCode(...new Uint8Array(bytes, 0, Math.min(MAGIC_BYTES, bytes.byteLength)));
    const format = formats.find(({ magic }) => magic.test(head));
    if (!format) return `${file.name} is no picture that the server reads; it takes ${formats.map(({ name }) => name).join(", ")}.`;
    into.push(await this.blobs.add(unusedName(file.name, into), new Blob([bytes], { type: format.type })));
    this.page.say(`Added ${into.at(-1).name}`);
    return "";
  }

  #draw() {
    this.list.replaceChildren(...this.#chosen.map((picture, k) => this.#chip(picture, k)));
    this.list.hidden = !this.#chosen.length;
  }

  #chip(picture, k) {
    const remove = () => {
      const [removed] = this.#chosen.splice(k, 1);
      this.say("");
      this.page.say(`Removed ${removed.name}`);
      this.#draw();
      this.page.removed(removed);
      (this.list.querySelectorAll("button")[Math.min(k, this.#chosen.length - 1)] ?? byId("prompt")).focus();
    };
    const words = h("span", { class: "chip-words" }, h("span", { class: "chip-name", dir: "auto" }, ...nodesOf(picture.name)), sizeText(picture.size));
    return h("li", { class: "chip" }, this.blobs.thumbnail(picture), words, iconButton("close", `Remove ${picture.name}`, remove));
  }
}

/** "image.png", or "image 2.png" where that is taken: pasted pictures all have the same name. */
function unusedName(name, pictures) {
  const [, stem, end] = name.match(/^(.+?)(\.[^.]*)?$/s) ?? [null, "picture", ""];
  const names = new Set(pictures.map((picture) => picture.name));
  let unused = name || stem;
  for (let k = 2; names.has(unused); k += 1) unused = `${stem} ${k}${end ?? ""}`;
  return unused;
}
