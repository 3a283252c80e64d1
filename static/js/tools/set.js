/**
 * The tools of a conversation: what the model is told of them, how it may call them, and what stands in for them here.
 *
 * Owns `conversation.extra.tools`: {isOn, list: [{name, description, parameters, mock, answer}], choice, parallel, once, auto};
 * `parameters` is the schema as it was typed, `mock` "fixed", "template" or "ask". Tells the page by the event "tools". Knows
 * nothing of fields on screen, or of calls.
 */

import { placeIn, pretty, readDocument } from "../json/reader.js";
import { FormChecks, placeOfParam } from "../structure/checks.js";

export const MAX_TURNS = 8; // of calls and results that go on by themselves
const MAX_TOOLS = 64; // that are imported at once
const NAME = /^[a-zA-Z0-9_.:/-]{1,128}$/;

export const MOCKS = [
  { name: "template", title: "A template", note: "{{args.city}} becomes that argument of the call." },
  { name: "fixed", title: "Always the same", note: "Sent as it is." },
  { name: "ask", title: "Ask me", note: "The chat waits until you have written the result." },
];

const NO_TOOLS = Object.freeze({ isOn: false, list: [], choice: "auto", parallel: true, once: true, auto: true });

export const SAMPLE = {
  name: "get_weather",
  description: "The weather in a city right now",
  parameters: pretty({ type: "object", properties: { city: { type: "string", maxLength: 40 }, unit: { enum: ["celsius", "fahrenheit"] } }, required: ["city", "unit"], additionalProperties: false }),
  mock: "template",
  answer: '{"city": "{{args.city}}", "temperature": 21, "unit": "{{args.unit}}", "sky": "clear"}',
};

export const newTool = (name) => ({ name, description: "", parameters: pretty({ type: "object", properties: {} }), mock: "ask", answer: "" });

/** The fields of a request, `{fields, schemas}`, or `{error: {message, tool, field, at}}`. `isFollowUp`: a call's result is sent. */
export function requestFor({ isOn, list, choice, parallel, once }, isFollowUp = false) {
  if (!isOn || !list.length) return { fields: {}, schemas: [] };
  const schemas = [];
  for (const [index, tool] of list.entries()) {
    const wrong = (field, message, at = null) => ({ error: { message: `${tool.name || `Tool ${index + 1}`}: ${message}`, words: message, tool: index, field, at } });
    if (!NAME.test(tool.name)) return wrong("name", "a name has 1 to 128 letters, digits and _ . : / -");
    if (list.findIndex(({ name }) => name === tool.name) !== index) return wrong("name", "another tool has this name already");
    const read = tool.parameters.trim() ? readDocument(tool.parameters) : { value: { type: "object", properties: {} }, places: new Map() };
    if (read.error) return wrong("parameters", `line ${read.error.line}, column ${read.error.column}: ${read.error.message}`, read.error.at);
    if (!read.value || typeof read.value !== "object" || Array.isArray(read.value)) return wrong("parameters", "a schema is a JSON object", 0);
    schemas.push(read);
  }
  const isNamed = list.some(({ name }) => name === choice) && !["auto", "none", "required"].includes(choice);
  const isDemand = choice === "required" || isNamed;
  const named = isNamed ? { type: "function", function: { name: choice } } : ["none", "required"].includes(choice) ? choice : "auto";
  const tools = list.map(({ name, description }, k) => ({ type: "function", function: { name, ...(description && { description }), parameters: schemas[k].value } }));
  return { fields: { tools, tool_choice: isDemand && once && isFollowUp ? "auto" : named, ...(!parallel && { parallel_tool_calls: false }) }, schemas };
}

/** What stands in for a tool: the text of its result, or null where the user is asked. */
export function mockAnswer(tool, args) {
  if (!tool || tool.mock === "ask") return null;
  if (tool.mock === "fixed") return tool.answer;
  return tool.answer.replace(/\{\{\s*args((?:\.[^.{}\s]+)*)\s*\}\}/g, (_, path) => {
    let at = args;
    for (const name of path.split(".").slice(1)) at = at && typeof at === "object" && Object.hasOwn(at, name) ? at[name] : undefined;
    const text = JSON.stringify(at ?? "");
    return typeof (at ?? "") === "string" ? text.slice(1, -1) : text; // so that a template that is JSON stays JSON
  });
}

/** Tools out of JSON as OpenAI or Anthropic write them, one or a list. Throws Error where there are none. */
export function importTools(text) {
  const { value, error } = readDocument(text);
  if (error) throw new Error(`Line ${error.line}, column ${error.column}: ${error.message}`);
  const given = Array.isArray(value) ? value : Array.isArray(value?.tools) ? value.tools : Array.isArray(value?.functions) ? value.functions : [value];
  if (given.length > MAX_TOOLS) throw new Error(`There are ${given.length} tools; at most ${MAX_TOOLS} can be taken at once.`);
  return given.map((entry, index) => {
    const { name, description, parameters, input_schema: schema } = entry?.function ?? entry ?? {};
    if (typeof name !== "string") throw new Error(`Entry ${index + 1} has no name.`);
    return { ...newTool(name.slice(0, 128)), description: String(description ?? "").slice(0, 4000), parameters: pretty(parameters ?? schema ?? { type: "object", properties: {} }) };
  });
}

/** The tools as a request has them. */
export const exportTools = (set) => JSON.stringify(requestFor({ ...set, isOn: true }).fields.tools ?? [], null, 2);

/** The tools of the conversation on screen, and how they stand. One for a page. */
class ToolSet {
  constructor(page) {
    this.page = page;
    this.checks = new FormChecks(page, "tools");
  }

  get value() {
    return toolsOf(this.page.conversation);
  }

  change(part) {
    const { conversation } = this.page;
    conversation.extra = { ...conversation.extra, tools: { ...this.value, ...part } };
    this.checks.changed();
    this.page.saveSoon(conversation);
  }

  changeTool(index, part) {
    this.change({ list: this.value.list.map((tool, k) => (k === index ? { ...tool, ...part } : tool)) });
  }

  /** How it stands: {state: "" | "busy" | "good" | "wrong" | "unknown", message}, and where: {tool, field, at}. */
  standing() {
    const set = this.value;
    const request = requestFor(set);
    if (request.error) return { state: "wrong", ...request.error };
    if (!request.fields.tools) return { state: "", message: "" };
    if (this.checks.failure) return { state: "unknown", message: `Not checked: ${this.checks.failure.message}` };
    const problem = this.checks.of(request.fields);
    if (problem === undefined) return { state: "busy", message: "Checking…" };
    return problem === null ? { state: "good", message: "" } : { state: "wrong", ...placed(problem, set, request) };
  }
}

/** Which tool and field the server's refusal is about. */
function placed({ message, param }, { list }, { schemas }) {
  const [start, key] = param?.match(/^tools\[([^\]]*)\]/) ?? []; // by number, or by name where it is about a schema
  const named = list.findIndex(({ name }) => name === key);
  const tool = named >= 0 ? named : Number(key ?? NaN);
  if (!(tool in list)) return { message, words: message, tool: null, field: null, at: null };
  const prefix = param.startsWith(`${start}.function.parameters`) ? `${start}.function.parameters` : `${start}.parameters`;
  const at = placeOfParam(param, prefix, schemas[tool].value, schemas[tool].places);
  const words = message.startsWith(prefix) ? message.slice(prefix.length).replace(/^\./, "") : message;
  const place = at === null ? null : placeIn(list[tool].parameters, at);
  const full = `${place ? `line ${place.line}, column ${place.column}: ` : ""}${words}`;
  return { message: `${list[tool].name}: ${full}`, words: full, tool, field: param.startsWith(prefix) ? "parameters" : "name", at };
}

/** Those of a conversation; where a file that somebody made has something else, none. */
export function toolsOf(conversation) {
  const set = { ...NO_TOOLS, ...conversation.extra?.tools };
  const isTool = (tool) => ["name", "description", "parameters", "mock", "answer"].every((field) => typeof tool?.[field] === "string");
  return Array.isArray(set.list) && set.list.every(isTool) ? set : NO_TOOLS;
}

const sets = new WeakMap();

/** The one of this page. */
export function toolSetOf(page) {
  if (!sets.has(page)) sets.set(page, new ToolSet(page));
  return sets.get(page);
}
