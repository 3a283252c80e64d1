/**
 * What adds to the chat without being looked at first. It is brought once the page stands; what is sent before waits for it.
 *
 * Owns the list: each module's class is made with the page and handed to chat.use(). Knows nothing of what they add.
 */

import { useStyle } from "./dom.js";

const PLUGINS = [
  { name: "announcing", load: () => import("./announcing.js").then((m) => m.Announcing) },
  { name: "context", load: () => import("./context.js").then((m) => m.Context) },
  { name: "recorder", load: () => import("./recorder.js").then((m) => m.Recorder) },
  { name: "token-log", load: () => import("./token-log.js").then((m) => m.TokenLog) },
  { name: "branching", load: () => import("./branching.js").then((m) => m.Branching) },
  { name: "hits", load: () => import("./hits.js").then((m) => m.Hits), style: "hits" },
  { name: "structure", load: () => import("./structure.js").then((m) => m.Structure), style: "structure" },
  { name: "tools", load: () => import("./tools.js").then((m) => m.Tools), style: "tools" },
];

/** Brings them. A part that cannot be loaded is missed alone. */
export async function extend(page) {
  const brought = await Promise.allSettled(PLUGINS.map(async ({ load, style }) => {
    const [Plugin] = await Promise.all([load(), style && useStyle(style)]);
    page.chat.use(new Plugin(page));
  }));
  const lost = brought.filter(({ status }) => status === "rejected");
  for (const { reason } of lost) page.say(`A part of the page could not be loaded: ${reason.message}`);
}
