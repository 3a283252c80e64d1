/**
 * A formula in the page: its source while it is being written or cannot be read, else MathML.
 *
 * Temml, which reads TeX, is loaded with the first formula. What it makes is looked through before it is shown: MathML and the
 * little else that it needs, without any attribute that could fetch or run something. Knows nothing of Markdown.
 */

const MATHML = "http://www.w3.org/1998/Math/MathML";
const OPTIONS = { throwOnError: true, trust: false, strict: false, maxExpand: 500, maxSize: [20, 100], annotate: false };
const ATTRIBUTES = new Set(
  ("class style display displaystyle scriptlevel mathvariant stretchy fence separator form lspace rspace minsize maxsize symmetric largeop " +
    "movablelimits accent accentunder linethickness columnalign rowspacing columnspacing columnlines rowlines columnspan rowspan width height depth " +
    "voffset mathcolor mathbackground mathsize notation align side frame framespacing open close separators linebreak indentalign scriptminsize dir").split(" "),
);

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
  const temml = library ?? (await load());
  if (!temml || current.get(node) !== token) return;
  const shown = document.createElement("span");
  try {
    temml.render(token.source, shown, { ...OPTIONS, displayMode: token.isBlock });
  } catch (error) {
    node.title = String(error.message).slice(0, 300); // TeX that it does not know stays as it was written
    return;
  }
  const math = shown.firstElementChild;
  if (math?.namespaceURI !== MATHML || ![math, ...math.querySelectorAll("*")].every(isHarmless)) return;
  node.replaceChildren(math);
  node.classList.remove("source");
}

function isHarmless(element) {
  const isKnown = element.namespaceURI === MATHML || element.localName === "span";
  return isKnown && [...element.attributes].every(({ name, value }) => ATTRIBUTES.has(name) && !/url\s*\(/i.test(value));
}

let library = null;
let loading = null;

function load() {
  loading ??= import("../vendor/temml-0.13.5.js").then(
    (module) => (library = module.default),
    (error) => {
      loading = null; // the server may be back for the next formula
      console.debug("formulas stay as they were written:", error);
      return null;
    },
  );
  return loading;
}
