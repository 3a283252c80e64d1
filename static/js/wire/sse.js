/**
 * One answer over HTTP, as server-sent events, for where no WebSocket opens.
 *
 * Owns one request. Knows nothing of what becomes of an answer when its connection is lost.
 */

import { ApiError } from "./server.js";

const SILENCE_MS = 45_000; // the server sends a comment every 15 s while there is nothing to say

/** Reads the answer to a body, or, without one, goes on with the stream `name` behind chunk number `after`. @param {Listener} on as socket.js has it, and `opened`. Returns what ends the reading, without a word to `on`. */
export function readStream(server, { body, name, after, keeps }, on) {
  const controller = new AbortController();
  const read = async () => {
    const response = body ? await begin(server, body, keeps, controller.signal) : await goOn(server, name, after, controller.signal);
    if (body) on.opened({ status: response.status, headers: [...response.headers] });
    if (!response.ok) throw await ApiError.of(response);
    if (response.status === 204) return on.done(null); // it had ended with what was there
    if (keeps) on.named(response.headers.get("x-request-id"));
    await pass(response.body, on);
  };
  read().catch((error) => {
    if (controller.signal.aborted) return;
    if (error instanceof ApiError) on.error(error);
    else on.lost("The connection to the server was lost");
  });
  return () => controller.abort();
}

function begin(server, body, keeps, signal) {
  const headers = { "Content-Type": "application/json", ...(keeps && { "X-StreamServe-Resumable": "1" }) };
  return server.fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
}

function goOn(server, name, after, signal) {
  const headers = after ? { "Last-Event-ID": `${name}:${after}` } : {};
  return server.fetch(`v1/streams/${encodeURIComponent(name)}`, { headers, signal });
}

async function pass(stream, on) {
  let usage = null;
  for await (const { data, number } of events(stream)) {
    if (data === "[DONE]") return on.done(usage);
    const chunk = JSON.parse(data);
    if (chunk.error) throw ApiError.fromBody(chunk);
    if (chunk.usage) usage = chunk.usage;
    on.chunk(chunk, number);
  }
  on.lost("The connection closed before the answer was complete");
}

/** The data of each event of a byte stream, and its number where it has one. Comments (keep-alives) are passed over. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await soon(reader.read());
      if (done) return;
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = (name) => block.split("\n").filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trimStart());
        const data = fields("data");
        if (data.length) yield { data: data.join("\n"), number: Number(fields("id")[0]?.split(":").pop()) || undefined };
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // already closed or aborted: nothing is left to cancel
  }
}

/** What is read next; a connection that says nothing for long is dead. */
async function soon(reading) {
  let timer = 0;
  const silence = new Promise((_, reject) => (timer = setTimeout(() => reject(new Error("silence")), SILENCE_MS)));
  try {
    return await Promise.race([reading, silence]);
  } finally {
    clearTimeout(timer);
  }
}
