/**
 * What the page knows of the server's prefix tree: the nodes that can be seen, loaded level by level as they are opened.
 *
 * A small tree is asked for in one request, of a large one each open node by itself, so many children at a time; those that nobody
 * has used since only now and then, to learn what was evicted below them. Requests keep a distance, except those that somebody
 * waits for. A node that is split gets a new one above it: that one is opened, so that what
 * was seen stays in sight.
 *
 * Owns the nodes, which of them are open, and how many children of each are wanted. Knows nothing of how they look.
 *
 * @typedef {object} CacheNode  as GET /cache/tree shows it, and
 * @property {?number[]} children  ids of those that are known, newest first; null until they were asked for
 * @property {number} seenAt  when it was told, by performance.now()
 */

export const ROOT = 0;
export const PAGE = 100; // children at a time
const SMALL = 200; // nodes of a tree that is asked for as a whole
const FEW = 6; // nodes of a level, beside which the next is shown from the start
const OPENED = 30; // of a tree that is open unless somebody closes it
const MAX_DEPTH = 16; // as the server allows
const MAX_CHILDREN = 999; // likewise, beside the node itself
const MAX_ROWS = 150; // beyond these nothing opens by itself
const PREVIEW = 24; // tokens
const DISTANCE_MS = 500;
const QUIET_PASSES = 4; // in one of so many, a node that nobody has used is asked for
const MAX_REMEMBERED = 5_000;

export class CacheNodes {
  #open = new Set([ROOT]); // ids; of those that are gone for now too, since a split takes a node away for a moment
  #closed = new Set(); // by somebody
  #wanted = new Map(); // id -> children
  #parents = new Map(); // of nodes that were let go of last
  #askedAt = -Infinity;
  #running = null; // a refresh
  #again = false;
  #isHurried = false;
  #numPasses = 0;
  #askedWith = new Map(); // id -> what was known of a node when its children were asked for

  /** `get(path)` settles to the JSON at a path. `keeps(id)`: whether this node has to stay in sight. */
  constructor(get, keeps) {
    this.get = get;
    this.keeps = keeps;
    this.nodes = new Map([[ROOT, { id: ROOT, parent: null, end: 0, children: null, num_children: 0 }]]);
    this.summary = null; // the counts of GET /cache/tree
    this.onPass = () => {}; // called when all that can be seen was asked for
  }

  /** Whether a node that was known lives no more: all that stand where it stood are known, and it is not among them. */
  isGone(id) {
    if (this.nodes.has(id)) return false;
    const parent = this.nodes.get(this.#parents.get(id));
    return parent ? parent.children?.length >= parent.num_children : true;
  }

  isOpen(id) {
    return this.#open.has(id);
  }

  wantedOf(id) {
    return this.#wanted.get(id) ?? PAGE;
  }

  /** Its children that are shown. @returns {CacheNode[]} */
  childrenOf(id) {
    return (this.nodes.get(id)?.children ?? []).map((child) => this.nodes.get(child)).filter(Boolean);
  }

  /** From the top down to the node's parent. @returns {CacheNode[]} */
  above(id) {
    const path = [];
    for (let at = this.nodes.get(this.nodes.get(id)?.parent); at && at.id !== ROOT; at = this.nodes.get(at.parent)) path.unshift(at);
    return path;
  }

  open(...ids) {
    for (const id of ids) {
      this.#open.add(id);
      this.#closed.delete(id);
    }
  }

  close(id) {
    this.#open.delete(id);
    this.#closed.add(id);
  }

  /** Whether the server would show more children of a node than are wanted now. */
  canWantMore(id) {
    return this.wantedOf(id) < MAX_CHILDREN;
  }

  /** Asks for more children of a node. */
  want(id, count) {
    this.#wanted.set(id, Math.min(MAX_CHILDREN, count));
  }

  /**
   * Asks for what can be seen now. One at a time; a call while one runs has it done once more. `isHurried`: somebody waits. Throws
   * ApiError.
   */
  refresh(isHurried = false) {
    if (isHurried) this.#askedAt = -Infinity;
    this.#isHurried ||= isHurried;
    this.#again = Boolean(this.#running);
    this.#running ??= this.#refreshAll().finally(() => (this.#running = null));
    return this.#running;
  }

  async #refreshAll() {
    do {
      this.#again = false;
      const isWhole = this.#isHurried; // nothing is left out
      this.#isHurried = false;
      this.#numPasses += 1;
      const isFirst = !this.summary;
      const isSmall = isFirst || this.summary.num_nodes <= SMALL;
      const depth = isFirst || this.summary.num_nodes <= OPENED ? MAX_DEPTH : Math.min(MAX_DEPTH, this.#depth() + 1);
      const answer = await this.#ask(ROOT, isSmall ? depth : 1, isSmall ? SMALL : this.wantedOf(ROOT));
      this.#take(answer, ROOT, isSmall ? depth : 1);
      if (isFirst && answer.num_nodes > OPENED) this.#openTop();
      if (answer.num_nodes <= OPENED) this.open(...[...this.nodes.keys()].filter((id) => !this.#closed.has(id)));
      if (isSmall && answer.is_cut) this.#again = true; // it has grown
      else await this.#refreshOpen(isSmall, isWhole);
      this.#forget();
      this.onPass();
    } while (this.#again);
  }

  /** Opens levels from the top until there is something to see: prompts often share their first words. */
  #openTop() {
    for (let level = this.childrenOf(ROOT); level.length && level.length < FEW; level = level.flatMap(({ id }) => this.childrenOf(id))) {
      this.open(...level.filter((node) => node.num_children).map(({ id }) => id));
    }
  }

  /** Each open node whose children the first answer did not have. */
  async #refreshOpen(isComplete, isWhole) {
    const waiting = [ROOT];
    for (let id = waiting.shift(); id !== undefined; id = waiting.shift()) {
      const node = this.nodes.get(id);
      if (!node || !this.isOpen(id)) continue;
      const isKnown = node.children?.length >= Math.min(node.num_children, this.wantedOf(id));
      const isQuiet = !isWhole && isKnown && isUnused(this.#askedWith.get(id), node) && (this.#numPasses + id) % QUIET_PASSES !== 0;
      if (id !== ROOT && node.num_children && !(isKnown && (isComplete || isQuiet))) {
        this.#askedWith.set(id, node);
        const answer = await this.#ask(id, 1, this.wantedOf(id) + 1).catch((error) => this.#gone(error, id));
        if (answer) this.#take(answer, id, 1);
      }
      waiting.push(...(this.nodes.get(id)?.children ?? []));
    }
  }

  #gone(error, id) {
    if (error.status !== 404) throw error;
    this.#drop(id);
    return null;
  }

  #drop(id) {
    const node = this.nodes.get(id);
    const parent = this.nodes.get(node?.parent);
    if (parent?.children) parent.children = parent.children.filter((child) => child !== id);
    this.nodes.delete(id);
  }

  async #ask(node, depth, limit) {
    const wait = this.#askedAt + DISTANCE_MS - performance.now();
    if (wait > 0) await new Promise((resolve) => setTimeout(resolve, wait));
    this.#askedAt = performance.now();
    return this.get(`cache/tree?node=${node}&depth=${depth}&limit=${limit}&preview=${PREVIEW}`);
  }

  /** How deep the open nodes reach. */
  #depth() {
    let deepest = 0;
    const go = (id, level) => {
      if (!this.isOpen(id)) return;
      deepest = Math.max(deepest, level + 1);
      for (const child of this.nodes.get(id)?.children ?? []) go(child, level + 1);
    };
    go(ROOT, 0);
    return deepest;
  }

  #take(answer, top, depth) {
    const { nodes, node: _, ...summary } = answer;
    this.summary = summary;
    const seenAt = performance.now();
    const children = new Map([[top, []]]);
    const levels = new Map([[top, 0]]);
    for (const node of nodes) {
      if (node.id !== top) {
        levels.set(node.id, levels.get(node.parent) + 1);
        children.get(node.parent)?.push(node.id);
        if (levels.get(node.id) < depth) children.set(node.id, []);
      }
      this.#split(node);
      const known = node.num_children ? (this.nodes.get(node.id)?.children ?? null) : [];
      this.nodes.set(node.id, { ...node, children: known, seenAt });
    }
    // Where the answer was cut, the last levels are not there: what was known of them stays.
    for (const [id, known] of children) {
      const node = this.nodes.get(id);
      if (id === ROOT) node.num_children = answer.is_cut && depth === 1 ? Math.max(known.length + 1, 0) : known.length;
      if (known.length || !answer.is_cut || node.num_children === 0) this.#replace(node, known);
    }
  }

  /** When a node has come to stand below a new one, that one is opened, unless too much would be seen. */
  #split({ id, parent }) {
    const before = this.nodes.get(id);
    if (!before || before.parent === parent || !this.isOpen(before.parent)) return;
    if (this.keeps(id) || this.nodes.size < MAX_ROWS) this.open(parent);
  }

  #replace(node, known) {
    const left = (node.children ?? []).filter((id) => !known.includes(id) && this.nodes.get(id)?.parent === node.id);
    const added = known.filter((id) => !node.children?.includes(id));
    node.children = known;
    if (!left.some((id) => this.isOpen(id) || this.keeps(id))) return;
    // One that was open is not where it was: it may stand below a new one, of which the children are not known yet.
    for (const id of added) if (this.nodes.get(id).num_children) this.open(id);
  }

  /** Lets go of what cannot be reached from the root. */
  #forget() {
    const reached = new Set();
    const waiting = [ROOT];
    for (let id = waiting.pop(); id !== undefined; id = waiting.pop()) {
      reached.add(id);
      waiting.push(...(this.nodes.get(id)?.children ?? []));
    }
    this.#parents.clear();
    for (const [id, { parent }] of this.nodes) {
      if (reached.has(id)) continue;
      this.#parents.set(id, parent);
      this.nodes.delete(id);
    }
    const isReached = (id) => reached.has(id);
    for (const id of this.#askedWith.keys()) if (!isReached(id)) this.#askedWith.delete(id);
    if (this.#open.size > MAX_REMEMBERED) this.#open = new Set([...this.#open].filter(isReached));
    if (this.#closed.size > MAX_REMEMBERED) this.#closed = new Set([...this.#closed].filter(isReached));
  }
}

/** Whether no request has come to a node, or below it, between two looks. */
function isUnused(before, now) {
  if (!before || before.requests || now.requests) return false;
  const usedAt = ({ seenAt, age_s }) => seenAt - age_s * 1_000;
  return Math.abs(usedAt(now) - usedAt(before)) < 300 && before.num_children === now.num_children && before.pins === now.pins;
}
