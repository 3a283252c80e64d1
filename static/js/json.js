/**
 * JSON as people type it: read, or told what is wrong with it and where.
 */

/** `{value}`, or `{error, line, column}`: a sentence, and the place where it was noticed (1 is the first). */
export function readJson(text) {
  const inexact = [];
  try {
    const value = JSON.parse(text, (_, found, context) => {
      if (typeof found === "number" && context?.source && !isKept(found, context.source)) inexact.push(context.source);
      return found;
    });
    if (!inexact.length) return { value };
    return { error: `${inexact[0].slice(0, 40)} cannot be kept exactly by a browser`, ...placeOf(text, text.indexOf(inexact[0])) };
  } catch (error) {
    const at = error.message.match(/position (\d+)/);
    const position = at ? Number(at[1]) : text.trimEnd().length;
    const what = error.message.replace(/ in JSON at position.*$/s, "").replace(/,? "[^]*" is not valid JSON$/, "").replace("Unexpected end of JSON input", "The text ends too early");
    return { error: what, ...placeOf(text, position) };
  }
}

/** Whether a number that was read is the one that was written. */
function isKept(number, source) {
  return Number.isFinite(number) && (/[.eE]/.test(source) || Number.isSafeInteger(number));
}

function placeOf(text, position) {
  const before = text.slice(0, position).split("\n");
  return { line: before.length, column: before.at(-1).length + 1 };
}
