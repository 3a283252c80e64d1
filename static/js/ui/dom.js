/**
 * The two ways this page makes elements. Text only ever becomes a text node; no HTML string is parsed anywhere.
 */

import { visible } from "./visible.js";

/** The element with this id, which index.html promises to have. */
export function byId(id) {
  const node = document.getElementById(id);
  if (!node) throw new Error(`index.html lacks #${id}`);
  return node;
}

/** An element: `on…` properties are listeners, true and false set or leave out an attribute, the rest are attributes. */
export function h(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Somebody else's text as nodes: what would hide or turn the text around it is shown by its name. */
export const nodesOf = (text) => visible(text).map((part) => (typeof part === "string" ? part : h(part.tag, part.attributes, ...part.children)));

/** An element of a drawing. */
export function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** One of the symbols at the top of index.html. */
export const icon = (name) => svg("svg", { "aria-hidden": "true" }, svg("use", { href: `#icon-${name}` }));

/** A button that shows only an icon; `label` is its name for everybody who cannot see it. */
export function iconButton(name, label, onclick) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick }, icon(name));
}

/** Calls `changed` when this element has become wider or narrower; in a frame of its own, so that it may change its size. */
export function onWidth(node, changed) {
  let width = 0;
  new ResizeObserver(() => {
    if (node.clientWidth !== width) requestAnimationFrame(changed);
    width = node.clientWidth;
  }).observe(node);
}

const sheets = new Map(); // name -> promise

/** Brings css/<name>.css, once; settles when its rules hold. A sheet that cannot be had costs only the looks, and is asked for again. */
export function useStyle(name) {
  if (!sheets.has(name)) {
    const link = h("link", { rel: "stylesheet", href: new URL(`../../css/${name}.css`, import.meta.url) });
    const settled = new Promise((resolve) => ["load", "error"].forEach((event) => link.addEventListener(event, resolve)));
    link.addEventListener("error", () => sheets.delete(name) && link.remove());
    document.head.append(link);
    sheets.set(name, settled);
  }
  return sheets.get(name);
}
