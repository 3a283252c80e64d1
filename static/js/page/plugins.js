/**
 * What adds to the chat without being looked at first. It is brought once the page stands; what is sent before waits for it.
 *
 * Owns the list: each module's class is made with the page and handed to chat.use(). And what is brought behind them, so that it is
 * there when the server is not. Knows nothing of what they add.
 */

import { useStyle } from "../ui/dom.js";

const PLUGINS = [
  { name: "announcing", load: () => import("../chat/announcing.js").then((m) => m.Announcing) },
  { name: "context", load: () => import("../composer/context.js").then((m) => m.Context) },
  { name: "recorder", load: () => import("../raw/recorder.js").then((m) => m.Recorder) },
  { name: "token-log", load: () => import("../tokens/log.js").then((m) => m.TokenLog) },
  { name: "branching", load: () => import("../chat/branching.js").then((m) => m.Branching) },
  { name: "hits", load: () => import("../cache/hits.js").then((m) => m.Hits), style: "hits" },
  { name: "structure", load: () => import("../structure/plugin.js").then((m) => m.Structure), style: "structure" },
  { name: "tools", load: () => import("../tools/plugin.js").then((m) => m.Tools), style: "tools" },
];

// What the chat may want when the server is gone: nothing could be brought then.
const LATER = [
  () => import("../chat/asked.js"),
  () => import("../chat/changes.js"),
  () => import("../chat/editing.js"),
  () => import("../chat/figures-table.js"),
  () => import("../chat/marks-view.js"),
  () => import("../chat/thought.js"),
  () => import("../store/blob-keeping.js"),
  () => import("../ui/copying.js"),
  () => import("../ui/toast.js"),
  () => import("./keys-dialog.js"),
];

/** Brings them. A part that cannot be loaded is missed alone. */
export async function extend(page) {
  const brought = await Promise.allSettled(PLUGINS.map(async ({ load, style }) => {
    const [Plugin] = await Promise.all([load(), style && useStyle(style)]);
    page.chat.use(new Plugin(page));
  }));
  const lost = brought.filter(({ status }) => status === "rejected");
  for (const { reason } of lost) page.say(`A part of the page could not be loaded: ${reason.message}`);
  Promise.allSettled(LATER.map((load) => load())); // what fails is asked for again where it is needed
}
