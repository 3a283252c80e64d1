/**
 * The page at /docs: every route of openapi.json with its fields and answers, and a form to try it.
 *
 * Shows what the document says and nothing else; a new route needs no change here.
 */

import { byId, h } from "./js/ui/dom.js";

const base = new URL(".", location.href);

/** The schema that a reference stands for. */
function resolve(schema, document) {
  return schema?.$ref ? document.components.schemas[schema.$ref.split("/").pop()] : schema;
}

/** A schema's type in a few words. */
function typeOf(schema, document) {
  if (!schema) return "any";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const options = schema.anyOf ?? schema.oneOf;
  if (options) return [...new Set(options.filter((one) => one.type !== "null").map((one) => typeOf(one, document)))].join(" | ");
  if (schema.type === "array") return `list of ${typeOf(schema.items, document)}`;
  return schema.type ?? "any";
}

/** What a value may be beside its type: its range, and what holds when it is left out. */
function limitsOf(schema) {
  const ranged = [schema, ...(schema.anyOf ?? [])].find((one) => one.minimum !== undefined);
  const words = ranged ? [`${ranged.minimum} to ${ranged.maximum}`] : [];
  if (schema.default !== undefined && schema.default !== null) words.push(`default ${JSON.stringify(schema.default)}`);
  return words.join("; ");
}

function fieldTable(schema, document) {
  const required = new Set(schema.required ?? []);
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) =>
    h(
      "tr",
      {},
      h("td", {}, h("code", {}, name), required.has(name) ? " (needed)" : ""),
      h("td", {}, typeOf(field, document)),
      h("td", {}, limitsOf(field)),
      h("td", {}, field.description ?? ""),
    ),
  );
  const head = h("tr", {}, ...["Field", "Type", "Values", ""].map((title) => h("th", { scope: "col" }, title)));
  return h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows));
}

/** Types that a type's fields are made of, each once, in the order in which they are met. */
function partsOf(schema, document, seen = new Map()) {
  for (const match of JSON.stringify(schema).matchAll(/#\/components\/schemas\/([^"]+)/g)) {
    const name = match[1];
    if (seen.has(name)) continue;
    seen.set(name, document.components.schemas[name]);
    partsOf(document.components.schemas[name], document, seen);
  }
  return seen;
}

/** A body to begin with: the document's example, or the needed fields. */
function exampleOf(content, document) {
  if (content.example) return content.example;
  const schema = resolve(content.schema, document);
  return Object.fromEntries((schema.required ?? []).map((name) => [name, sample(schema.properties[name], document)]));
}

function sample(field, document) {
  const schema = resolve(field, document);
  const option = schema?.anyOf ? resolve(schema.anyOf[0], document) : schema;
  const samples = { string: "Hello", integer: 16, number: 1, boolean: false, array: [], object: {} };
  return option?.default ?? samples[option?.type] ?? null;
}

/** The form that sends a request and shows what comes back, piece by piece. */
function tryForm(method, path, operation, document) {
  const output = h("pre", { hidden: true, "aria-live": "polite" });
  const names = (operation.parameters ?? []).map((parameter) => parameter.name);
  const inputs = new Map(names.map((name) => [name, h("input", { name, "aria-label": name, placeholder: name })]));
  const content = operation.requestBody?.content["application/json"];
  const form = operation.requestBody?.content["multipart/form-data"];
  const parts = Object.entries(form?.schema.properties ?? {}).map(([name, { format }]) =>
    h("input", { name, type: format === "binary" ? "file" : "text", "aria-label": name, placeholder: name }),
  );
  const body = content ? h("textarea", { rows: 8, "aria-label": "Body", spellcheck: "false" }) : null;
  if (body) body.value = JSON.stringify(exampleOf(content, document), null, 2);
  let stop = null;

  async function send(event) {
    event.preventDefault();
    stop?.abort();
    stop = new AbortController();
    output.hidden = false;
    output.className = "";
    output.textContent = "…";
    try {
      const response = await fetch(urlOf(path, operation, inputs), {
        method: method.toUpperCase(),
        headers: { ...(body ? { "Content-Type": "application/json" } : {}), ...keyHeader() },
        body: form ? formOf(parts) : body?.value,
        signal: stop.signal,
      });
      output.className = response.ok ? "" : "bad";
      output.textContent = `${response.status} ${response.statusText}\n`;
      await show(response, output);
    } catch (error) {
      output.className = "bad";
      output.textContent += `\n${error.name === "AbortError" ? "stopped" : error.message}`;
    }
  }

  const row = h(
    "div",
    { class: "row" },
    ...inputs.values(),
    ...parts,
    h("button", { type: "submit" }, "Send"),
    h("button", { type: "button", onclick: () => stop?.abort() }, "Stop"),
  );
  return h("form", { onsubmit: send, autocomplete: "off" }, h("h3", {}, "Try it"), body, row, output);
}

function formOf(parts) {
  const data = new FormData();
  for (const { name, value, files } of parts) {
    if (files?.length) data.append(name, files[0]);
    else if (value) data.append(name, value);
  }
  return data;
}

function keyHeader() {
  const key = byId("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function urlOf(path, operation, inputs) {
  const query = new URLSearchParams();
  let filled = path;
  for (const parameter of operation.parameters ?? []) {
    const value = inputs.get(parameter.name).value;
    if (parameter.in === "path") filled = filled.replace(`{${parameter.name}}`, value.split("/").map(encodeURIComponent).join("/"));
    else if (value) query.set(parameter.name, value);
  }
  const tail = query.size ? `?${query}` : "";
  return new URL(filled.slice(1) + tail, base);
}

async function show(response, output) {
  if (response.headers.get("content-type")?.startsWith("application/json")) {
    output.append(JSON.stringify(await response.json(), null, 2));
    return;
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) output.append(part.value);
}

function routeView(method, path, operation, document) {
  const inside = h("div", {});
  const [content] = Object.values(operation.requestBody?.content ?? {});
  const view = h(
    "details",
    { "data-words": `${method} ${path} ${operation.summary}`.toLowerCase() },
    h("summary", {}, h("span", { class: "method" }, method.toUpperCase()), h("span", { class: "path" }, path), h("span", { class: "quiet" }, operation.summary)),
    inside,
  );
  view.addEventListener("toggle", () => {
    if (inside.childElementCount) return; // made when it is first opened
    inside.append(h("p", {}, operation.description ?? ""));
    for (const { name, description } of operation.parameters ?? []) inside.append(h("p", {}, h("code", {}, name), ` ${description ?? ""}`));
    if (content) {
      inside.append(h("h3", {}, "Body"), fieldTable(resolve(content.schema, document), document));
      const parts = partsOf(resolve(content.schema, document), document);
      for (const [name, schema] of parts) inside.append(h("h3", {}, name), h("p", { class: "quiet" }, schema.description ?? ""), fieldTable(schema, document));
    }
    inside.append(h("h3", {}, "Answers"));
    for (const [status, answer] of Object.entries(operation.responses)) {
      const kinds = Object.entries(answer.content ?? {}).map(([media, { schema }]) => `${media}: ${typeOf(schema, document)}`);
      inside.append(h("p", {}, h("code", {}, status), ` ${answer.description} `, h("span", { class: "quiet" }, kinds.join("; "))));
    }
    inside.append(tryForm(method, path, operation, document));
  });
  return view;
}

function filter(word) {
  for (const view of document.querySelectorAll("details")) view.hidden = !view.dataset.words.includes(word.trim().toLowerCase());
}

async function main() {
  const routes = byId("routes");
  const response = await fetch(new URL("openapi.json", base));
  if (!response.ok) throw new Error(`openapi.json: ${response.status}`);
  const api = await response.json();
  byId("version").textContent = api.info.version;
  byId("about").textContent = api.info.description;
  byId("filter").addEventListener("input", (event) => filter(event.target.value));
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  const views = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => routeView(method, path, operation, api)),
  );
  routes.replaceChildren(...views);
}

main().catch((error) => byId("routes").replaceChildren(h("p", { class: "quiet" }, `The routes could not be loaded: ${error.message}`)));
