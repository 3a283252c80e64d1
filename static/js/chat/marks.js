/**
 * Which parts of an answer were guessed before they were sampled (speculation). The view that shows them is marks-view.js.
 *
 * Owns the form in which marks are kept: lengths of parts in turn, the first of text that nobody guessed (0 where there is
 * none), the second of guessed text, and so on. Knows nothing of conversations or of the server.
 */

/** Adds the server's `draft_marks` of a chunk to `marks`. */
export function addMarks(marks, parts) {
  for (const { text, drafted } of parts) {
    const isGuessed = marks.length % 2 === 0; // what the last length is of
    if (marks.length && isGuessed === drafted) marks[marks.length - 1] += text.length;
    else if (drafted && !marks.length) marks.push(0, text.length);
    else marks.push(text.length);
  }
}

/** Whether anything was guessed. */
export const hasGuesses = (marks) => (marks?.length ?? 0) > 1;
