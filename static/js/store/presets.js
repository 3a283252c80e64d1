/**
 * Named sets of settings, in the order of their names. Where the browser keeps nothing they last as long as the page.
 *
 * Knows nothing of what the values mean.
 */

export class Presets {
  #memory = new Map();

  constructor(database) {
    this.database = database;
  }

  /** @returns {Promise<{name: string, values: object}[]>} */
  async list() {
    const kept = await this.database.run("readonly", ["presets"], (presets) => presets.getAll()).catch(() => []);
    const all = new Map([...kept, ...this.#memory.values()].map((preset) => [preset.name, preset]));
    return [...all.values()].sort((a, b) => a.name.localeCompare(b.name));
  }

  /** Keeps these values under this name, instead of what it had. */
  async save(name, values) {
    const preset = { name, values: structuredClone(values) };
    this.#memory.delete(name);
    await this.database.run("readwrite", ["presets"], (presets) => presets.put(preset)).catch(() => this.#memory.set(name, preset));
  }

  /** False where the browser did not let go of it. */
  async remove(name) {
    const wasInMemory = this.#memory.delete(name);
    const isGone = this.database.run("readwrite", ["presets"], (presets) => presets.delete(name)).then(() => true);
    return isGone.catch(() => wasInMemory);
  }
}
