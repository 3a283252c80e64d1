/**
 * Whether the server is there: looks for it until it takes questions, again when it is lost, and shows the state in the top bar.
 *
 * Owns the words of that state. Knows nothing of answers; those that were cut go on when this has told the wire (server.js).
 */

import { byId, h } from "../ui/dom.js";

const READY_TIMEOUT_MS = 5_000; // a network that swallows packets must not hold the next try for longer
const LOADING_MS = 1_000; // between looks at a server that is starting
const FIRST_MS = 250; // of waits for a server that is not there; each is twice the last one
const LONGEST_MS = 8_000;
const STEADY_MS = 5_000; // a connection that holds for less was none
const QUIET_TRIES = 2; // fail before more than "Reconnecting…" is said

export class Connection {
  #tries = 0; // that failed since the server was last there for a while
  #turn = 0; // of looks: an older one is not heard
  #timer = 0;
  #isLooking = false;
  #liveAt = 0;
  #told = ""; // what the status region said

  /** `page` has learn(), which is called whenever the server is there (again), needKey(ApiError), say(text) and
   *  away(why) with a reason while nothing can be asked, "" when it can. */
  constructor(server, page) {
    this.server = server;
    this.page = page;
    this.state = ""; // live, starting, reconnecting, offline or locked
    this.retry = h("button", { type: "button", class: "link-button retry", hidden: true, onclick: () => this.look() }, "Retry now");
    byId("server-state").after(this.retry);
    server.onLost = () => this.#lost();
    addEventListener("online", () => this.#changed());
    addEventListener("offline", () => this.#changed());
    document.addEventListener("visibilitychange", () => document.hidden || this.#changed());
  }

  /** Looks for the server, now. */
  async look() {
    clearTimeout(this.#timer);
    this.#turn += 1;
    const turn = this.#turn;
    this.#isLooking = true;
    try {
      const { isReady, reason, progress } = await ready(this.server);
      if (turn !== this.#turn) return;
      if (isReady) await this.page.learn();
      if (turn !== this.#turn) return;
      if (isReady) this.#found();
      else this.#isStarting(reason, progress);
    } catch (error) {
      if (turn === this.#turn) this.#failed(error);
    }
  }

  #found() {
    this.#isLooking = false;
    this.#liveAt = performance.now();
    this.#show("live", "ready", "Ready");
    if (this.#told) this.#tell("Connected again");
    this.#told = "";
    this.server.reached();
  }

  #isStarting(reason, progress) {
    this.#tries = 0;
    const words = progress ? loadingWords(progress) : /loading/.test(reason) ? "Loading model…" : "Starting";
    this.#show("starting", "starting", words, reason);
    this.#timer = setTimeout(() => this.look(), LOADING_MS);
  }

  #failed(error) {
    if (error.status === 401) {
      this.#isLooking = false;
      this.#show("locked", "down", "Key needed", error.message);
      return this.page.needKey(error);
    }
    this.#tries += 1;
    this.#wait(error);
  }

  #lost() {
    if (this.#isLooking) return;
    if (performance.now() - this.#liveAt > STEADY_MS) this.#tries = 0;
    if (this.#tries === 0) this.look();
    else this.#wait();
    this.#tries += 1;
  }

  /** The network, or whether somebody looks. */
  async #changed() {
    if (this.state === "locked" || (this.state === "live" && (await this.server.probe().catch(() => false)))) return;
    this.look();
  }

  /** Counts down to the next look. */
  #wait(error = null) {
    this.#isLooking = true;
    const backOff = Math.min(LONGEST_MS, FIRST_MS * 2 ** (this.#tries - 1));
    const until = performance.now() + backOff * (0.75 + Math.random() / 2); // not all pages at once, behind a restart
    const isOffline = navigator.onLine === false;
    const what = isOffline ? "No network" : error && error.code !== "unreachable" ? "Server has a problem" : "Server not reachable";
    if (this.#tries > QUIET_TRIES && this.#told !== what) this.#tell(what);
    const tick = () => {
      const left = until - performance.now();
      if (left <= 0) return this.look();
      const seconds = Math.ceil(left / 1_000);
      const words = this.#tries > QUIET_TRIES ? `${what}, retrying in ${seconds} s` : "Reconnecting…";
      this.#show(isOffline ? "offline" : "reconnecting", "down", words, error?.message ?? "");
      this.#timer = setTimeout(tick, Math.min(left, left - (seconds - 1) * 1_000));
    };
    clearTimeout(this.#timer);
    tick();
  }

  #tell(words) {
    this.#told = words;
    this.page.say(words);
  }

  #show(state, dot, words, reason = "") {
    this.state = state;
    byId("dot").dataset.state = dot;
    const place = byId("server-state");
    place.classList.toggle("loud", state !== "live");
    place.title = reason;
    place.textContent = words;
    const isAway = state === "starting" || (["reconnecting", "offline"].includes(state) && this.#tries > QUIET_TRIES);
    this.page.away(isAway ? words : "");
    const hadFocus = this.retry === document.activeElement;
    this.retry.hidden = this.#tries <= QUIET_TRIES || !["reconnecting", "offline"].includes(state);
    if (hadFocus && this.retry.hidden) byId("prompt").focus();
  }
}

/** Whether the server takes questions; else its own words for why not yet, and how far it is. Throws ApiError when unreachable. */
async function ready(server) {
  const response = await server.fetch("ready", { signal: AbortSignal.timeout(READY_TIMEOUT_MS) });
  if (response.ok) return { isReady: true };
  const body = await response.json().catch(() => ({}));
  return { isReady: false, reason: String(body.error?.message ?? body.status ?? "starting"), progress: body.progress ?? null };
}

/** "Loading model… 43 % (12 of 28 GB)"; other parts of the start have counts instead of bytes. */
function loadingWords({ phase, done, total }) {
  if (!total) return "Loading model…";
  const percent = Math.floor((100 * done) / total);
  if (phase !== "weights") return `Starting: ${phase}… ${percent} %`;
  const [size, unit] = total >= 1e9 ? [1e9, "GB"] : [1e6, "MB"];
  const count = (bytes) => (bytes / size).toLocaleString("en", { maximumFractionDigits: bytes / size < 10 ? 1 : 0 });
  return `Loading model… ${percent} % (${count(done)} of ${count(total)} ${unit})`;
}
