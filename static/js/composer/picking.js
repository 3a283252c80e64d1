/**
 * The pictures of the message being written, for as long as what chooses them (pictures.js) is on its way: it is not needed to ask
 * something.
 */

export class Pictures {
  #part = null;
  #chosen = [];
  #limits = undefined; // not known
  #note = "";

  constructor(blobs, page) {
    import("./pictures.js").then(
      (module) => {
        this.#part = new module.Pictures(blobs, page);
        if (this.#limits !== undefined) this.#part.allow(this.#limits);
        this.#part.show(this.#chosen);
        this.#part.say(this.#note);
      },
      (error) => page.say(`Pictures cannot be added: ${error.message}`),
    );
  }

  get chosen() {
    return this.#part?.chosen ?? this.#chosen;
  }

  get isReading() {
    return this.#part?.isReading ?? false;
  }

  allow(limits) {
    this.#limits = limits;
    this.#part?.allow(limits);
  }

  show(pictures) {
    this.#chosen = pictures;
    this.#part?.show(pictures);
  }

  say(text) {
    this.#note = text;
    this.#part?.say(text);
  }
}
