/**
 * JSON as people type it: read, or told what is wrong with it and where.
 */

import { JsonReader, placeIn } from "./reader.js";

/** `{value}`, or `{error, line, column}`: a sentence, and the place that it is about (1 is the first). */
export function readJson(text) {
  const inexact = [];
  try {
    const value = JSON.parse(text, (_, found, context) => {
      if (typeof found === "number" && context?.source && !isKept(found, context.source)) inexact.push(context.source);
      return found;
    });
    if (!inexact.length) return { value };
    return { error: `${inexact[0].slice(0, 40)} cannot be kept exactly by a browser`, ...placeIn(text, text.indexOf(inexact[0])) };
  } catch (error) {
    const reader = new JsonReader();
    reader.push(text);
    const { message, at } = reader.finish() ?? { message: error.message, at: text.length };
    return { error: message, ...placeIn(text, at) };
  }
}

/** Whether a number that was read is the one that was written. */
function isKept(number, source) {
  return Number.isFinite(number) && (/[.eE]/.test(source) || Number.isSafeInteger(number));
}
