/**
 * A formula in the page: its source while it is being written or cannot be read, else MathML.
 *
 * What draws it is brought with the first formula (math-drawing.js). Knows nothing of Markdown.
 */

const current = new WeakMap(); // node -> the token that it shows

export function buildMath(token) {
  const node = document.createElement("span");
  node.className = token.isBlock ? "math math-block" : "math";
  if (token.isBlock) node.tabIndex = 0; // wide ones are scrolled
  if (token.isBlock) node.setAttribute("role", "group");
  if (token.isBlock) node.setAttribute("aria-label", "Formula");
  show(node, token);
  return node;
}

/** Shows `now` in a node that shows `was`; false when it has to be made anew. */
export function updateMath(node, was, now) {
  if (was.isBlock !== now.isBlock) return false;
  if (was.source !== now.source || was.isComplete !== now.isComplete) show(node, now);
  return true;
}

function show(node, token) {
  current.set(node, token);
  node.replaceChildren(token.source);
  node.classList.add("source");
  if (token.isComplete) draw(node, token);
}

async function draw(node, token) {
  const drawing = await import("./math-drawing.js").catch((error) => console.debug("formulas stay as they were written:", error));
  drawing?.draw(node, token, () => current.get(node) === token);
}
