/**
 * A formula as MathML. Temml, which reads TeX, is loaded with the first one. What it makes is looked through before it is shown: MathML
 * and the little else that it needs, without any attribute that could fetch or run something.
 */

const MATHML = "http://www.w3.org/1998/Math/MathML";
const OPTIONS = { throwOnError: true, trust: false, strict: false, maxExpand: 500, maxSize: [20, 100], annotate: false };
const ATTRIBUTES = new Set(
  ("class style display displaystyle scriptlevel mathvariant stretchy fence separator form lspace rspace minsize maxsize symmetric largeop " +
    "movablelimits accent accentunder linethickness columnalign rowspacing columnspacing columnlines rowlines columnspan rowspan width height depth " +
    "voffset mathcolor mathbackground mathsize notation align side frame framespacing open close separators linebreak indentalign scriptminsize dir").split(" "),
);

/** Shows the formula in `node`, if it still `isCurrent()` once Temml is there. */
export async function draw(node, token, isCurrent) {
  const temml = library ?? (await load());
  if (!temml || !isCurrent()) return;
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
  loading ??= import("../../vendor/temml-0.13.5.js").then(
    (module) => (library = module.default),
    (error) => {
      loading = null; // the server may be back for the next formula
      console.debug("formulas stay as they were written:", error);
      return null;
    },
  );
  return loading;
}
