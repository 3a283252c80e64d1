/**
 * Whether answers can be held to a form, as the server says it: each form is asked about once, when nothing has been typed for a moment.
 *
 * Owns what it said, and where in a text that is. Knows nothing of what makes a form, or of fields on screen.
 */

import { step } from "../json/reader.js";

const WAIT_MS = 300; // after the last keystroke
const MAX_KNOWN = 40; // checked forms

/** The page's `event`, and "blocks", say that there is news. */
export class FormChecks {
  #known = new Map(); // fields as JSON -> null (it can be), or {message, param}
  #timer = 0;
  #asked = null;

  constructor(page, event) {
    this.page = page;
    this.event = event;
    this.failure = null; // why it could not be asked
    page.addEventListener("ready", () => this.changed());
  }

  /** The form is another one, or the server may say something else now. */
  changed() {
    this.#tell(null);
  }

  /** What is known of these fields: null where they are good, {message, param}, or undefined where that is being asked. */
  of(fields) {
    if (!Object.keys(fields).length) return null;
    const key = JSON.stringify(fields);
    if (this.#known.has(key)) return this.#known.get(key);
    if (this.#asked !== key) this.#ask(fields, key);
    return undefined;
  }

  #ask(fields, key) {
    clearTimeout(this.#timer);
    this.#asked = key;
    this.#timer = setTimeout(async () => {
      const found = await this.page.server.post("forms/check", fields).catch((error) => ({ failure: error }));
      if (this.#asked === key) this.#asked = null;
      const isRefused = found.failure?.status === 400;
      if (isRefused || !found.failure) this.#know(key, isRefused ? found.failure : found.error);
      this.#tell(isRefused ? null : (found.failure ?? null));
    }, WAIT_MS);
  }

  #know(key, problem) {
    this.#known.set(key, problem);
    if (this.#known.size > MAX_KNOWN) this.#known.delete(this.#known.keys().next().value);
  }

  #tell(failure) {
    this.failure = failure;
    for (const name of [this.event, "blocks"]) this.page.dispatchEvent(new Event(name));
  }
}

/** The place of a value that the server names by its path behind `prefix`, "properties.a.items"; of the nearest that there is. */
export function placeOfParam(param, prefix, value, places) {
  if (!param?.startsWith(prefix)) return null;
  let rest = param.slice(prefix.length);
  let at = value;
  let pointer = "";
  while (rest && at && typeof at === "object") {
    const steps = Object.keys(at).flatMap((key) => spelt(key, Array.isArray(at)).map((words) => ({ key, words })));
    const fits = steps.filter(({ words }) => rest.startsWith(words) && /^$|^[.[]/.test(rest.slice(words.length)));
    const [{ key, words } = {}] = fits.sort((a, b) => b.words.length - a.words.length);
    if (key === undefined) break;
    rest = rest.slice(words.length);
    at = at[key];
    pointer += step(key);
  }
  return places.get(pointer)?.from ?? null;
}

/** How the server may write this step of a path: [2], .name, ['another name']. */
function spelt(key, isIndex) {
  if (isIndex) return [`[${key}]`];
  const quote = key.includes("'") && !key.includes('"') ? '"' : "'";
  const quoted = [...key].slice(0, 60).join("").replaceAll("\\", "\\\\");
  return [`.${key}`, `[${quote}${quote === "'" ? quoted.replaceAll("'", "\\'") : quoted}${quote}]`];
}
