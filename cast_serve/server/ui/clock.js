// How long an answer takes, as who asked for it sees it.

import { seconds, short, whole } from "./format.js";

/** Times and tokens of one answer; times are those of performance.now(). */
export class Clock {
  tokens = undefined;
  #promptTokens = undefined;
  #sent;
  #first = null;
  #last = null;
  #firstTokens = 0;

  constructor(sent) {
    this.#sent = sent;
  }

  /** Take note of a piece of the answer; see stream.js. */
  note(piece) {
    this.#promptTokens = piece.promptTokens ?? this.#promptTokens;
    if (piece.tokens === undefined || piece.tokens === (this.tokens ?? 0)) return;
    this.tokens = piece.tokens;
    this.#last = piece.time;
    this.#first ??= piece.time;
    if (this.#first === piece.time) this.#firstTokens = piece.tokens;
  }

  /**
   * One line. The rate is that of the tokens after those that came first, which the time to the
   * first token is about; there is none where all came at once.
   */
  summary(finish) {
    const parts = [];
    if (this.#first !== null) {
      parts.push(`${whole(this.tokens)} tokens`);
      const duration = (this.#last - this.#first) / 1000;
      const later = this.tokens - this.#firstTokens;
      if (duration > 0) parts.push(`${short(later / duration)} tokens/s`);
      parts.push(`first token ${seconds((this.#first - this.#sent) / 1000)}`);
    }
    if (this.#promptTokens !== undefined) parts.push(`${whole(this.#promptTokens)} in the prompt`);
    if (finish) parts.push(finish === "length" ? "ended at max tokens" : finish);
    return parts.join(" · ");
  }
}
