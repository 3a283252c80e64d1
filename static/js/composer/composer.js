/**
 * The message being written: its text and pictures, Send and Stop, the question that is being edited.
 *
 * A draft belongs to its conversation and is kept with it; that of a conversation without messages is kept for this tab. Owns the
 * text box and its button. Knows nothing of answers; what the text costs is context.js.
 */

import { pathOf, recall, remember } from "../store/store.js";
import { byId, h, onWidth } from "../ui/dom.js";

const EXAMPLES = [
  "Explain in three sentences why the sky is blue.",
  "Write a Python function that tells whether a word is a palindrome.",
  "List three fruits with their colours, as JSON.",
];

export const isTouch = () => matchMedia("(pointer: coarse)").matches;

const namesPicture = ({ messages }, id) => messages.some(({ pictures }) => pictures?.some((picture) => picture.id === id));

export class Composer {
  #editing = null; // the question being edited
  #editedIn = null; // its conversation
  #chosen = new Map(); // conversation id -> pictures of the message being written
  #block = ""; // why nothing can be sent now

  constructor(page) {
    this.page = page;
    this.prompt = byId("prompt");
    this.button = byId("send");
    this.onChange = () => {}; // what would be sent has changed (context.js)
    this.whyTooMuch = ""; // it is more than the model reads (context.js)
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (page.chat.isStreaming) page.chat.stop();
      else this.#send();
    });
    this.prompt.addEventListener("keydown", (event) => this.#pressed(event));
    this.prompt.addEventListener("input", () => this.#typed());
    onWidth(this.prompt, () => this.#fit()); // lines break elsewhere
    byId("hint-cancel").addEventListener("click", () => this.cancelEdit());
    page.addEventListener("blocks", () => this.changed());
    byId("hint-save").addEventListener("click", () => this.#saveInPlace());
    byId("examples").append(...EXAMPLES.map((text) => h("li", {}, h("button", { type: "button", class: "example", onclick: () => this.#sendExample(text) }, text))));
  }

  get isEditing() {
    return this.#editing !== null;
  }

  get text() {
    return this.prompt.value.trim();
  }

  /** The message that what is written would stand below. */
  get parent() {
    return this.#editing ? this.#editing.parent : this.page.conversation.head;
  }

  /** The pictures of the messages above. */
  get earlierPictures() {
    return pathOf({ ...this.page.conversation, head: this.parent }).flatMap(({ pictures }) => pictures ?? []);
  }

  focus() {
    this.prompt.focus();
  }

  // ---------------------------------------------------------------------------------------------------------- what is shown

  /** Another conversation is on screen. */
  show() {
    this.#editing = this.#editedIn = null;
    const { extra, messages } = this.page.conversation;
    const edited = messages.find(({ id }) => id === extra?.editing?.id);
    if (edited) this.#edit(edited, extra.editing.text);
    else this.#showDraft();
  }

  #showDraft() {
    const { conversation } = this.page;
    const { id, messages } = conversation;
    if (!messages.length) conversation.draft ||= recall("draft", "session");
    if (!this.#chosen.has(id)) this.#chosen.set(id, []);
    this.#setText(conversation.draft);
    this.page.pictures.show(this.#chosen.get(id));
    this.changed();
  }

  #setText(text) {
    this.prompt.value = text;
    this.#fit();
    byId("composer").classList.toggle("editing", this.isEditing);
    byId("hint-keys").hidden = this.isEditing || isTouch();
    byId("hint-editing").hidden = !this.isEditing;
  }

  #fit() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight}px`;
  }

  /** What would be sent is another text, or it can be sent now, or no longer. */
  changed() {
    const { conversation } = this.page;
    if (this.#editedIn === conversation && !conversation.messages.includes(this.#editing)) {
      conversation.draft ||= this.prompt.value; // it was taken out
      this.#endEdit();
    }
    this.showSend();
    this.onChange();
  }

  showSend() {
    const isStop = this.page.chat.isStreaming;
    const why = this.#why;
    this.button.setAttribute("aria-label", isStop ? "Stop" : this.isEditing ? "Send edited message" : "Send");
    this.button.title = isStop ? "" : why;
    this.button.classList.toggle("stop", isStop);
    this.button.querySelector("use").setAttribute("href", isStop ? "#icon-stop" : "#icon-send");
    this.button.disabled = !isStop && !this.#canSend;
    byId("hint-save").disabled = !this.#hasMessage;
  }

  /** From now on nothing can be sent, because of this; "": it can. */
  block(why) {
    this.#block = why;
    this.showSend();
  }

  // --------------------------------------------------------------------------------------------------------------- writing

  #pressed(event) {
    const isComposing = event.isComposing || event.keyCode === 229; // Enter that ends an IME word; Safari only sets the code
    if (event.key !== "Enter" || event.shiftKey || isComposing || isTouch()) return;
    event.preventDefault();
    if (!this.page.chat.isStreaming) this.#send();
  }

  #typed() {
    const { conversation } = this.page;
    this.#fit();
    this.changed();
    if (this.#editing) conversation.extra = { ...conversation.extra, editing: { id: this.#editing.id, text: this.prompt.value } };
    else conversation.draft = this.prompt.value;
    if (!conversation.messages.length) remember("draft", this.prompt.value, "session");
    this.page.saveSoon(conversation);
  }

  /** Whether there is something to send, all of it. */
  get #hasMessage() {
    return Boolean(this.text || this.page.pictures.chosen.length) && !this.page.pictures.isReading;
  }

  /** Why nothing can be sent now; "" where it can. */
  get #why() {
    return this.#block || this.page.chat.fromPlugins("blocks")[0] || this.whyTooMuch;
  }

  get #canSend() {
    return this.#hasMessage && !this.#why;
  }

  #sendExample(text) {
    this.#setText(text);
    this.changed();
    this.#send();
  }

  #send() {
    if (!this.#canSend) return this.#hasMessage && this.page.say(this.#why);
    if (!this.page.chat.conversation) return; // it is still being read
    const { parent, text } = this;
    const pictures = this.page.pictures.chosen;
    this.page.settings?.clearErrors();
    if (!this.#editing) this.#forgetDraft();
    this.#endEdit();
    this.page.chat.ask(text, parent, pictures);
  }

  #forgetDraft() {
    const { conversation } = this.page;
    if (!conversation.messages.length) remember("draft", "", "session");
    conversation.draft = "";
    this.#chosen.delete(conversation.id);
  }

  // --------------------------------------------------------------------------------------------------------------- editing

  /** Takes a question back into the composer. Sending it opens a new branch; the old one stays. */
  edit(message) {
    if (this.page.chat.isBusy()) return;
    this.#edit(message);
    this.focus();
  }

  /** Has a refused question in the composer again, unless something is being written. */
  takeBack(question) {
    const isWriting = this.#editing || this.prompt.value || this.page.pictures.chosen.length;
    if (!isWriting) this.#edit(question);
  }

  #edit(message, text = message.content) {
    this.#editing = message;
    this.#editedIn = this.page.conversation;
    this.#setText(text);
    this.page.pictures.show([...(message.pictures ?? [])]);
    this.changed();
    this.page.say("Editing an earlier message. Escape cancels.");
  }

  cancelEdit() {
    this.#endEdit();
    this.focus();
  }

  async #saveInPlace() {
    if (!this.#hasMessage || this.page.chat.isBusy()) return;
    const [message, text, pictures] = [this.#editing, this.text, this.page.pictures.chosen];
    this.page.blobs.keep(pictures);
    await this.page.chat.change("rewrite", message, text, pictures);
    if (this.#editing !== message) return; // another conversation was chosen: it is kept as it was typed
    this.#endEdit();
    this.page.say("Saved");
    this.focus();
  }

  #endEdit() {
    const { conversation } = this.page;
    this.#editing = this.#editedIn = null;
    if (conversation.extra?.editing) {
      conversation.extra.editing = undefined;
      this.page.saveSoon(conversation);
    }
    this.#showDraft();
  }

  /** A picture was taken out of what is being written; its bytes go unless a message has it. */
  removedPicture(picture) {
    if (!namesPicture(this.page.conversation, picture.id)) this.page.blobs.drop(picture);
    this.changed();
  }
}
