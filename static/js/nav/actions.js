/**
 * What can be done with one conversation of the list: its menu, and rename, duplicate, delete and take back.
 *
 * The menu is WAI-ARIA's: arrow keys move, Escape closes, the focus goes back to its button. Owns the menu's element.
 */

import { copyOf } from "../store/copies.js";
import { byId, h } from "../ui/dom.js";
import { offerUndo, tell } from "../ui/toast.js";
import { titleOf } from "./nav.js";

const MAX_TITLE = 200; // characters

const ENTRIES = [
  { words: "Rename", act: rename },
  { words: "Duplicate", act: duplicate },
  { words: "Export", act: exportOne },
  { words: "Delete", act: remove, isGrave: true },
];

/** Opens the menu of this conversation at its button. */
export function openMenu(page, entry, button) {
  const close = (returnFocus) => {
    if (returnFocus) button.focus();
    menu.remove();
    button.setAttribute("aria-expanded", "false");
  };
  const run = (act) => {
    close(true);
    act(page, entry);
  };
  const entries = ENTRIES.map(({ words, act, isGrave }) =>
    h("button", { type: "button", role: "menuitem", tabindex: "-1", class: `menu-entry${isGrave ? " grave" : ""}`, onclick: () => run(act) }, words),
  );
  const menu = h("div", { class: "menu", role: "menu", popover: "auto", "aria-label": `Actions for ${titleOf(entry)}` }, ...entries);
  menu.addEventListener("keydown", (event) => pressed(event, entries, close));
  menu.addEventListener("toggle", ({ newState }) => newState === "closed" && menu.isConnected && close(menu.contains(document.activeElement)));
  document.body.append(menu);
  menu.showPopover();
  place(menu, button);
  button.setAttribute("aria-expanded", "true");
  entries[0].focus();
}

function pressed(event, entries, close) {
  const at = entries.indexOf(document.activeElement);
  const num = entries.length;
  const first = (key) => entries.findIndex((entry) => key.length === 1 && entry.textContent.toLowerCase().startsWith(key.toLowerCase()));
  const to = { ArrowDown: (at + 1) % num, ArrowUp: (at - 1 + num) % num, Home: 0, End: num - 1 }[event.key] ?? first(event.key);
  if (event.key === "Escape" || event.key === "Tab") close(true);
  else if (to >= 0 && !event.ctrlKey && !event.metaKey) entries[to].focus();
  else return;
  event.stopPropagation(); // Escape would stop an answer
  event.preventDefault();
}

/** Below the button, or above where there is no room. */
function place(menu, button) {
  const at = button.getBoundingClientRect();
  const { width, height } = menu.getBoundingClientRect();
  const isRoom = at.bottom + height + 8 < innerHeight;
  menu.style.top = `${isRoom ? at.bottom + 4 : Math.max(8, at.top - height - 4)}px`;
  menu.style.left = `${Math.max(8, Math.min(at.right - width, innerWidth - width - 8))}px`;
}

/** A field in the title's place: Enter and leaving it keep what was typed, Escape does not. */
function rename(page, entry) {
  const item = page.nav.itemOf(entry.id);
  const link = item.querySelector("a");
  const field = h("input", { class: "rename", "aria-label": `New title of ${titleOf(entry)}`, maxlength: MAX_TITLE, dir: "auto" });
  let isOver = false;
  const end = async (isKept) => {
    if (isOver) return;
    isOver = true;
    const hadFocus = document.activeElement === field;
    const title = field.value.trim().replace(/\s+/g, " ");
    field.replaceWith(link);
    if (isKept && title && title !== entry.title) {
      const conversation = await page.find(entry.id);
      if (conversation) {
        conversation.title = title;
        await page.store.save(conversation);
      }
      await page.nav.draw();
    }
    if (hadFocus) page.nav.focus(entry.id);
  };
  field.value = entry.title;
  field.addEventListener("blur", () => end(true));
  field.addEventListener("keydown", (event) => {
    if (event.isComposing || event.keyCode === 229 || !["Enter", "Escape"].includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    end(event.key === "Enter");
  });
  link.replaceWith(field);
  field.focus();
  field.select();
}

async function duplicate(page, entry) {
  const conversation = await page.find(entry.id);
  if (!conversation) return;
  const copy = copyOf(conversation, `${titleOf(entry)} (copy)`);
  await page.store.save(copy);
  await page.nav.draw();
  page.nav.focus(copy.id);
  page.say(`Duplicated ${titleOf(entry)}`);
}

async function exportOne(page, entry) {
  const conversation = await page.find(entry.id);
  if (conversation) await (await import("./transfer.js")).exportOne(page, conversation);
}

const picturesOf = ({ messages }) => messages.flatMap((message) => message.pictures ?? []);

/** Deletes it at once; for ten seconds it can be had back. */
async function remove(page, entry) {
  const { store, blobs, chat, nav } = page;
  const conversation = await page.find(entry.id);
  const isCurrent = entry.id === page.conversation.id;
  const next = nav.after(entry.id);
  if (conversation) chat.stop(conversation);
  if (isCurrent) page.newChat();
  await store.remove(entry.id);
  if (conversation) await blobs.forget(picturesOf(conversation));
  await nav.draw();
  if (!isCurrent) nav.focus(next);
  if (!conversation) return;
  offerUndo(`Deleted “${titleOf(entry)}”`, async () => {
    await store.restore(conversation);
    await blobs.keep(picturesOf(conversation));
    await nav.draw();
    if (isCurrent) location.hash = `c=${conversation.id}`;
    nav.focus(conversation.id);
  });
}

/** The conversation on screen was deleted in another tab. It is still here. */
export function tellRemoved(page) {
  const { conversation } = page;
  tell("This conversation was deleted in another tab.", "Keep it", async () => {
    await page.store.restore(conversation);
    await page.blobs.keep(picturesOf(conversation));
    byId("prompt").focus();
  });
}

/** Has on screen what another tab made of the conversation; false where something is being written here, which would be lost. */
export async function refresh(page) {
  const { chat, conversation, store } = page;
  const isWriting = () => chat.isStreaming || document.querySelector("#messages .editor, .composer.editing");
  if (isWriting()) return false;
  const fresh = await store.load(conversation.id);
  if (!fresh || conversation !== page.conversation) return true;
  if (isWriting()) return false;
  const scroll = byId("scroll");
  const { scrollTop } = scroll;
  const isAtEnd = scroll.scrollHeight - scroll.clientHeight - scrollTop < 2;
  Object.assign(conversation, fresh, { draft: conversation.draft });
  page.show(conversation);
  if (!isAtEnd) scroll.scrollTop = scrollTop;
  return true;
}
