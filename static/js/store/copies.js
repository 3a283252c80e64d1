/**
 * Copies of conversations: the whole of one, or the way to one of its messages.
 *
 * A copy shares nothing with what it was made of but the bytes of pictures, which lie under their hash.
 */

import { newId, pathOf } from "./store.js";

/** A conversation of its own with these messages of another one. */
function copyWith(conversation, messages, title) {
  const ids = new Map(messages.map(({ id }) => [id, newId()]));
  const copied = messages.map((message) => {
    const copy = structuredClone(message);
    const isRunning = message.state === "streaming" || message.state === "elsewhere";
    return { ...copy, id: ids.get(message.id), parent: ids.get(message.parent) ?? null, ...(isRunning && { state: "stopped" }) };
  });
  const { messages: _, ...rest } = conversation;
  const now = Date.now();
  const head = ids.get(conversation.head) ?? copied.at(-1)?.id ?? null;
  return { ...structuredClone(rest), id: newId(), title, created: now, updated: now, draft: "", head, messages: copied };
}

/** All of it, with every branch. */
export const copyOf = (conversation, title) => copyWith(conversation, conversation.messages, title);

/** The messages from the first one to this one. */
export function branchAt(conversation, message, title) {
  return copyWith(conversation, pathOf({ ...conversation, head: message.id }), title);
}
