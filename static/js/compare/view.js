/**
 * The view Compare: the same question to two to four columns, each with settings and a conversation of its own.
 *
 * Owns the columns, what is asked of them, and the toolbar and composer that they share. How a column looks is in
 * column.js, how answers arrive in runs.js, what is kept in state.js.
 */

import { samplingBody } from "../settings/sampling.js";
import { copyText } from "../ui/copying.js";
import { byId, h, icon, onWidth } from "../ui/dom.js";
import { plural } from "../ui/numbers.js";
import { offerUndo } from "../ui/toast.js";
import { ColumnView, SETTINGS, typedIn } from "./column.js";
import { Runs } from "./runs.js";
import { MAX_COLUMNS, MIN_COLUMNS, anySeed, letterOf, loadState, messagesOf, newColumn, newTurn, saveState, startState } from "./state.js";

const SAVE_MS = 400; // after the last keystroke
const MAX_SHOWN = 24; // characters of a setting beside its name
const PICTURES = "Questions here are text; pictures can be asked in Chat.";

export class CompareView {
  #state;
  #views = new Map(); // column -> ColumnView
  #batch = new Map(); // column -> turn, of what was asked together
  #saveTimer = 0;
  #leader = null; // the column that the reader moves
  #keys = (event) => this.#pressed(event);

  constructor(page) {
    this.page = page;
    this.runs = new Runs(page.server, {
      text: (column, text, reasoning) => this.#views.get(column)?.append(text, reasoning),
      figures: (column, figures) => this.#views.get(column)?.showFigures(figures),
      named: () => this.#saveSoon(),
      restarted: (column, turn) => this.#views.get(column)?.open(turn),
      waiting: (column, isWaiting) => this.#views.get(column)?.wait(isWaiting),
      ended: (column, turn, error) => this.#ended(column, turn, error),
      recounted: (column, turn) => this.#recounted(column, turn),
    });
    this.#build();
    this.#state = loadState() ?? startState(page.conversation, page.config?.sampling_defaults);
    this.#drawAll();
    page.addEventListener("ready", () => this.#ready());
    page.addEventListener("conversation", () => this.#startFromChat());
    addEventListener("pagehide", () => this.#save());
    if (page.config) this.#ready();
  }

  shown() {
    this.#startFromChat();
    this.runs.see(true);
    document.addEventListener("keydown", this.#keys);
    this.#fitPrompt();
  }

  gone() {
    this.runs.see(false);
    document.removeEventListener("keydown", this.#keys);
    this.#save();
  }

  // ---------------------------------------------------------------------------------------------------------- elements

  #build() {
    const switchOf = (name, label, title) => {
      const box = h("input", { type: "checkbox", onchange: () => this.#switched(name, box.checked) });
      return [box, h("label", { class: "switch", title }, box, label)];
    };
    let sameSeed, together, marks;
    [this.sameSeedBox, sameSeed] = switchOf("isSameSeed", "Same seed", "All columns get this seed");
    [this.togetherBox, together] = switchOf("scrollsTogether", "Scroll together", "Moving one column moves the others to the same answer");
    [this.marksBox, marks] = switchOf("marksDifferences", "Mark differences", "Shows in each answer what differs from column A");
    this.seed = h("input", { type: "text", inputmode: "numeric", class: "seed", "aria-label": "Seed for all columns", spellcheck: "false" });
    this.seed.addEventListener("input", () => {
      this.#state.seed = this.seed.value;
      this.#changed();
    });
    this.addButton = h("button", { type: "button", class: "button", onclick: () => this.#add(newColumn(this.#state.columns.at(-1))) }, icon("plus"), "Add column");
    this.clearButton = h("button", { type: "button", class: "button", onclick: () => this.#clear() }, "Clear answers");
    this.progress = h("p", { class: "progress" });
    this.columns = h("div", { class: "columns-row" });
    this.columns.addEventListener("click", (event) => {
      const button = event.target.closest(".copy-code:not(.colour-code)");
      if (button) copyText(button.closest(".code").querySelector("code").textContent, button);
    });
    this.prompt = h("textarea", { id: "compare-prompt", rows: 1, dir: "auto", placeholder: "Ask all columns", enterkeyhint: "send" });
    this.runAll = h("button", { type: "submit", class: "button primary run-all" });
    this.hint = h("p", { class: "hint" }, h("span", { class: "compare-keys" }, h("kbd", {}, "Enter"), " runs all · ", h("kbd", {}, "Esc"), " stops all"));
    this.pictures = h("span", { hidden: true }, PICTURES);
    this.hint.append(this.pictures);
    this.composer = h("form", { class: "composer", autocomplete: "off" }, h("label", { class: "hidden", for: "compare-prompt" }, "Question for all columns"), this.prompt, this.runAll);
    this.#wireComposer();
    this.element = h(
      "div",
      { class: "compare-view" },
      h("div", { class: "compare-bar" }, h("div", { class: "switches" }, sameSeed, this.seed, together, marks), this.progress, this.addButton, this.clearButton),
      this.columns,
      h("div", { class: "composer-wrap" }, this.composer, this.hint),
    );
  }

  #wireComposer() {
    this.composer.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.runs.size) this.#stopAll();
      else this.#runAll();
    });
    this.prompt.addEventListener("keydown", (event) => {
      const isComposing = event.isComposing || event.keyCode === 229; // Enter that ends an IME word; Safari only sets the code
      if (event.key !== "Enter" || event.shiftKey || isComposing || matchMedia("(pointer: coarse)").matches) return;
      event.preventDefault();
      if (!this.runs.size && this.#question()) this.#runAll();
    });
    onWidth(this.prompt, () => this.#fitPrompt());
    this.prompt.addEventListener("input", () => {
      this.#state.draft = this.prompt.value;
      this.#fitPrompt();
      this.#showRuns();
      this.#saveSoon();
    });
  }

  #fitPrompt() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight}px`;
  }

  /** Escape stops all columns, the key of the chat's message box leads to this one. */
  #pressed(event) {
    const isStop = event.key === "Escape" && !event.isComposing && this.runs.size && !document.querySelector("dialog[open]");
    const isFocus = event.key === "/" && (event.ctrlKey || event.metaKey);
    if (!isStop && !isFocus) return;
    event.preventDefault();
    event.stopPropagation();
    if (isStop) this.#stopAll();
    else this.prompt.focus();
  }

  // ------------------------------------------------------------------------------------------------------------ columns

  #drawAll() {
    const state = this.#state;
    this.sameSeedBox.checked = state.isSameSeed;
    this.togetherBox.checked = state.scrollsTogether;
    this.marksBox.checked = state.marksDifferences;
    this.seed.value = state.seed;
    this.prompt.value = state.draft;
    this.#views.clear();
    for (const column of state.columns) this.#view(column);
    this.#drawColumns();
  }

  #view(column) {
    const view = new ColumnView(column, {
      run: (isAgain = !this.#question()) => this.#runOne(column, isAgain),
      stop: () => this.runs.stop(column),
      use: () => this.#use(column),
      duplicate: () => this.#add(newColumn(column), column),
      remove: () => this.#remove(column),
      changed: () => this.#changed(),
    });
    this.#views.set(column, view);
    view.showTurns();
    const leads = () => (this.#leader = column);
    for (const event of ["wheel", "pointerdown", "touchstart", "keydown", "focusin"]) view.scroll.addEventListener(event, leads, { passive: true });
    view.scroll.addEventListener("scroll", () => this.#scrolled(column), { passive: true });
    return view;
  }

  /** Puts the columns in their order, names them, and shows how they differ; those that stand stay where they are. */
  #drawColumns() {
    const { columns } = this.#state;
    const elements = columns.map((column) => this.#views.get(column).element);
    for (const element of [...this.columns.children]) if (!elements.includes(element)) element.remove();
    elements.forEach((element, k) => this.columns.children[k] === element || this.columns.insertBefore(element, this.columns.children[k] ?? null));
    columns.forEach((column, k) => this.#views.get(column).place(letterOf(k), k + 1, columns.length, columns.length < MAX_COLUMNS, columns.length > MIN_COLUMNS));
    this.columns.dataset.count = columns.length;
    this.addButton.disabled = columns.length >= MAX_COLUMNS;
    this.#showSettings();
    this.#showRuns();
    this.#showComparison();
  }

  /** What holds in each column, and what of it differs. */
  #showSettings() {
    const { columns, isSameSeed, seed } = this.#state;
    const { sampling_defaults: defaults = {}, takes = null } = this.page.config ?? {};
    this.seed.hidden = !isSameSeed;
    const texts = new Map(columns.map((column) => [column, SETTINGS.map((setting) => this.#textOf(column, setting, defaults))]));
    const differing = SETTINGS.map((_, k) => new Set([...texts.values()].map((all) => all[k])).size > 1);
    for (const column of columns) {
      const view = this.#views.get(column);
      view.showDefaults(defaults, takes, isSameSeed ? seed : null);
      view.showDifferences(SETTINGS.map(({ name, label }, k) => ({ name, label, text: short(texts.get(column)[k]) })).filter((_, k) => differing[k]));
    }
  }

  /** What this setting is in this column, in words. */
  #textOf(column, { name, otherwise }, defaults) {
    const { isSameSeed, seed } = this.#state;
    return (name === "seed" && isSameSeed ? seed : typedIn(column, name)).trim() || String(defaults[name] ?? otherwise) || "default";
  }

  #samplingOf(column) {
    const { isSameSeed, seed } = this.#state;
    return isSameSeed ? { ...column.sampling, seed } : column.sampling;
  }

  #add(column, after = this.#state.columns.at(-1)) {
    this.#touch();
    this.#state.columns.splice(this.#state.columns.indexOf(after) + 1, 0, column);
    const view = this.#view(column);
    this.#drawColumns();
    this.#saveSoon();
    view.element.scrollIntoView({ block: "nearest", inline: "nearest" });
    view.settings.querySelector("summary").focus({ preventScroll: true });
    this.page.say(`Added column ${letterOf(this.#state.columns.indexOf(column))}`);
  }

  #remove(column) {
    this.runs.stop(column);
    const { columns } = this.#state;
    const place = columns.indexOf(column);
    columns.splice(place, 1);
    this.#views.delete(column);
    this.#batch.delete(column);
    this.#touch();
    this.#drawColumns();
    this.#saveSoon();
    this.#views.get(columns[Math.min(place, columns.length - 1)]).settings.querySelector("summary").focus();
    offerUndo(`Removed column ${letterOf(place)}`, () => {
      if (this.#state.columns.length < MAX_COLUMNS) this.#add(column, this.#state.columns[place - 1] ?? null);
    });
  }

  #clear() {
    this.#stopAll();
    const before = new Map(this.#state.columns.map((column) => [column, column.turns]));
    const show = (turnsOf) => {
      for (const [column, view] of this.#views) {
        column.turns = turnsOf(column);
        view.showTurns();
      }
      this.#showRuns();
      this.#showComparison();
      this.#saveSoon();
    };
    this.#batch.clear();
    show(() => []);
    this.prompt.focus();
    offerUndo("Cleared the answers", () => show((column) => before.get(column) ?? column.turns));
  }

  /** Until something is done here, the columns have the settings of the chat that is shown. */
  #startFromChat() {
    if (!this.#state.isUntouched || this.runs.size) return;
    const { draft } = this.#state;
    this.#state = { ...startState(this.page.conversation, this.page.config?.sampling_defaults), draft };
    this.#drawAll();
  }

  #touch() {
    this.#state.isUntouched = false;
  }

  #changed() {
    this.#touch();
    this.#showSettings();
    this.#saveSoon();
  }

  #switched(name, isOn) {
    this.#state[name] = isOn;
    if (name === "isSameSeed" && isOn && !this.#state.seed.trim()) this.seed.value = this.#state.seed = anySeed();
    if (name === "marksDifferences") this.#showComparison();
    this.#changed();
  }

  #use(column) {
    const { conversation } = this.page;
    conversation.system = column.system;
    conversation.sampling = { ...this.#samplingOf(column) };
    this.page.settings?.show(conversation);
    this.page.saveSoon(conversation);
    this.page.say(`The chat has the settings of column ${letterOf(this.#state.columns.indexOf(column))}`);
  }

  // -------------------------------------------------------------------------------------------------------------- asking

  #question() {
    return this.prompt.value.trim();
  }

  #ready() {
    this.pictures.hidden = !this.page.config?.image_limits;
    this.#startFromChat();
    this.#resume();
    this.#showSettings();
    this.#showRuns();
  }

  /** Goes on with answers that were under way when the page was left. */
  #resume() {
    for (const column of this.#state.columns) {
      const turn = column.turns.at(-1);
      if (turn?.state !== "streaming" || this.runs.has(column)) continue;
      this.#batch.set(column, turn);
      this.runs.resume(column, turn);
    }
  }

  #runAll() {
    const question = this.#question();
    this.#batch.clear();
    for (const column of this.#state.columns) this.#run(column, question);
    this.#asked(question);
  }

  #runOne(column, isAgain) {
    const question = isAgain ? "" : this.#question();
    if (!this.runs.size) this.#batch.clear();
    this.#run(column, question);
    this.#asked("");
  }

  /** What was asked of all leaves the message box; what was asked of one may be wanted of others. */
  #asked(question) {
    if (question) {
      this.prompt.value = this.#state.draft = "";
      this.#fitPrompt();
    }
    this.#touch();
    this.#showRuns();
    this.#showComparison();
    this.#saveSoon();
    this.page.say("Generating");
  }

  /** Asks this column, or once more its last question where there is no other. */
  #run(column, question) {
    const { turns } = column;
    if (this.runs.has(column) || !this.page.config || !(question || turns.length)) return;
    const turn = newTurn(question || turns.pop().question);
    turns.push(turn);
    this.#batch.set(column, turn);
    this.#views.get(column).open(turn);
    try {
      const body = { model: this.page.config.model, messages: messagesOf(column, turn), ...samplingBody(this.#samplingOf(column)) };
      turn.limit = body.max_tokens;
      this.runs.start(column, turn, body);
    } catch (error) {
      turn.state = "failed"; // further fields that are no JSON are not sent
      turn.error = { message: error.message, param: error.param ?? null };
      this.#ended(column, turn, error);
    }
  }

  #stopAll() {
    for (const column of this.#state.columns) this.runs.stop(column);
  }

  #ended(column, turn, error) {
    this.#views.get(column)?.close(turn);
    this.#showRuns();
    this.#showComparison();
    this.#tellProgress();
    this.#save();
    const keyDialog = byId("key-dialog");
    if (error?.status === 401 && !keyDialog.open) keyDialog.showModal();
  }

  #recounted(column, turn) {
    this.#views.get(column)?.recount(turn);
    this.#showRanks();
    this.#saveSoon();
  }

  /** "3 of 4 answers complete, 1 failed", for everybody. */
  #tellProgress() {
    const states = [...this.#batch.values()].map(({ state }) => state);
    const num = (state) => states.filter((other) => other === state).length;
    const words = [`${num("done")} of ${plural(states.length, "answer")} complete`];
    if (num("stopped")) words.push(`${num("stopped")} stopped`);
    if (num("failed")) words.push(`${num("failed")} failed`);
    this.progress.textContent = words.join(", ");
    this.page.say(words.join(", "));
  }

  /** What can be run or stopped now, and in which words. */
  #showRuns() {
    const { columns } = this.#state;
    const question = this.#question();
    const isReady = Boolean(this.page.config);
    const hasTurns = columns.some(({ turns }) => turns.length);
    for (const column of columns) {
      const canRun = isReady && Boolean(question || column.turns.length);
      this.#views.get(column).showRun(this.runs.has(column), !question && column.turns.length > 0, canRun);
    }
    const isRunning = this.runs.size > 0;
    const word = isRunning ? "Stop all" : !question && hasTurns ? "Run all again" : "Run all";
    this.runAll.replaceChildren(icon(isRunning ? "stop" : "send"), word);
    this.runAll.disabled = !isRunning && !(isReady && (question || hasTurns));
    this.runAll.title = isReady ? "" : "The server is not ready yet";
    this.clearButton.disabled = !hasTurns;
    if (isRunning && !this.#batchEnded()) this.progress.textContent = `Answering in ${this.runs.size} of ${columns.length}`;
  }

  #batchEnded() {
    return [...this.#batch.values()].some(({ state }) => state !== "streaming");
  }

  // ----------------------------------------------------------------------------------------------------------- comparing

  /** Ranks the last answers, and shows where they differ from the first column's. */
  #showComparison() {
    const [first] = this.#state.columns;
    const texts = first.turns.map(({ content, state }) => (state !== "streaming" && content ? content : null));
    for (const [column, view] of this.#views) view.compare(this.#state.marksDifferences && column !== first ? texts : null);
    this.#showRanks();
  }

  #showRanks() {
    const lasts = new Map(this.#state.columns.map((column) => [column, column.turns.at(-1)]));
    const ranked = [...lasts.values()].filter((turn) => turn?.state === "done" && turn.figures).map(({ figures }) => figures);
    for (const [column, turn] of lasts) if (!this.runs.has(column)) this.#views.get(column).showFigures(turn?.figures ?? null, ranked);
  }

  #scrolled(column) {
    if (!this.#state.scrollsTogether || column !== this.#leader) return;
    const { position } = this.#views.get(column);
    for (const [other, view] of this.#views) if (other !== column) view.moveTo(position);
  }

  // -------------------------------------------------------------------------------------------------------------- keeping

  #saveSoon() {
    clearTimeout(this.#saveTimer);
    this.#saveTimer = setTimeout(() => this.#save(), SAVE_MS);
  }

  #save() {
    clearTimeout(this.#saveTimer);
    if (this.#state.isUntouched && !this.#state.draft) return;
    saveState(this.#state);
  }
}

/** The beginning of a setting, on one line. */
function short(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > MAX_SHOWN ? `${line.slice(0, MAX_SHOWN - 1).trimEnd()}…` : line;
}
