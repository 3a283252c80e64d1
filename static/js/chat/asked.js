/**
 * The body of a request: what of a conversation is sent to have a message answered, or gone on with.
 *
 * Owns that choice: the system prompt, the messages above, pictures as data: URLs, the sampling. Knows nothing of the page; parts
 * of it add their own fields afterwards (chat.js).
 */

import { samplingBody } from "../settings/sampling.js";
import { pathOf } from "../store/store.js";

const STREAMED = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true }, return_draft_marks: true, return_timings: true };

/** The messages above this one that are sent: none before the one that `extra.from` names. */
function above(conversation, message) {
  const path = pathOf({ ...conversation, head: message.parent });
  return path.slice(Math.max(0, path.findIndex(({ id }) => id === conversation.extra?.from)));
}

/**
 * The body that has `message` answered, or gone on with if it `continues`. `given(message)` are the turns that a part of the page
 * sends in a message's place, `dataUrl(picture)` reads a picture and may refuse; `sources` is told of each turn the id of its message.
 */
export async function bodyOf(conversation, message, { model, continues = false, given, dataUrl, sources = new Map() }) {
  const messages = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const other of above(conversation, message)) {
    let turns = given(other);
    if (!turns.length && (other.role === "user" || other.content)) turns = [await turnOf(other, dataUrl)];
    for (const turn of turns) sources.set(turn, other.id);
    messages.push(...turns);
  }
  if (continues) {
    messages.push({ role: "assistant", content: message.content });
    sources.set(messages.at(-1), message.id);
  }
  const body = { model: model || undefined, messages, ...STREAMED, ...samplingBody(conversation.sampling) };
  return continues ? { ...body, continue_final_message: true } : body;
}

/** A message as the server takes it: pictures first, as the page shows them. A thought is not sent back. */
async function turnOf({ role, content, pictures }, dataUrl) {
  if (!pictures?.length) return { role, content };
  const urls = await Promise.all(pictures.map(dataUrl));
  const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role, content: content ? [...parts, { type: "text", text: content }] : parts };
}
