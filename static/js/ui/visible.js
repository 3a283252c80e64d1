/**
 * Text with the characters that hide or reorder it made visible, and kept from having any effect.
 *
 * A terminal's escape codes, controls of writing direction, and tags that no reader sees each become a <bdi> that shows the
 * character's name (by its style) and still holds the character: what is copied is what the model wrote. A <bdi> ends the effect
 * of a direction control where it ends itself. Marks that scripts need (joiners, a mark of direction) stay as they are.
 */

const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]|(?<!\u{1f3f4}[\u{e0020}-\u{e007e}]*)[\u{e0000}-\u{e007f}]/gu;
const NAMES = { "\u001b": "ESC", "\u0007": "BEL", "\u0008": "BS", "\r": "CR", "\u0000": "NUL", "\u007f": "DEL" };

const nameOf = (char) => NAMES[char] ?? `U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

/** The text as tokens: strings, and one element for each hidden character. */
export function visible(text) {
  const tokens = [];
  let from = 0;
  for (const { 0: char, index } of text.matchAll(HIDDEN)) {
    if (index > from) tokens.push(text.slice(from, index));
    tokens.push({ tag: "bdi", attributes: { class: "control", "data-name": nameOf(char) }, children: [char] });
    from = index + char.length;
  }
  if (from < text.length) tokens.push(text.slice(from));
  return tokens;
}
