/**
 * JSON read piece by piece, as it arrives: what begins, grows and ends where, and the first thing that is wrong with it.
 *
 * Owns the grammar of JSON (RFC 8259) and how its errors are worded. Knows nothing of what is made of it.
 */

const PLAIN = /[^"\\\u0000-\u001f]+/y; // of a string, what stands for itself
const WORD = /[A-Za-z0-9+\-.]+/y;
const SPACE = /[ \t\n\r]+/y;
const NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/;
const WORDS = new Set(["true", "false", "null"]);
const ESCAPES = { '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" };
const CLOSERS = { object: "}", array: "]" };

const named = (char) => (char === "\n" ? "the end of the line" : char < " " ? "a control character" : `"${char}"`);

/**
 * Reads one JSON text. `on` has methods, each of which may be missing; `at` counts characters from the start of the text:
 *   begin(kind, at)      a value: "object", "array", "string" or "word" (a number, true, false, null)
 *   key(name, from, to)  a name in an object; its value begins next
 *   text(part)           the string, decoded, or the word that is being read goes on
 *   end(at)              the value that began last, of those that have not ended
 */
export class JsonReader {
  #on;
  #open = []; // kinds of the containers around
  #wants = "value"; // or "value or ]", "name or }", "name", "colon", "next", "nothing"
  #token = null; // {kind: "string" | "key" | "word", from, text, escape}
  #at = 0;

  constructor(on = {}) {
    this.#on = on;
    this.error = null; // {message, at}; then nothing more is read
  }

  /** The text is one whole value so far. A number may still go on. */
  get isComplete() {
    const isWhole = this.#token?.kind === "word" && !this.#open.length && isWord(this.#token.text);
    return !this.error && (isWhole || this.#wants === "nothing");
  }

  push(text) {
    const start = this.#at;
    let index = 0;
    while (index < text.length && !this.error) {
      this.#at = start + index;
      index += this.#token ? this.#goOn(text, index) : this.#step(text, index);
    }
    if (!this.error) this.#at = start + index;
  }

  /** The text is over. Returns what is wrong with it, or null. */
  finish() {
    if (this.error) return this.error;
    if (this.#token?.kind === "word") this.#endWord();
    if (this.error) return this.error;
    if (this.#token) this.#fail("the text ends inside a string");
    else if (this.#open.length) this.#fail(`the text ends early: ${CLOSERS[this.#open.at(-1)]} is missing`);
    else if (this.#wants !== "nothing") this.#fail("there is no JSON here");
    return this.error;
  }

  #tell(event, ...given) {
    this.#on[event]?.(...given);
  }

  #fail(message, at = this.#at) {
    this.error ??= { message, at };
  }

  /** One step between tokens. Returns how many characters it took. */
  #step(text, index) {
    SPACE.lastIndex = index;
    const space = SPACE.exec(text);
    if (space) return space[0].length;
    const char = text[index];
    const { length: depth } = this.#open;
    if (this.#wants === "nothing") this.#fail(`the JSON is over before ${named(char)}`);
    else if (char === "'" || char === "“" || char === "”") this.#fail(`strings and names stand in straight double quotes, not in ${char}`);
    else if (char === "/" || char === "#") this.#fail("JSON has no comments");
    else if (this.#wants === "colon") return this.#take(char === ":", `: is missing before ${named(char)}`, "value");
    else if (this.#wants === "next") return this.#next(char);
    else if (this.#wants.startsWith("name")) return this.#name(char);
    else if (char === "]" && this.#wants === "value or ]") return this.#close();
    else if (char === '"') this.#start("string", "string");
    else if (char === "{" || char === "[") this.#openOne(char === "{" ? "object" : "array");
    else if (/[A-Za-z0-9+\-.]/.test(char)) return this.#start("word", "word"), 0;
    else if (depth && char === CLOSERS[this.#open.at(-1)]) this.#fail(`a value is missing before ${named(char)}`);
    else this.#fail(`${named(char)} begins no value`);
    return 1;
  }

  #take(isRight, message, wants) {
    if (isRight) this.#wants = wants;
    else this.#fail(message);
    return 1;
  }

  #next(char) {
    const kind = this.#open.at(-1);
    if (char === CLOSERS[kind]) return this.#close();
    return this.#take(char === ",", `a comma or ${CLOSERS[kind]} is missing before ${named(char)}`, kind === "object" ? "name" : "value");
  }

  #name(char) {
    if (char === '"') this.#token = { kind: "key", from: this.#at, text: "", escape: "" };
    else if (char === "}" && this.#wants === "name or }") return this.#close();
    else this.#fail(char === "}" ? "nothing comes after the last comma" : `a name in double quotes is missing before ${named(char)}`);
    return 1;
  }

  #openOne(kind) {
    this.#tell("begin", kind, this.#at);
    this.#open.push(kind);
    this.#wants = kind === "object" ? "name or }" : "value or ]";
  }

  #close() {
    this.#open.pop();
    this.#ended(this.#at + 1);
    return 1;
  }

  #start(kind, shown) {
    this.#token = { kind, from: this.#at, text: "", escape: "" };
    this.#tell("begin", shown, this.#at);
  }

  #ended(at) {
    this.#token = null;
    this.#wants = this.#open.length ? "next" : "nothing";
    this.#tell("end", at);
  }

  /** More of a string or a word. Returns how many characters it took. */
  #goOn(text, index) {
    const token = this.#token;
    if (token.kind === "word") return this.#goOnWord(text, index);
    if (token.escape) return this.#goOnEscape(text[index]);
    PLAIN.lastIndex = index;
    const plain = PLAIN.exec(text);
    if (plain) return this.#grow(plain[0]), plain[0].length;
    const char = text[index];
    if (char === "\\") token.escape = "\\";
    else if (char !== '"') this.#fail(`${named(char)} stands inside a string; write it as ${char === "\n" ? "\\n" : "an escape"}`);
    else if (token.kind === "string") this.#ended(this.#at + 1);
    else {
      this.#token = null;
      this.#wants = "colon";
      this.#tell("key", token.text, token.from, this.#at + 1);
    }
    return 1;
  }

  #grow(part) {
    this.#token.text += this.#token.kind === "string" ? "" : part;
    if (this.#token.kind !== "key") this.#tell("text", part);
  }

  #goOnEscape(char) {
    const token = this.#token;
    if (token.escape === "\\") {
      if (char === "u") token.escape = "\\u";
      else if (char in ESCAPES) {
        token.escape = "";
        this.#grow(ESCAPES[char]);
      } else this.#fail(`\\${char} is no escape`);
    } else if (/[0-9a-fA-F]/.test(char)) {
      token.escape += char;
      if (token.escape.length === 6) {
        this.#grow(String.fromCharCode(parseInt(token.escape.slice(2), 16)));
        token.escape = "";
      }
    } else this.#fail("behind \\u come four hexadecimal digits");
    return 1;
  }

  #goOnWord(text, index) {
    WORD.lastIndex = index;
    const more = WORD.exec(text);
    if (more) return this.#grow(more[0]), more[0].length;
    this.#endWord();
    return 0; // the character behind it is looked at once more
  }

  #endWord() {
    const { text, from } = this.#token;
    if (isWord(text)) this.#ended(from + text.length);
    else this.#fail(`${text.length > 40 ? `${text.slice(0, 40)}…` : text} is no value of JSON; texts stand in double quotes`, from);
  }
}

const isWord = (text) => WORDS.has(text) || NUMBER.test(text);

/** Line and column of a place in a text; 1 is the first of each. */
export function placeIn(text, at) {
  const before = text.slice(0, at);
  return { line: before.split("\n").length, column: at - before.lastIndexOf("\n") };
}

/** The step of a JSON pointer to this name or index. */
export const step = (name) => `/${String(name).replaceAll("~", "~0").replaceAll("/", "~1")}`;

/**
 * A whole text: its `value`, or `error` {message, at, line, column}. `places` says of each JSON pointer where its value stands:
 * {from, to}, beginning with its name where it has one.
 */
export function readDocument(text) {
  const places = new Map();
  const path = []; // containers and values that have not ended: {pointer, from, index}
  let name = null;
  const reader = new JsonReader({
    key: (key, from) => (name = { key, from }),
    begin: (_, at) => {
      const parent = path.at(-1);
      const pointer = parent ? parent.pointer + step(name ? name.key : parent.index) : "";
      if (parent) parent.index += 1;
      path.push({ pointer, from: name?.from ?? at, index: 0 });
      name = null;
    },
    end: (to) => {
      const { pointer, from } = path.pop();
      places.set(pointer, { from, to });
    },
  });
  reader.push(text);
  const error = reader.finish();
  if (error) return { error: { ...error, ...placeIn(text, error.at) }, places };
  return { value: JSON.parse(text), places };
}

/** JSON for people: what fits into a line stands in one. */
export function pretty(value, width = 44, indent = "", used = 0) {
  const isOpen = value && typeof value === "object";
  const short = JSON.stringify(value, null, 1)?.replace(/\n\s*/g, " ") ?? "null"; // line breaks inside strings are escaped
  if (!isOpen || indent.length + used + short.length <= width) return isOpen && Array.isArray(value) ? short.replace(/^\[ | \]$/g, (end) => end.trim()) : short;
  const inner = `${indent}  `;
  const lines = Array.isArray(value)
    ? value.map((entry) => inner + pretty(entry, width, inner))
    : Object.entries(value).map(([name, entry]) => `${inner}${JSON.stringify(name)}: ${pretty(entry, width, inner, name.length + 4)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return lines.length ? `${open}\n${lines.join(",\n")}\n${indent}${close}` : open + close;
}
