/**
 * The reading position: follows the end of a growing list until the reader moves up, and again once they are back.
 *
 * Owns the scroll position and the button that jumps to the end. Knows nothing of what is read.
 */

const NEAR_END_PX = 40;

export class Reading {
  #isFollowing = true;
  #lastTop = 0;

  /** `scroll` holds `list`; `jump` is the button that is shown while the end is out of sight. */
  constructor(scroll, list, jump) {
    this.scroll = scroll;
    this.jump = jump;
    scroll.addEventListener("scroll", () => this.#moved(), { passive: true });
    const leave = (event) => event.deltaY < 0 && scroll.scrollTop > 0 && this.follow(false);
    scroll.addEventListener("wheel", leave, { passive: true });
    jump.addEventListener("click", () => this.follow(true));
    new ResizeObserver(() => this.keepEnd()).observe(scroll);
    new ResizeObserver(() => this.keepEnd()).observe(list);
  }

  #moved() {
    const left = this.#left();
    const movedUp = this.scroll.scrollTop < this.#lastTop;
    this.#lastTop = this.scroll.scrollTop;
    if (movedUp && left > 1) this.follow(false);
    else if (left < NEAR_END_PX) this.follow(true);
    this.#showJump();
  }

  /** From now on the end stays in sight, or no longer. */
  follow(isFollowing) {
    this.#isFollowing = isFollowing;
    this.keepEnd();
  }

  /** To be called when the list has grown. */
  keepEnd() {
    if (this.#isFollowing) {
      this.scroll.scrollTop = this.scroll.scrollHeight;
      this.#lastTop = this.scroll.scrollTop;
    }
    this.#showJump();
  }

  #left() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroll;
    return scrollHeight - clientHeight - scrollTop;
  }

  #showJump() {
    this.jump.hidden = this.#isFollowing || this.#left() < NEAR_END_PX;
  }
}
