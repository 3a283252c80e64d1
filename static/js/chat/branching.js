/**
 * The button on each message that goes on from there in a conversation of its own.
 */

import { branchAt } from "../store/copies.js";
import { byId, iconButton } from "../ui/dom.js";
import { tell } from "../ui/toast.js";

export class Branching {
  constructor(page) {
    this.page = page;
  }

  actions(message, number) {
    return iconButton("branch", `Branch off after message ${number}`, () => this.#branch(message));
  }

  async #branch(message) {
    const { page } = this;
    const { conversation } = page;
    const branch = branchAt(conversation, message, `${conversation.title || "Untitled"} (branch)`);
    await page.store.save(branch);
    location.hash = `c=${branch.id}`;
    byId("prompt").focus();
    tell("Branched to a new chat", "Go back", () => (location.hash = `c=${conversation.id}`));
  }
}
