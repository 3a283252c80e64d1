/**
 * What can be done with a message that is there: go on with an answer, change a text in its place or beside it, take a message out.
 *
 * Each function changes the conversation, has it saved and drawn. No change but taking out removes a message.
 */

import { addMessage, pathOf, showVariant, variantsOf } from "../store/store.js";
import { byId } from "../ui/dom.js";
import { offerUndo, tell } from "../ui/toast.js";
import { Answer } from "./answers.js";

/** Goes on with the text that this answer has, in the same message. */
export function continueAnswer(chat, message) {
  if (chat.isBusy()) return;
  const whole = message.content.replace(/\ufffd$/, ""); // half of a character: it was cut in between
  const isOther = whole !== message.content;
  message.content = whole;
  message.marks ??= [whole.length];
  Object.assign(message, { state: "streaming", error: undefined, param: undefined, finish: undefined, isEdited: undefined });
  if (isOther) chat.rebuild(message);
  chat.itemOf(message)?.fill();
  chat.run(new Answer(chat.conversation, message, { continues: true }));
}

/** Ends the thought of an answer under way, so that the answer itself begins. */
export async function endThought(chat, { state, requestId }) {
  if (state !== "streaming") return;
  const asked = chat.server.post("v1/chat/completions/control", { id: requestId, action: "end_reasoning" });
  await asked.catch((error) => tell(`The thought could not be ended: ${error.message}`));
}

/** Has this message on screen, on whichever branch it is. */
export function showMessage(chat, message) {
  const { conversation } = chat;
  if (!pathOf(conversation).includes(message)) {
    if (chat.isBusy()) return;
    showVariant(conversation, message);
    chat.page.save(conversation);
    chat.draw();
  }
  while (!chat.itemOf(message) && !chat.earlier.hidden) chat.mountEarlier();
  chat.reading.follow(false);
  chat.itemOf(message)?.element.scrollIntoView({ block: "center" });
}

/** Shows another version of a message; `label` is the name of the button that has the focus. */
export function switchTo(chat, message, label) {
  if (chat.isBusy()) return;
  showVariant(chat.conversation, message);
  chat.page.save(chat.conversation);
  chat.draw();
  const item = chat.itemOf(message);
  item.drawUnder(); // how many there are may have changed
  const buttons = [...item.under.querySelectorAll(".variants button:not(:disabled)")];
  (buttons.find((button) => button.title.startsWith(label)) ?? buttons[0])?.focus();
}

/** Another text for this message, in its place. What follows it stays. */
export function rewrite(chat, message, content, pictures = message.pictures) {
  Object.assign(message, { content, pictures: pictures?.length ? pictures : undefined, marks: undefined, edit: undefined });
  if (message.role === "assistant") message.isEdited = true;
  chat.page.save(chat.conversation);
  chat.rebuild(message);
}

/** An answer of this text beside this one, which stays as a version. */
export function addVersion(chat, message, content) {
  message.edit = undefined;
  const copy = addMessage(chat.conversation, message.parent, message.role, content);
  copy.isEdited = true;
  chat.page.save(chat.conversation);
  chat.draw();
  return copy;
}

/** Takes out this message and all below it; for ten seconds it can be had back. */
export function remove(chat, message) {
  const { conversation } = chat;
  if (chat.isBusy()) return;
  const { words, shown, pictures, putBack } = takeOut(conversation, message, chat.itemOf(message).number);
  const show = (changed, focused) => {
    chat.page.save(changed);
    chat.page.changed(changed);
    if (changed !== chat.conversation) return;
    chat.draw();
    chat.redraw(); // how many versions there are has changed
    const button = focused() && chat.itemOf(focused())?.under.querySelector("button:not(:disabled)");
    (button ?? byId("prompt")).focus();
  };
  chat.blobs.forget(pictures);
  show(conversation, () => shown ?? conversation.messages.find(({ id }) => id === conversation.head));
  offerUndo(words, async () => {
    const there = await chat.page.find(conversation.id); // it may have been read anew, and gone on with
    if (!there) return tell("The conversation is not here any more.");
    putBack(there);
    chat.blobs.keep(pictures);
    show(there, () => message);
  });
}

/**
 * Takes the message out of the conversation. Returns words for what was done, the version that is shown in its place (null: none is
 * left), the pictures that nothing names any more, and a function that puts everything back, where the conversation is this now.
 */
function takeOut(conversation, message, number) {
  const { messages, head } = conversation;
  const taken = new Set([message.id]);
  for (const { id, parent } of messages) if (taken.has(parent)) taken.add(id); // parents stand before what is below them
  const variants = variantsOf(conversation, message);
  const at = variants.indexOf(message);
  const shown = variants[at - 1] ?? variants[at + 1] ?? null;
  conversation.messages = messages.filter(({ id }) => !taken.has(id));
  if (shown) showVariant(conversation, shown);
  else conversation.head = message.parent;
  const kept = new Set(conversation.messages.flatMap((other) => other.pictures ?? []).map(({ id }) => id));
  const pictures = messages.filter(({ id }) => taken.has(id)).flatMap((one) => one.pictures ?? []);
  const putBack = (there) => {
    const here = new Set(there.messages.map(({ id }) => id));
    const place = new Map(messages.map(({ id }, k) => [id, k])); // what came since stands behind
    const back = messages.filter(({ id }) => taken.has(id) && !here.has(id));
    const placeOf = ({ id }) => place.get(id) ?? messages.length;
    there.messages = [...there.messages, ...back].sort((a, b) => placeOf(a) - placeOf(b));
    there.head = head;
  };
  const words = taken.size > 1 ? `Deleted message ${number} and ${taken.size - 1} below it` : `Deleted message ${number}`;
  return { words, shown, pictures: pictures.filter(({ id }) => !kept.has(id)), putBack };
}
