/**
 * Answers under way: from the question that is sent to the last token that is kept.
 *
 * Text that arrives is added to the message at once and to the page once a frame. Owns the running answers, at most one in a
 * conversation. Knows nothing of elements beyond the message item that grows (message.js).
 */

import { statsText } from "./figures.js";
import { addMarks } from "./marks.js";

const SAVE_MS = 1_000; // how much of an answer a crash may cost
const FIGURES_MS = 250; // figures that change faster cannot be read

/** One of them, with what is known of its times and counts. */
export class Answer {
  constructor(conversation, message, { continues = false, isResumed = false } = {}) {
    this.conversation = conversation;
    this.message = message;
    this.continues = continues; // goes on with the text that the message has
    this.isResumed = isResumed; // it began before this page did
    this.before = continues ? (message.stats ?? null) : null; // figures of that
    this.sources = new Map(); // of a turn in the body: the id of the message that it was made of
    this.body = null; // what was sent
    this.cancel = () => {};
    this.isWaiting = false; // for its connection
    this.isOver = false; // its message may go on with another one
    this.sentAt = performance.now();
    this.thoughtAt = 0;
    this.firstAt = 0;
    this.lastAt = 0;
    this.savedAt = this.sentAt;
    this.shownAt = this.sentAt;
    this.usage = null; // the server's latest count
    this.timings = null; // and its times
  }

  /** Counts as the server gave them last, times as this page saw them. @returns {import("./figures-table.js").Stats} */
  stats() {
    const { usage, before } = this;
    const sum = (name, n) => n + (before?.[name] ?? 0);
    return {
      tokens: usage ? sum("tokens", usage.completion_tokens) : (before?.tokens ?? null),
      promptTokens: usage?.prompt_tokens ?? null,
      pictureTokens: usage?.prompt_tokens_details?.image_tokens ?? 0,
      cachedTokens: usage?.prompt_tokens_details?.cached_tokens ?? null,
      thoughtTokens: sum("thoughtTokens", usage?.completion_tokens_details?.reasoning_tokens ?? 0),
      guessedTokens: sum("guessedTokens", usage?.completion_tokens_details?.accepted_prediction_tokens ?? 0),
      wrongGuesses: sum("wrongGuesses", usage?.completion_tokens_details?.rejected_prediction_tokens ?? 0),
      firstMs: this.firstAt && !this.isResumed ? this.firstAt - this.sentAt : null,
      decodeMs: sum("decodeMs", this.lastAt - this.firstAt),
      timings: this.timings,
    };
  }
}

export class Answers {
  #running = new Map(); // conversation id -> Answer
  #frame = 0;

  /**
   * `chat` is what they need of the message list: fromPlugins(method, ...given), itemOf(message) that is on screen,
   * painted(), begun(answer), ended(answer, error).
   */
  constructor(server, page, chat) {
    this.server = server;
    this.page = page;
    this.chat = chat;
  }

  /** The one of this conversation, if one runs. */
  of(conversation) {
    return this.#running.get(conversation?.id) ?? null;
  }

  /** The conversation of a running answer is alive here and must not be read from storage. */
  living(id) {
    return this.#running.get(id)?.conversation ?? null;
  }

  /** Runs this one to its end. `asked` settles to the body; one that `isExact` is sent as it is. */
  async run(answer, asked, isExact) {
    this.#running.set(answer.conversation.id, answer);
    this.page.save(answer.conversation);
    try {
      this.chat.begun(answer);
      const body = await asked;
      await this.page.extended();
      if (answer.isOver) return; // it may be stopped while others are waited for
      if (!isExact) this.chat.fromPlugins("contribute", body, answer);
      answer.body = body;
    } catch (error) {
      return answer.isOver || this.#failed(answer, error); // a picture is gone, a field cannot be read
    }
    await Promise.allSettled(this.chat.fromPlugins("before", answer, answer.body));
    if (answer.isOver) return;
    this.chat.fromPlugins("sent", answer, answer.body);
    answer.message.limit = answer.body.max_tokens ?? null;
    answer.cancel = this.server.stream(answer.body, this.#listener(answer));
  }

  /** Goes on with one that was cut off by a reload, where the server still has it. */
  async resume(answer) {
    const { conversation, message } = answer;
    message.state = "streaming";
    this.#running.set(conversation.id, answer);
    this.chat.begun(answer);
    await this.page.extended();
    if (answer.isOver) return;
    answer.cancel = this.server.resume(message.stream.name, message.stream.last, this.#listener(answer));
  }

  #listener(answer) {
    const { message } = answer;
    return {
      cancel: () => this.stop(answer),
      opened: (head) => this.chat.fromPlugins("opened", answer, head),
      named: (name) => (message.stream = { name, last: 0 }),
      waiting: (isWaiting) => {
        answer.isWaiting = isWaiting;
        this.chat.itemOf(message)?.showLive(isWaiting ? "Reconnecting…" : "Generating");
      },
      chunk: (chunk, number) => {
        if (message.stream && number) message.stream.last = number; // saved with the text that it belongs to
        this.#arrived(answer, chunk);
      },
      done: (usage) => this.#done(answer, usage),
      error: (error) => this.#failed(answer, error),
    };
  }

  /** Ends it, here and on the server. What has arrived is kept. */
  stop(answer) {
    answer.isOver = true;
    answer.message.state = "stopped";
    answer.cancel();
    this.#end(answer);
  }

  // ------------------------------------------------------------------------------------------------------- what arrives

  #arrived(answer, chunk) {
    const { message } = answer;
    answer.usage = chunk.usage ?? answer.usage;
    answer.timings = chunk.timings ?? answer.timings;
    if (chunk.id) message.requestId = chunk.id;
    this.chat.fromPlugins("chunk", answer, chunk);
    const choice = chunk.choices?.[0];
    if (!choice || choice.index > 0) return;
    if (choice.finish_reason) message.finish = choice.finish_reason;
    const { content, reasoning_content: thought } = choice.delta ?? {};
    if (!content && !thought) return;
    answer.lastAt = performance.now();
    answer.firstAt ||= answer.lastAt;
    if (thought) this.#thought(answer, thought);
    if (content) {
      if (answer.thoughtAt) this.#thoughtEnded(answer);
      message.content += content;
      addMarks((message.marks ??= []), choice.draft_marks ?? []);
    }
    this.#frame ||= requestAnimationFrame(() => this.#paint());
    if (answer.lastAt - answer.savedAt > SAVE_MS) {
      answer.savedAt = answer.lastAt;
      this.page.save(answer.conversation, message);
    }
  }

  #thought(answer, text) {
    answer.thoughtAt ||= answer.sentAt;
    answer.message.reasoning = (answer.message.reasoning ?? "") + text;
  }

  #thoughtEnded(answer) {
    answer.message.thoughtMs = (answer.message.thoughtMs ?? 0) + answer.lastAt - answer.thoughtAt;
    answer.thoughtAt = 0;
  }

  /** The one writer: everything that arrived since the last frame, for all answers on screen. */
  #paint() {
    this.#frame = 0;
    for (const answer of this.#running.values()) this.#grow(answer);
    this.chat.painted();
  }

  #grow(answer) {
    const item = this.chat.itemOf(answer.message);
    if (!item) return;
    item.grow();
    if (answer.usage && !answer.isWaiting && answer.lastAt - answer.shownAt > FIGURES_MS) {
      answer.shownAt = answer.lastAt;
      item.showLive(statsText(answer.stats()));
    }
  }

  #done(answer, usage) {
    const { message } = answer;
    answer.usage = usage ?? answer.usage;
    if (answer.isOver) return message.state === "stopped" && this.#setStats(answer); // Stop was pressed; the count may be newer
    message.state = "done";
    this.#end(answer);
  }

  #failed(answer, error) {
    const { conversation, message } = answer;
    const name = pictureIn(error, answer);
    const isCut = error.code === "broken_stream" && Boolean(message.content); // it can be continued
    message.state = isCut ? "interrupted" : "failed";
    if (name) error.message = `${name}: ${error.message}`;
    message.error = isCut && answer.isResumed ? undefined : error.message;
    message.param = error.param ?? undefined;
    this.#end(answer);
    this.page.refused(error, conversation, conversation.messages.find(({ id }) => id === message.parent));
  }

  #end(answer) {
    answer.isOver = true;
    if (answer.thoughtAt) this.#thoughtEnded(answer);
    this.#running.delete(answer.conversation.id);
    delete answer.message.stream;
    this.chat.fromPlugins("ended", answer); // what they keep with it is saved with it
    this.#setStats(answer);
    this.page.changed(answer.conversation);
    this.chat.itemOf(answer.message)?.finish();
    this.chat.painted();
  }

  #setStats(answer) {
    if (answer.usage || answer.firstAt) answer.message.stats = answer.stats();
    this.page.save(answer.conversation);
    this.chat.itemOf(answer.message)?.drawUnder(Boolean(answer.message.error));
  }
}

/** The name of the picture that a refusal of this body is about, "" where it is about none. */
function pictureIn({ param }, { body, sources, conversation }) {
  const [, turn, part] = param?.match(/^messages\[(\d+)\]\.content\[(\d+)\]/) ?? [];
  const id = sources.get(body?.messages[turn]);
  return (id && conversation.messages.find((message) => message.id === id)?.pictures?.[part]?.name) ?? "";
}
