/**
 * A Markdown text that is still being written, mended so that it looks like what it is likely to become.
 *
 * A reader should not see a heading where a list begins, a row of dashes that turns into a table, or ** before a word is bold.
 * Nothing here has a say in how a complete text looks.
 */

const MARKS_ALONE = /(?:^|\n)[ \t]*(?:[-=*_+#>|~`$]+|\d{1,3}[.)])[ \t]*$/; // a last line that says nothing yet
const STARTED_RULER = /(?:^|\n)([^\n]*\|[^\n]*)\n[ \t]*\|?[ \t]*:?-[ \t:|-]*$/;
const CODE = /(`+)(?!`)[\s\S]*?[^`]\1(?!`)/g;
const STARTED_LINK = /!?\[([^[\]\n]*)\]\([^()\s]*$/;

/** Blocks: a last line of marks alone is held back, and the line under a table's head is written to its end. */
export function healed(text) {
  const ruler = STARTED_RULER.exec(text.slice(-2_000));
  if (ruler) {
    const head = ruler[1].trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
    const numColumns = head.split(/(?<!\\)\|/).length;
    if (numColumns > 1) return `${text.slice(0, text.lastIndexOf("\n") + 1)}|${"---|".repeat(numColumns)}`;
  }
  const marks = MARKS_ALONE.exec(text.slice(-200));
  if (!marks) return text;
  const start = text.length - marks[0].length;
  return text.slice(0, text[start] === "\n" ? start + 1 : start);
}

/** One paragraph: an open ** and an open ` are closed, and of a link under way only its label is shown. */
export function healedInline(src) {
  let text = src.replace(STARTED_LINK, "$1");
  const outside = text.replace(CODE, (code) => " ".repeat(code.length));
  const tick = outside.indexOf("`");
  if (tick >= 0) return /^`+[^`\n]+$/.test(outside.slice(tick)) ? text + outside.slice(tick).match(/^`+/)[0] : text;
  const pairs = outside.match(/\\\*|\*\*/g)?.filter((mark) => mark === "**") ?? [];
  if (pairs.length % 2 === 0) return text;
  const body = text.trimEnd();
  if (body.endsWith("**")) return body.slice(0, -2);
  return body + (body.endsWith("*") ? "*" : "**") + text.slice(body.length);
}
