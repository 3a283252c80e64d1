/**
 * Numbers in words.
 *
 * What the page's first sight needs of this stands in chat/figures.js, so that this file can come later.
 */

/** "1,234" */
export const count = (n) => Math.round(n).toLocaleString("en");

/** "1 token", "1,234 tokens" */
export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** "340 kB" or "4.52 MB". Pass Math.floor for what is a limit, so that nothing over it looks equal to it. */
export function sizeText(bytes, round = Math.ceil) {
  return bytes < 999_500 ? `${round(bytes / 1e3)} kB` : `${round(bytes / 1e4) / 100} MB`;
}
