/**
 * A chat request as a program that sends it again: for a shell, Python, JavaScript and a WebSocket.
 *
 * The text is made from the request itself, so that it asks for exactly the same. The key is never part of it: programs read it
 * from $STREAMSERVE_API_KEY. Long pictures become files beside the program, with the lines that read them. Characters that hide or
 * reorder text are written as escapes.
 *
 * Knows the quoting of these languages. Knows nothing of the page or of conversations.
 */

const MAX_INLINE = 10_000; // characters of a picture that are written out
const MAX_ARGUMENT = 100_000; // bytes; a system takes no longer word on a command line than 128 kB
const DATA_URL = /^data:([\w.+-]+\/([\w.+-]+));base64,([A-Za-z0-9+/]+=*)$/;
const HIDDEN = /[\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202f\u2060-\u206f\ufeff\ufff0-\ufffb\ufffe\uffff]|[\u{e0000}-\u{e0fff}]/gu;

/** @typedef {{name: string, url: string}} File  a picture that a program reads: `url` is its data: URL */

/** JSON text in which no character hides, and which says the same. */
export function showHidden(json) {
  return json.replace(HIDDEN, (char) => char.split("").map((unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`).join(""));
}

/** Pretty JSON in which no character hides. */
export const jsonText = (value) => showHidden(JSON.stringify(value, null, 2) ?? "null");

/** The same value with every long picture replaced by what `name(url, k)` gives, k counting different ones from 0. */
export function replaceFiles(value, name) {
  const seen = new Map(); // url -> what it became
  const walk = (at) => {
    if (typeof at === "string") {
      if (at.length <= MAX_INLINE || !DATA_URL.test(at)) return at;
      if (!seen.has(at)) seen.set(at, name(at, seen.size));
      return seen.get(at);
    }
    if (Array.isArray(at)) return at.map(walk);
    if (at === null || typeof at !== "object") return at;
    const copy = {};
    for (const [key, inner] of Object.entries(at)) set(copy, key, walk(inner));
    return copy;
  };
  return walk(value);
}

/** Sets what is an object's own, whatever it is called. */
function set(object, key, value) {
  Object.defineProperty(object, key, { value, enumerable: true, configurable: true, writable: true });
}

/** What the file of the k-th picture is called. */
export function fileName(url, k) {
  const kind = url.match(DATA_URL)[2];
  return `image-${k + 1}.${{ jpeg: "jpg", "svg+xml": "svg" }[kind] ?? kind.replace(/\W/g, "")}`;
}

/** What stands for the files while a program is written: a word that is nowhere in the request. */
function takeFiles(body) {
  const nonce = crypto.getRandomValues(new Uint32Array(2)).join("");
  const files = [];
  const marked = replaceFiles(body, (url, k) => {
    files.push({ name: fileName(url, k), url, mark: `FILE${nonce}N${k}`, variable: `image_${k + 1}`, type: url.match(DATA_URL)[1] });
    return files[k].mark;
  });
  return { marked, files };
}

/** `target`: {base: the server's URL with its last slash, hasKey: whether it asks for one}. */
export const LANGUAGES = {
  curl: { title: "curl", colours: "bash", write: curl },
  python: { title: "Python", colours: "python", write: python },
  javascript: { title: "JavaScript", colours: "javascript", write: javascript },
  websocket: { title: "WebSocket", colours: "javascript", write: websocket },
};

/** The program and the files it reads. @returns {{text: string, files: File[]}} */
export function snippet(language, body, target) {
  const { marked, files } = takeFiles(body);
  return { text: LANGUAGES[language].write(marked, files, target), files: files.map(({ name, url }) => ({ name, url })) };
}

const KEY = "STREAMSERVE_API_KEY";
const endpoint = ({ base }, path = "v1/chat/completions") => String(new URL(path, base));
const isStreamed = (body) => body?.stream === true;

// -------------------------------------------------------------------------------------------------------------------- shell

/** One word for a POSIX shell: nothing in it is expanded, not even by an interactive one. */
const word = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function curl(body, files, target) {
  let json = word(jsonText(body));
  for (const { mark, variable } of files) json = json.replaceAll(mark, `'"$${variable}"'`);
  const isLong = files.length > 0 || new TextEncoder().encode(json).length > MAX_ARGUMENT;
  const lines = [
    `curl --no-buffer ${word(endpoint(target))}`,
    ...(target.hasKey ? [`-H "Authorization: Bearer $${KEY}"`] : []),
    "-H 'Content-Type: application/json'",
    isLong ? "--data-binary @-" : `-d ${json}`,
  ];
  const reads = files.map(({ name, variable, type }) => `${variable}="data:${type};base64,$(base64 < ${name} | tr -d '\\n')"\n`);
  const command = lines.join(" \\\n  ");
  return `${reads.join("")}${isLong ? `printf '%s' ${json} | ${command}` : command}\n`;
}

// ------------------------------------------------------------------------------------------------------------------- Python

/** Fields that the openai client has by name; others travel in its extra_body. */
const NAMED = new Set(
  `messages model audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens metadata
  modalities n parallel_tool_calls prediction presence_penalty reasoning_effort response_format seed service_tier stop store stream
  stream_options temperature tool_choice tools top_logprobs top_p user`.split(/\s+/),
);

/** A string for Python, whose escapes are JSON's but for what lies beyond 16 bits. */
function pythonString(text) {
  return JSON.stringify(text).replace(HIDDEN, (char) => {
    const code = char.codePointAt(0);
    return code > 0xffff ? `\\U${code.toString(16).padStart(8, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
  });
}

function pythonValue(value, files, indent = "") {
  const inner = `${indent}    `;
  const list = (open, items, close) => (items.length ? `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}` : open + close);
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "number") return JSON.stringify(value);
  if (typeof value === "string") return files.find(({ mark }) => mark === value)?.variable ?? pythonString(value);
  if (Array.isArray(value)) return list("[", value.map((item) => pythonValue(item, files, inner)), "]");
  return list("{", Object.entries(value).map(([key, item]) => `${pythonString(key)}: ${pythonValue(item, files, inner)}`), "}");
}

function python(body, files, target) {
  const entries = Object.entries(body).filter(([, value]) => value !== undefined);
  const named = entries.filter(([name]) => NAMED.has(name));
  const extra = {};
  for (const [name, value] of entries) if (!NAMED.has(name)) set(extra, name, value);
  const missing = ["model", "messages"].filter((name) => !named.some(([other]) => other === name));
  const fields = [
    ...missing.map((name) => `    ${name}=NOT_GIVEN,\n`),
    ...named.map(([name, value]) => `    ${name}=${pythonValue(value, files, "    ")},\n`),
    ...(Object.keys(extra).length ? [`    extra_body=${pythonValue(extra, files, "    ")},\n`] : []),
  ];
  const key = target.hasKey ? `os.environ["${KEY}"]` : '"none"'; // the client insists on one
  const imports = [
    ...(target.hasKey ? ["import os"] : []),
    ...(files.length ? ["from base64 import b64encode", "from pathlib import Path"] : []),
    ...(target.hasKey || files.length ? [""] : []),
    `from openai import ${missing.length ? "NOT_GIVEN, OpenAI" : "OpenAI"}`,
  ];
  const reads = files.map(({ name, variable, type }) => `${variable} = "data:${type};base64," + b64encode(Path("${name}").read_bytes()).decode()`);
  const shows = isStreamed(body)
    ? ["for chunk in answer:", "    if chunk.choices:", '        print(chunk.choices[0].delta.content or "", end="", flush=True)', "print()"]
    : ["print(answer.choices[0].message.content)"];
  return [
    ...imports,
    "",
    `client = OpenAI(base_url=${pythonString(endpoint(target, "v1"))}, api_key=${key})`,
    ...reads,
    `answer = client.chat.completions.create(\n${fields.join("")})`,
    ...shows,
    "",
  ].join("\n");
}

// --------------------------------------------------------------------------------------------------------------- JavaScript

/** JSON as an expression: a key of this one name would set the prototype instead. */
function script(body, files, indent) {
  let text = jsonText(body).replace(/^(\s*)"__proto__":/gm, '$1["__proto__"]:').replaceAll("\n", `\n${indent}`);
  for (const { mark, variable } of files) text = text.replaceAll(`"${mark}"`, variable);
  return text;
}

function scriptHead(files) {
  if (!files.length) return "";
  const reads = files.map(({ name, variable, type }) => `const ${variable} = "data:${type};base64," + (await readFile("${name}")).toString("base64");\n`);
  return `import { readFile } from "node:fs/promises";\n\n${reads.join("")}\n`;
}

function javascript(body, files, target) {
  const key = target.hasKey ? `\n    Authorization: \`Bearer \${process.env.${KEY}}\`,` : "";
  const shows = isStreamed(body)
    ? `let rest = "";
for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
  const events = (rest + text).split("\\n\\n");
  rest = events.pop();
  for (const event of events) {
    if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
    const chunk = JSON.parse(event.slice(6));
    if (chunk.error) throw new Error(chunk.error.message);
    process.stdout.write(chunk.choices[0]?.delta.content ?? "");
  }
}
`
    : "console.log((await response.json()).choices[0].message.content);\n";
  return `// Node 18 or newer: save as request.mjs
${scriptHead(files)}const response = await fetch(${JSON.stringify(endpoint(target))}, {
  method: "POST",
  headers: {
    "Content-Type": "application/json",${key}
  },
  body: JSON.stringify(${script(body, files, "  ")}),
});
if (!response.ok) throw new Error(await response.text());
${shows}`;
}

function websocket(body, files, target) {
  const key = target.hasKey ? `\n  send({ type: "auth", api_key: process.env.${KEY} });` : "";
  const url = endpoint(target, "v1/ws").replace(/^http/, "ws");
  return `// Node 22 or newer: save as request.mjs
${scriptHead(files)}const socket = new WebSocket(${JSON.stringify(url)});
const send = (frame) => socket.send(JSON.stringify(frame));
socket.onopen = () => {${key}
  send({ type: "chat.create", id: "a", request: ${script(body, files, "  ")} });
};
socket.onmessage = ({ data }) => {
  const frame = JSON.parse(data);
  if (frame.type === "chunk") process.stdout.write(frame.chunk.choices[0]?.delta.content ?? "");
  if (frame.type === "error") console.error(frame.error.message);
  if (frame.type === "done" || frame.type === "error") socket.close();
};
`;
}
