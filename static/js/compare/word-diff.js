/**
 * Which words of a text differ from those of another one: the shortest edit, by Myers' greedy algorithm (1986).
 *
 * Knows nothing of the page.
 */

const MAX_EDITS = 1_000; // texts further apart than this are not matched word by word: memory grows with the square

const wordsOf = (text) => text.match(/\s+|[\p{L}\p{N}\p{M}_'’]+|[^\s\p{L}\p{N}\p{M}_'’]/gu) ?? [];

/**
 * The parts of both texts in order: [{kind: "same" | "gone" | "new", text}], "gone" is only in `before`, "new" only in `after`.
 * Neighbours never have the same kind.
 */
export function differences(before, after) {
  const [a, b] = [wordsOf(before), wordsOf(after)];
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a.at(-1 - end) === b.at(-1 - end)) end += 1;
  const parts = [];
  const add = (kind, words) => {
    if (!words.length) return;
    if (parts.at(-1)?.kind === kind) parts.at(-1).text += words.join("");
    else parts.push({ kind, text: words.join("") });
  };
  add("same", a.slice(0, start));
  for (const [kind, words] of edits(a.slice(start, a.length - end), b.slice(start, b.length - end))) add(kind, words);
  add("same", end ? a.slice(-end) : []);
  return parts;
}

/** Number of words (not of spaces or marks) in a text. */
export const numWords = (text) => (text.match(/[\p{L}\p{N}\p{M}_'’]+/gu) ?? []).length;

/** The edit that makes `b` of `a`, as [kind, words] pairs. */
function edits(a, b) {
  if (!a.length || !b.length) return [["gone", a], ["new", b]];
  const trace = furthest(a, b);
  return trace ? walkBack(a, b, trace) : [["gone", a], ["new", b]];
}

/** For each number of edits, how far along `a` each diagonal gets; null where that takes too many. */
function furthest(a, b) {
  const max = Math.min(a.length + b.length, MAX_EDITS);
  const reach = new Int32Array(2 * max + 3); // of diagonal k at max + 1 + k
  const trace = [];
  for (let d = 0; d <= max; d += 1) {
    trace.push(reach.slice(max + 1 - d - 1, max + 1 + d + 2)); // as it was before this round, diagonals -d-1 to d+1
    for (let k = -d; k <= d; k += 2) {
      const at = max + 1 + k;
      let x = k === -d || (k !== d && reach[at - 1] < reach[at + 1]) ? reach[at + 1] : reach[at - 1] + 1;
      while (x < a.length && x - k < b.length && a[x] === b[x - k]) x += 1;
      reach[at] = x;
      if (x >= a.length && x - k >= b.length) return trace;
    }
  }
  return null;
}

function walkBack(a, b, trace) {
  const parts = [];
  let [x, y] = [a.length, b.length];
  for (let d = trace.length - 1; d >= 0; d -= 1) {
    const reach = (k) => trace[d][k + d + 1];
    const k = x - y;
    const from = k === -d || (k !== d && reach(k - 1) < reach(k + 1)) ? k + 1 : k - 1;
    const fromX = d ? reach(from) : 0;
    const fromY = d ? fromX - from : 0;
    while (x > fromX && y > fromY) {
      parts.push(["same", [a[x - 1]]]);
      [x, y] = [x - 1, y - 1];
    }
    if (d) parts.push(x === fromX ? ["new", [b[y - 1]]] : ["gone", [a[x - 1]]]);
    [x, y] = [fromX, fromY];
  }
  return parts.reverse();
}
