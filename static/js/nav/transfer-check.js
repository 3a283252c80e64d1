/**
 * What a file of conversations may hold. Files come from anywhere: everything is looked at before anything is taken, and a fault is said
 * with its place.
 *
 * Knows nothing of the page or of storage.
 */

export const FORMAT = "streamserve.chat";
export const VERSION = 1;
export const MAX_FILE_BYTES = 200e6;

const MAX_DEPTH = 40;
const MAX_VALUES = 5_000_000;
const MAX_CONVERSATIONS = 10_000;
const MAX_MESSAGES = 20_000; // of one conversation
const MAX_TEXT = 20_000_000; // characters of one text
const MAX_TITLE = 500;
const MAX_PICTURES = 2_000;
const PICTURE_TYPES = { "image/png": "iVBORw0KGgo", "image/jpeg": "/9j/", "image/webp": "UklGR", "image/gif": "R0lGOD", "image/bmp": "Qk" };
const BAD_NAMES = new Set(["__proto__", "constructor", "prototype"]);
const STATES = new Set(["streaming", "done", "stopped", "failed", "interrupted", "elsewhere"]);

const fail = (message) => {
  throw new Error(message);
};

/** Names, in the order of a path: conversations[2].messages[0].role. */
const at = (path, key) => (typeof key === "number" ? `${path}[${key}]` : path ? `${path}.${key}` : key);

/** The conversations of this text, as the page keeps them, and its pictures: Map of key -> Blob. Throws an Error that says what is wrong. */
export function checked(text) {
  const file = parse(text);
  checkPlain(file);
  if (!isRecord(file) || file.format !== FORMAT) fail(`it is no file of conversations: "format" is not "${FORMAT}".`);
  if (file.version !== VERSION) fail(`it has version ${show(file.version)} of the format; this page reads version ${VERSION}.`);
  const { conversations } = file;
  if (!Array.isArray(conversations) || !conversations.length) fail("it has no conversations.");
  if (conversations.length > MAX_CONVERSATIONS) fail(`it has ${conversations.length} conversations; at most ${MAX_CONVERSATIONS} are taken.`);
  return {
    conversations: conversations.map((one, k) => conversationOf(one, at("conversations", k))),
    pictures: picturesOf(file.pictures ?? {}),
  };
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    return fail(`it is not JSON: ${error.message}.`);
  }
}

const isRecord = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

const show = (value) => (JSON.stringify(value) ?? "nothing").slice(0, 40);

/** Bounds depth, number and size of all there is, and the names that would reach beyond it. Goes without calls, however deep. */
function checkPlain(file) {
  const waiting = [[file, "", 0]];
  for (let num = 0; waiting.length; num += 1) {
    const [value, path, depth] = waiting.pop();
    if (num > MAX_VALUES) fail(`it has more than ${MAX_VALUES} values.`);
    if (typeof value !== "object" || value === null) continue;
    if (depth > MAX_DEPTH) fail(`${path.slice(0, 80)}… is nested deeper than ${MAX_DEPTH} levels.`);
    const isArray = Array.isArray(value);
    for (const key of Object.keys(value)) {
      if (BAD_NAMES.has(key)) fail(`${at(path, key)}: a field cannot have this name.`);
      waiting.push([value[key], depth < 4 ? at(path, isArray ? Number(key) : key) : path, depth + 1]);
    }
  }
}

function need(isRight, path, wanted, value) {
  if (!isRight) fail(`${path} is ${show(value)}; it must be ${wanted}.`);
}

const isText = (value, most = MAX_TEXT) => typeof value === "string" && value.length <= most;
const isId = (value) => typeof value === "string" && /^[\w.-]{1,80}$/.test(value);

function conversationOf(given, path) {
  need(isRecord(given), path, "an object", given);
  const { id, title, created, updated, system, sampling, draft, head, messages, extra } = given;
  need(isId(id), at(path, "id"), "letters and digits, at most 80", id);
  need(isText(title, MAX_TITLE), at(path, "title"), `a text of at most ${MAX_TITLE} characters`, title);
  for (const [name, value] of Object.entries({ created, updated })) need(Number.isFinite(value), at(path, name), "a time in milliseconds", value);
  for (const [name, value] of Object.entries({ system, draft })) need(isText(value), at(path, name), "a text", value);
  need(isRecord(sampling), at(path, "sampling"), "an object", sampling);
  for (const [name, value] of Object.entries(sampling)) need(isText(value), at(path, `sampling.${name}`), "a text, as it was typed", value);
  need(extra === undefined || isRecord(extra), at(path, "extra"), "an object", extra);
  need(Array.isArray(messages), at(path, "messages"), "a list", messages);
  if (messages.length > MAX_MESSAGES) fail(`${path} has ${messages.length} messages; at most ${MAX_MESSAGES} are taken.`);
  const seen = new Set();
  const kept = messages.map((message, k) => messageOf(message, at(at(path, "messages"), k), seen));
  need(head === null || seen.has(head), at(path, "head"), "null or the id of a message", head);
  const now = Date.now();
  return { ...given, format: 1, created: Math.min(created, now), updated: Math.min(updated, now), messages: kept };
}

/** `seen` has the ids of the messages before it, of which one is its parent: so there are no rings. */
function messageOf(given, path, seen) {
  need(isRecord(given), path, "an object", given);
  const { stream: _, ...rest } = given; // of a server that had it
  const { id, parent, role, content, created, state, pictures, marks, stats, extra, limit } = rest;
  need(isId(id) && !seen.has(id), at(path, "id"), "letters and digits, at most 80, and another one than before", id);
  need(parent === null || seen.has(parent), at(path, "parent"), "null or the id of a message before it", parent);
  need(role === "user" || role === "assistant", at(path, "role"), '"user" or "assistant"', role);
  need(isText(content), at(path, "content"), "a text", content);
  for (const name of ["reasoning", "error", "param", "finish", "requestId", "edit"]) need(rest[name] === undefined || isText(rest[name]), at(path, name), "a text", rest[name]);
  need(rest.thoughtMs === undefined || Number.isFinite(rest.thoughtMs), at(path, "thoughtMs"), "a number", rest.thoughtMs);
  need(Number.isFinite(created), at(path, "created"), "a time in milliseconds", created);
  need(STATES.has(state), at(path, "state"), [...STATES].join(", "), state);
  need(marks === undefined || (Array.isArray(marks) && marks.every(Number.isFinite)), at(path, "marks"), "a list of numbers", marks);
  need(stats === undefined || areFigures(stats), at(path, "stats"), "an object of numbers", stats);
  need(extra === undefined || isRecord(extra), at(path, "extra"), "an object", extra);
  seen.add(id);
  const isOver = state !== "streaming" && state !== "elsewhere";
  const kept = { ...rest, state: isOver ? state : "interrupted" };
  if (limit !== undefined && !Number.isFinite(limit)) kept.limit = null; // a request may ask for anything
  if (pictures !== undefined) kept.pictures = namesOf(pictures, at(path, "pictures"));
  return kept;
}

/** Numbers, or null where one is not known; the server's times beside them. */
function areFigures(stats) {
  const areNumbers = (figures) => isRecord(figures) && Object.values(figures).every((value) => value === null || Number.isFinite(value));
  const { timings = null, ...own } = isRecord(stats) ? stats : { timings: 0 };
  return areNumbers(own) && (timings === null || areNumbers(timings));
}

function namesOf(pictures, path) {
  need(Array.isArray(pictures) && pictures.length <= MAX_PICTURES, path, `a list of at most ${MAX_PICTURES}`, pictures);
  return pictures.map((picture, k) => {
    need(isRecord(picture), at(path, k), "an object", picture);
    const { id, name, size } = picture;
    need(isId(id), at(at(path, k), "id"), "letters and digits, at most 80", id);
    need(isText(name, MAX_TITLE), at(at(path, k), "name"), "a text", name);
    need(Number.isFinite(size) && size >= 0, at(at(path, k), "size"), "a number of bytes", size);
    return { id, name, size };
  });
}

function picturesOf(given) {
  need(isRecord(given), "pictures", "an object", given);
  const entries = Object.entries(given);
  if (entries.length > MAX_PICTURES) fail(`it has ${entries.length} pictures; at most ${MAX_PICTURES} are taken.`);
  return new Map(entries.map(([key, value]) => [key, blobOf(value, at("pictures", key.slice(0, 80)))]));
}

/** A picture of a kind that the page sends, as its first bytes say; of another kind nothing could be shown, and some run scripts. */
function blobOf(value, path) {
  need(isRecord(value), path, "an object", value);
  const { type, data } = value;
  const isKnown = typeof type === "string" && Object.hasOwn(PICTURE_TYPES, type);
  need(isKnown, at(path, "type"), `one of ${Object.keys(PICTURE_TYPES).join(", ")}`, type);
  need(typeof data === "string" && data.startsWith(PICTURE_TYPES[type]), at(path, "data"), `a picture of type ${type} in base64`, data);
  let bytes = "";
  try {
    bytes = atob(data);
  } catch {
    fail(`${at(path, "data")} is not base64.`);
  }
  return new Blob([Uint8Array.from(bytes, (char) => char.charCodeAt(0))], { type });
}
