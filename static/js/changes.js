/**
 * What can be done with a message that is there: go on with an answer, change a text in its place or beside it, take a message out.
 *
 * Each function changes the conversation, has it saved and drawn. No change but taking out removes a message.
 */

import { Answer } from "./answers.js";
import { byId } from "./dom.js";
import { addMessage, showVariant, variantsOf } from "./store.js";
import { offerUndo } from "./toast.js";

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
  const show = (focused) => {
    chat.page.save(conversation);
    chat.page.changed(conversation);
    if (conversation !== chat.conversation) return;
    chat.draw();
    chat.redraw(); // how many versions there are has changed
    const button = focused() && chat.itemOf(focused())?.under.querySelector("button:not(:disabled)");
    (button ?? byId("prompt")).focus();
  };
  chat.blobs.forget(pictures);
  show(() => shown ?? conversation.messages.find(({ id }) => id === conversation.head));
  offerUndo(words, () => {
    putBack();
    chat.blobs.keep(pictures);
    show(() => message);
  });
}

/**
 * Takes the message out of the conversation. Returns words for what was done, the version that is shown in its place (null: none is
 * left), the pictures that nothing names any more, and a function that puts everything back.
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
  const putBack = () => {
    const before = new Set(messages);
    conversation.messages = [...messages, ...conversation.messages.filter((other) => !before.has(other))];
    conversation.head = head;
  };
  const words = taken.size > 1 ? `Deleted message ${number} and ${taken.size - 1} below it` : `Deleted message ${number}`;
  return { words, shown, pictures: pictures.filter(({ id }) => !kept.has(id)), putBack };
}
