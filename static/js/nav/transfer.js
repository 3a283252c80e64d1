/**
 * Conversations as files: export of one or all, and import.
 *
 *   {"format": "streamserve.chat", "version": 1, "exported": time, "conversations": [...], "pictures": {key: {type, data: base64}}}
 *
 * A conversation stands there as it is kept: all branches, settings, what parts of the page know of it. Bytes of pictures stand beside
 * them, each once. A file holds nothing of the server, no key and no address. What a file may hold is the business of transfer-check.js.
 */

import { newId } from "../store/store.js";
import { byId, h } from "../ui/dom.js";
import { plural } from "../ui/numbers.js";
import { tell } from "../ui/toast.js";
import { titleOf } from "./nav.js";
import { FORMAT, MAX_FILE_BYTES, VERSION, checked } from "./transfer-check.js";

const picturesOf = ({ messages }) => messages.flatMap((message) => message.pictures ?? []);

// ------------------------------------------------------------------------------------------------------------------- export

export async function exportOne(page, conversation) {
  const name = titleOf(conversation).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60);
  await save(page, [conversation], `${name || "conversation"}.json`);
  page.say(`Exported ${titleOf(conversation)}`);
}

export async function exportAll(page) {
  const entries = await page.store.list();
  const conversations = [];
  for (const { id } of entries) {
    const conversation = await page.find(id);
    if (conversation) conversations.push(conversation);
  }
  await save(page, conversations, `streamserve-chats-${new Date().toISOString().slice(0, 10)}.json`);
  page.say(`Exported ${plural(conversations.length, "conversation")}`);
}

/** Written in pieces, so that no single text has all of it. */
async function save(page, conversations, name) {
  const pieces = [`{"format":"${FORMAT}","version":${VERSION},"exported":"${new Date().toISOString()}","conversations":[\n`];
  const pictures = new Map();
  conversations.forEach((conversation, k) => {
    const { format: _, ...rest } = conversation;
    pieces.push(k ? ",\n" : "", JSON.stringify(rest));
    for (const picture of picturesOf(conversation)) pictures.set(picture.id, picture);
  });
  pieces.push('\n],"pictures":{\n');
  let isFirst = true;
  for (const [id, picture] of pictures) {
    const blob = await page.blobs.find(id);
    if (!blob) continue; // gone from this browser: the message still names it
    const url = await page.blobs.dataUrl(picture);
    pieces.push(isFirst ? "" : ",\n", `${JSON.stringify(id)}:`, JSON.stringify({ type: blob.type, data: url.slice(url.indexOf(",") + 1) }));
    isFirst = false;
  }
  pieces.push("\n}}\n");
  const url = URL.createObjectURL(new Blob(pieces, { type: "application/json" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser reads it when it likes
}

// ------------------------------------------------------------------------------------------------------------------- import

/** Adds the conversations of these files. Nothing that is here is changed; of a file with a fault nothing is taken. */
export async function importFiles(page, files) {
  const added = [];
  const wrong = [];
  for (const file of files) {
    try {
      added.push(...(await importFile(page, file)));
    } catch (error) {
      wrong.push(`${file.name}: ${error.message}`);
    }
  }
  showFaults(wrong);
  if (!added.length) return;
  await page.nav.draw();
  const [{ id, title }] = added;
  tell(added.length === 1 ? `Imported “${title}”` : `Imported ${plural(added.length, "conversation")}`, "Open", () => page.open(id));
  page.nav.focus(id);
}

function showFaults(wrong) {
  document.getElementById("import-fault")?.remove();
  if (!wrong.length) return;
  const close = () => {
    fault.remove();
    byId("import-chats").focus();
  };
  const button = h("button", { type: "button", class: "link-button", onclick: close }, "Close");
  const fault = h("div", { class: "error", id: "import-fault", role: "alert" }, ...wrong.map((text) => h("p", {}, text)), button);
  byId("import-chats").before(fault);
}

async function importFile(page, file) {
  if (file.size > MAX_FILE_BYTES) throw new Error(`it has ${Math.ceil(file.size / 1e6)} MB; at most ${MAX_FILE_BYTES / 1e6} MB are taken.`);
  const { conversations, pictures } = checked(await file.text());
  const ids = await addPictures(page, conversations, pictures);
  const entries = await page.store.list();
  const titles = new Set(entries.map(({ title }) => title));
  const taken = new Set(entries.map(({ id }) => id));
  for (const conversation of conversations) {
    if (taken.has(conversation.id)) conversation.id = newId();
    conversation.title = unusedTitle(titleOf(conversation), titles);
    taken.add(conversation.id);
    titles.add(conversation.title);
    for (const message of conversation.messages) {
      if (message.pictures) message.pictures = message.pictures.map((picture) => ({ ...picture, id: ids.get(picture.id) ?? newId() }));
    }
    await page.store.restore(conversation);
  }
  return conversations;
}

/** Bytes are kept under their own hash, whatever the file calls them. Returns the id of each in this browser. */
async function addPictures(page, conversations, pictures) {
  const names = new Map(conversations.flatMap(picturesOf).map(({ id, name }) => [id, name]));
  const ids = new Map();
  for (const [key, blob] of pictures) {
    if (!names.has(key)) continue; // no message shows it
    const picture = await page.blobs.add(names.get(key), blob);
    await page.blobs.keep([picture]);
    ids.set(key, picture.id);
  }
  return ids;
}

function unusedTitle(title, titles) {
  let unused = title;
  for (let k = 1; titles.has(unused); k += 1) unused = `${title} (imported${k > 1 ? ` ${k}` : ""})`;
  return unused;
}
