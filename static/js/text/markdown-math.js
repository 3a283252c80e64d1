/**
 * Where a Markdown text holds formulas: $…$ and \(…\) in a line, $$…$$ and \[…\] on lines of their own or in one.
 *
 * Two tokenizers in the form that marked's lexer asks for, and the mask that keeps emphasis out of formulas. Knows nothing of
 * how a formula is drawn. A dollar sign is often money or a variable of a shell: a single one opens only before a character
 * that is no space, and closes only after one and before no letter or digit (Pandoc's rule, and letters).
 */

const MAX_SOURCE = 4_000; // characters of one formula; a longer one is shown as it was written
const BLANK_LINE = /\n[ \t]*\n/;
const BLOCK_START = /^ {0,3}(\$\$|\\\[)/;
const REST_OF_LINE = /[ \t]*(?:\n|$)/y;
const BLOCK_IN_PARAGRAPH = /\n {0,3}(?:\$\$|\\\[)/g;
const INLINE_DOLLAR = /^\$(?![\s$])((?:\\[^\n]|[^\\$`\n]|\n(?!\s*\n))*)\$(?![\p{L}\p{N}_])/u;
const CLOSES = { "$$": "$$", "\\[": "\\]", "\\(": "\\)" };

const formula = (raw, source, isBlock, isComplete) => ({ type: "math", raw, source: source.trim(), isBlock, isComplete });

/** The formula between `opening` at `from` and its closing: {source, end}. Null where none closes in time. */
function between(text, from, opening) {
  const start = from + opening.length;
  const close = text.slice(start, start + MAX_SOURCE).indexOf(CLOSES[opening]);
  if (close < 0) return null;
  const source = text.slice(start, start + close);
  if (!source.trim() || BLANK_LINE.test(source)) return null;
  return { source, end: start + close + CLOSES[opening].length };
}

/** Whether a formula that starts at `from` is still being written: nothing of the text says that it ended. */
function isUnderWay(text, from, opening) {
  const rest = text.slice(from + opening.length, from + opening.length + MAX_SOURCE + 1);
  return rest.length <= MAX_SOURCE && !rest.includes(CLOSES[opening]) && !BLANK_LINE.test(rest);
}

/** A formula on lines of its own at the start of `text`. `isOpen`: more text may follow. */
export function mathBlock(text, isOpen) {
  const found = BLOCK_START.exec(text);
  if (!found) return undefined;
  const opening = found[1];
  const from = found[0].length - opening.length;
  const inside = between(text, from, opening);
  if (inside) {
    REST_OF_LINE.lastIndex = inside.end;
    const rest = REST_OF_LINE.exec(text);
    return rest ? formula(text.slice(0, inside.end + rest[0].length), inside.source, true, true) : undefined;
  }
  if (isOpen && isUnderWay(text, from, opening)) return formula(text, text.slice(from + opening.length), true, false);
  return undefined;
}

/** Where, behind its first line, a paragraph at the start of `text` is ended by a formula of its own; -1 if nowhere. */
export function mathBlockIn(paragraph, text, isOpen) {
  for (const found of paragraph.matchAll(BLOCK_IN_PARAGRAPH)) {
    if (mathBlock(text.slice(found.index + 1, found.index + 2 * MAX_SOURCE), isOpen)) return found.index + 1;
  }
  return -1;
}

/** A formula within a line, at the start of `text`. */
export function mathInline(text, isOpen) {
  const opening = text.startsWith("$$") ? "$$" : text[0] === "\\" ? text.slice(0, 2) : "";
  if (!(opening in CLOSES)) return text[0] === "$" ? dollars(text) : undefined;
  const inside = between(text, 0, opening);
  const isBlock = opening !== "\\(";
  if (inside) return formula(text.slice(0, inside.end), inside.source, isBlock, true);
  if (isOpen && isUnderWay(text, 0, opening)) return formula(text, text.slice(opening.length), isBlock, false);
  return undefined;
}

function dollars(text) {
  const found = INLINE_DOLLAR.exec(text.slice(0, MAX_SOURCE));
  return found && /\S$/.test(found[1]) ? formula(found[0], found[1], false, true) : undefined;
}

/** The same text, as long, with no mark of emphasis in its formulas. */
export function masked(text) {
  if (!text.includes("$")) return text;
  return text.replace(/\$\$[^$]{1,4000}\$\$|\$(?![\s$])[^$`\n]{0,1000}?[^\s$]\$(?![\p{L}\p{N}_])/gu, (math) => "a".repeat(math.length));
}

/** How many characters of `raw`, which is no formula at its start, come before the next one may start. */
export function beforeMath(raw) {
  const next = raw.indexOf("$", 1);
  return next < 0 ? raw.length : next;
}
