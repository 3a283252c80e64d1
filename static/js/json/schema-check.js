/**
 * Whether a value matches a JSON schema, in words and with the place of each problem.
 *
 * Owns how the validator is asked, and what of a schema it is not asked about: a pattern on which the browser's own regular
 * expressions might hang. Knows nothing of where values or schemas come from.
 */

const MAX_PROBLEMS = 50;
const DRAFTS = [[/draft-04/, "4"], [/draft-07|draft-06/, "7"], [/2019-09/, "2019-09"]];
/** Keywords whose error only says that there are errors further down. */
const OUTER = new Set([
  ...["properties", "patternProperties", "additionalProperties", "unevaluatedProperties", "items", "prefixItems", "additionalItems"],
  ...["unevaluatedItems", "$ref", "$dynamicRef", "$recursiveRef", "allOf", "then", "else", "dependentSchemas"],
]);
const VALUES = new Set(["const", "enum", "default", "examples"]); // hold no schemas

let validator = null;

/**
 * Settles to `{problems: [{pointer, message}], unchecked}`: `unchecked` patterns were left out. Rejects with an Error that says why
 * where nothing could be checked.
 */
export async function problemsOf(schema, value) {
  validator ??= import("../../vendor/json-schema-4.1.6/validator.js");
  const { Validator } = await validator;
  const left = { unchecked: 0 };
  const asked = schema && typeof schema === "object" ? withoutRisks(schema, left) : schema;
  const draft = DRAFTS.find(([pattern]) => pattern.test(String(schema?.$schema ?? "")))?.[1] ?? "2020-12";
  const { errors } = new Validator(asked, draft, false).validate(value);
  const choices = errors.filter(({ keyword }) => keyword === "anyOf" || keyword === "oneOf").map(({ keywordLocation }) => `${keywordLocation}/`);
  const inner = errors.filter(({ keyword, keywordLocation }) => !OUTER.has(keyword) && !choices.some((choice) => keywordLocation.startsWith(choice)));
  const problems = (inner.length ? inner : errors).slice(0, MAX_PROBLEMS).map(({ instanceLocation, error }) => ({ pointer: pointerOf(instanceLocation), message: worded(error) }));
  return { problems, ...left };
}

function pointerOf(location) {
  try {
    return decodeURI(location.slice(1));
  } catch {
    return location.slice(1);
  }
}

function worded(error) {
  const text = error.replace("False boolean schema.", "is not allowed here").replace(/^Instance type "(\w+)" is invalid\. Expected "([^]*)"\.$/, 'is of type $1; expected is $2');
  return text.replace("does not match any subschemas", "matches none of the alternatives").replace(/^Instance /, "").replace(/^does not have required property ([^]*)\.$/, "$1 is missing").replace(/\.$/, "");
}

/** A copy without patterns that may take for ever. */
function withoutRisks(schema, left, depth = 0) {
  if (depth > 200) throw new Error("the schema is nested too deeply to be checked here");
  if (Array.isArray(schema)) return schema.map((entry) => withoutRisks(entry, left, depth + 1));
  if (!schema || typeof schema !== "object") return schema;
  const copy = {};
  for (const [name, entry] of Object.entries(schema)) {
    const isPattern = name === "pattern" && typeof entry === "string";
    const isRisky = isPattern ? mayHang(entry) : name === "patternProperties" && Object.keys(entry ?? {}).some(mayHang);
    if (isRisky) left.unchecked += 1;
    else Object.defineProperty(copy, name, { value: VALUES.has(name) ? entry : withoutRisks(entry, left, depth + 1), enumerable: true });
  }
  return copy;
}

/** Repeated groups, references back and many repetitions are where matching can take exponential or steep polynomial time. */
function mayHang(pattern) {
  const numRepeats = (pattern.match(/[*+]|\{\d+,\}/g) ?? []).length;
  return pattern.length > 500 || /\)[*+{]|\\[1-9k]/.test(pattern) || numRepeats > 2;
}
